"""Write a method that the library lacks: LoRA-XS, in 31 lines of code.

    W = W0 + s B R A,   s = alpha / r         Bałazy, Banaei, Aberer & Tabor, 2024, arXiv:2405.17604
    B = U_r, A = S_r V_r^T                    the r largest singular values of W0 = U S V^T; B A comes closest to W0

    x [.., d_in] --+-- W0 [d_out, d_in] ------------------------------+-- y [.., d_out]
                   +-- A [r, d_in] -- R [r, r] -- B [d_out, r] -- * s -+       R alone is trained, and starts at 0

LoRA learns in which directions a weight should change. LoRA-XS takes the directions in which the pretrained weight is
large, and learns how to mix them. That leaves r^2 numbers to train at each weight, whatever its size.

A method has two parts. A piece (`Mixed`) says what is computed at one place: the equation. A method (`LoRAXS`) says
which numbers a person chooses, which arrays each place gets, and how a piece is made of them. The library does the
rest. It checks both before it touches a model, and then the method can be trained, stacked on others, mixed in a batch,
merged, saved and loaded. `help(minipeft.Method)` shows the whole contract.

    python examples/your_own_method.py             ten seconds on two cores
    python examples/your_own_method.py --rank 4    with fewer numbers

The program checks the method with the laws of the library, and then teaches a small pretrained model the English past
tense. It prints two tables, writes the adapter file to examples/out/your_own_method, and ends with checks that fail if
a claim is false. Copy it to begin a method of your own.
"""
from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console
from rich.table import Table

import minipeft
from lab.claims import failures
from data.inflection import CODEC, NEW_TASK, ids_of, load_tasks
from lab.measure import logits
from lab.scoring import answers, exact_match
from minipeft import Fixed, Method, Parameter, Reparam, fixed, register, setting, trained


# ---- 1. The piece: a weight built on the weight below it, `self.base`. dense() is the equation; products, lookups,
# merging and gradients follow from it. project() is optional. It gives the same product without forming B R A, and
# hands `rng` on, so that dropout in a weight below is not lost.

class Mixed(Reparam):
    """W0 + s B R A.   A [r, d_in], R [r, r], B [d_out, r]."""

    A: Fixed
    B: Fixed
    R: Parameter
    scale: float

    def dense(self):
        return self.base.dense() + self.scale * (self.B @ self.R @ self.A)

    def project(self, x, rng=None):
        linear = minipeft.ops.linear
        return self.base.project(x, rng) + self.scale * linear(linear(linear(x, self.A), self.R), self.B)


# ---- 2. Initial values: functions of (shape, dtype, rng), here with the slot in front. `attach` calls them. `load`
# does not, because the file has the arrays. They read slot.fold(), the weight with everything that is plugged.

def svd(slot):
    """U [d_out, k], S [k], V^T [k, d_in], k = min(d_out, d_in)."""
    return numpy.linalg.svd(minipeft.to_host(slot.fold().dense().data), full_matrices=False)


def left(slot, shape, dtype, rng):
    """B = U_r."""
    return minipeft.to_device(svd(slot)[0][:, :shape[1]])


def right(slot, shape, dtype, rng):
    """A = S_r V_r^T. The singular values stand on the side of the input, as in the authors' code."""
    _, S, Vt = svd(slot)
    return minipeft.to_device(S[:shape[0], None] * Vt[:shape[0]])


# ---- 3. The method: a frozen dataclass. Its fields are the hyper-parameters; `where` says at which places.

@register
@dataclass(frozen=True)
class LoRAXS(Method):
    """rank: r. alpha: in s = alpha / r. where: which weights, by default q and v of every attention.

    Departures: R starts at 0, so that attaching changes nothing (in the authors' code N(0, 1e-5^2)). The file holds A
    and B beside R: another machine's decomposition may have other signs, and R is valid only with these A and B.
    Raises ValueError for fields out of range, and on a model where r exceeds min(d_out, d_in)."""

    rank: int = setting(16, lambda r: type(r) is int and r >= 1, "an integer >= 1")
    alpha: float = setting(16, lambda a: type(a) in (int, float) and a != 0, "a number other than 0")
    where: Any = r"\.(q|v)\.weight$"

    def arrays(self, name, slot, model):
        (d_out, d_in), r = slot.shape, self.rank
        if r > min(d_out, d_in):
            raise ValueError(f"LoRAXS: rank is {r}; expected at most {min(d_out, d_in)}, that of {name}")
        return {"A": fixed((r, d_in), functools.partial(right, slot)),
                "B": fixed((d_out, r), functools.partial(left, slot)), "R": trained((r, r))}

    def make(self, name, slot, arrays):
        return Mixed(**arrays, scale=self.alpha / self.rank)


# ---- 4. Try it.

HERE = Path(__file__).parent
EVERY_LINEAR = r"\.(attn|cross|ff)\.\w+\.weight$"
BATCH, LR = 64, 2e-2
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="r (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "your_own_method",
                        help="folder for the adapter file (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1 or args.rank < 1:
        parser.error("expected --steps >= 1 and --rank >= 1")
    args.out.mkdir(parents=True, exist_ok=True)
    minipeft.keep_heap()

    laws = minipeft.laws.check(LoRAXS(rank=4))  # 4: the models of the laws are tiny
    print(laws)

    train, test = load_tasks()
    verbs, unseen = ids_of(train[NEW_TASK]), test[NEW_TASK][:300]
    model = minipeft.Transformer.from_pretrained(HERE / "data" / "checkpoints" / "inflection")

    def score() -> float:
        said = answers(model, [prompt for prompt, _ in unseen], CODEC)
        return exact_match(said, unseen, CODEC)

    def seen() -> numpy.ndarray:
        return logits(model, ids_of(unseen[:64]))

    base, before = seen(), score()
    adapter = minipeft.attach(model, LoRAXS(args.rank, where=EVERY_LINEAR), numpy.random.default_rng(0))
    attached = seen()
    minipeft.fit(model, adapter, minipeft.Batches(verbs, BATCH), steps=args.steps, optimizer=minipeft.AdamW(lr=LR),
                 schedule=minipeft.cosine_decay(args.steps, warmup=args.steps // 20), label="LoRA-XS")
    taught, after = seen(), score()
    adapter.merge()
    merged = seen()
    adapter.unmerge()
    adapter.save(args.out / "past_tense.safetensors")
    adapter.remove()
    removed = seen()
    loaded = minipeft.load(model, args.out / "past_tense.safetensors")
    again = seen()

    numbers = sum(p.data.size for p in loaded.parameters.values())
    of_lora = sum(args.rank * sum(slot.shape) for slot in loaded.places.values())
    gap = float(abs(merged - taught).max() / abs(taught).max())
    table = Table(title=f"the past tense of {len(unseen)} verbs that no task has shown, exact match in %")
    for column in ("", "past tense", "trained numbers"):
        table.add_column(column, justify="right")
    table.add_row("base", f"{before:.1f}", "0")
    table.add_row(f"LoRA-XS r={args.rank}", f"{after:.1f}", f"{numbers:,} (a LoRA of this rank: {of_lora:,})")
    console.print("", table)
    return 1 if failures([
        ("the method keeps all laws of the library", laws.ok),
        ("attaching it changes no logit", numpy.array_equal(attached, base)),
        (f"it learns the past tense: {before:.1f} % before, at least 50 points more after", after >= before + 50),
        ("it trains fewer numbers than a LoRA of its rank", numbers < of_lora),
        (f"merged, the logits are the same up to rounding ({gap:.0e})", gap < 1e-4),
        ("removed, every logit is the base's, bit for bit", removed.tobytes() == base.tobytes()),
        ("loaded from its file, every logit is as after training, bit for bit", again.tobytes() == taught.tobytes()),
    ], console) else 0


if __name__ == "__main__":
    sys.exit(main())
