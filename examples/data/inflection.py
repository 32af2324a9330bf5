"""English inflections as text-to-text tasks, from the tables inside the pip package pyinflect.

    "plural: berry" -> "berries"       "gerund: run" -> "running"      "third person: try" -> "tries"
    "comparative: big" -> "bigger"     "superlative: big" -> "biggest" "past: wrestle" -> "wrestled"

The words are split once, before any task: a test word is seen in no task's training. Source: AGID (Automatically
Generated Inflection Database, K. Atkinson) as shipped by pyinflect 0.5.1 (MIT).
"""
from __future__ import annotations

import csv
import importlib.util
import string
from pathlib import Path

import numpy

from data.codec import EOS, PAD, Codec, Pair

OLD_TASKS = ("plural", "gerund", "third person", "comparative", "superlative")
NEW_TASK = "past"
CHARACTERS = " :" + string.ascii_lowercase          # ids from 2 on
CODEC = Codec(CHARACTERS)
VOCAB_SIZE, encode, decode, ids_of = CODEC.vocab_size, CODEC.encode, CODEC.decode, CODEC.ids_of
_SPLIT_SEED = 20
__all__ = ["CHARACTERS", "CODEC", "EOS", "NEW_TASK", "OLD_TASKS", "PAD", "VOCAB_SIZE", "decode", "encode", "ids_of",
           "load_tasks"]


def load_tasks() -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
    """({task: training pairs}, {task: test pairs}) of (prompt, answer), always in the same order."""
    forms = _read_table()
    words = sorted({word for pairs in forms.values() for word in pairs})
    order = numpy.random.default_rng(_SPLIT_SEED).permutation(len(words))
    held_out = {words[i] for i in order[:max(1500, len(words) // 12)]}
    train: dict[str, list[Pair]] = {}
    test: dict[str, list[Pair]] = {}
    for task, pairs in forms.items():
        # len(task) is a poor seed, because two tasks share it; it stays because the shipped base was made with it
        shuffled = numpy.random.default_rng([_SPLIT_SEED, len(task)]).permutation(sorted(pairs))
        asked = [(f"{task}: {word}", pairs[word]) for word in shuffled]
        train[task] = [p for p, word in zip(asked, shuffled) if word not in held_out]
        test[task] = [p for p, word in zip(asked, shuffled) if word in held_out]
    return train, test


def _read_table() -> dict[str, dict[str, str]]:
    """{task: {word: answer}}. A row of the table is word, N | V | A, forms. The first of alternatives "a/b" counts."""
    spec = importlib.util.find_spec("pyinflect")
    if spec is None or spec.origin is None:
        raise SystemExit("this example reads its data from the package pyinflect: pip install 'minipeft[examples]'")
    forms: dict[str, dict[str, str]] = {task: {} for task in (*OLD_TASKS, NEW_TASK)}
    with open(Path(spec.origin).parent / "infl.csv", encoding="utf-8", newline="") as file:
        for word, kind, *rest in csv.reader(file):
            first = [form.split("/")[0] for form in rest]
            if kind == "N" and first:
                found = {"plural": first[0]}
            elif kind == "V" and len(first) >= 4:
                found = {"past": first[0], "gerund": first[-2], "third person": first[-1]}
            elif kind == "A" and len(first) == 2:
                found = {"comparative": first[0], "superlative": first[1]}
            else:
                continue
            if _plain(word):
                for task, answer in found.items():
                    if _plain(answer):
                        forms[task].setdefault(word, answer)
    return forms


def _plain(word: str) -> bool:
    return 2 <= len(word) <= 16 and word.isascii() and word.isalpha() and word.islower()
