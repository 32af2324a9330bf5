"""Training steps of LoRA on a linear layer: the parts of the method, put together."""
from __future__ import annotations

from typing import Any, Callable

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Make, Method
from minipeft.conformance.methods.lora_training import mutants_of_state, mutants_of_steps  # noqa: F401  (they plant)
from minipeft.conformance.methods.lora_training.batches import settings, steps_of
from minipeft.conformance.methods.lora_training.cases import draw, refusals, vectors
from minipeft.conformance.methods.lora_training.equations import CLIPS, WARMUPS, exact_values, values
from minipeft.conformance.methods.lora_training.lattice import stays_exact
from minipeft.conformance.methods.lora_training.laws import LAWS, number, step, weights
from minipeft.conformance.methods.lora_training.laws_of_adamw import LAWS as LAWS_OF_ADAMW
from minipeft.conformance.methods.lora_training.laws_of_moves import LAWS as LAWS_OF_MOVES
from minipeft.conformance.methods.lora_training.mutants import PLANTED
from minipeft.conformance.methods.lora_training.notes import NOTES
from minipeft.conformance.methods.lora_training.plain import LoraTraining
from minipeft.conformance.numbers import float_of


def arguments(case: Case) -> tuple:
    """The factory's positional arguments (W, b, A, B, alpha, dtype), and its keyword optimizer."""
    arrays = (case[name] for name in ("W", "b", "A", "B"))
    return (*arrays, float_of(case.params["alpha"]), case.dtype), {"optimizer": settings(case)}


def _after_steps(look: Callable[[Any, Any], Any]) -> Callable[[Make, Case], Any]:
    """A function that makes all steps and stacks look(handle, loss) of each."""
    def of(make: Make, case: Case) -> Any:
        run = make(case)
        return numpy.stack([look(run, step(run, micro_batches)) for micro_batches in steps_of(case)])
    return of


OUTPUTS = {
    "losses": (("step",), _after_steps(lambda run, loss: loss)),
    "A": (("step", "weights"), lambda make, c: _after_steps(lambda run, loss: weights(run, c)["A"])(make, c)),
    "B": (("step", "weights"), lambda make, c: _after_steps(lambda run, loss: weights(run, c)["B"])(make, c)),
    "lr": (("step", "lr"), _after_steps(lambda run, loss: number("lora_training.lr", run.lr())))}


METHOD = Method(
    name="lora_training", title="Training steps of LoRA",
    equation=("L = sum w 1/2 |y - t|^2 / sum w over all tokens of a step; y = x W^T + b + s (x A^T) B^T, s = alpha/r",
              "g = (dA, dB) min(1, clip / |(dA, dB)|); lr' = lr factor(t), t = 1, 2, ...; W and b are frozen",
              "m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p = p - lr' decay p - lr' u, with "
              "u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) for AdamW, u = g for SGD",
              "linear: factor(t) = min(1, t/warmup) min(1, (steps - t + 1) / (steps - warmup)); cosine, constant"),
    source={"paper": "Hu et al., 2021, arXiv:2106.09685; Kingma & Ba, 2015, arXiv:1412.6980; Loshchilov & Hutter, "
            "2019, arXiv:1711.05101", "where": "LoRA's eq. (3); AdamW's Algorithm 2, decay times learning rate"},
    conventions={"schedule": WARMUPS, "clip": CLIPS},
    axes={"W": ("out", "in"), "b": ("out",), "A": ("r", "in"), "B": ("out", "r"), "x": ("N", "in"), "t": ("N", "out"),
          "w": ("N",), "step": ("N",), "micro": ("N",)},
    sizes={"N": (3, 6), "in": (1, 6), "out": (1, 5), "r": (1, 3)},
    draw=draw, arguments=arguments, reference=values, exact=exact_values, outputs=OUTPUTS,
    properties=(*LAWS.all, *LAWS_OF_MOVES.all, *LAWS_OF_ADAMW.all), plain=LoraTraining, mutants=tuple(PLANTED.all),
    refusals=refusals, vectors=vectors, notes=NOTES, absent=("W", "b"), exact_when=stays_exact)
