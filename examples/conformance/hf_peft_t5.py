"""Hugging Face PEFT on encoder-decoders: LoRA on the shared table of a tiny T5, prompt tuning with SEQ_2_SEQ_LM.

`soft_prompt` is PEFT's own PeftModelForSeq2SeqLM around `TinyEncoder`, which computes the kit's one attention layer and
no decoder: what PEFT hands to the encoder is what is seen. Nothing is declared and nothing cast: as by default.

    pip install peft==0.21.2 transformers==4.57.6 torch
    python -m minipeft.conformance --impl examples.conformance.hf_peft_t5
"""
import importlib

import torch
from transformers import T5Config, T5ForConditionalGeneration

hf_peft = importlib.import_module(__name__.replace("hf_peft_t5", "hf_peft"))
hf_peft_prompt = importlib.import_module(__name__.replace("hf_peft_t5", "hf_peft_prompt"))

capabilities = {**hf_peft.capabilities, "name": "huggingface/peft on an encoder-decoder",
                "dtypes": ["float64", "float32", "bfloat16"]}


class SharedTable(hf_peft.Handle):
    """LoRA on T5's `shared`, which the encoder, the decoder and the head use."""

    target = "shared"

    def __init__(self, E, A, B, alpha, dtype):
        self.E = E
        super().__init__(None, A, B, alpha, dtype, 0.0, False)

    def base(self):
        V, d = self.E.shape
        model = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=d, d_kv=1, d_ff=1, num_layers=1, num_heads=1))
        model.shared.weight.data = torch.tensor(self.E)
        model.tie_weights()
        return model.to(getattr(torch, self.dtype))

    @property
    def t5(self):
        return self.model.base_model.model

    @property
    def layer(self):
        return self.t5.shared

    def forward(self, ids):
        return hf_peft.array(self.t5.encoder.embed_tokens(torch.tensor(ids)))

    def forward_decoder(self, ids):
        return hf_peft.array(self.t5.decoder.embed_tokens(torch.tensor(ids)))

    def head(self, h):
        return hf_peft.array(self.t5.lm_head(self.given(h)))

    def vjp(self, ids, g):
        self.model.zero_grad()
        y = self.t5.encoder.embed_tokens(torch.tensor(ids))
        if y.requires_grad:
            y.backward(self.given(g))
        found = {hf_peft.short(name, "E"): p.grad for name, p in self.model.named_parameters()}
        return {name: None if p is None else hf_peft.array(p) for name, p in found.items()}


def lora_embedding(E, A, B, alpha, dtype):
    return SharedTable(E, A, B, alpha, dtype)


class EncoderPrompt(hf_peft_prompt.Prompt):
    """PromptTuningConfig's defaults for an encoder-decoder."""

    task, cast = "SEQ_2_SEQ_LM", False

    def disabled(self, ids, mask):
        """As generate() runs it."""
        with self.model.disable_adapter():
            y = self.model.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        return hf_peft.array(y[:, y.shape[1] - ids.shape[1]:])


def soft_prompt(P, base, dtype):
    return EncoderPrompt(P, base, dtype)
