"""Every name that the package asks of `xp` exists in CuPy, and where there is a GPU a model trains on it.

`import cupy` works on a machine without a GPU, so the first half needs only the package. Where it is not installed
these tests are skipped, unless MINIPEFT_REQUIRE_CUPY=1 says that they must run.
"""
from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.engine.tensor import value_and_grad
from minipeft.backend import to_host
from tests.models_under_test import FAMILIES, Case
from tests.strict_namespace import strict

PACKAGE = Path(minipeft.__file__).parent
_METHODS = """T all any argmax argmin argsort astype clip copy cumsum dtype get item itemsize max mean min nbytes ndim
prod ravel reshape round shape size squeeze sum swapaxes transpose""".split()  # of arrays; the strict one has these too


@pytest.fixture(scope="module")
def cupy() -> Any:
    """CuPy, with or without a GPU."""
    if os.environ.get("MINIPEFT_REQUIRE_CUPY") == "1":
        return importlib.import_module("cupy")
    return pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)


@pytest.fixture
def gpu(cupy: Any) -> Any:
    """CuPy with a GPU."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    assert count > 0
    return cupy


def names_used(source: str) -> set[str]:
    """The dotted names that are looked up on `xp` in a module: {"exp", "add.reduceat"}."""
    found: set[str] = set()
    inner: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        parts, at = [], node
        while isinstance(at, ast.Attribute) and node not in inner:
            parts.append(at.attr)
            at = at.value
            inner.add(at)
        if parts and isinstance(at, ast.Name) and at.id == "xp":
            found.add(".".join(reversed(parts)))
    return found


def all_names_used() -> dict[str, list[str]]:
    """{name: the files that use it}."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in names_used(path.read_text("utf-8")):
            found.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    return found


def test_names_are_collected_with_what_follows_them():
    source = "y = xp.exp(x) + f(xp.add.reduceat(a, [xp.zeros(2)])).sum()\nxpp.no(np.no)\nx.xp.no"
    assert names_used(source) == {"exp", "add.reduceat", "zeros"}
    assert {"exp", "where", "zeros_like", "concatenate"} <= set(all_names_used())


def test_xp_is_never_imported_under_another_name_nor_taken_apart():
    """Else the collection above would miss names."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert all(a.asname is None for a in node.names if a.name == "xp"), path
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "vars", "dir"):
                assert getattr(node.args[0], "id", "") != "xp", path
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                assert getattr(node.value, "id", "") != "xp", path


def test_every_name_used_exists_in_the_strict_namespace():
    """Its functions may do less: add.reduceat and the like are guarded where they are used."""
    missing = {name: files for name, files in all_names_used().items() if name.split(".")[0] not in strict.offered}
    assert not missing


def test_every_name_used_exists_in_cupy(cupy):
    missing = {}
    for name, files in all_names_used().items():
        at = cupy
        for part in name.split("."):
            at = getattr(at, part, None)
        if at is None and name != "add.reduceat":  # since version 14; `backend.segment_sum` does not ask for it
            missing[name] = files
    assert not missing


def test_the_strict_namespace_offers_nothing_that_cupy_lacks(cupy):
    assert not [name for name in strict.offered if not hasattr(cupy, name)]
    assert not [name for name in _METHODS if not hasattr(cupy.ndarray, name)]
    assert not [name for name in _METHODS if not hasattr(strict.ndarray, name)]


def test_what_the_list_of_differences_says_cupy_lacks_it_lacks(cupy):
    assert not [name for name in ("erf", "errstate", "frompyfunc", "spacing") if hasattr(cupy, name)]


def test_cupy_refuses_object_arrays(cupy):
    with pytest.raises(ValueError, match="[Uu]nsupported dtype"):
        cupy.zeros(2, dtype=object)


def test_cupy_without_a_gpu_is_refused_with_the_reason(cupy):
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        with pytest.raises(RuntimeError, match="CuPy is installed but finds no usable GPU"), minipeft.use("cupy"):
            pytest.fail("the block ran")
    else:
        pytest.skip("there is a GPU")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_on_a_gpu_is_that_of_numpy_within_rounding(gpu, family):
    """float64; the bound is that of a whole model (`minipeft.laws.bounds`), because a GPU sums in another order."""
    from minipeft.laws.bounds import close_gradients
    found = []
    for library in ("numpy", "cupy"):
        case = Case((family, "mixture"), 2, 5, "float64", 3)
        model, batch = case.model(), case.batch()
        lora = case.attach(model)
        model.to(library)
        with minipeft.use(library):
            loss, grads = value_and_grad(lambda: model.loss(**batch, rng=numpy.random.default_rng(0)), lora.parameters)
            minipeft.AdamW(1e-3).step(lora.parameters, grads)
            ids = model.generate(batch["input_ids"], batch["attention_mask"], 5)
            found.append((loss, {name: to_host(g) for name, g in grads.items()}, ids.tolist()))
    (loss, grads, ids), (gpu_loss, gpu_grads, gpu_ids) = found
    assert abs(gpu_loss - loss) <= 1e-12 * abs(loss) and gpu_ids == ids
    assert close_gradients(gpu_grads, grads, 2.0 ** -53) is None
