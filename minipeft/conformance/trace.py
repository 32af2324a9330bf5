"""One run of a whole model, tensor by tensor: the reference for a port to another framework.

    trace(model, batch, "ref.safetensors")                     float64: every activation and gradient, by name
    python -m minipeft.conformance compare mine.safetensors ref.safetensors

The file holds, for a loss L = model.loss(**batch):

    X            the output of the part of the model called X; the entries of the batch, under their keys
    grad/X       dL/dX, for every activation and every parameter X that leads to the loss
    noise/X      the change of X per unit roundoff, one number for each row (the shape of X without its last axis)
    noise.float16/X, noise.bfloat16/X    the same at the unit roundoff of half precision

Names are dotted paths: X is the output that a forward hook on the module of that path sees. `i` is a layer, S a stack:

    name                                of the T5, the Transformer          in PyTorch, say
    embedding, embedding#2              rows of the table for input_ids,    hook on the embedding, first and second
                                        for the decoder's input             call (#2, #3: the n-th use of one part)
    encoder.input                       the (scaled) input of the encoder   input of the stack
    S.position                          [time, d_model] added to it, or     the table or bias before it is added
                                        T5's [1, heads, query, key] bias
    S.i.attn.q, .k, .v, .o              x W^T + b, heads not yet split      nn.Linear (of a packed one, its thirds)
    S.i.cross.q ...                     decoder: attention to the encoder   the same
    S.i.ff.wi, .wi_0, .wi_1, .wo        x W^T + b, before any activation    nn.Linear
    S.i.attn_norm, .cross_norm, .ff_norm, S.norm                            nn.LayerNorm
    S.i.attn.out, .cross.out, .ff.out   F of the block, with attachments    output of the sublayer, before the
                                        plugged there                       residual is added
    S.i                                 the residual stream after block i   output of the block (pre-LN; in post-LN
                                                                            it is that of S.i.ff_norm)
    S.i.attn.keys_values.k, .v          keys and values, if a prefix is     past keys and values
                                        plugged there
    head, logits, loss                  [batch, target, vocab] twice, []    lm_head, logits, loss
    grad/S.i.attn.q.weight              a parameter, [d_out, d_in]          weight.grad
    grad/S.i.attn.q.weight@lora.A       one of an attachment                lora_A.weight.grad

A layer's slots (weight, bias) have no entry of their own: their effect is in the layer's output. Nor has a module that
passes on the result of one of its parts. safetensors keeps no order, so the metadata does: "order" is a JSON list of
all names except the noise: the inputs, then the activations in the order of evaluation, then the gradients in the order
of the backward pass.

The noise is measured; no constant is typed. The same run is made `samples` times in float32, with its parameters (and
the positions of sinusoids) times 1 + u xi, u = 2^-24, xi uniform in [-1, 1], and compared with the run in float64:

    noise = max over samples and over a row of |float32 - float64| / u,   and of |X|: storing X rounds it

So the rounding of every weight and of every operation, forward and backward, is really there. For half precision u is
2^-11 or 2^-8, and the result of every op and of every VJP is multiplied in the same way. This is Monte-Carlo arithmetic
(D. S. Parker, 1997). A relu whose input is within its noise of 0 may be open or closed in a port, whatever u is, and
samples would miss some cases. So two more runs are made, one with all of these open in the backward pass and one with
all closed. An ill-conditioned tensor changes a lot, and is allowed to. `compare.py` derives the bound from the noise.
"""
from __future__ import annotations

import json
import os
from typing import Any, Mapping

import numpy

from minipeft.backend import Array, to_device, to_host
from minipeft.conformance.arithmetic import UNIT
from minipeft.conformance.recording import Run, Shake, record
from minipeft.files import write_tensors
from minipeft.nn.module import Model, whole
from minipeft.nn.weight import Parameter

FORMAT = "minipeft-trace-1"
NOISE = {"float32": "noise/", "float16": "noise.float16/", "bfloat16": "noise.bfloat16/"}  # by what was measured


def trace(model: Any, batch: Mapping[str, Any], path: str | os.PathLike, *,
          params: Mapping[str, Parameter] | None = None, samples: int = 8) -> None:
    """Write one run of `model.loss(**batch)` and its gradients, tensor by tensor, to the safetensors file `path`.

    A reference is best traced in float64. params: the parameters whose gradients are written; None takes all that the
    loss depends on, those of plugged attachments included. samples: the number of runs from which the noise is
    measured; 0 leaves it out (such a file can be compared with a reference, but cannot be one). All runs are made on
    copies: no bit of the model changes. The samples come from a fixed seed, so a trace depends only on its arguments.

    Raises TypeError for keys that `loss` does not know and for a part of a model; ValueError for a random generator
    in the batch (dropout is not traced), for negative samples and for numbers that are not finite; and everything that
    `loss` and `value_and_grad` raise. Nothing is written then."""
    attachments = whole(model).attachments
    if batch.get("rng") is not None:
        raise ValueError("the batch holds an rng; leave it out: a trace shows evaluation, which draws nothing")
    if samples < 0:
        raise ValueError(f"samples is {samples}; expected 0 or more")
    run = record(model, batch, params)
    tensors = {name: to_host(array) for name, array in run.values.items()}
    for name, array in tensors.items():
        if not numpy.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite: such a run cannot be a reference")
    if samples:
        exact = run if _dtype(model) == "float64" else record(model, batch, params, "float64")
        for kind, prefix in NOISE.items():
            noise = _noise(model, batch, params, samples, UNIT[kind], exact)
            tensors.update({prefix + name: most for name, most in noise.items()})
    inputs = {key: to_host(value) for key, value in batch.items()
              if key not in ("adapter", "rng") and value is not None}
    said = {"format": FORMAT, "order": [*inputs, *run.values], "dtype": _dtype(model), "samples": samples,
            "model": type(model).__name__, "config": model.config.to_dict(), "adapter": batch.get("adapter"),
            "attachments": {name: attachment.state for name, attachment in attachments.items()}}
    write_tensors(path, {**inputs, **tensors}, {key: value if isinstance(value, str) else json.dumps(value)
                                                for key, value in said.items()})


def _dtype(model: Model) -> str:
    """The dtype in which the model computes."""
    return str(next(iter(model.base_parameters.values())).dtype)


def _noise(model: Any, batch: Mapping[str, Any], params: Mapping[str, Parameter] | None, samples: int,
           u: float, exact: Run) -> dict[str, numpy.ndarray]:
    """{X: [...]}: the largest change of each row of X in a sample, or by storing X, per unit roundoff."""
    noise = {name: _largest(value) for name, value in exact.values.items()}
    shake = Shake(u, numpy.random.default_rng(0))
    for _ in range(samples):
        run = record(model, batch, params, "float32", shake)
        for name, most in noise.items():
            moved = _largest(run.values[name] - exact.values[name]) / u
            if not numpy.isfinite(moved).all():
                raise ValueError(f"{name} overflows in float32, so its noise cannot be measured")
            noise[name] = numpy.maximum(most, moved)
    _decide(model, batch, params, u, exact, noise)
    return {name: most.astype(numpy.float32) for name, most in noise.items()}


def _decide(model: Any, batch: Mapping[str, Any], params: Mapping[str, Parameter] | None, u: float, exact: Run,
            noise: dict[str, numpy.ndarray]) -> None:
    """Enlarges `noise` by the changes of the gradients if all relus near 0 are open, and if all are closed."""
    near = {name: u * noise[name][..., None] for name in sorted(exact.decided)}
    if not any((abs(to_host(exact.values[name])) <= distance).any() for name, distance in near.items()):
        return
    for sign in (1, -1):
        run = record(model, batch, params, "float64",
                     moved={name: to_device(sign * distance) for name, distance in near.items()})
        for name, most in noise.items():
            noise[name] = numpy.maximum(most, _largest(run.values[name] - exact.values[name]) / u)


def _largest(x: Array) -> numpy.ndarray:
    """max |x| of each row: [..., d] -> [...]; of a scalar, |x|."""
    x = abs(to_host(x))
    return x.max(axis=-1) if x.ndim else x
