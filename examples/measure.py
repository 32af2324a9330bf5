"""Adapting a copy of a model, and what that costs: time, memory, exactness of a merge. Shared by the examples."""
from __future__ import annotations

import dataclasses
import time
import tracemalloc
from typing import Any, Callable, Mapping, Sequence

import minipeft
import numpy
from codec import PAD

Ids = Sequence[tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass
class Trained:
    """A model that was trained. attachment: None after full fine-tuning; seconds: of the steps alone;
    evaluation_seconds: of the scores that `curve` [(step, score)] holds."""

    model: Any
    attachment: minipeft.Attachment | None
    params: dict[str, minipeft.Parameter]
    batches: minipeft.Batches
    seconds: float
    evaluation_seconds: float
    curve: list[tuple[int, float]]


def train(model: Any, method: Any, pairs: Ids, *, lr: float, steps: int, batch_size: int, seed: int,
          evaluate: Callable[[Any], float], label: str) -> Trained:
    """Attach `method` to `model` (None: train all of it) and fit it to `pairs`: AdamW, a cosine with a twentieth of
    the steps to warm up, gradients clipped to length 1. `evaluate(model)` is called after every fifth of the steps."""
    attachment = minipeft.attach(model, method, numpy.random.default_rng(seed)) if method else None
    params = attachment.parameters if attachment else minipeft.select(model, ".*")
    batches = minipeft.Batches(pairs, batch_size, seed)
    waited = 0.0

    def timed() -> float:
        nonlocal waited
        begun = time.perf_counter()
        score = evaluate(model)
        waited += time.perf_counter() - begun
        return score

    begun = time.perf_counter()
    history = minipeft.fit(
        model, params, batches, steps=steps, optimizer=minipeft.AdamW(lr=lr), clip=1.0, seed=seed,
        schedule=minipeft.cosine_decay(steps, warmup=steps // 20), evaluate=timed, eval_every=max(1, steps // 5),
        label=label)
    seconds = time.perf_counter() - begun - waited
    return Trained(model, attachment, params, batches, seconds, waited, history.scores)


def step_peak(model: Any, params: Mapping[str, minipeft.Parameter], batches: minipeft.Batches) -> int:
    """Bytes at the peak of a training step (forward, backward, AdamW), above the loaded model; moments are among them.

    Measured on a second step, when the moments are there. The steps go to copies of the parameters' arrays."""
    batch, kept, optimizer = batches.next(), {name: p.data for name, p in params.items()}, minipeft.AdamW()
    for p in params.values():
        p.data = p.data.copy()
    tracemalloc.start()
    try:
        for _ in range(2):
            tracemalloc.reset_peak()
            _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), params)
            optimizer.step(params, grads)
            del grads
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        for name, p in params.items():
            p.data = kept[name]


def merged_gap(model: Any, attachment: minipeft.Attachment, pairs: Ids) -> float:
    """max |merged - unmerged| over the logits of `pairs`, divided by the largest logit."""
    batch = minipeft.batch_of(pairs, PAD)
    inputs = batch["input_ids"], model.shift_right(batch["labels"]), batch["attention_mask"]
    unmerged = model(*inputs).data
    attachment.merge()
    gap = abs(model(*inputs).data - unmerged).max() / abs(unmerged).max()
    attachment.unmerge()
    return float(gap)


def seconds_of(work: Callable[[], Any], repeats: int = 3) -> float:
    """The fastest of a few calls: what the work takes when nothing else is in its way."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
