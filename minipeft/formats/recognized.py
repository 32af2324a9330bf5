"""Files and folders are told apart by the names of files, the keys of tensors and the configuration.

    read here       an adapter file of ours; a folder of PEFT's; a folder of AdapterHub's
    not read        mlx-lm, kohya's scripts, torchtune, LyCORIS, loralib; a whole model; a checkpoint of training; GGUF;
                    a pickle; a pointer of Git LFS; a part of a folder instead of the folder

No tensor is read: of a safetensors file the header alone, of other files the first bytes. A damaged file is recognized
by its name, and the damage is left to its reader.
"""
from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Iterable, Mapping

from minipeft.files import read_json, read_metadata, read_shapes
from minipeft.formats.folder import CONFIG, LFS, LIMIT

_MANY = 100  # files of a folder that are looked at


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of path. name: in words. reader: the part of the library that loads it, "minipeft", "peft" or
    "adapterhub"; None if there is none. hint: advice in that case. exists: whether anything is there at all."""

    name: str
    reader: str | None = None
    hint: str = ""
    exists: bool = True


OURS = Kind("an adapter file of minipeft", "minipeft")
PEFT = Kind("a folder of PEFT's", "peft")
ADAPTERHUB = Kind("a folder of AdapterHub's", "adapterhub")
UNKNOWN = Kind("a file of an unknown kind")
MISSING = Kind("not there",
               hint="Nothing is downloaded, and '~' is not expanded: expected the path of an adapter file, or of a "
                    "folder with adapter_config.json", exists=False)
EMPTY = Kind("an empty folder", hint="Expected an adapter file, or a folder with adapter_config.json and its weights",
             exists=False)
NO_ADAPTER = Kind("a folder without an adapter", hint=EMPTY.hint, exists=False)
PART = Kind("a part of a folder", hint="Pass the folder in which it lies beside adapter_config.json")
LFS_POINTER = Kind("a Git LFS pointer, not the file itself", hint="Fetch the file with `git lfs pull`")
CHECKPOINT = Kind("a checkpoint of minipeft's training")
MODEL = Kind("a whole model, not an adapter file of minipeft or a folder with an adapter",
             hint="T5.from_pretrained(folder) reads the folder of a T5")
GGUF = Kind("a GGUF file of llama.cpp's", hint="Load the adapter from which it was made")
PICKLE = Kind("a pickle, which can run code when it is opened",
              hint="minipeft reads safetensors alone. If you trust it, convert it in the library that wrote it")
MLX = Kind("an adapter of mlx-lm's",
           hint="It is not read. As a folder of PEFT's it would have lora_A = lora_a^T and lora_B = lora_b^T, because "
                "mlx-lm has lora_a [in, r] and lora_b [r, out], and lora_alpha = scale * r, because scale is not "
                "divided by r")
KOHYA = Kind("an adapter of kohya's sd-scripts",
             hint="It is not read. lora_down is PEFT's lora_A and lora_up its lora_B; .alpha is lora_alpha, and the "
                  "rank of the module where it is missing")
TORCHTUNE = Kind("an adapter of torchtune's",
                 hint="It is not read. Let torchtune write it for PEFT: that also permutes the rows of q and k, so new "
                      "names alone would be wrong")
LYCORIS = Kind("an adapter of LyCORIS's",
               hint="It is not read. Its names stand for other layouts than PEFT's: dora_scale, for example, lies on "
                    "the other axis")
LORALIB = Kind("a state dict of loralib's",
               hint="It has no configuration, and so no alpha. Write an adapter_config.json with r, lora_alpha and "
                    "target_modules beside it, and name the tensors as PEFT does")

# by the keys of the tensors, in this order: LyCORIS has kohya's prefixes, mlx-lm and torchtune have PEFT's words
_KEYS = (
    (LYCORIS, r"^(?!base_model\.).*\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|dora_scale|oft_blocks|"
              r"on_input)$|^lycoris_"),
    (KOHYA, r"\.lora_(up|down|mid)\.weight$|^lora_(unet|te\d?|transformer)_"),
    (TORCHTUNE, r"(^|\.)layers\.\d+\.(attn|mlp|self_attn|cross_attn)\.\w+\.lora_[ab]\.weight$"),
    (MLX, r"\.lora_[ab]$"),
    (ADAPTERHUB, r"\.(adapters|loras|prefix_tunings|refts|prompt_tunings)\.[^.]+\."),
    (PEFT, r"^(\w+\.)*base_model\.|\.lora_(A|B|embedding_[AB])\.(\w+\.)?weight$|^prompt_embeddings$"),
    (LORALIB, r"(^|\.)lora_[AB]$"))
_OF_A_MODEL = (r"(^|\.)(shared|embed_tokens|wte|tok_embeddings|embeddings|lm_head)\.weight$|"
               r"\.quant_state\.bitsandbytes__\w+$")  # a shard of a model in 4 bits may hold layers alone
# folders, by the files that the library writes
_WEIGHTS = {"adapter_model.safetensors": PEFT, "adapter_model.bin": PEFT, "adapter.safetensors": ADAPTERHUB,
            "pytorch_adapter.bin": ADAPTERHUB, "adapters.safetensors": MLX, "adapters.npz": MLX}
_MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def recognize(path: str | os.PathLike) -> Kind:
    """The kind of `path`, a file or a folder; a symbolic link is followed. Raises nothing, whatever lies there."""
    where = Path(path)
    try:
        return _folder(where) if where.is_dir() else _file(where)
    except OSError:  # it may not be read, for example; its reader says so
        return UNKNOWN
    except ValueError:  # a name that no file can have
        return MISSING


def by_keys(keys: Iterable[str]) -> Kind | None:
    """The kind of file that has tensors with these `keys`; None if they say nothing."""
    keys = list(keys)
    found = next((kind for kind, pattern in _KEYS if any(re.search(pattern, key) for key in keys)), None)
    return found if found or not any(re.search(_OF_A_MODEL, key) for key in keys) else MODEL


def _folder(where: Path) -> Kind:
    names = sorted(os.listdir(where))
    config = _config(where / CONFIG) if CONFIG in names else {}
    foreign = _by_config(config)
    weights = next((name for name in _WEIGHTS if name in names), None)
    if foreign is not None:
        return foreign
    if weights is not None:
        found = _by_header(where / weights)
        odd = (MLX, TORCHTUNE, KOHYA, MODEL, *(() if "peft_type" in config else (LYCORIS,)))  # whatever its name is
        return found if found is not None and found in odd else _WEIGHTS[weights]
    if CONFIG in names:
        return PEFT
    if any(name in names for name in _MODELS):
        return MODEL
    return _other_folder(where, names)


def _other_folder(where: Path, names: list[str]) -> Kind:
    """A folder without a file that a library gives a name of its own."""
    inside = [name for name in names if (where / name / CONFIG).is_file()]
    if inside:
        return dataclasses.replace(NO_ADAPTER, hint=f"There are adapters in folders of it: {', '.join(inside[:5])}. "
                                                    f"Pass one of these, or a list of some")
    files = [name for name in names if (where / name).is_file()][:_MANY]
    kinds = [_file(where / name) for name in files]
    found = next((kind for kind in kinds if kind not in (OURS, UNKNOWN, PART)), None)
    if found is not None:
        return found
    ours = [name for name, kind in zip(files, kinds) if kind is OURS]
    if ours:
        return dataclasses.replace(NO_ADAPTER, hint=f"There are adapter files of minipeft in it: "
                                                    f"{', '.join(ours[:5])}. Pass one of these, or a list of some")
    return NO_ADAPTER if names else EMPTY


def _by_config(config: Mapping[str, Any]) -> Kind | None:
    """The kind of a folder with such a configuration; None if it does not decide."""
    if "peft_type" in config:
        return None  # another library may write such a file, too; then the keys say so
    if "fine_tune_type" in config or "lora_parameters" in config:
        return MLX
    return ADAPTERHUB if isinstance(config.get("config"), dict) else None


def _config(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path, LIMIT)
    except (OSError, ValueError):  # damaged, or a link to nothing: the reader says so
        return {}


def _file(where: Path) -> Kind:
    if not where.exists():
        return MISSING
    if not where.is_file():
        return UNKNOWN
    with open(where, "rb") as file:
        first = file.read(max(len(LFS), 9))
    if first[:len(LFS)] == LFS:
        return LFS_POINTER
    if first[:4] == b"GGUF":
        return GGUF
    # a safetensors file may begin with the same two bytes: then they are the length of its header, which begins with {
    if where.suffix in _PICKLES or first[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05") and first[8:9] != b"{":
        return PICKLE
    if where.name in (CONFIG, "head_config.json"):
        return PART
    found = _by_header(where)
    return UNKNOWN if found is None else PART if found in (PEFT, ADAPTERHUB) else found


def _by_header(path: Path) -> Kind | None:
    """The kind of a safetensors file, by its header; None if it says nothing, and for another or a damaged file."""
    if path.suffix in _PICKLES:
        return None
    try:
        said = read_metadata(path).get("format", "")
        if said.startswith("minipeft"):
            return OURS if said == "minipeft-adapter" else CHECKPOINT
        return by_keys(read_shapes(path))
    except (OSError, ValueError):
        return None
