"""Hugging Face PEFT: prompt tuning of an encoder. The prompt stands left of the whole row, padding included: declared.

PEFT's own PeftModelForFeatureExtraction prepends to `TinyEncoder`, a model of transformers that computes the kit's one
attention layer. PEFT makes the prompt in float32; it is cast with the model here, which its users have to do too.

    pip install peft==0.21.2 transformers==4.57.6 torch
    python -m minipeft.conformance --impl examples.conformance.hf_peft_prompt
"""
import tempfile
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel, logging

logging.set_verbosity_error()  # that TinyEncoder has a generate() of its own

capabilities = dict(name="huggingface/peft, prompt tuning", version=version("peft"),
                    dtypes=["float64", "float32", "bfloat16"],
                    conventions={"soft_prompt": {"left_padding": "outside the padding"}})


class TinyEncoder(PreTrainedModel):
    """One attention layer: softmax(x q^T (x k^T)^T / sqrt(d) + bias) x v^T o^T. It keeps what it was given."""

    config_class = PretrainedConfig

    def __init__(self, base):
        super().__init__(PretrainedConfig(vocab_size=base["E"].shape[0], hidden_size=base["E"].shape[1],
                                          num_hidden_layers=1, num_attention_heads=1))
        self.embeddings = torch.nn.ModuleDict({"word_embeddings": table(base["E"])})
        self.weights = torch.nn.ParameterDict({name: torch.tensor(base[name]) for name in "qkvo"})
        self.position = table(base["position"]) if "position" in base else None
        self.relative = table(base["relative"][:, None]) if "relative" in base else None

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, **_):
        x = self.embeddings["word_embeddings"](input_ids) if inputs_embeds is None else inputs_embeds
        at, w = torch.arange(x.shape[1]), self.weights
        self.given = x, attention_mask != 0, at.expand(len(x), -1)
        if self.position is not None:
            x = x + self.position(at)
        scores = (x @ w["q"].T) @ (x @ w["k"].T).transpose(1, 2) * x.shape[-1] ** -0.5
        if self.relative is not None:
            far = self.relative.num_embeddings // 2
            scores = scores + self.relative((at[None] - at[:, None]).clamp(-far, far) + far)[..., 0]
        seen = (attention_mask != 0)[:, None, :]
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ (x @ w["v"].T) @ w["o"].T

    def generate(self, **inputs):
        """What an encoder-decoder begins with: its encoder."""
        return self(**inputs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return kwargs

    _prepare_encoder_decoder_kwargs_for_generation = None


class Prompt:
    task, cast = "FEATURE_EXTRACTION", True

    def __init__(self, P, base, dtype):
        self.build, self.dtype, self.p = lambda: TinyEncoder(base).to(getattr(torch, dtype)), dtype, len(P)
        config = peft.PromptTuningConfig(task_type=self.task, num_virtual_tokens=self.p)
        self.take(peft.get_peft_model(self.build(), config))
        state = peft.get_peft_model_state_dict(self.model)["prompt_embeddings"].double()
        state = torch.cat([torch.tensor(P), state[self.p:]])  # SEQ_2_SEQ_LM has 2 p rows
        peft.set_peft_model_state_dict(self.model, {"prompt_embeddings": state})

    def take(self, model):
        self.model = (model.to(getattr(torch, self.dtype)) if self.cast else model).eval()

    def run(self, ids, mask):
        y = self.model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        return y[:, y.shape[1] - ids.shape[1]:]

    def forward(self, ids, mask):
        return array(self.run(ids, mask))

    def base_forward(self, ids, mask):
        return array(self.build()(torch.tensor(ids), attention_mask=torch.tensor(mask)))

    def disabled(self, ids, mask):
        with self.model.disable_adapter():
            return self.forward(ids, mask)

    def embed(self, ids, mask):
        self.run(ids, mask)
        x, seen, positions = self.model.get_base_model().given
        return array(x), seen.numpy(), positions.numpy()

    def vjp(self, ids, mask, g):
        self.model.zero_grad()
        y = self.run(ids, mask)
        if y.requires_grad:
            y.backward(torch.tensor(g).to(y.dtype))
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        return {short(name): None if p is None else array(p) for name, p in grads.items()}

    def trainable(self):
        return {short(name) for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.keys = set(load_file(Path(folder) / "adapter_model.safetensors"))
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def load(self, files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self.take(peft.PeftModel.from_pretrained(self.build(), folder))

    def state_keys(self):
        self.save()
        return self.keys


def soft_prompt(P, base, dtype):
    return Prompt(P, base, dtype)


def table(rows):
    return torch.nn.Embedding(*rows.shape, _weight=torch.tensor(rows))


def short(name):
    """PEFT's name of a parameter as the kit calls it."""
    if "prompt_encoder" in name:
        return "P"
    return "E" if "word_embeddings" in name else name.removesuffix(".weight").rpartition(".")[2]


def array(t):
    return t.detach().double().numpy()
