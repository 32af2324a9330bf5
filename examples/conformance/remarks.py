"""What a person has to say of each plug-in: what it is, and of each failure whether it is a defect or a convention.

Defect: what the library does contradicts what it says itself, or spoils what a user gave it. Convention: it does
something else than the paper, on purpose. Limitation: it keeps fewer digits than one would expect, or does less.
Strictness: it accepts what the kit wants to be refused, and no number is wrong.
"""
from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Remark:
    """Of failures in `method` whose property matches `ids` (a regular expression), in these dtypes, or in all."""

    method: str
    ids: str
    kind: str
    title: str
    text: str
    dtypes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plugin:
    """imports: modules without which it is skipped. packages: distributions whose versions the page gives. cases: drawn
    per method, dtype and kind, fewer where a layer takes long to build."""

    title: str
    about: str
    install: str
    imports: tuple[str, ...]
    packages: tuple[str, ...]
    methods: tuple[str, ...]
    remarks: tuple[Remark, ...] = ()
    cases: int = 25


HALF = ("bfloat16", "float16")


MERGED_TWICE = Remark(
    "lora_linear", "L13m", "defect", "a layer that was saved while merged is merged twice after loading",
    "Whether the weight is merged is an attribute of the module and not in its `state_dict`. What is saved in "
    "evaluation holds the merged weight; loaded into a fresh layer, `eval()` adds the update once more. To save in "
    "training mode, or what `lora_state_dict` gives and no more, avoids it.")
DRIFT = Remark(
    "lora_linear", "L5c", "defect", "merging and unmerging drifts",
    "`merge()` adds the float32 update to the half-precision weight; `unmerge()` subtracts the update after rounding "
    "it to half precision. Each cycle moves the weight, always the same way: 100 cycles move it beyond what one can. "
    "In float32 and float64, with adapters in the dtype of the base, and on an embedding both use the same update, and "
    "nothing grows.", HALF)
SAFE_MERGE = Remark(
    "lora_linear", "L14", "defect", "safe_merge=True gives another weight than safe_merge=False",
    "Documented is the same merge in a copy, with a check for NaN. It rounds the update to half precision before it "
    "is added, where the other adds it in float32. Both weights are within the bound; but copies of a model that were "
    "merged in different ways differ.", HALF)
NO_OP = Remark(
    "lora_embedding",
    "V (y|y_merged|logits|logits_merged|dA|dB)|L1|L2|L2r|L2a|L2s|L2f|L3m|L7s|L7v|L11e|L13|L13r|L15|T1|T4", "defect",
    "LoRA on the shared table of T5 has no effect until it is merged",
    "PEFT replaces the module `shared`. The encoder and the decoder keep the old one, the head the old weight: the "
    "forward is the base's, the factors have no gradient; and merging, which changes the weight itself, changes the "
    "model. Expected: that it acts at all uses of the table, or refuses.")
NO_OP_TOO = Remark(
    "lora_embedding", "X1", "strictness", "alpha may be infinite or NaN",
    "Any alpha is taken. Elsewhere the outputs are NaN then; here, where the adapter has no effect, nothing shows it.")
DEAD_ROWS = Remark(
    "soft_prompt", "P3d", "defect", "half of the rows of the prompt never get a gradient",
    "For SEQ_2_SEQ_LM the parameter has 2 p rows, of which the first p are put in front of the encoder's input and the "
    "others are used nowhere. They are counted as trainable. `num_transformer_submodules=1` avoids it.")
STILL_ON = Remark(
    "soft_prompt", "P2d", "defect", "with disable_adapter(), generate() puts the prompt in front all the same",
    "Looked at through `generate()`, as an encoder-decoder is evaluated; `forward()` is right.")
LEFT_PADDING = Remark(
    "soft_prompt", "V (y|dP)|P0|P0e|P1|P3|P3o|P5", "convention", "the prompt stands left of the padding",
    "Of a row that is padded on the left, PEFT puts the prompt before the padding. Where positions matter, the "
    "distance from prompt to text then depends on the padding, and so do outputs. The kit has a name for it, "
    "left_padding = outside the padding; hf_peft_prompt.py declares it, and these properties hold there. Here it is "
    "not declared, so that it is seen.")
PROMPT_FLOAT32 = Remark(
    "soft_prompt", ".*", "limitation", "the prompt is float32 in a float64 model",
    "PEFT makes and loads the prompt in float32 whatever the dtype of the model. Casting the model after the method "
    "was added gives float64; for a prompt that was loaded, half of the digits are gone by then.", ("float64",))
WIDTH = Remark(
    "soft_prompt", "P6x", "strictness", "a prompt of another width is loaded",
    "`from_pretrained` takes the width from the file and does not look at the model; the first forward raises.")

PEFT = "peft==0.21.2 transformers==4.57.6 torch==2.13.0"
PEFT_PACKAGES = ("peft", "transformers", "torch")

PLUGINS: dict[str, Plugin] = {
    "plain_torch": Plugin(
        "A LoRA layer in plain PyTorch", "Twenty-five lines written from the paper: the model for a plug-in of one's "
        "own.", "torch==2.13.0", ("torch",), ("torch",), ("lora_linear",)),
    "hf_peft": Plugin(
        "Hugging Face PEFT, adapters in the dtype of the base", "`get_peft_model(..., autocast_adapter_dtype=False)` "
        "on a model of one `nn.Linear` or `nn.Embedding`; saved and loaded by `save_pretrained` and `from_pretrained`.",
        PEFT, ("peft", "torch"), PEFT_PACKAGES, ("lora_linear", "lora_embedding")),
    "hf_peft_default": Plugin(
        "Hugging Face PEFT, as it is by default", "The same as hf_peft.py with `autocast_adapter_dtype` left at True: "
        "on a base in half precision the adapters are float32.",
        PEFT, ("peft", "torch"), PEFT_PACKAGES, ("lora_linear", "lora_embedding"),
        (DRIFT, SAFE_MERGE)),
    "hf_peft_prompt": Plugin(
        "Hugging Face PEFT, prompt tuning of an encoder", "`PeftModelForFeatureExtraction` around one attention layer, "
        "the kit's. It is declared that the prompt stands left of the padding. The prompt, which PEFT makes in "
        "float32, is cast with the model.",
        PEFT, ("peft", "torch", "transformers"), PEFT_PACKAGES, ("soft_prompt",),
        (WIDTH, dataclasses.replace(PROMPT_FLOAT32, ids="P6|P6l",
                                    title="a loaded prompt is float32 in a float64 model")), 15),
    "hf_peft_t5": Plugin(
        "Hugging Face PEFT, on an encoder-decoder", "LoRA on `shared`, the table that a tiny T5 uses three times; and "
        "`PeftModelForSeq2SeqLM` with the defaults of `PromptTuningConfig` around one attention layer, the kit's, in "
        "the place of the encoder. Nothing is declared, and nothing cast.",
        PEFT, ("peft", "torch", "transformers"), PEFT_PACKAGES, ("lora_embedding", "soft_prompt"),
        (NO_OP, NO_OP_TOO, DEAD_ROWS, STILL_ON, WIDTH, LEFT_PADDING, PROMPT_FLOAT32), 10),
    "loralib_plugin": Plugin(
        "loralib", "`loralib.Linear` and `loralib.Embedding`, which merge in `eval()` and unmerge in `train()`. So "
        "unmerged and without dropout at once they exist in this plug-in alone, which puts the dropout into `eval()` "
        "by itself. A file is the `state_dict` of the module, with r and alpha beside it.",
        "loralib==0.1.2 torch==2.13.0", ("loralib", "torch"), ("loralib", "torch"), ("lora_linear", "lora_embedding"),
        (MERGED_TWICE,)),
    "adapterhub": Plugin(
        "AdapterHub adapters", "The bottleneck layer that `adapters` puts into a feed-forward layer of T5's encoder, "
        "called with the stream and the sublayer's output.",
        "adapters==1.3.0 torch==2.13.0", ("adapters", "torch"), ("adapters", "transformers", "torch"),
        ("bottleneck_adapter",),
        (Remark("bottleneck_adapter", "X1", "strictness", "a sublayer's output of width 1 is broadcast",
                "The layer adds whatever torch can add; in a model the widths cannot differ."),
         Remark("bottleneck_adapter", "A13", "limitation", "a loaded adapter is float32 in a float64 model",
                "`load_adapter` makes the modules in torch's default dtype and copies the file into them: half of the "
                "digits are gone before the model can be cast.", ("float64",))), 15),
    "keras_lora": Plugin(
        "Keras, Dense.enable_lora", "On the torch backend. Keras has no merge(); saving a layer merges, and that is "
        "what is called merging here.",
        "keras==3.15.1 torch==2.13.0", ("keras", "torch"), ("keras", "torch"), ("lora_linear",),
        (Remark("lora_linear", "X1", "strictness", "alpha may be infinite, NaN or missing",
                "None is documented to be alpha = r. Infinite and NaN are taken, and the outputs are too."),
         Remark("lora_linear", ".*", "defect", "a float64 layer has float32's digits",
                "Two causes. On the torch backend `keras.ops.matmul` of two float64 tensors computes in float32, so a "
                "plain Dense has only these digits as well (keras-team/keras #23704); on the JAX backend it has all. "
                "And `lora_kernel_a` and `lora_kernel_b` are float32 whatever the dtype of the layer, as a comment in "
                "Keras says against underflow and overflow: that is meant for half precision, and narrows float64.",
                ("float64",))), 15),
    "flax_lora": Plugin(
        "Flax, nnx.LoRA", "`nnx.LoRA` around `nnx.Linear`. Flax has no alpha: the plug-in folds alpha / r into B, so "
        "that factor is the plug-in's, and Flax is held for the rest.",
        "flax==0.12.8 jax==0.10.2", ("flax", "jax"), ("flax", "jax"), ("lora_linear",), (), 6),
    "mlx_lora": Plugin(
        "MLX, the LoRALinear of mlx_lm", "Its `scale` is a factor and not an alpha: declared, scaling = alpha. "
        "`fuse()` is its merge.",
        '"mlx[cpu]==0.32.4" mlx-lm==0.32.2', ("mlx", "mlx_lm"), ("mlx-lm", "mlx"), ("lora_linear",),
        (Remark("lora_linear", "X1", "strictness", "the scale may be infinite or NaN, the rank 0",
                "The outputs are NaN or infinite then; with r = 0 the layer is its base."),), 15),
}
