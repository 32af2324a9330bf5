"""FLAN-T5-base with random weights: what a training step costs, without any file.

    247,577,856 parameters     v1.1: gated GELU, an untied head; 12 + 12 blocks of 768, 12 heads of 64, d_ff 2048
    3,538,944 of a LoRA        r = 32 on q and v: 72 matrices, each with 32 (768 + 768) numbers; 251,116,800 with it

Time and memory do not depend on the values of the weights. The memory of a step is the peak of what it allocates above
the loaded model (`tracemalloc`), in a step that finds the optimizer's moments in place.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
import tracemalloc
from typing import Any, Mapping, Sequence

import numpy
from rich.console import Console

import minipeft
from lab.claims import Claim, failures
from lab.flan_run import lora_numbers, lora_of
from lab.free_memory import free_memory
from lab.tables import Column, on_terminal

CONFIG = minipeft.T5Config(
    vocab_size=32128, d_model=768, d_kv=64, num_heads=12, d_ff=2048, num_layers=12, num_decoder_layers=12,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False)
RANK = 32
PARAMETERS, WITH_LORA, OF_LORA = 247_577_856, 251_116_800, 3_538_944        # the lab's, the last two with r = 32
RATE, THREADS = 1e-5, "OPENBLAS_NUM_THREADS"
TIMED = 3                   # steps, after one that makes the moments
MARGIN = 1.2                # on the estimate of a full step, which keeps a few more activations than a LoRA's
MIB = 2 ** 20


@dataclasses.dataclass
class Row:
    """One kind of training step. all: numbers of the model, with the LoRA's. training: bytes of gradients and moments,
    from the shapes. seconds, cpu_seconds: medians of the timed steps, by the clock and of the processor, over all
    threads; other programs count in the first. peak: bytes above the loaded model."""

    method: str
    trainable: int
    all: int
    percent: float
    training: int
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak: int | None = None


COLUMNS = [
    Column("trained", lambda r: r.trainable, "{:,.0f}"), Column("%", lambda r: r.percent, "{:.2f}"),
    Column("gradients and moments", lambda r: r.training / MIB, "{:,.0f} MiB"),
    Column("peak memory", lambda r: r.peak and r.peak / MIB, "{:,.0f} MiB"),
    Column("processor time", lambda r: r.cpu_seconds, "{:.1f} s"), Column("time", lambda r: r.seconds, "{:.1f} s")]


class Base:
    """The model, with the LoRA plugged. args: those of `flan_t5_lab.py`. Raises ValueError for a LoRA that does not
    fit."""

    def __init__(self, args: argparse.Namespace, config: minipeft.T5Config = CONFIG):
        self.args, rng, begun = args, numpy.random.default_rng(args.seed), time.perf_counter()
        self.model = minipeft.T5(config, rng, args.dtype)
        self.everything, self.report = minipeft.select(self.model, ".*"), minipeft.report(self.model)
        self.full = row_of("full", self.model, self.everything)
        self.lora = minipeft.attach(self.model, lora_of(args), rng)
        self.seconds = time.perf_counter() - begun
        self.ids = {name: rng.integers(2, config.vocab_size, (args.batch, length))
                    for name, length in (("input_ids", args.max_source), ("labels", args.max_target))}


def run(base: Base) -> int:
    """Measure both kinds of step, print and write what was found to the folder --out. Returns 1 if a check fails."""
    console, args, model, full = Console(), base.args, base.model, base.full
    console.print(f"built at random in {base.seconds:.0f} s\n{base.report}\n", highlight=False)
    console.print(f"a step: {args.batch} dialogues of {args.max_source} tokens, summaries of {args.max_target}, with "
                  f"dropout, {args.dtype}")
    expected = lora_numbers(model, args)
    lora = row_of(f"LoRA r={args.rank}", model, base.lora)
    measure(lora, model, base.lora.parameters, base.ids)
    base.lora.remove()
    need, free = full.training + lora.peak - lora.training, free_memory()
    if free is not None and MARGIN * need < free:
        measure(full, model, base.everything, base.ids)
    else:
        console.print(f"a step of full fine-tuning is not made: it needs about {need / MIB:,.0f} MiB above the model, "
                      + (f"and {free / MIB:,.0f} MiB are free" if free is not None else "the free memory is not known"))
    rows = [lora, full]
    console.print(on_terminal("one training step", rows, COLUMNS))
    claims = claims_about(rows, expected, model.config, args.rank)
    about = {"batch": args.batch, "source": args.max_source, "target": args.max_target, "rank": args.rank,
             "dtype": args.dtype, "seed": args.seed, "cores": os.cpu_count(), "threads": os.environ.get(THREADS),
             "machine": platform.machine(), "python": platform.python_version(), "numpy": numpy.__version__}
    (args.out / "dry_run.json").write_text(json.dumps(
        {**about, "rows": [dataclasses.asdict(row) for row in rows], "claims": dict(claims)}, indent=1), "utf-8")
    console.print(f"figures: {args.out}/dry_run.json", soft_wrap=True)
    return 1 if failures(claims, console) else 0


def row_of(name: str, model: Any, params: Any) -> Row:
    """A row with what the shapes tell, before any step is made."""
    found = minipeft.report(model, params)
    return Row(name, found.trainable, found.all, found.percent, found.training_bytes)


def measure(row: Row, model: Any, params: Mapping[str, Any], ids: Mapping[str, numpy.ndarray]) -> None:
    """Make training steps on `params`, which changes them, and note in the row what they cost."""
    optimizer, rng = minipeft.AdamW(lr=RATE), numpy.random.default_rng(0)

    def step() -> tuple[float, float]:
        begun = time.perf_counter(), time.process_time()
        _, grads = minipeft.value_and_grad(lambda: model.loss(**ids, rng=rng), params)
        optimizer.step(params, grads)
        return time.perf_counter() - begun[0], time.process_time() - begun[1]

    step()
    row.seconds, row.cpu_seconds = map(float, numpy.median([step() for _ in range(TIMED)], axis=0))
    moments = sum(array.nbytes for held in (optimizer.m, optimizer.v) for array in held.values())
    tracemalloc.start()
    try:
        step()
        row.peak = tracemalloc.get_traced_memory()[1] + moments
    finally:
        tracemalloc.stop()


def claims_about(rows: Sequence[Row], expected: int, config: minipeft.T5Config, rank: int) -> list[Claim]:
    """The claims, each with whether it holds. rows: of the LoRA and of full fine-tuning. expected: how many numbers the
    LoRA has, from the shapes."""
    lora, full = rows
    claims = [(f"a LoRA has r (d_in + d_out) numbers at every place: {lora.trainable:,} = {expected:,}",
               lora.trainable == expected)]
    if config == CONFIG:
        claims.append((f"FLAN-T5-base has {PARAMETERS:,} parameters: {full.trainable:,}", full.trainable == PARAMETERS))
    if config == CONFIG and rank == RANK:
        claims.append((f"with r = {RANK}, {OF_LORA:,} of {WITH_LORA:,} are trained: {lora.trainable:,} of "
                       f"{lora.all:,}", (lora.trainable, lora.all) == (OF_LORA, WITH_LORA)))
    if full.peak is not None and lora.peak is not None:
        claims.append(("a step that trains the LoRA takes less memory than one that trains all", lora.peak < full.peak))
    return claims
