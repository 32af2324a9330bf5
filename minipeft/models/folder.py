"""A pretrained model is a folder: config.json holds its configuration, model.safetensors its weights.

The two are written one after the other, so a kill between them leaves new weights beside an old configuration. The
weights carry a digest of the configuration that they were saved with, so that such a pair is refused.
"""
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping

from minipeft.atomic import missing_folder
from minipeft.backend import to_host, xp
from minipeft.checks import shown
from minipeft.files import write_atomic, write_tensors
from minipeft.models.config import Config
from minipeft.models.merged import merged_weight
from minipeft.models.quantized import FIELD, expanded
from minipeft.nn.absent import is_absent
from minipeft.nn.fingerprint import sha256
from minipeft.nn.merge_report import MergeReport
from minipeft.nn.slot import Slot
from minipeft.quant.origin import ORIGIN, origin_in_metadata
from minipeft.quant.weight import QuantizedWeight

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SAVED_WITH = "config_sha256"  # in the metadata of the weights
LIMIT = 2 ** 20  # bytes of a config.json


def existing_folder(path: str | os.PathLike) -> Path:
    """The folder `path` as a Path. Raises FileNotFoundError, saying what is expected, if it holds no config.json."""
    directory = Path(path)
    if not (directory / CONFIG).exists():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}: expected a folder with {CONFIG} and {WEIGHTS}; "
                                f"nothing is downloaded")
    return directory


@contextlib.contextmanager
def naming(directory: Path) -> Iterator[None]:
    """Makes every ValueError that is raised inside the block name the folder."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(tuple(f"{directory}{after}" for after in (os.sep, ":", " "))):
            raise
        raise ValueError(f"{directory}: {error}") from None


def check_saved_with(config: Config, metadata: Mapping[str, str], quantization: Any = None) -> None:
    """Raises ValueError if the weights were saved with another configuration than `config`, by their metadata.
    quantization: the quantization_config, or None."""
    said = metadata.get(SAVED_WITH)
    if said is not None and said != _digest(config, quantization, metadata.get(ORIGIN)):
        raise ValueError(f"{CONFIG} is not the configuration that {WEIGHTS} was saved with: it was edited, or "
                         f"save_pretrained was killed between the two files. Put the right {CONFIG} back, or save the "
                         f"model again; to change the configuration, save a model that was built with the new one")


def _digest(config: Config, quantization: Any, origin: str | None) -> str:
    """Of all that the file says beside its tensors. Without a quantization it is that of `config`, as it always was."""
    return config.digest() if quantization is None and origin is None else sha256(
        [json.dumps([config.resolved(), quantization, origin], sort_keys=True).encode()])


def exported(model: Any, merged: bool | None, dtype: str | None) -> tuple[dict[str, Any], MergeReport]:
    """{name: array or QuantizedWeight} for `save_pretrained`: the base, or with merged=True all plugged attachments
    merged into it, one weight at a time, as it reads back when stored in `dtype`; and what this left of the changes.
    A weight that is merged into codes, or that nothing is plugged on, keeps its codes.

    Raises ValueError if something is plugged or merged and `merged` is None, if a plugged attachment cannot be merged
    into weights, and for overflow in `dtype`; TypeError unless `merged` is True, False or None."""
    if merged is not None and type(merged) is not bool:
        raise TypeError(f"merged is {shown(merged)}; expected True, False or None")
    acting = [a for a in model.attachments.values() if a.state != "off"]
    if merged is None and acting:
        raise ValueError(f"{acting[0].name!r} is {acting[0].state}: pass merged=True to save the model with all "
                         f"plugged attachments merged into the weights, or merged=False to save the base alone "
                         f"(attachments have files of their own: attachment.save)")
    if not merged:
        return {name: _as_it_is(slot) for name, slot in model.slots.items()}, MergeReport()
    for attachment in acting:
        for where, place in attachment.places.items():
            if not isinstance(place, Slot):
                raise ValueError(f"{attachment.name!r} cannot be merged: at {where} it acts on hidden states, which no "
                                 f"weight of the model can absorb; unplug it, or pass merged=False to save the base")
            if is_absent(place):
                raise ValueError(f"{attachment.name!r} cannot be saved as a part of the model: it adds {where}, and "
                                 f"the model's files have no such bias; save the attachment by itself, and unplug it "
                                 f"or pass merged=False to save the base")
    tensors, errors, dtypes = {}, {}, {}
    for name, slot in model.slots.items():
        try:
            if slot.entries:
                tensors[name], errors[name], dtypes[name] = merged_weight(name, slot, dtype or slot.dtype.name)
            else:
                tensors[name] = _as_it_is(slot)
        except TypeError as error:  # a weight without a dense form
            names = ", ".join(repr(a.name) for a in acting)
            raise ValueError(f"{names} cannot be merged: {error}; pass merged=False to save the base") from None
    return tensors, MergeReport(errors, dtypes)


def _as_it_is(slot: Slot) -> Any:
    """The base of a slot as a file stores it: its codes, or its numbers."""
    return slot.base if isinstance(slot.base, QuantizedWeight) else slot.base.dense().data


def write_folder(path: str | os.PathLike, config: Config, values: Mapping[str, Any], weights: Mapping[str, Any],
                 metadata: Mapping[str, str], dtype: str | None, modules: Iterable[str] = ()) -> None:
    """Write both files, each atomically; the folder is made if it is missing. values: of config.json; weights: {key:
    array or QuantizedWeight}; metadata, dtype: as in `files.write_tensors`; modules: as in `expanded`. Raises
    FileNotFoundError for a new folder below '~', which is not expanded; ValueError for numbers that are not finite; and
    what `expanded` and `files.write_tensors` raise."""
    directory = Path(path)
    if directory.parts[:1] and directory.parts[0].startswith("~") and not directory.exists():
        raise missing_folder(path, directory)
    tensors, exact, quantization = expanded(weights, dtype, modules)
    for name, array in tensors.items():
        if array.dtype.kind == "f" and not to_host(xp.isfinite(array).all()):
            raise ValueError(f"{name} holds NaN or infinity: {directory} is not written")
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        said = {**metadata, SAVED_WITH: _digest(config, quantization, metadata.get(ORIGIN))}
        write_tensors(directory / WEIGHTS, tensors, said, dtype, exact=exact)
    except ValueError:
        if is_new:
            directory.rmdir()
        raise
    if quantization is not None:
        values = {**values, FIELD: quantization}
    write_atomic(directory / CONFIG, (json.dumps(values, indent=2) + "\n").encode())


def write_hf_folder(model: Any, path: str | os.PathLike, dtype: str | None, merged: bool | None) -> MergeReport:
    """Write the `model`, a T5 or a Decoder, to the folder `path` under Hugging Face's names, and return the report of
    `exported`. dtype: of the stored weights. Raises as `exported` and `write_folder` do."""
    arrays, report = exported(model, merged, dtype)
    tensors = {model.to_hf_name(name): array for name, array in arrays.items()}
    linear = [model.to_hf_name(name) for name, slot in model.slots.items() if slot.kind == "linear"]
    said = {"format": "pt", **origin_in_metadata(model, bool(report.dtypes), dtype)}
    write_folder(path, model.config, model.config.to_hf(), tensors, said, dtype, linear)
    return report
