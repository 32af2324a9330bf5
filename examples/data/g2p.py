"""Pronunciation as text-to-text tasks, from the dictionaries in the pip package misaki.

    "american: sweaty" -> "swˈɛɾi"     "spell: swˈɛɾi" -> "sweaty"     "british: sweaty" -> "swˈɛti"

A base model is pretrained on the first two tasks. Adapters teach it the third. American and British agree on one word
in eight, so the new task is related to an old one but not solved by it. The words are split once, before any task: no
task's training contains a test word, not even as an answer of "spell".

The IPA is written as in misaki: one character for each phoneme, capitals for diphthongs (A is eɪ, I is aɪ, W aʊ, Y ɔɪ,
O and Q the American and British oʊ), and the stress marks ˈ and ˌ before the vowel. Source: us_gold.json and
gb_gold.json of misaki 0.7.4 (Apache-2.0). They are read where pip installed them and are not copied; misaki itself is
not imported.
"""
from __future__ import annotations

import importlib.util
import json
import string
from pathlib import Path
from typing import Iterable, Sequence

import numpy

from data.codec import EOS, PAD, Codec, Pair

OLD_TASKS = ("american", "spell")
NEW_TASK = "british"
CHARACTERS = " :" + string.ascii_lowercase + "AIOQWYæðŋɑɒɔəɛɜɡɪɹɾʃʊʌʒʤʧˈˌːθᵊᵻ"          # ids from 2 on
CODEC = Codec(CHARACTERS)
VOCAB_SIZE, encode, decode, ids_of = CODEC.vocab_size, CODEC.encode, CODEC.decode, CODEC.ids_of
LONGEST_WORD, LONGEST_IPA = 12, 16
_SPLIT_SEED = 20
__all__ = ["CHARACTERS", "CODEC", "EOS", "NEW_TASK", "OLD_TASKS", "PAD", "VOCAB_SIZE", "decode", "encode", "ids_of",
           "asked_in_american", "load_tasks", "prompt_of"]


def load_tasks() -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
    """({task: training pairs}, {task: test pairs}) of (prompt, answer).

    Every task has the same words in the same order: the i-th pairs of all tasks belong to one word."""
    us, gb = _read("us"), _read("gb")
    words = sorted(word for word in us if word in gb)
    order = numpy.random.default_rng(_SPLIT_SEED).permutation(len(words))
    shuffled = [words[i] for i in order]
    held_out = max(2000, len(words) // 12)
    return _tasks(shuffled[held_out:], us, gb), _tasks(shuffled[:held_out], us, gb)


def prompt_of(task: str, text: str) -> str:
    """The prompt of a task: its name, then `text`, which is the word or the IPA."""
    return f"{task}: {text}"


def asked_in_american(british: Sequence[Pair], words: Iterable[str] | None = None) -> list[Pair]:
    """British pairs, but asked with the prompt that the base knows: ("american: water", "wˈɔːtə").

    words: these words alone, in this order; all by default."""
    answer = {prompt.removeprefix(prompt_of(NEW_TASK, "")): ipa for prompt, ipa in british}
    return [(prompt_of("american", word), answer[word]) for word in (answer if words is None else words)]


def _tasks(words: list[str], us: dict[str, str], gb: dict[str, str]) -> dict[str, list[Pair]]:
    return {"american": [(prompt_of("american", word), us[word]) for word in words],
            "spell": [(prompt_of("spell", us[word]), word) for word in words],
            "british": [(prompt_of("british", word), gb[word]) for word in words]}


def _read(accent: str) -> dict[str, str]:
    """{word: IPA} of the plain lower-case words of one dictionary.

    Entries that depend on the part of speech are dicts there, and are skipped."""
    spec = importlib.util.find_spec("misaki")
    if spec is None or spec.origin is None:
        raise SystemExit("this example reads its data from the package misaki: pip install 'minipeft[examples]'")
    found = json.loads((Path(spec.origin).parent / "data" / f"{accent}_gold.json").read_text("utf-8"))
    return {word: ipa for word, ipa in found.items()
            if isinstance(ipa, str) and len(ipa) <= LONGEST_IPA and 3 <= len(word) <= LONGEST_WORD
            and word.isascii() and word.isalpha() and word.islower()}
