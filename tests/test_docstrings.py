"""Every public callable of the package says what it takes, in which shapes, and what it raises.

A name is public when no part of it begins with an underscore; `__call__` is public too. For each class, function and
method of the modules of minipeft:

1. it has a docstring, its own or that of the method which it overrides;
2. the docstring names every parameter that is not self-evident. The docstring of a class may name the parameters of
   `__init__` and the fields of a dataclass, and an override may leave them to the method that it overrides;
3. an op, and a function whose annotations mention an array or a Tensor, gives a shape such as `[batch, time, d_model]`;
4. a function that raises, or calls a private function of its module that raises, says so.

"as in `name`" in a docstring takes over what the docstring of that name says. A property needs a docstring alone. So do
the public functions and classes of the conformance kit, except laws and planted bugs, whose decorators hold a title.
"""
from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
import types
from pathlib import Path
from typing import Any, Iterator

import pytest

import minipeft

# Parameters that need no words: {name: (its annotations, why)}. See also `self_evident`.
SELF_EVIDENT = {
    "rng": (r".*", "a numpy.random.Generator everywhere; None draws nothing and drops nothing"),
    "model": (r"Any|\w+", "the model that the function is about"),
    "method": (r"Any|Method", "the method that the function is about"),
    "dtype": (r"Any|str|object", "a NumPy dtype, or its name"),
    "seed": (r"int", "of all random numbers"),
    "path": (r".*(PathLike|Path|str).*", "the file that the function reads or writes"),
    "directory": (r".*(PathLike|Path|str).*", "the folder that the function reads or writes"),
    "params": (r"(Mapping|dict)\[str, (Leaf|Parameter)\]", "{name: Parameter}, as `select` gives it"),
    "config": (r"\w*Config|Any", "the configuration of the model"),
    "optimizer": (r"AdamW", "the only optimizer"),
    "attention_mask": (r"Any", "the mask of input_ids, as everywhere"),
    "spec": (r"str", "the format specification of Python's `format`"),
}
# The letters of the papers and of this library, for arrays whose shape the docstring gives.
GIVEN_BY_SHAPE = {"x", "ids", "g", "a", "b"}

ARRAYS = re.compile(r"\b(Array|Tensor|ndarray)\b")
_SIZE = r"(?:\.{2,3}|[*\w][\w*+/ -]*)"
SHAPE = re.compile(rf"(?<![\w)\]])\[{_SIZE}(?:,\s*{_SIZE})*\]|\b(?:any|the same|another) shape\b|\b[Ee]lementwise\b"
                   r"|\bshapes? of\b|\bscalar\b")
SAYS_RAISES = re.compile(r"\b[Rr]aises?\b|\b[A-Z]\w*(?:Error|Exception)\b")
REFERENCE = re.compile(r"\bas(?:\sin)?\s`([\w.]+)`|\bas in a (call)\b")


@dataclasses.dataclass(frozen=True)
class Definition:
    """A public class, function or method. doc: its docstring. others: docstrings that may say the rest. raising: the
    private functions of its module that raise."""

    name: str
    node: Any
    doc: str
    others: str = ""
    raising: frozenset = frozenset()
    is_property: bool = False


def public(name: str) -> bool:
    """Whether no part of a dotted name begins with an underscore."""
    return not any(part.startswith("_") and part != "__call__" for part in name.split("."))


def doc_of(value: Any) -> str:
    """The docstring of a class or function, or the one that it inherits, but not from Python's own classes."""
    if isinstance(value, type):
        doc = value.__doc__ or ""
        return "" if doc.startswith(f"{value.__name__}(") else inspect.cleandoc(doc)  # that is how dataclasses begin
    doc = inspect.getdoc(value) or ""
    return "" if doc == type.__call__.__doc__ else doc


def raises(node: ast.AST) -> bool:
    """Whether it raises an exception of its own: no bare `raise`, and no NotImplementedError of an interface."""
    return any(isinstance(n, ast.Raise) and n.exc is not None and "NotImplementedError" not in ast.unparse(n.exc)
               for n in ast.walk(node))


def private_that_raise(tree: ast.Module) -> frozenset:
    """The names of the private functions and methods of a module that raise."""
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("_")
                     and not n.name.startswith("__") and raises(n))


def definitions(module: types.ModuleType, source: str) -> Iterator[Definition]:
    """The public definitions of a module, in its order."""
    tree = ast.parse(source)
    raising = private_that_raise(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and public(node.name) and not decorated(node, "overload"):
            doc = doc_of(getattr(module, node.name))
            yield Definition(node.name, node, doc, referred(doc, module, None), raising)
        elif isinstance(node, ast.ClassDef) and public(node.name):
            yield from of_class(node, getattr(module, node.name), module, raising)


def of_class(node: ast.ClassDef, cls: type, module: types.ModuleType, raising: frozenset) -> Iterator[Definition]:
    """A class, its public methods and its properties."""
    above = " ".join(doc_of(base) for base in cls.__mro__[1:-1])
    init = " ".join(vars(cls)[n].__doc__ or "" for n in ("__init__", "__post_init__") if n in vars(cls))
    doc = doc_of(cls)
    yield Definition(node.name, node, doc, f"{init} {above} {referred(doc, module, cls)}", raising)
    protocol = any(getattr(base, "id", "") == "Protocol" for base in node.bases)
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and public(part.name) and not decorated(part, "setter"):
            if protocol and re.search(rf"\b{part.name}\b", doc_of(cls)):
                continue  # the docstring of a protocol describes its members
            overridden = [base for base in cls.__mro__[1:] if part.name in vars(base)]
            others = " ".join(doc_of(inspect.getattr_static(base, part.name)) for base in overridden)
            doc = doc_of(inspect.getattr_static(cls, part.name)) or doc_of(getattr(cls, part.name)) or others
            others += " ".join(doc_of(base) for base in overridden)  # a contract stands in the class
            yield Definition(f"{node.name}.{part.name}", part, doc, f"{others} {referred(doc, module, cls)}", raising,
                             decorated(part, "property") or decorated(part, "cached_property"))


def referred(doc: str, module: types.ModuleType, cls: type | None) -> str:
    """The docstrings of the names that a docstring refers to by "as in `name`", "as `name`" or "as in a call"."""
    found = []
    for name, call in REFERENCE.findall(doc):
        parts = ["__call__"] if call else name.split(".")
        starts = [(start, parts) for start in (cls, module, minipeft) if hasattr(start, parts[0])]
        for value, rest in [*starts, (beside(module, parts[0]), parts[1:])][:1]:
            for part in rest:
                value = getattr(value, part, None)
            found.append(doc_of(value) if rest else "")
    return " ".join(found)


def beside(module: types.ModuleType, name: str) -> Any:
    """The module of this name in the folder of a module, or None."""
    try:
        return importlib.import_module(f"{module.__name__.rpartition('.')[0]}.{name}")
    except ImportError:
        return None


def decorated(node: Any, name: str) -> bool:
    """Whether a decorator of this name stands above it."""
    return any(isinstance(n, (ast.Name, ast.Attribute)) and (n.id if isinstance(n, ast.Name) else n.attr) == name
               for decorator in node.decorator_list for n in ast.walk(decorator))


def parameters(node: Any) -> dict[str, str]:
    """{parameter: its annotation} of a function, of the `__init__` of a class, or of the fields of a dataclass."""
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is not None:
            return parameters(init)
        if not decorated(node, "dataclass"):
            return {}
        return {n.target.id: ast.unparse(n.annotation) for n in node.body if isinstance(n, ast.AnnAssign)
                and isinstance(n.target, ast.Name) and public(n.target.id)
                and "ClassVar" not in ast.unparse(n.annotation) and "init=False" not in ast.unparse(n)}
    args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    args += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    bound = 1 if args and args[0].arg in ("self", "cls") else 0
    return {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in args[bound:] if public(a.arg)}


def self_evident(name: str, annotation: str) -> bool:
    """Whether a parameter needs no words: one of SELF_EVIDENT, or one that is called like its type (slot: Slot)."""
    annotation = annotation.strip("'\"").removesuffix(" | None")
    known = name in SELF_EVIDENT and re.fullmatch(SELF_EVIDENT[name][0], annotation)
    return bool(known) or annotation.split(".")[-1].lower() == name.replace("_", "")


def bare(annotation: ast.AST | None) -> str:
    """An annotation without its maps and functions: a map of arrays, and a function of arrays, have no one shape."""
    class Stripped(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            name = ast.unparse(node.value)
            return ast.Name("object") if name in ("Mapping", "dict", "Callable", "type") else self.generic_visit(node)

        def visit_Constant(self, node: ast.Constant) -> ast.AST:
            return self.visit(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else node

    return "" if annotation is None else ast.unparse(Stripped().visit(ast.parse(ast.unparse(annotation), mode="eval")))


def needs_shape(node: Any) -> bool:
    """Whether it is an op, or takes or returns an array by its annotations."""
    if isinstance(node, ast.ClassDef):
        return False
    args = [*node.args.args, *node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    return decorated(node, "op") or any(ARRAYS.search(bare(a)) for a in [node.returns, *(a.annotation for a in args)])


def may_raise(node: Any, raising: frozenset) -> bool:
    """Whether it raises itself, or calls a private function of its module that does. Of a class, its constructor."""
    if isinstance(node, ast.ClassDef):
        return any(may_raise(n, raising) for n in node.body if isinstance(n, ast.FunctionDef)
                   and n.name in ("__init__", "__post_init__"))
    called = {n.func.id if isinstance(n.func, ast.Name) else n.func.attr for n in ast.walk(node)
              if isinstance(n, ast.Call) and isinstance(n.func, (ast.Name, ast.Attribute))}
    return raises(node) or bool(called & raising)


def missing(d: Definition) -> list[str]:
    """What the docstring of a definition lacks."""
    if not re.search(r"\w", d.doc):
        return ["a docstring"]
    if d.is_property:
        return []
    said, found = f"{d.doc} {d.others}", []
    shaped = SHAPE.search(said)
    for name, annotation in parameters(d.node).items():
        if not (re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said) or self_evident(name, annotation)
                or name in GIVEN_BY_SHAPE and shaped):
            found.append(f"the parameter {name}")
    if needs_shape(d.node) and not shaped:
        found.append("a shape")
    if may_raise(d.node, d.raising) and not SAYS_RAISES.search(said):
        found.append("what it raises")
    return found


def lacking(name: str, only_docstrings: bool = False) -> list[str]:
    """"module:definition: what is missing" for each public definition of a module that lacks something."""
    module = importlib.import_module(name)
    source = Path(module.__file__ or "").read_text("utf-8")
    found = [(d, missing(d)) for d in definitions(module, source)]
    if only_docstrings:
        found = [(d, [what for what in lacks if what == "a docstring"]) for d, lacks in found
                 if "." not in d.name and not titled(d.node)]
    return [f"{name}:{d.name}: {', '.join(lacks)}" for d, lacks in found if lacks]


def titled(node: Any) -> bool:
    """Whether a decorator gives it a title, as laws and planted bugs of the kit have it: @law("A1", "V: ...")."""
    return any(isinstance(decorator, ast.Call) and any(isinstance(a, ast.Constant) and isinstance(a.value, str)
                                                       for a in decorator.args) for decorator in node.decorator_list)


MODULES = ["minipeft", *(name for _, name, _ in pkgutil.walk_packages(minipeft.__path__, "minipeft.") if public(name))]
KIT = [name for name in MODULES if name.startswith("minipeft.conformance")]
LIBRARY = [name for name in MODULES if name not in KIT]


@pytest.mark.parametrize("name", LIBRARY)
def test_every_public_callable_says_what_it_takes_and_what_it_raises(name):
    found = lacking(name)
    assert not found, "missing in docstrings:\n" + "\n".join(found)


@pytest.mark.parametrize("name", KIT)
def test_every_public_function_and_class_of_the_kit_has_a_docstring(name):
    found = lacking(name, only_docstrings=True)
    assert not found, "missing:\n" + "\n".join(found)


def test_the_whole_package_is_walked():
    assert {"minipeft.methods.lora", "minipeft.engine.ops.fused", "minipeft.train.loop", "minipeft.laws.moves"} <= set(
        LIBRARY)
    assert len(LIBRARY) > 60 and len(KIT) > 40
    seen = [f"{name}:{d.name}" for name in LIBRARY for d in definitions(
        importlib.import_module(name), Path(importlib.import_module(name).__file__ or "").read_text("utf-8"))]
    assert {"minipeft.engine.ops.fused:linear", "minipeft.attaching.attachment:Attachment.off",
            "minipeft.nn.attention:Attention.__call__", "minipeft.attaching.load:load"} <= set(seen)
    assert len(seen) > 400


# ---- the checker itself


def checked(source: str) -> list[str]:
    """What is missing in a module of this source."""
    source = textwrap.dedent(source)
    module = types.ModuleType("minipeft.sample")
    vars(module).update({"dataclasses": dataclasses, "op": lambda f: f, "Any": Any})
    exec(compile(source, "sample", "exec", dont_inherit=True), vars(module))
    return [f"{d.name}: {', '.join(m)}" for d in definitions(module, source) if (m := missing(d))]


@pytest.mark.parametrize("source, expected", [
    ("def f(): pass", ["f: a docstring"]),
    ("def _f(): pass", []),
    ('def f(size): """A sentence."""', ["f: the parameter size"]),
    ('def f(size): """Sizes and resize."""', ["f: the parameter size"]),
    ('def f(size): """Of a size."""', []),
    ('def f(*parts, **options): """A sentence."""', ["f: the parameter parts, the parameter options"]),
    ('def f(rng): """A sentence."""', []),
    ('def f(seed: str): """A sentence."""', ["f: the parameter seed"]),
    ('def f(x: Any) -> "Array": """A sentence about x."""', ["f: a shape"]),
    ('def f(x: "Array"): """x[i] and (a) [b > c]."""', ["f: a shape"]),
    ('def f(x: "Array"): """[batch, heads * d]."""', []),
    ('def f(x: "Array"): """x, elementwise."""', []),
    ('def f(arrays: "dict[str, Array]"): """Of arrays."""', []),
    ('def f(arrays: "list[Array]"): """Of arrays."""', ["f: a shape"]),
    ('@op\ndef f(x): """A sentence about x."""', ["f: a shape"]),
    ('def f():\n    """A sentence."""\n    raise ValueError("no")', ["f: what it raises"]),
    ('def f():\n    """Raises ValueError."""\n    raise ValueError("no")', []),
    ('def f():\n    """A sentence."""\n    raise NotImplementedError', []),
    ('def f():\n    """A sentence."""\n    try:\n        pass\n    except OSError:\n        raise', []),
    ('def _g(): raise ValueError("no")\ndef f():\n    """A sentence."""\n    _g()', ["f: what it raises"]),
    ('class C:\n    """A sentence."""\n    def __init__(self, size): pass', ["C: the parameter size"]),
    ('class C:\n    """A sentence."""\n    def __init__(self, size): """Of a size."""', []),
    ('class C:\n    """A sentence."""\n    def __init__(self): raise ValueError("no")', ["C: what it raises"]),
    ('class C:\n    def __init__(self): pass', ["C: a docstring"]),
    ('@dataclasses.dataclass\nclass C:\n    size: int', ["C: a docstring"]),
    ('@dataclasses.dataclass\nclass C:\n    """A sentence."""\n    size: int', ["C: the parameter size"]),
    ('class C:\n    """A sentence."""\n    def __call__(self): pass', ["C.__call__: a docstring"]),
    ('class C:\n    """A sentence."""\n    @property\n    def size(self): pass', ["C.size: a docstring"]),
    ('class C:\n    """A sentence."""\n    @classmethod\n    def of(cls, size): """A sentence."""',
     ["C.of: the parameter size"]),
    ('class B:\n    """A sentence."""\n    def f(self, size): """Of a size."""\n'
     'class C(B):\n    """A sentence."""\n    def f(self, size): pass', []),
    ('class B:\n    """A sentence."""\n    def f(self, size): """Of a size."""\n'
     'class C(B):\n    """A sentence."""\n    def f(self, size, shape): """Another sentence."""',
     ["C.f: the parameter shape"]),
    ('class B:\n    """A sentence."""\nclass C(B): pass', ["C: a docstring"]),
    ('def f(size): """Of a size."""\ndef g(size): """As f, as in `f`."""', []),
    ('def f(size): """Of a size."""\ndef g(size): """As in h, as in `h`."""', ["g: the parameter size"])])
def test_a_docstring_that_lacks_something_is_seen(source, expected):
    assert checked(source) == expected
