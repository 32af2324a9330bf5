"""The meaning of a file of PEFT's, one class for each `peft_type`.

    method(config, shapes, model)      which method of ours it is, on which places
    rows(method, model, config)        under which keys its arrays are in the file
    config(method, model)              the fields that PEFT needs in order to compute the same
"""
from __future__ import annotations

import abc
from typing import Any, ClassVar, Mapping

from minipeft.attaching.method import Method
from minipeft.formats.row import Row

Config = Mapping[str, Any]                  # the fields of an adapter_config.json
Shapes = Mapping[str, tuple[int, ...]]      # {key: shape}
CODECS: dict[str, "Codec"] = {}             # by peft_type

# fields that say nothing about what is computed
HARMLESS = frozenset({"peft_type", "peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision",
                      "auto_mapping"})


class Codec(abc.ABC):
    """How one `peft_type` is read and written.

    used: the fields that `method` reads. harmless: fields whose values change no output of a trained adapter, such as a
    dropout of a path that training alone has; they are kept and written back. neutral: {field: the values at which it
    changes nothing}; with any other value the file is refused by the name of the field. needed: fields without which
    PEFT would compute something else or fail, so they must be there. defaults: {field: what PEFT takes where the file
    has nothing or null}; `method` and `rows` see the field as if it were there, and it is written back."""

    peft_type: ClassVar[str]
    used: ClassVar[frozenset[str]] = frozenset()
    harmless: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple]] = {}
    needed: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}

    @abc.abstractmethod
    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        """The method that the file describes, on the places of `model` that its config chooses. config: its fields,
        checked against `used`, `neutral` and `needed`. shapes: of its tensors, under the keys that PEFT writes. Raises
        ValueError for what does not fit or is not supported."""

    @abc.abstractmethod
    def rows(self, method: Method, model: Any, config: Config) -> list[Row]:
        """Every array of `method` on `model`, trained or fixed, under both names. config: the fields of the file that
        was read or is being written."""

    @abc.abstractmethod
    def writes(self, method: Method) -> bool:
        """Whether a file of this peft_type is the one for such a method. `config` may still refuse it."""

    @abc.abstractmethod
    def config(self, method: Method, model: Any) -> dict[str, Any]:
        """The fields that a file of `method` needs, each named as PEFT names it, without HARMLESS ones. Fields that are
        not `used` are written as they were in the file that the method came from, if there is one. Raises ValueError
        for a method that PEFT cannot hold, saying why."""

    def config_again(self, method: Method, model: Any, read: Config) -> dict[str, Any]:
        """`config`, for a method that came from a file with the fields `read`. A codec that can write a method in two
        ways overrides it, so that a file is written as it was. Raises ValueError as `config` does."""
        return self.config(method, model)

    def computed(self, method: Method, model: Any, config: Config) -> dict[str, Any]:
        """{our key: array} of fixed arrays that the file leaves out, because PEFT computes them, too."""
        return {}

    def completed(self, method: Method, theirs: Mapping[str, Any], model: Any) -> Method:
        """`method`, with what the arrays of the file alone say, such as the indices of a mask. theirs: {key: array}, of
        the shapes that `rows` gave. Raises ValueError for arrays that say something impossible."""
        return method

    def notes(self, method: Method, model: Any, config: Config) -> list[str]:
        """Sentences for somebody who loads the file: `load` warns of each."""
        return []

    def departure(self, method: Method, model: Any) -> str | None:
        """In words, how PEFT departs from the paper in such a method. It is then loaded with as_peft=True alone. None
        where PEFT does not depart from it."""
        return None


def codec(cls: type[Codec]) -> type[Codec]:
    """Class decorator: makes `load` and `save` know the codec."""
    CODECS[cls.peft_type] = cls()
    return cls
