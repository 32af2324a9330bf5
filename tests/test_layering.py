"""The one-way order of the package, read from its imports; and what an import of it brings along.

    examples, __main__ -> tools | conformance -> formats -> laws -> train | models | quant | operations | methods
    operations -> methods;   models -> quant
    train | models | methods -> attaching -> nn -> engine.ops -> engine -> files, backend;   files -> atomic

Models and training need nothing of attaching.
"""
from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

import minipeft

PACKAGE = Path(minipeft.__file__).parent
ROOT = PACKAGE.parent
_BASE = ["files", "atomic", "backend", "checks"]
_BELOW_ATTACHING = ["nn", "engine.ops", "engine", *_BASE]
_BELOW_LAWS = ["train", "models", "quant", "operations", "methods", "attaching", *_BELOW_ATTACHING]
MAY_IMPORT: dict[str, list[str]] = {
    "checks": [],
    "backend": [],
    "atomic": [],
    "files": ["atomic", "backend", "checks"],
    "engine": _BASE,
    "engine.ops": ["engine", *_BASE],
    "nn": ["engine.ops", "engine", *_BASE],
    "attaching": _BELOW_ATTACHING,
    "methods": ["attaching", *_BELOW_ATTACHING],
    "operations": ["methods", "attaching", *_BELOW_ATTACHING],
    "models": ["quant", *_BELOW_ATTACHING],
    "train": _BELOW_ATTACHING,
    "quant": ["attaching", *_BELOW_ATTACHING],
    "laws": _BELOW_LAWS,
    "formats": ["laws", *_BELOW_LAWS],
    "conformance": ["formats", "laws", *_BELOW_LAWS],
    "deprecated": [],
    "tools": ["formats", "laws", *_BELOW_LAWS],
    "__main__": ["tools", "conformance", "formats", "laws", *_BELOW_LAWS],
}

# Work on the host that a folder whose arrays live in `xp` may do with NumPy, besides naming types: {file: why}.
TYPES = {"ndarray", "generic", "dtype", "integer", "floating", "float32", "float64", "int64", "random",
         "random.Generator", "random.default_rng"}
SEEDED = {"random.RandomState": "methods/vera.py"}  # another library's numbers, from a key that the method names
HOST_WORK = {
    "engine/check.py": ({"isfinite"}, "the gradients that are compared are on the host"),
    "engine/ops/fused.py": ({"argsort", "diff", "flatnonzero"},
                            "token ids are sorted on the host, where they were checked"),
    "engine/ops/linalg.py": ({"broadcast_shapes", "ndindex"}, "shapes, and a loop over Fractions"),
    "engine/ops/overflow.py": ({"errstate"}, "NumPy's warning of an overflow that is mended in the next line"),
    "engine/ops/primitives.py": ({"cumsum", "unique"}, "sizes of the parts of a concatenation; whether indices repeat"),
    "methods/delta.py": ({"arange", "array", "full"}, "which rows are trained is known on the host, once"),
    "attaching/load.py": ({"array_equal", "errstate", "isfinite"},
                          "the numbers of a file are checked before they move"),
    "methods/mask.py": ({"argsort", "concatenate", "cumsum", "flatnonzero", "isfinite", "unique", "zeros"},
                        "indices are made and checked on the host, once"),
    "attaching/trained_on.py": ({"ascontiguousarray"}, "checksums are of bytes on the host"),
    "methods/lora_inits.py": ({"ascontiguousarray", "concatenate", "diagonal", "linalg", "linalg.qr", "where"},
                              "initial values are drawn on the host"),
    "methods/pissa.py": ({"isfinite", "linalg", "linalg.svd", "sqrt"}, "a weight is decomposed on the host"),
    "methods/oft.py": ({"flatnonzero", "ones", "triu"}, "where the numbers of Q lie is known on the host, once"),
    "methods/selective.py": ({"diff"}, "the indices of a file are checked on the host"),
    "methods/vera.py": ({"random.RandomState"}, "another library's numbers are drawn on the host"),
    "methods/neighbors.py": ({"argsort", "full", "linalg", "linalg.norm", "nan", "take_along_axis", "where"},
                             "a report about a few vectors, in float64"),
}


def sources() -> dict[str, Path]:
    """{dotted name below minipeft: file}, packages by their own name ("ops" is ops/__init__.py)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, known: dict[str, Path]) -> Iterator[str]:
    """The modules below minipeft that a module imports, anywhere in it; "" is minipeft itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "minipeft":
                    yield alias.name[len("minipeft."):]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the direction"
            if node.module and node.module.split(".")[0] == "minipeft":
                origin = node.module[len("minipeft."):]
                for alias in node.names:
                    inside = f"{origin}.{alias.name}".lstrip(".")
                    yield inside if inside in known else origin


def graph() -> dict[str, set[str]]:
    """{module: what it imports}, without minipeft/__init__.py."""
    known = sources()
    return {module: set(imports(path.read_text("utf-8"), module, known)) for module, path in known.items() if module}


def layer(module: str) -> str:
    """The folder right below minipeft; the ops are a layer of their own above the engine."""
    return "engine.ops" if module.startswith("engine.ops") else module.split(".")[0]


def against_the_order(edges: dict[str, set[str]]) -> list[str]:
    """Every import that goes up or sideways between layers."""
    return [f"{a} imports {b or 'minipeft'}" for a, targets in edges.items() for b in sorted(targets)
            if layer(a) != layer(b) and layer(b) not in MAY_IMPORT[layer(a)]]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module):]
        if module in done:
            return []
        found = next((c for b in sorted(edges.get(module, ())) if (c := visit(b, [*path, module]))), [])
        done.add(module)
        return found

    return next((c for module in edges if (c := visit(module, []))), [])


def test_every_module_belongs_to_a_layer_of_the_design():
    assert {layer(module) for module in graph()} <= set(MAY_IMPORT)


def test_imports_go_one_way():
    assert against_the_order(graph()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(graph()) == []


def test_the_order_of_layers_is_itself_without_a_circle():
    assert circle({name: set(below) for name, below in MAY_IMPORT.items()}) == []


@pytest.mark.parametrize("module, line", [
    ("nn.weight", "from minipeft.methods.lora import LoRA"), ("models.t5", "import minipeft.train.loop"),
    ("engine.ops.fused", "from minipeft.nn import weight"), ("engine.tensor", "from minipeft.engine.ops import add"),
    ("train.loop", "from minipeft.models.t5 import T5"), ("methods.lora", "from minipeft.quant.nf4 import NF4"),
    ("backend", "from minipeft.files import read_tensors"), ("methods.lora", "import minipeft"),
    ("methods.lora", "def late():\n    from minipeft.train.loop import fit"),
    ("nn.site", "from minipeft import methods"),
    ("attaching.load", "from minipeft.methods import lora")])
def test_an_import_against_the_order_is_seen(module, line):
    assert against_the_order({module: set(imports(line, module, sources()))})


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"a"}}) == ["a"]


def test_the_public_names_are_names_and_nothing_else():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    kinds = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef)
    assert all(isinstance(node, kinds) for node in tree.body)
    assert sorted(minipeft.__all__, key=str.lower) == minipeft.__all__
    assert all(hasattr(minipeft, name) for name in minipeft.__all__)


def test_examples_import_the_package_and_it_does_not_import_them():
    assert list((ROOT / "examples").rglob("*.py"))
    for path in sources().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("examples", "tests")], path


def test_a_source_file_stays_under_300_lines():
    assert {name: n for name, path in sources().items()
            if (n := len(path.read_text("utf-8").splitlines())) >= 300} == {}


def attributes_of(source: str, name: str) -> set[str]:
    """{"argsort", "random.default_rng"}: what a module looks up on `name`, prefixes included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        parts, at = [], node
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value
        if parts and isinstance(at, ast.Name) and at.id == name:
            found.add(".".join(reversed(parts)))
    return found


def test_random_numbers_come_from_a_host_generator_and_never_from_the_backend_or_a_hidden_state():
    for path in sources().values():
        source = path.read_text("utf-8")
        assert not {n for n in attributes_of(source, "xp") if n.split(".")[0] == "random"}, path
        seeded = {n for n, file in SEEDED.items() if path == PACKAGE / file}
        assert {n for n in attributes_of(source, "numpy") if n.startswith("random.")} <= TYPES | seeded, path
        for node in ast.walk(ast.parse(source)):
            assert not (isinstance(node, ast.Import) and any(a.name == "random" for a in node.names)), path


def test_numpy_has_one_name_and_is_never_taken_apart():
    """Or the rules about `numpy.` would miss something."""
    for path in sources().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert all(a.asname is None for a in node.names if a.name.split(".")[0] == "numpy"), path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "numpy", path


def test_where_arrays_live_in_xp_numpy_only_names_types_and_does_the_host_work_that_is_listed():
    found = {}
    for module, path in sources().items():
        if layer(module) in ("engine", "engine.ops", "methods", "attaching"):
            if work := attributes_of(path.read_text("utf-8"), "numpy") - TYPES:
                found[str(path.relative_to(PACKAGE))] = work
    assert found == {file: work for file, (work, _) in HOST_WORK.items()}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                          timeout=60).stdout


def test_an_import_brings_nothing_but_numpy_safetensors_and_the_standard_library():
    code = "import json, sys{}; print(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    brought = set(json.loads(run(code.format(", minipeft")))) - set(json.loads(run(code.format(""))))
    assert {"minipeft", "numpy", "safetensors"} <= brought
    others = brought - sys.stdlib_module_names
    # What numpy and safetensors bring themselves (compiled extensions may register helpers) is theirs.
    theirs = set(json.loads(run(code.format(", numpy, safetensors"))))
    assert others - theirs == {"minipeft"}


def test_an_import_loads_neither_laws_nor_kit_nor_tools_which_are_there_when_they_are_asked_for():
    code = ("import sys, minipeft; late = ('minipeft.laws', 'minipeft.conf', 'minipeft.tools');"
            "print([n for n in sys.modules if n.startswith(late)], callable(minipeft.laws.check),"
            "callable(minipeft.trace), callable(minipeft.tools.plan), hasattr(minipeft, 'nothing'))")
    assert run(code) == "[] True True True False\n"


def test_an_import_starts_no_thread_and_imports_neither_numpy_random_nor_cupy():
    code = ("import sys, threading, minipeft\n"
            "print(threading.active_count(), 'numpy.random' in sys.modules, 'cupy' in sys.modules)")
    assert run(code) == "1 False False\n"
