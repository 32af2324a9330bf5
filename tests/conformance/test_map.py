"""The map of the folder, in its docstring, is one of this folder."""
import re
from pathlib import Path

from minipeft import conformance

FOLDER = Path(conformance.__file__).parent


def test_every_module_is_on_the_map_and_what_is_on_it_is_there():
    text = "\n".join(line[24:] for line in conformance.__doc__.split("what they are for:\n\n")[1].splitlines())
    listed = {name for names in re.findall(r"(?:^|\.  )([\w /]+):", text, re.M) for name in names.split()}
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == listed - {"vectors/"}


def test_the_files_to_begin_with_are_there_and_the_map_is_short():
    begin = re.search("Where to begin:(.*?)The other files", conformance.__doc__, re.S)[1]
    assert all((FOLDER / name).exists() for name in re.findall(r"[a-z_/]+(?:\.py|/)", begin))
    assert len(conformance.__doc__.splitlines()) < 40
