"""The head that AdapterHub saves beside an adapter.

    lm_head.weight [V, d]            of a T5ForConditionalGeneration
    heads.NAME.0.weight [V, d]       of a T5AdapterModel with a head for generation

AdapterHub saves the head of the model with every adapter, whether it was trained or not (`train_adapter` leaves that of
a T5ForConditionalGeneration as it is), and puts it into the model that loads the adapter. Here the head belongs to the
base. So the file must hold the head that the model has, to the last bit.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Mapping

import numpy

from minipeft.backend import to_host
from minipeft.checks import shown
from minipeft.files import read_shapes, read_tensors
from minipeft.formats.folder import no_pointer, pickled

WEIGHTS, PICKLE = "model_head.safetensors", "pytorch_model_head.bin"
_HEAD = r"(transformer\.)?(lm_head|heads\.[^.]+\.0)\.weight"


def check_head(model: Any, directory: Path, stored: Mapping[str, numpy.ndarray]) -> None:
    """Raises ValueError where the directory has another head than the model. stored: {key: array} of the adapter, which
    the head's file may repeat."""
    path = directory / WEIGHTS
    if not path.exists():
        if (directory / PICKLE).exists():
            raise ValueError(f"{pickled(PICKLE, WEIGHTS)}. {_WAY_OUT}")
        return
    no_pointer(path)
    own = to_host((model.slots.get("head.weight") or model.slots["embedding.weight"]).base.dense().data)
    shapes = read_shapes(path)
    for key, shape in shapes.items():
        expected = own.shape if re.fullmatch(_HEAD, key) else stored[key].shape if key in stored else None
        if shape != expected:
            raise ValueError(f"{WEIGHTS} has {shown(key)} of shape {list(shape)}; expected lm_head.weight "
                             f"{list(own.shape)} alone. {_WAY_OUT}")
    for key, array in read_tensors(path)[0].items():
        if not numpy.array_equal(array.astype(own.dtype), stored[key].astype(own.dtype) if key in stored else own):
            raise ValueError(f"{key} in {WEIGHTS} differs from the head of this model, so the adapter was trained with "
                             f"another head. Load it on a model that has this head. {_WAY_OUT}")


_WAY_OUT = ("Or load the adapter alone, and leave the head as it is: minipeft.formats.adapterhub.load(model, "
            "directory, with_head=False)")
