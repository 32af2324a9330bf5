"""`minipeft.load`: an adapter file of ours, or a folder of PEFT's or AdapterHub's."""
from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Sequence, overload

from minipeft.attaching import load as ours
from minipeft.attaching.attach import put
from minipeft.attaching.attachment import Attachment
from minipeft.checks import shown
from minipeft.formats.adapterhub import files as adapterhub
from minipeft.formats.peft import files as peft
from minipeft.formats.recognized import UNKNOWN, Kind, recognize
from minipeft.nn.module import Model

PathLike = str | os.PathLike


@overload
def load(model: Model, path: PathLike, force: bool = False, name: str | None = None,
         as_peft: bool = False) -> Attachment: ...


@overload
def load(model: Model, path: list[PathLike] | tuple[PathLike, ...], force: bool = False,
         name: Sequence[str] | None = None, as_peft: bool = False) -> list[Attachment]: ...


def load(model: Model, path: Any, force: bool = False, name: Any = None, as_peft: bool = False) -> Any:
    """The attachment in the adapter file or folder `path`, attached to `model` and plugged.

    path: an adapter file of ours (`Attachment.save`), or a folder of PEFT's or AdapterHub's; it is recognized by its
    contents (`formats.recognized`). A list of files, or a list of folders, gives a list of attachments, and `name` is
    then a list too. They are plugged together or not at all: folders in the order of the list, each file above those
    that it was trained on. name: by default that in the file, or that of the folder.

    A file of ours names the weights that it was trained on, and is refused on others; force=True skips this check
    alone (see `attaching.load`). Folders do not name them, and are not checked for it. as_peft: where PEFT departs from
    the paper of a method, do as PEFT does; without it such a folder is refused. It means nothing for files of ours, and
    for folders of AdapterHub's, whose reader, `formats.adapterhub.load`, has an option of its own.

    Raises ValueError, naming the file or folder, and leaves the model as it was, as `formats.peft.load`,
    `formats.adapterhub.load` and `attaching.load` do; and for formats of other tools, a whole model, a pickle, and a
    list of both files and folders. Raises FileNotFoundError if there is nothing to load. Warns of keys and fields that
    were changed in order to be read, and of an adapter that was trained on a relative of this base, such as the weights
    from which it was quantized."""
    several = isinstance(path, (list, tuple))
    paths = list(path) if several else [path]
    kinds = [recognize(p) if isinstance(p, (str, os.PathLike)) else UNKNOWN for p in paths]
    for p, kind in zip(paths, kinds):
        _refuse(p, kind)
    folders = [kind.reader in ("peft", "adapterhub") for kind in kinds]
    if not any(folders):
        found = ours.ready(model, path, force, name)
        for note in found.notes:
            warnings.warn(note, stacklevel=2)
        return found.put()
    if not all(folders):
        other = folders.index(False)
        raise ValueError(f"{paths[folders.index(True)]} is a folder of another library's, and {paths[other]} is "
                         f"{kinds[other].name}; expected a list of either: load them in two calls")
    names = [name] * len(paths) if name is None or not several else list(name)
    if len(names) != len(paths):
        raise ValueError(f"{len(paths)} folders and {len(names)} names; expected a name for each")
    attachments = [_read(model, Path(p), kind, n, as_peft) for p, kind, n in zip(paths, kinds, names)]
    for p, attachment in zip(paths, attachments):
        for note in attachment.source.notes:  # first, for those who turn warnings into errors
            warnings.warn(f"{p}: {note}", stacklevel=2)
    _together(model, paths, attachments)
    return attachments if several else attachments[0]


def _refuse(path: Any, kind: Kind) -> None:
    """Raises for a kind that nothing reads. A file of an unknown kind is left to the reader of our files."""
    if kind.reader is None and kind.hint:
        raise (ValueError if kind.exists else FileNotFoundError)(f"{path} is {kind.name}. {kind.hint}")


def _read(model: Model, directory: Path, kind: Kind, name: str | None, as_peft: bool) -> Attachment:
    if kind.reader == "peft":
        return peft.read(model, directory, name, as_peft)
    return adapterhub.read(model, directory, name)


def _together(model: Model, paths: list, attachments: list[Attachment]) -> None:
    """Plug the attachments in their order, all or none. Raises ValueError, naming the folders, for two of one name, and
    where one cannot lie above another."""
    names = [attachment.name for attachment in attachments]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    said = ", ".join(str(path) for path in paths)
    if twice:
        raise ValueError(f"{said}: two of the folders are called {shown(twice[0])}; pass name=[...], one for each")
    try:
        put(model, attachments)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None
