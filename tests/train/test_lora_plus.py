"""LoRA+: an optimizer with another learning rate for some of the parameters."""
from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.nn.weight import Parameter
from tests.train import tiny

LR, RATIO = 3e-3, 7.3  # no power of two, so that another order of the products would show
OF_B = {r"\.B$": RATIO}
NAMES = ("q@lora.A", "q@lora.B", "v@lora.A", "v@lora.B")


def parameters(dtype: str = "float64") -> dict[str, Parameter]:
    rng = numpy.random.default_rng(0)
    return {name: Parameter(rng.standard_normal((3, 4)).astype(dtype)) for name in NAMES}


def stepped(params: dict[str, Parameter], *optimizers: tuple[minipeft.AdamW, str], lr: float | None = None,
            seed: int = 1) -> dict[str, Any]:
    """The bits of params and moments after three steps, each optimizer stepping the names that end so."""
    rng = numpy.random.default_rng(seed)
    for _ in range(3):
        grads = {name: rng.standard_normal(p.shape).astype(p.dtype) for name, p in params.items()}
        for optimizer, end in optimizers:
            own = [name for name in params if name.endswith(end)]
            optimizer.step({n: params[n] for n in own}, {n: grads[n] for n in own}, lr, scale=0.9)
    return {name: p.data.tobytes() for name, p in params.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_step_with_two_rates_is_that_of_two_optimizers_with_two_rates_bit_for_bit(dtype: str) -> None:
    """Weight decay included: it is multiplied by the rate of its parameter."""
    options: dict[str, Any] = dict(weight_decay=0.1)
    slow, fast = minipeft.AdamW(LR, **options), minipeft.AdamW(LR * RATIO, **options)
    two = stepped(parameters(dtype), (slow, "A"), (fast, "B"))
    assert stepped(parameters(dtype), (minipeft.AdamW(LR, lr_ratio=OF_B, **options), "")) == two
    assert two != stepped(parameters(dtype), (minipeft.AdamW(LR, **options), ""))


def test_a_rate_that_is_given_to_a_step_is_multiplied_by_the_ratio_too() -> None:
    one = stepped(parameters(), (minipeft.AdamW(1.0, lr_ratio=OF_B), ""), lr=LR)
    assert one == stepped(parameters(), (minipeft.AdamW(LR, lr_ratio=OF_B), ""))


def test_the_first_pattern_that_selects_a_name_counts_and_patterns_are_those_of_where() -> None:
    found = minipeft.AdamW(lr_ratio={r"v@lora\.B": 2, ("B",): 3, (lambda name: name.startswith("v")): 5}).ratios(NAMES)
    assert found == {"q@lora.A": 1, "q@lora.B": 3, "v@lora.A": 5, "v@lora.B": 2}


def test_a_ratio_of_0_holds_parameters_where_they_are() -> None:
    params, before = parameters(), parameters()
    stepped(params, (minipeft.AdamW(LR, lr_ratio={r"\.B$": 0}), ""))
    assert [numpy.array_equal(params[n].data, before[n].data) for n in NAMES] == [False, True, False, True]


@pytest.mark.parametrize("ratio", [-1, numpy.nan, numpy.inf, True, "16", None])
def test_a_ratio_that_is_no_finite_number_of_at_least_0_is_refused(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"AdamW: lr_ratio\['B'\] is .*; expected a finite number >= 0"):
        minipeft.AdamW(lr_ratio={"B": ratio})


@pytest.mark.parametrize("given", [16, [("B", 16)], "B", {"B"}])
def test_an_lr_ratio_that_is_no_mapping_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="AdamW: lr_ratio is .*; expected {pattern: ratio}, such as"):
        minipeft.AdamW(lr_ratio=given)


def test_a_pattern_that_matches_no_stepped_parameter_is_refused_before_anything_changes() -> None:
    params, optimizer = parameters(), minipeft.AdamW(LR, lr_ratio={r"\.B$": 2, "lora_B": 16})
    before = tiny.bits(params, optimizer)
    with pytest.raises(ValueError, match="where='lora_B' matches none of the 4 parameter names"):
        stepped(params, (optimizer, ""))
    assert tiny.bits(params, optimizer) == before and optimizer.made == 0
    model = tiny.model()
    lora = minipeft.attach(model, minipeft.LoRA(2), numpy.random.default_rng(0))
    with pytest.raises(ValueError, match="where='lora_B' matches none of the"):
        minipeft.fit(model, lora, tiny.batches(), steps=1, optimizer=optimizer, progress=False)


def test_a_rate_that_is_not_finite_is_refused_before_anything_changes() -> None:
    params, optimizer = parameters(), minipeft.AdamW(1e200, lr_ratio={r"v@lora\.B$": 1e200})
    before = tiny.bits(params, optimizer)
    with pytest.raises(ValueError, match="lr times the ratio of v@lora.B is inf; expected a finite number >= 0"):
        stepped(params, (optimizer, ""))
    assert tiny.bits(params, optimizer) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_steps_with_the_same_ratios(copied: Any) -> None:
    params, twins, optimizer = parameters(), parameters(), minipeft.AdamW(LR, lr_ratio=OF_B)
    stepped(params, (optimizer, ""))
    stepped(twins, (twin := copied(optimizer), ""))
    assert twin.lr_ratio == ((r"\.B$", RATIO),)
    fresh = minipeft.AdamW(LR, lr_ratio=OF_B)
    assert stepped(twins, (twin, ""), seed=2) != stepped(parameters(), (fresh, ""), seed=2)
    assert twin.steps == dict.fromkeys(NAMES, 9)


def test_the_description_has_the_ratios_only_where_there_are_any() -> None:
    assert "lr_ratio" not in minipeft.AdamW().describe()
    assert minipeft.AdamW(lr_ratio={"A": 1, "B": 16, "C": 16}).describe()["lr_ratio"] == [1.0, 16.0]


# ---- runs


def run(folder: Path, steps: int, lr_ratio: Any, init: str = "gaussian") -> dict[str, Any]:
    model, optimizer = tiny.model(), minipeft.AdamW(1e-2, lr_ratio=lr_ratio)
    lora = minipeft.attach(model, minipeft.LoRA(2, rank_pattern={r"\.v\.": 1}, init=init), numpy.random.default_rng(0))
    minipeft.fit(model, lora, tiny.batches(), steps=steps, optimizer=optimizer, schedule=minipeft.linear_decay(6),
                 checkpoint=folder / "run.safetensors", progress=False)
    return tiny.bits(lora.parameters, optimizer)


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_a_run_with_a_schedule_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path: Path, init: str) -> None:
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", 6, OF_B, init)
    run(tmp_path, 3, OF_B, init)
    assert run(tmp_path, 6, OF_B, init) == whole
    (tmp_path / "plain").mkdir()
    assert run(tmp_path / "plain", 6, None, init)["params"] != whole["params"]


@pytest.mark.parametrize("other, match", [(None, "lr ratio"), ({r"\.B$": 8}, "lr ratio"),
                                          ({r"\.v\..*\.B$": RATIO}, "lr ratio"), ({r"\.A$": RATIO}, "lr ratio")])
def test_a_checkpoint_of_other_ratios_is_refused(tmp_path: Path, other: Any, match: str) -> None:
    run(tmp_path, 2, OF_B)
    with pytest.raises(ValueError, match=f"belongs to another run: params / .*{match}"):
        run(tmp_path, 4, other)


def test_the_same_ratios_in_other_words_are_the_same_run(tmp_path: Path) -> None:
    run(tmp_path, 2, OF_B)
    run(tmp_path, 4, {r"\.q\..*\.B$": RATIO, lambda name: name.endswith(".B"): RATIO})
