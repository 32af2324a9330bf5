"""Train a copy of a model, and measure what that costs: time, memory, and the exactness of merging."""
from __future__ import annotations

import dataclasses
import time
import tracemalloc
from typing import Any, Callable, Mapping, Sequence

import numpy

import minipeft
from data.codec import PAD
from minipeft.train.data import pad

Ids = Sequence[tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass
class Trained:
    """A trained model.

    attachment: None after full fine-tuning. curve: [(step, score)]. seconds: by the clock, with the evaluations of
    `curve`. cpu_seconds: of the processor, for the steps alone, over all threads; other programs do not count."""

    model: Any
    attachment: minipeft.Attachment | None
    params: dict[str, minipeft.Parameter]
    batches: minipeft.Batches
    seconds: float
    cpu_seconds: float
    curve: list[tuple[int, float]]


def train(model: Any, method: Any, pairs: Ids, *, lr: float, steps: int, batch_size: int, seed: int,
          evaluate: Callable[[Any], float], label: str, name: str | None = None) -> Trained:
    """Attach `method` to `model` (None: train all of it) and fit it to `pairs` of ids.

    The optimizer is AdamW with a cosine schedule, whose warmup takes a twentieth of the steps, and gradients clipped to
    length 1. evaluate: called with the model after every fifth of the steps. label: for the progress line. name: of the
    attachment, by default the method's."""
    attachment = minipeft.attach(model, method, numpy.random.default_rng(seed), name) if method else None
    params = attachment.parameters if attachment else minipeft.select(model, ".*")
    batches = minipeft.Batches(pairs, batch_size, seed)
    evaluating = 0.0

    def timed() -> float:
        nonlocal evaluating
        begun = time.process_time()
        score = evaluate(model)
        evaluating += time.process_time() - begun
        return score

    begun, cpu_begun = time.perf_counter(), time.process_time()
    history = minipeft.fit(
        model, params, batches, steps=steps, optimizer=minipeft.AdamW(lr=lr), clip=1.0, seed=seed,
        schedule=minipeft.cosine_decay(steps, warmup=steps // 20), evaluate=timed, eval_every=max(1, steps // 5),
        label=label)
    return Trained(model, attachment, params, batches, time.perf_counter() - begun,
                   time.process_time() - cpu_begun - evaluating, history.scores)


def step_peak(model: Any, params: Mapping[str, minipeft.Parameter], batches: minipeft.Batches) -> int:
    """Bytes at the peak of a training step (forward, backward, AdamW) above the loaded model, moments included.

    The second step is measured, when the moments exist. The steps change copies of the parameters' arrays."""
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


def logits(model: Any, pairs: Ids, adapter: Any = None) -> numpy.ndarray:
    """[batch, target, vocab] for (source ids, target ids) pairs, where the decoder reads the targets.

    adapter: as in a call of the model."""
    batch = minipeft.batch_of(pairs, PAD)
    return model(batch["input_ids"], model.shift_right(batch["labels"]), batch["attention_mask"], adapter=adapter).data


def merged_gap(model: Any, attachment: minipeft.Attachment, pairs: Ids) -> float:
    """max |merged - unmerged| over the logits of `pairs`, divided by the largest logit. The model is left unmerged."""
    unmerged = logits(model, pairs)
    attachment.merge()
    gap = abs(logits(model, pairs) - unmerged).max() / abs(unmerged).max()
    attachment.unmerge()
    return float(gap)


def generation_time(model: Any, prompts: Sequence[Sequence[int]], repeats: int = 5) -> float:
    """Processor seconds per row and decoding step of one batch, encoder included: the fastest of `repeats` runs.

    It is per step because different models give answers of different lengths."""
    rows = pad(prompts, PAD)
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        steps = model.generate(rows).shape[1] - 1
        times.append((time.process_time() - begun) / (steps * len(rows)))
    return min(times)
