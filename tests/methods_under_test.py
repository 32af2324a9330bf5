"""The families of methods, each in several variants, on both kinds of model, in both dtypes: what the laws run on.

    @each("LoRA", "Selective")                      parametrizes over method x kind of model x dtype, "each()" over all
    @given(st.data())
    def test_...(method, kind, dtype, data):
        case = data.draw(variants(method, kind, dtype))       a variant, a model of that kind, a seed
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable

import numpy
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import minipeft
from minipeft.laws.models import moved
from tests.models_under_test import D_MODEL, PATTERNS, TIED, Case

KINDS = {"T5": ("t5 v1.0", "t5 v1.1"), "Transformer": ("post-LN", "pre-LN")}
DTYPES = ("float64", "float32")


def share(percent: int) -> settings:
    """So many percent of the examples of the profile in use, at least one."""
    return settings(max_examples=max(1, settings.default.max_examples * percent // 100))  # type: ignore[union-attr]


HALF, WHOLE = share(50), share(100)  # in each of two dtypes, or in one: at least 100 examples together


def _mask(model: Any, rng: numpy.random.Generator) -> dict[str, numpy.ndarray]:
    """A tenth of the elements of three weights of different kinds, by magnitude; of a quantized one, by its W~."""
    chosen = [name for name in model.slots if name in ("embedding.weight", "decoder.0.cross.k.weight")
              or name.endswith("0.ff_norm.weight")]
    return minipeft.top(minipeft.magnitude({name: model.slots[name].base.dense() for name in chosen}), 0.1)


def _lora(pattern: str) -> Callable:
    def make(model: Any, rng: numpy.random.Generator) -> minipeft.LoRA:
        return minipeft.LoRA(int(rng.choice([1, 2, 3, 7, D_MODEL])), float(rng.choice([1, 5, 0.75, -3])),
                             where=PATTERNS[pattern])
    return make


def _fixed(method: Any) -> Callable:
    return lambda model, rng: method


# {family of methods: {variant: (model, rng) -> method}}
VARIANTS: dict[str, dict[str, Callable]] = {
    "LoRA": {
        **{pattern: _lora(pattern) for pattern in PATTERNS},
        "orthogonal, ranks by place": _fixed(minipeft.LoRA(
            3, 5, init="orthogonal", scaling="alpha/sqrt(r)", rank_pattern={r"\.cross\.": 2, r"^decoder": 1},
            alpha_pattern={r"\.v\.": -2.5})),
        "pissa": _fixed(minipeft.LoRA(2, -3, init="pissa", where=["^embedding", r"\.(q|wo)\.weight$"])),
        "merged": _fixed(minipeft.LoRA(2, 0.75, 0.25, enable=(True, False, True)))},
    "Bottleneck": {
        "houlsby": _fixed(minipeft.Bottleneck("houlsby", size=3, activation="gelu")),
        "houlsby, cross": _fixed(minipeft.Bottleneck("houlsby", reduction=4, cross=True, scale=-1.5)),
        "pfeiffer": _fixed(minipeft.Bottleneck("pfeiffer", size=5, activation="swish")),
        "parallel": _fixed(minipeft.Bottleneck("parallel", reduction=2, stacks="decoder")),
        "parallel, norm": _fixed(minipeft.Bottleneck("parallel", size=1, input="norm")),
        "double_seq_bn, bert": _fixed(minipeft.Bottleneck("double_seq_bn", reduction=6, init="bert"))},
    "Selective": {
        "norms": _fixed(minipeft.Selective(component="norm")),
        "biases": _fixed(minipeft.Selective(type="bias")),
        "attention, last layer": _fixed(minipeft.Selective(component="attention", last=1)),
        "embedding": _fixed(minipeft.Selective(component="embedding")),
        "matrices, first layer": _fixed(minipeft.Selective(type="matrix", layers=(0,))),
        "all": _fixed(minipeft.Selective()),
        "rows": _fixed(minipeft.Selective(rows=(2, 7, 11))),
        "mask": lambda model, rng: minipeft.Selective(mask=_mask(model, rng))},
    "PromptTuning": {
        "1": _fixed(minipeft.PromptTuning(1)), "2": _fixed(minipeft.PromptTuning(2, "random")),
        "3 tokens": _fixed(minipeft.PromptTuning(3, "tokens", ((3, 4), 5))),
        "2 next to the text": _fixed(minipeft.PromptTuning(2, next_to_text=True))},
    "PrefixTuning": {
        "3": _fixed(minipeft.PrefixTuning(3)), "2 earlier": _fixed(minipeft.PrefixTuning(2, bias="earlier")),
        "2 mlp": _fixed(minipeft.PrefixTuning(2, mlp=4)),
        "1, decoder": _fixed(minipeft.PrefixTuning(1, "decoder", "earlier", std=1.0)),
        "2, slices": _fixed(minipeft.PrefixTuning(2, "decoder", "earlier", slices=2))},
    "Relatives": {     # of LoRA: other ways to change a weight, a page each
        "DoRA": lambda model, rng: minipeft.DoRA(int(rng.choice([1, 3])), float(rng.choice([5, -3])), 0.3),
        "DoRA, columns of the table": _fixed(minipeft.DoRA(2, 3, where="^embedding", norm="input", detach=False)),
        "(IA)^3": _fixed(minipeft.IA3()),
        "(IA)^3, before": _fixed(minipeft.IA3("before")),
        "LoRA, norms": _fixed(minipeft.Union(minipeft.LoRA(2, -3), minipeft.Selective(component="norm"))),
        "LoRA, a mask": lambda model, rng: minipeft.Union(minipeft.LoRA(1), minipeft.Selective(mask=_mask(model, rng))),
        "added biases": lambda model, rng: minipeft.AddedBias(**{} if "relative" in str(model.config) else
                                                              {"where": "^head"})},
    "Zoo": {
        "VeRA": _fixed(minipeft.VeRA(7, where=r"\.(q|wo)\.weight$")),               # of weights of two shapes
        "VeRA, with a table": _fixed(minipeft.VeRA(2, 0.5, ["^embedding", "v"], key=3)),
        "LoHa": _fixed(minipeft.LoHa(2, 5, PATTERNS["mixture"])),
        "LoKr": _fixed(minipeft.LoKr(1, -3, PATTERNS["mixture"])),
        "LoKr, both": _fixed(minipeft.LoKr(1, 2, decompose_both=True)),
        "LoKr, full": _fixed(minipeft.LoKr(9, 5, factor=3, full="alpha / r")),
        "HiRA": _fixed(minipeft.HiRA(2, PATTERNS["mixture"])),
        "OFT": _fixed(minipeft.OFT(4, ["^embedding", "q", "v"])),
        "QA-LoRA": _fixed(minipeft.QALoRA(2, 5, 3, where=["^embedding", "q", "o"])),    # d_in = 12, and 15 in T5
        "QA-LoRA, mean": _fixed(minipeft.QALoRA(1, -3, 4, 0.25, pooling="mean", alpha_pattern={r"\.v\.": 7})),
        "QA-LoRA, PEFT": _fixed(minipeft.QALoRA(3, 2, 2, pooling="mean * groups", scaling="alpha/sqrt(r)")),
        "OFT, shared series": _fixed(minipeft.OFT(3, share=True, cayley="neumann"))}}
METHODS = tuple(family for family, found in VARIANTS.items() if found)
ON_WEIGHTS = ("LoRA", "Selective", "Relatives", "Zoo")            # families that merge
ON_STREAMS = ("Bottleneck", "PromptTuning", "PrefixTuning")       # families that act on hidden states
FIRST = ("LoRA", "Bottleneck", "Selective", "PromptTuning")       # on all kinds of model in all dtypes
OPAQUE = ("PromptTuning", "PrefixTuning")                         # families that change outputs from the start


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of a method, a model family, a dtype, the seed of everything drawn."""

    method: str
    variant: str
    family: str
    dtype: str
    seed: int

    @property
    def _case(self) -> Case:
        return Case((self.family, "q and v"), 1, 1, self.dtype, self.seed)

    def model(self) -> Any:
        """The base, no array of it all zeros or all ones."""
        return self._case.model()

    def batch(self, rows: int = 4) -> dict[str, numpy.ndarray]:
        return self._case.batch(rows)

    @property
    def u(self) -> float:
        return self._case.u

    def rng(self, *at: int) -> numpy.random.Generator:
        return numpy.random.default_rng([self.seed, *at])

    def make(self, model: Any) -> Any:
        """The method."""
        return VARIANTS[self.method][self.variant](model, self.rng(7))

    def attach(self, model: Any, name: str = "a", at: int = 2, variant: tuple[str, str] | None = None) -> Any:
        """This method, or `variant` (of any method), as it might be after training. `at` tells several apart."""
        other = self if variant is None else dataclasses.replace(self, method=variant[0], variant=variant[1])
        return moved(minipeft.attach(model, other.make(model), self.rng(at), name), self.rng(at, 1))

    @property
    def is_weight(self) -> bool:
        """Whether it acts on weights, and can be merged."""
        return self.method in ON_WEIGHTS


def fits(method: str, variant: str, family: str) -> bool:
    """T5 has no biases, and a tied head is the table."""
    return not (variant == "biases" and family.startswith("t5") or variant == "head" and family in TIED)


def variants(method: str, kind: str, dtype: str) -> st.SearchStrategy[Variant]:
    """All variants of the method on the models of that kind, that fit."""
    places = [(variant, family) for family in KINDS[kind] for variant in VARIANTS[method]
              if fits(method, variant, family)]
    return st.builds(lambda place, seed: Variant(method, *place, dtype, seed), st.sampled_from(places),
                     st.integers(0, 999))


def each(*methods: str, dtypes: tuple[str, ...] = DTYPES) -> Any:
    """Parametrize a law over families (all by default), kinds of model and dtypes. Families beyond the FIRST take half
    of the grid: T5 in float64, the Transformer in float32."""
    return pytest.mark.parametrize("method, kind, dtype", [
        pytest.param(method, kind, dtype, id=f"{method}-{kind}-{dtype}")
        for method in methods or METHODS if method in METHODS for kind in KINDS for dtype in dtypes
        if method in FIRST or (kind == "T5") == (dtype == "float64")])
