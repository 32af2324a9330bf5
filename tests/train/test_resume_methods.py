"""Runs of every family of methods can be stopped and resumed to the same bits; one of another mask is refused."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy
import pytest

import minipeft
from minipeft.train import checkpoint as checkpoints
from tests.train import tiny

METHODS: dict[str, Callable[[Any], Any]] = {
    "bottleneck": lambda model: minipeft.Bottleneck(size=3),
    "bitfit": lambda model: minipeft.Selective(type="bias"),
    "mask": lambda model: minipeft.Selective(mask=minipeft.top(minipeft.magnitude(model.base_parameters), 0.05)),
    "prompt": lambda model: minipeft.PromptTuning(3),
    "prefix": lambda model: minipeft.PrefixTuning(2, mlp=3)}


def run(folder: Path, method: Callable, steps: int, seed: int = 0) -> dict[str, Any]:
    """The bits of parameters and moments after `steps`, going on from a checkpoint that is there."""
    model, optimizer = tiny.model(), minipeft.AdamW(1e-2)
    attachment = minipeft.attach(model, method(model), numpy.random.default_rng(seed))
    minipeft.fit(model, attachment.parameters, tiny.batches(), steps=steps, optimizer=optimizer, accumulate=2,
                 checkpoint=folder / "run.safetensors", checkpoint_every=1, progress=False)
    return tiny.bits(attachment.parameters, optimizer)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(name, at, tmp_path, monkeypatch):
    """Stopped when its checkpoint is about to be written for the at-th time: in the middle of a step, or after one."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole, written, write = run(tmp_path / "whole", METHODS[name], 4), [], checkpoints.write

    def stop(*arguments: Any) -> None:
        written.append(None)
        if len(written) == at:
            raise Stopped
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", stop)
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", METHODS[name], 4)
    assert run(tmp_path / "stopped", METHODS[name], 4) == whole


def test_a_checkpoint_of_a_run_with_another_mask_of_the_same_size_is_refused(tmp_path):
    """The indices are no parameters, and still decide what the parameters mean."""
    def masked(first: int) -> Callable[[Any], Any]:
        return lambda model: minipeft.Selective(mask={"embedding.weight": numpy.arange(first, first + 5)})

    run(tmp_path, masked(0), 1)
    with pytest.raises(ValueError, match="belongs to another run: frozen weights"):
        run(tmp_path, masked(1), 2)
    run(tmp_path, masked(0), 2)
