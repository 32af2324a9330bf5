"""From text to token ids and back, with the tokenizer of a T5 folder and one template for training and testing.

    Summarize the following conversation.                       a source: these words around the dialogue, then </s>
    <dialogue>                                                  a target: the summary, then </s>
    Summary:

A dialogue that is too long loses its end; the words of the template are never cut off. tokenizer.json is read by the
tokenizers package; no Python code of the folder is run.
"""
from __future__ import annotations

from pathlib import Path
from typing import Sequence

import minipeft
from lab.dialogues import Dialogue
from minipeft.formats.folder import no_pointer

BEFORE, AFTER = "Summarize the following conversation.\n\n", "\n\nSummary:"
TOKENIZER = "tokenizer.json"
SENTENCEPIECE = ("spiece.model", "tokenizer.model")
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"            # as T5 calls them


class Prompts:
    """The tokenizer in `folder`, for a model of this `config`. max_source, max_target: the most tokens of each, with
    </s>.

    Raises FileNotFoundError where tokenizer.json is missing; ValueError for a file that is no tokenizer or that of
    another model, and for a max_source that leaves no room for a dialogue."""

    def __init__(self, folder: Path, config: minipeft.T5Config, max_source: int, max_target: int):
        self.tokenizer, self.config = _tokenizer(folder), config
        self.max_source, self.max_target = max_source, max_target
        for token, field in ((PAD, "pad_token_id"), (EOS, "eos_token_id")):
            found, expected = self.tokenizer.token_to_id(token), getattr(config, field)
            if found not in (None, expected):
                raise ValueError(f"{folder / TOKENIZER}: {token} has the id {found}; expected {expected}, the model's "
                                 f"{field}: it is the tokenizer of another model")
        self.after = self._ids(AFTER)
        words = len(self._ids(BEFORE)) + len(self.after) + 1
        if max_source <= words:
            raise ValueError(f"max_source is {max_source}; expected more than {words}, the tokens of the template "
                             f"without a dialogue")

    def prompt(self, dialogue: str) -> str:
        """The text that the model is asked, in training and in tests."""
        return f"{BEFORE}{dialogue}{AFTER}"

    def source(self, dialogue: str) -> list[int]:
        """The ids of the prompt, at most max_source."""
        ids, room = self._ids(self.prompt(dialogue)), self.max_source - 1
        if len(ids) > room:
            ids = self._ids(BEFORE + dialogue)[:room - len(self.after)] + self.after
        return [*ids, self.config.eos_token_id]

    def target(self, summary: str) -> list[int]:
        """The ids of the summary, at most max_target."""
        return [*self._ids(summary)[:self.max_target - 1], self.config.eos_token_id]

    def pairs(self, rows: Sequence[Dialogue]) -> list[tuple[list[int], list[int]]]:
        """[(source, target)] of the rows. Raises ValueError for a token that the model does not have."""
        return [(self.source(row.dialogue), self.target(row.summary)) for row in rows]

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids: up to </s>, without special tokens and ids that no token has."""
        ids = list(ids)
        end = ids.index(self.config.eos_token_id) if self.config.eos_token_id in ids else len(ids)
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()

    def sizes(self, rows: Sequence[Dialogue]) -> str:
        """How long the rows are, how many are cut, and how many of their tokens the tokenizer does not know."""
        sources, targets = [self._ids(self.prompt(row.dialogue)) for row in rows], [self._ids(r.summary) for r in rows]
        parts = []
        for name, all_ids, most in (("prompts", sources, self.max_source), ("summaries", targets, self.max_target)):
            lengths = [len(ids) + 1 for ids in all_ids]
            cut = sum(length > most for length in lengths)
            parts.append(f"{name} of {min(lengths)} to {max(lengths)} tokens" + (f" ({cut} cut to {most})" if cut else
                                                                                 ""))
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        strange = sum(ids.count(unknown) for ids in sources + targets)
        return ", ".join(parts) + (f", of which {strange} are unknown" if strange else "")

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.config.vocab_size:
            token = self.tokenizer.id_to_token(max(ids))
            raise ValueError(f"the token {token!r} has the id {max(ids)}, and the model's table only "
                             f"{self.config.vocab_size:,} rows: {TOKENIZER} is that of another model")
        return ids


def _tokenizer(folder: Path):
    from tokenizers import Tokenizer
    file = folder / TOKENIZER
    if not file.is_file():
        other = next((name for name in SENTENCEPIECE if (folder / name).is_file()), None)
        raise FileNotFoundError(f"{folder} holds no {TOKENIZER}" + (
            f", only {other}. Convert it once, in Python with transformers, sentencepiece and protobuf: "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder)" if other else
            "; expected the tokenizer of the model beside its config.json"))
    no_pointer(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:                  # the package raises nothing more special
        raise ValueError(f"{file} is not a file of the tokenizers package: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
