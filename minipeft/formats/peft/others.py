"""The methods of PEFT that minipeft does not have, whose files are refused by name: {peft_type: what it is}."""
from __future__ import annotations

from minipeft.checks import shown

OTHERS = {
    "ADALORA": "LoRA in the form of an SVD, whose ranks are pruned in training",
    "ADAMSS": "clusters of singular directions, some of which are trained",
    "ADAPTION_PROMPT": "LLaMA-Adapter: gated prompts in the upper layers of a decoder",
    "BEFT": "trained biases of the value projections",
    "BOFT": "products of sparse rotations, in the pattern of a butterfly",
    "BONE": "MiSS under its old name",
    "C3A": "updates that are circular convolutions",
    "CARTRIDGE": "a trained cache of keys and values",
    "CPT": "prompts of context and labels, trained within bounds",
    "DEFT": "a weight that loses a trained subspace and gets another in its place",
    "DELORA": "LoRA with a direction and a strength that are trained apart",
    "FOURIERFT": "updates given by a few of their Fourier coefficients",
    "FROD": "updates in a basis that all layers share, with sparse coefficients",
    "GLORA": "scales and shifts of weights, biases and hidden states together",
    "GRALORA": "LoRA in blocks of each weight",
    "HRA": "chains of Householder reflections",
    "LILY": "LoRA whose factors are shared and mixed across layers",
    "MISS": "a small matrix that is repeated along the inputs",
    "MULTITASK_PROMPT_TUNING": "a prompt times a low-rank matrix of each task",
    "OSF": "full weights that are trained outside of their main singular directions",
    "PEANUT": "updates that a small network computes from the weight",
    "POLY": "mixtures of LoRAs, chosen by the task",
    "PSOFT": "rotations within the main singular directions",
    "PVERA": "VeRA with random variation around its vectors",
    "RANDLORA": "sums of random products, scaled by trained vectors",
    "ROAD": "rotations of pairs of hidden features",
    "SHADOW": "a small network that runs beside the model",
    "SUPERTUNING": "the elements of smallest or largest magnitude, with or without a LoRA",
    "TINYLORA": "a tiny vector between fixed random and singular directions",
    "UNILORA": "all factors of a LoRA as one projection of one vector",
    "VBLORA": "factors put together from a bank of shared vectors",
    "WAVEFT": "updates given by a few of their wavelet coefficients",
    "XLORA": "LoRAs that a trained gate mixes for each token",
}


def refused(kind: object, known: list[str]) -> str:
    """The error for the peft_type `kind`, which is not among the `known` ones."""
    if isinstance(kind, str) and kind in OTHERS:
        return f"{kind} is a method of PEFT that minipeft does not have ({OTHERS[kind]}); it has {', '.join(known)}"
    return f"peft_type is {shown(kind)}, which is unknown; expected one of {', '.join(known)}"
