"""Damaged and hostile directories: a clear error or a right answer, and never a half-changed model."""
from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import time
import warnings
from pathlib import Path
from typing import Any, Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft import T5
from tests.methods.golden import FIXTURES
from tests.methods_under_test import share

FOLDERS = sorted(str(path.parent.relative_to(FIXTURES)) for kind in ("adapters", "zoo", "bottleneck", "adapterhub")
                 for path in (FIXTURES / kind).glob("*/adapter_config.json")
                 if (path.parent / "golden.npz").exists())
ODD = st.one_of(st.none(), st.booleans(), st.integers(-2, 2 ** 70), st.floats(), st.text(max_size=8),
                st.sampled_from(["../x", "/etc/passwd", "(a+)+$", "(.*.*)*x", "(", "all-linear", "q", "*", ".*"]),
                st.lists(st.sampled_from(["q", "../x", "wo", ""]), max_size=2),
                st.dictionaries(st.sampled_from(["q", "(a+)+$", "..", "shared"]), st.integers(-1, 9), max_size=2))
NAMES = ("../x", "a" * 5000, "\0", "", "base_model.model.lm_head.lora_A.weight", "shared", "__metadata__", "\ud800")


@functools.cache
def base(folder: str) -> Any:
    """The model of a folder, on which nothing may ever stay."""
    path = FIXTURES / folder / "golden.npz"
    with numpy.load(path) as g:
        return T5.from_pretrained(FIXTURES / str(g["base"]))


def fingerprint(model: Any) -> tuple:
    return tuple(model.attachments), model.plugged, {name: a.tobytes() for name, a in model.state().items()}


def header_of(raw: bytes) -> tuple[dict, bytes]:
    n = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + n]), raw[8 + n:]


def packed(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def damaged_config(draw: Callable, config: Path) -> None:
    """A field is taken out, added, or gets an odd value; or the file itself is cut."""
    values = json.loads(config.read_text())
    inner = values["config"] if isinstance(values.get("config"), dict) and draw(st.booleans()) else values
    field = draw(st.sampled_from([*sorted(inner), "use_new_mathematics", "a_note"]))
    kind = draw(st.sampled_from(["drop", "odd", "odd", "cut", "list", "twice"]))
    if kind == "drop":
        inner.pop(field, None)
    elif kind == "odd":
        inner[field] = draw(ODD)
    text = json.dumps(values if kind != "list" else [values])
    config.write_text(text[:draw(st.integers(0, len(text)))] if kind == "cut" else
                      text.replace("{", '{"r": 1, "r": 2, ', 1) if kind == "twice" else text)


def damaged_tensors(draw: Callable, weights: Path) -> None:
    """A name, a shape, a type, an offset or a number is changed; or bytes are cut, flipped or replaced."""
    raw = weights.read_bytes()
    kind = draw(st.sampled_from(["cut", "flip", "name", "shape", "dtype", "swap", "huge", "drop", "number", "lfs",
                                 "empty"]))
    if kind in ("cut", "flip", "lfs"):
        at = draw(st.integers(0, len(raw) - 1))
        weights.write_bytes(raw[:at] if kind == "cut" else raw[:at] + bytes([raw[at] ^ 0xff]) + raw[at + 1:]
                            if kind == "flip" else b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        return
    header, data = header_of(raw)
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    entry = header[name]
    if kind == "name":
        header = {draw(st.sampled_from(NAMES)) if key == name else key: value for key, value in header.items()}
    elif kind == "shape":
        entry["shape"] = draw(st.sampled_from([entry["shape"][::-1], [*entry["shape"], 1], [0], [-1],
                                               [2 ** 62, 2 ** 62], [len(data) // 4]]))
    elif kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F64", "F16", "I32", "BF16", "F8", "", None]))
    elif kind == "swap":
        other = header[draw(st.sampled_from(names))]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif kind == "huge":
        entry["data_offsets"] = [0, 2 ** draw(st.integers(40, 63))]
    elif kind == "drop":
        del header[name]
    elif kind == "number":
        at = 4 * draw(st.integers(0, len(data) // 4 - 1))
        data = data[:at] + struct.pack("<f", draw(st.sampled_from([numpy.nan, numpy.inf, 3e38]))) + data[at + 4:]
    else:
        header, data = {}, b""
    weights.write_bytes(packed(header, data))


@pytest.mark.parametrize("folder", FOLDERS)
@share(10)
@given(data=st.data())
def test_a_damaged_directory_changes_nothing_or_loads_whole(folder, data, tmp_path_factory):
    model, target = base(folder), tmp_path_factory.mktemp("damaged") / "a"
    target.mkdir()
    for path in (FIXTURES / folder).iterdir():
        if path.name != "golden.npz":
            shutil.copy(path, target)
    damage = data.draw(st.sampled_from([damaged_config, damaged_tensors]))
    damage(data.draw, target / "adapter_config.json" if damage is damaged_config
           else next(target.glob("*.safetensors")))
    before, listed, began = fingerprint(model), sorted(os.listdir(target.parent)), time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attachment = minipeft.load(model, target, as_peft=True)
    except (ValueError, FileNotFoundError) as error:
        assert str(target) in str(error), "the error names the directory"
    else:
        assert all(numpy.isfinite(array).all() for array in attachment.tensors.values())
        attachment.remove()
    assert fingerprint(model) == before and sorted(os.listdir(target.parent)) == listed
    assert time.monotonic() - began < 20, "no damage makes it hang"
    shutil.rmtree(target.parent)
