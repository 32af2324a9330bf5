"""The seam between NumPy and CuPy: choosing a backend, moving arrays, and the list of differences.

No GPU is needed: the strict namespace refuses what CuPy would refuse or do silently otherwise, and whole lives of both
models run under it. What it computes is NumPy's arithmetic, so results are held against NumPy's bit for bit.
"""
from __future__ import annotations

import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft import backend
from minipeft.engine import ops
from minipeft.engine.tensor import Leaf, Tensor, value_and_grad
from minipeft.backend import namespace, scalar, segment_sum, to_device, to_host, xp
from tests.models_under_test import FAMILIES, VOCAB, Case
from tests.strategies import draw_array, fractions, seeds
from tests.strict_namespace import strict


class Portable:
    """NumPy under another name: for `backend.segment_sum`, whose order of additions NumPy has to itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)


portable: Any = Portable()


def moved(*numbers: Any, dtype: Any = "float64") -> Any:
    return strict.asarray(numpy.array(numbers, dtype=dtype))


# ---- the list of differences, and what the strict namespace makes of each item

def _scatter() -> None:
    moved(1, 2, 3)[moved(0, 0, dtype=int)] = moved(4, 5)


def _scatter_add() -> None:
    a = moved(1, 2, 3)
    a[moved(2, -1, dtype=int)] += 1.0


def _scatter_pairs() -> None:
    strict.zeros((2, 2))[moved(0, 0, dtype=int), moved(1, 1, dtype=int)] = 1.0


def _in_place() -> None:
    a = moved(1, 2)
    a += numpy.ones(2)


def _host_into_device() -> None:
    moved(1, 2)[0:1] = numpy.ones(1)


def _device_into_host() -> None:
    numpy.ones(2)[0:1] = moved(1)


REFUSED: dict[int, list[tuple[Callable[[], Any], type[Exception]]]] = {
    1: [(lambda: moved(1, 2, 3)[moved(0, 3, dtype=int)], IndexError),
        (lambda: moved(1, 2, 3)[moved(-4, dtype=int)], IndexError),
        (lambda: strict.zeros((2, 3))[moved(0, dtype=int), moved(3, dtype=int)], IndexError),
        (lambda: strict.zeros((2, 3))[:, None, moved(3, dtype=int)], IndexError),
        (lambda: strict.zeros((2, 3))[..., moved(3, dtype=int)], IndexError)],
    2: [(_scatter, ValueError), (_scatter_add, ValueError), (_scatter_pairs, ValueError),
        (lambda: strict.add.at, AttributeError)],
    3: [(lambda: strict.random, AttributeError)],
    5: [(lambda: numpy.asarray(moved(1)), TypeError), (lambda: numpy.array([moved(1), moved(2)]), TypeError),
        (lambda: numpy.exp(moved(1)), TypeError), (lambda: numpy.sum(moved(1)), TypeError),
        (lambda: numpy.concatenate([moved(1), moved(2)]), TypeError),
        (lambda: numpy.where(moved(1) > 0, 1, 2), TypeError), (_device_into_host, TypeError)],
    6: [(lambda: moved(1) + numpy.ones(1), TypeError), (lambda: numpy.ones(1) + moved(1), TypeError),
        (lambda: numpy.array(1.0) * moved(1), TypeError), (lambda: numpy.ones((1, 1)) @ moved(1), TypeError),
        (lambda: moved(1) == numpy.ones(1), TypeError), (_in_place, TypeError), (_host_into_device, TypeError),
        (lambda: strict.where(moved(1) > 0, numpy.ones(1), moved(1)), TypeError),
        (lambda: strict.stack([moved(1), numpy.ones(1)]), TypeError), (lambda: strict.exp(numpy.ones(1)), TypeError),
        (lambda: strict.sum(numpy.ones(1)), TypeError), (lambda: moved(1, 2)[numpy.array([0])], TypeError),
        (lambda: strict.add(moved(1), moved(1), out=numpy.ones(1)), TypeError)],
    7: [(lambda: strict.asarray(fractions([1], 2)), ValueError), (lambda: moved(1).astype(object), ValueError),
        (lambda: strict.zeros(2, dtype=object), ValueError), (lambda: moved(1) + Fraction(1, 2), TypeError)],
    8: [(lambda: strict.erf, AttributeError), (lambda: strict.errstate, AttributeError),
        (lambda: strict.frompyfunc, AttributeError), (lambda: strict.spacing, AttributeError)],
    9: [(lambda: moved(1, dtype="float32") * numpy.float64(2), TypeError),
        (lambda: numpy.float64(2) * moved(1, dtype="float32"), TypeError),
        (lambda: moved(1, dtype="float32") * moved(1), TypeError),
        (lambda: moved(1, dtype="float32") * moved(1, dtype="int64"), TypeError),
        (lambda: strict.where(moved(1) > 0, moved(1, dtype="float32"), numpy.float64(0)), TypeError),
        (lambda: strict.concatenate([moved(1, dtype="float32"), moved(1)]), TypeError)],
    10: [(lambda: strict.add.reduceat, AttributeError)],
}
NOT_REFUSED = {
    2: "test_the_embedding_gradient_adds_rows_in_a_fixed_order_without_a_scatter_add",
    3: "test_both_backends_start_from_the_same_bits",
    4: "test_reductions_of_the_strict_namespace_are_arrays_of_no_axes",
}


def test_every_difference_is_refused_or_has_its_own_test():
    assert backend.__doc__ is not None
    listed = {int(n) for n in re.findall(r"^ *(\d+)\. ", backend.__doc__, re.MULTILINE)}
    assert listed == set(range(1, max(listed) + 1))
    assert listed == set(REFUSED) | set(NOT_REFUSED)
    assert all(name in globals() for name in NOT_REFUSED.values())


@pytest.mark.parametrize("item, snippet, error", [(i, s, e) for i in REFUSED for s, e in REFUSED[i]])
def test_the_strict_namespace_refuses(item, snippet, error):
    with pytest.raises(error):
        snippet()


def test_the_strict_array_is_no_ndarray_and_offers_no_way_around():
    a = moved(1, 2)
    assert not isinstance(a, numpy.ndarray)
    for name in ("__array_interface__", "__array_struct__", "__dlpack__", "__buffer__", "ctypes", "data", "flat"):
        assert not hasattr(a, name)
    with pytest.raises(TypeError):
        memoryview(a)


def test_what_cupy_allows_the_strict_namespace_allows():
    a = moved(1, 2, dtype="float32")
    for result in (a * 2.0, 2.0 * a, numpy.float32(2) * a, a * numpy.float32(2), strict.multiply(a, 2)):
        assert type(result) is strict.ndarray and result.dtype == "float32" and result.get().tolist() == [2, 4]
    assert float(a[0]) == 1 and int(a.sum()) == 3 and bool(a[0] > 0) and len(a) == 2
    a[moved(1, 0, dtype=int)] = moved(5, 6, dtype="float32")
    assert a.get().tolist() == [6, 5]
    a[a > 5] = 0.0
    assert a.get().tolist() == [0, 5] and a[moved(-1, -1, dtype=int)].get().tolist() == [5, 5]


def test_reductions_of_the_strict_namespace_are_arrays_of_no_axes():
    a = moved(1, 2)
    for result in (a.sum(), a[0], a.max(), a @ a, strict.sum(a)):
        assert type(result) is strict.ndarray and result.shape == ()


def test_a_host_array_comes_out_as_a_copy():
    a = moved(1, 2)
    host = a.get()
    host[0] = 9
    assert a.get().tolist() == [1, 2]
    source = numpy.ones(2)
    b = strict.asarray(source)
    source[0] = 9
    assert b.get().tolist() == [1, 1] and strict.asarray(b) is b


# ---- the differences that cannot be refused

@given(st.lists(st.integers(0, 6), max_size=30), seeds())
def test_the_embedding_gradient_adds_rows_in_a_fixed_order_without_a_scatter_add(ids, seed):
    """The same on every backend up to the order within a run; in what order the *ids* come does not matter beyond
    that of their rows. Exact on Fractions."""
    g = draw_array(seed, (len(ids), 2), "fraction")
    expected = fractions(numpy.zeros((7, 2)), 1)
    for i, row in zip(ids, g):
        expected[i] += row
    table = Leaf(draw_array(1, (7, 2), "fraction"))
    where = numpy.array(ids, dtype=numpy.int64)
    if ids:
        loss, grads = value_and_grad(lambda: ops.sum(ops.mul(ops.embedding(table, where), g)), {"t": table})
        assert (grads["t"] == expected).all()
    floats = Leaf(numpy.ones((7, 2)))

    def step() -> Tensor:
        with_ids = to_device(where) if namespace() is strict else where
        return ops.sum(ops.mul(ops.embedding(floats, with_ids), to_device(g.astype(float))))

    found = []
    for library in (numpy, portable, strict):
        with minipeft.use(library):
            floats.data = to_device(to_host(floats.data))
            found.append(to_host(value_and_grad(step, {"t": floats})[1]["t"]))
    assert all((f == expected.astype(float)).all() for f in found)  # halves: every order is exact


@given(st.lists(st.integers(1, 12), max_size=5), seeds())
def test_segments_are_summed_within_their_rounding_and_exactly_on_fractions(lengths, seed):
    n = sum(lengths)
    starts = numpy.cumsum([0] + lengths[:-1])[:len(lengths)].astype(int)
    exact = draw_array(seed, (n, 3), "fraction")
    wanted = [exact[s:s + k].sum(axis=0).tolist() for s, k in zip(starts, lengths)]
    assert segment_sum(exact, starts).tolist() == wanted
    rows = draw_array(seed, (n, 3))
    for library in (numpy, portable, strict):
        with minipeft.use(library):
            found = to_host(segment_sum(to_device(rows), starts))
        assert found.shape == (len(lengths), 3)
        for s, k, total in zip(starts, lengths, found):
            magnitude = abs(rows[s:s + k]).sum(axis=0)
            assert (abs(total - [float(sum(map(Fraction, column))) for column in rows[s:s + k].T])
                    <= k * 2.0 ** -53 * magnitude).all()  # gamma_(k-1), and half an ulp of the exact sum


def test_portable_and_strict_sum_segments_to_the_same_bits():
    rows, starts = draw_array(0, (23, 4), "float32"), numpy.array([0, 1, 9, 20])
    found = []
    for library in (portable, strict):
        with minipeft.use(library):
            found.append(to_host(segment_sum(to_device(rows), starts)).tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_start_from_the_same_bits(family):
    """Random numbers are drawn by a host Generator: initial weights, LoRA's A and dropout are the same everywhere."""
    found = []
    for library in (numpy, strict):
        with minipeft.use(library):
            model = FAMILIES[family](numpy.random.default_rng(0), "float32")
            lora = minipeft.attach(model, minipeft.LoRA(2), numpy.random.default_rng(1))
            mask = ops.dropout(to_device(numpy.ones((3, 4), "float32")), 0.5, numpy.random.default_rng(2))
            arrays = {**model.state(), **{n: p.data for n, p in lora.parameters.items()}, "dropout": mask.data}
            assert all(isinstance(a, library.ndarray) for a in arrays.values())
            found.append({name: to_host(a).tobytes() for name, a in arrays.items()})
    assert found[0] == found[1]


# ---- choosing a backend

def test_use_holds_for_its_block_and_nests():
    assert namespace() is numpy
    with minipeft.use(strict) as found:
        assert found is strict and namespace() is strict and type(xp.zeros(2)) is strict.ndarray
        with minipeft.use("numpy"):
            assert namespace() is numpy and type(xp.zeros(2)) is numpy.ndarray
        assert namespace() is strict
    assert namespace() is numpy


def test_use_ends_with_an_exception():
    with pytest.raises(KeyError), minipeft.use(strict):
        raise KeyError
    assert namespace() is numpy


def test_use_holds_for_its_thread_alone():
    seen = []
    with minipeft.use(strict):
        thread = threading.Thread(target=lambda: seen.append(namespace()))
        thread.start()
        thread.join()
    assert seen == [numpy]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backend is 'torch'; expected one of numpy, cupy, or an array namespace"):
        with minipeft.use("torch"):
            pytest.fail("the block ran")
    with pytest.raises(ValueError, match="backend is 'jax'"):
        FAMILIES["post-LN"](numpy.random.default_rng(0), "float32").to("jax")


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install 'minipeft\[cuda12\]' or 'minipeft\[cuda13\]'"):
        with minipeft.use("cupy"):
            pytest.fail("the block ran")
    assert namespace() is numpy


def test_without_a_gpu_the_error_says_so(monkeypatch):
    def count() -> int:
        raise OSError("no CUDA-capable device is detected")

    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count)))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    with pytest.raises(RuntimeError, match="CuPy is installed but finds no usable GPU .no CUDA-capable device"):
        backend.resolve("cupy")


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A new interpreter without CuPy."""
    start = "import sys; sys.modules['cupy'] = None\nimport minipeft\nfrom minipeft.backend import namespace, xp\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60,
                          env={"PYTHONPATH": str(Path(minipeft.__file__).parents[1]), **environment})


@pytest.mark.parametrize("value, code, words", [
    ("numpy", "print(namespace().__name__, xp.ones(2).sum())", "numpy 2.0"),
    ("", "print(namespace().__name__)", "numpy"),
    ("tpu", "xp.ones(2)", "ValueError: backend is 'tpu'; expected one of numpy, cupy"),
    ("cupy", "xp.ones(2)", "ImportError: backend 'cupy' needs CuPy: pip install"),
    ("cupy", "\nwith minipeft.use('numpy'): print(xp.ones(2).sum())", "2.0"),
])
def test_the_environment_variable_sets_the_backend_that_a_process_starts_with(value, code, words):
    result = fresh(code, MINIPEFT_BACKEND=value)
    assert words in result.stdout + result.stderr
    assert ("Error" in words) == (result.returncode != 0)


def test_an_import_asks_for_no_backend():
    assert fresh("print('imported')", MINIPEFT_BACKEND="cupy").stdout == "imported\n"


def test_keep_heap_says_whether_it_was_done():
    """In a process of its own, because the setting is for the whole process."""
    code = "import ctypes\nprint(minipeft.keep_heap())\nctypes.CDLL = None\n"
    assert fresh(code).stdout in ("True\n", "False\n")
    missing = "import ctypes\ndef absent(name): raise OSError(name)\nctypes.CDLL = absent\nprint(minipeft.keep_heap())"
    assert fresh(missing).stdout == "False\n"


# ---- moving

def test_arrays_that_are_there_already_are_not_copied():
    host, device = numpy.ones(2), moved(1, 1)
    assert to_host(host) is host and to_device(host) is host and to_device(device, strict) is device
    with minipeft.use(strict):
        assert to_device(device) is device and to_device(host, numpy) is host
        assert type(to_device(host)) is strict.ndarray
    assert type(to_host(device)) is numpy.ndarray and to_host(device).tolist() == [1, 1]
    assert type(to_host(numpy.float32(2))) is numpy.ndarray and to_host([1, 2]).tolist() == [1, 2]


def test_a_scalar_takes_the_kind_of_the_array_beside_it():
    for like in (numpy.ones(2, "float32"), moved(1, dtype="float32"), Tensor(numpy.ones(2, "float32"))):
        assert type(scalar(Fraction(1, 2), like)) is numpy.float32
    assert type(scalar(2, numpy.ones(2))) is numpy.float64
    assert scalar(Fraction(1, 3), fractions([1], 2)) == Fraction(1, 3)


def test_a_model_on_one_backend_run_on_another_says_what_to_do():
    model = FAMILIES["post-LN"](numpy.random.default_rng(0), "float32")
    ids = numpy.ones((1, 2), int)
    words = r"the model's arrays are numpy arrays, the backend in use is strict: model\.to\(backend\)"
    with minipeft.use(strict), pytest.raises(TypeError, match=words):
        model(ids, ids)
    model.to(strict)
    with pytest.raises(TypeError, match="the model's arrays are strict arrays, the backend in use is numpy"):
        model(ids, ids)


# ---- whole lives under the strict namespace

PAIRS = [([2, 3, 4], [5, 6, 1]), ([7, 8], [9, 1]), ([10, 11, 12, 3], [4, 1]), ([5], [6, 7, 8, 1]), ([9, 2], [3, 1])]


def host(arrays: Any) -> dict[str, Any]:
    """{name: array or Parameter} -> {name: (dtype, shape, bytes)}."""
    found = {name: to_host(a.data if isinstance(a, Tensor) else a) for name, a in arrays.items()}
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in found.items()}


def life(library: Any, family: str, dtype: str, lora: bool, folder: Path) -> dict[str, Any]:
    """Everything that one may do with a model, as what came out of it on the host; all on one backend."""
    folder.mkdir()
    seen: dict[str, Any] = {}
    case = Case((family, "mixture" if lora else "q and v"), 2, 5, dtype, 3)
    model, batch = case.model().to(library), case.batch()
    with minipeft.use(library):
        seen["base"] = host(model.state())
        attachment = minipeft.attach(model, minipeft.LoRA(2, 5, 0.25, case.method.where), numpy.random.default_rng(7))
        params = attachment.parameters if lora else minipeft.select(model, "^[^@]*$")

        def step() -> Tensor:
            return model.loss(**batch, rng=numpy.random.default_rng(5))

        optimizer = minipeft.AdamW(1e-2)
        for _ in range(2):
            loss, grads = value_and_grad(step, params)
            assert all(isinstance(g, library.ndarray) and g.dtype == dtype for g in grads.values())
            optimizer.step(params, grads)
            seen.setdefault("steps", []).append((loss, host(grads), host(params)))

        def train(steps: int) -> Any:
            return minipeft.fit(model, params, minipeft.Batches(PAIRS, 2, 1), steps=steps, accumulate=2, clip=0.5,
                                optimizer=minipeft.AdamW(1e-2), checkpoint=folder / "run", checkpoint_every=1,
                                log=folder / "log", evaluate=lambda: model.loss(**batch).data.item(), progress=False)

        begun = {name: p.data.copy() for name, p in params.items()}
        train(2)
        for name, p in params.items():
            p.data = begun[name]                          # where the run began; the checkpoint has the rest
        history = train(4)
        seen["resumed"] = (history.step, history.losses, history.scores, host(params))
        seen["logits"] = host({"": model(batch["input_ids"], model.shift_right(batch["labels"]),
                                         batch["attention_mask"])})
        for cached in (True, False):
            ids = model.generate(batch["input_ids"], batch["attention_mask"], 5, use_cache=cached)
            assert type(ids) is numpy.ndarray
            seen[f"generated, cache {cached}"] = ids.tolist()
        if lora:
            attachment.save(folder / "adapter")
            attachment.merge()
            seen["merged"] = host({"": model.encode(batch["input_ids"])})
            attachment.unmerge()
            attachment.unplug()
            minipeft.load(model, folder / "adapter", name="again")
            seen["loaded"] = host({"": model.encode(batch["input_ids"])})
            adapters = ["again", None, ("lora", "again"), "lora"]
            seen["routed"] = host({"": model.encode(batch["input_ids"], adapter=adapters)})
        model.save_pretrained(folder / "model", merged=False)
        twin = type(model).from_pretrained(folder / "model", dtype)
        seen["clone"] = host({"": twin.clone().encode(batch["input_ids"])})
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora, dtype", [(False, "float32"), (True, "float32"), (True, "float64")])
def test_a_whole_life_under_the_strict_namespace_is_numpys_bit_for_bit(family, lora, dtype, tmp_path):
    assert (life(strict, family, dtype, lora, tmp_path / "strict")
            == life(portable, family, dtype, lora, tmp_path / "portable"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_under_the_strict_namespace_is_that_of_plain_numpy_bit_for_bit(family):
    case = Case((family, "mixture"), 2, 5, "float32", 4)
    model, batch = case.model(), case.batch()
    case.attach(model)
    shifted = model.shift_right(batch["labels"])
    before = host({**model.state(), "logits": model(batch["input_ids"], shifted, rng=numpy.random.default_rng(0))})
    with minipeft.use(strict):
        model.to(strict)
        assert host({**model.state(), "logits": model(batch["input_ids"], shifted,
                                                      rng=numpy.random.default_rng(0))}) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_goes_to_another_backend_and_back_with_everything_attached(family):
    """Parameters, kept bases, merged constants and what is off: all move, and come back as they were."""
    case = Case((family, "q and v"), 2, 5, "float32", 4)
    model, batch = case.model(), case.batch()
    merged, plugged, off = (case.attach(model, name, i) for i, name in enumerate(("one", "two", "three"), 2))
    off.unplug()
    merged.merge()
    optimizer = minipeft.AdamW(1e-2)
    pieces = {**model.state(), **merged.parameters, **plugged.parameters, **off.parameters}

    def pieces_now() -> dict[str, Any]:
        constants = {f"{name} merged": e.merged for name, slot in model.slots.items() for e in slot.merged}
        return {**model.state(), **merged.parameters, **plugged.parameters, **off.parameters, **constants}

    def train() -> tuple:
        loss, grads = value_and_grad(lambda: model.loss(**batch), plugged.parameters)
        optimizer.step(plugged.parameters, grads)
        return loss, host(grads)

    with minipeft.use(portable):
        train()
    before = host(pieces_now())
    assert len(before) > len(pieces)
    assert model.to(strict) is model and optimizer.to(strict) is optimizer
    assert all(isinstance(a.data if isinstance(a, Tensor) else a, strict.ndarray) for a in pieces_now().values())
    with minipeft.use(strict):
        train()
        there = host(pieces_now())
    model.to("numpy")
    optimizer.to("numpy")
    assert all(isinstance(a.data if isinstance(a, Tensor) else a, numpy.ndarray) for a in pieces_now().values())
    assert host(pieces_now()) == there and there != before
    again = Case((family, "q and v"), 2, 5, "float32", 4)
    model = again.model()
    merged, plugged, off = (again.attach(model, name, i) for i, name in enumerate(("one", "two", "three"), 2))
    off.unplug()
    merged.merge()
    optimizer = minipeft.AdamW(1e-2)
    with minipeft.use(portable):
        train()
        train()
    assert host(pieces_now()) == there


def test_ids_out_of_range_are_refused_before_they_reach_a_device():
    with minipeft.use(strict):
        model = FAMILIES["t5 v1.0"](numpy.random.default_rng(0), "float32")
        for bad in (VOCAB, -1):
            with pytest.raises(ValueError, match="expected ids from 0 to"):
                model(numpy.array([[1, bad]]), numpy.array([[1]]))
            with pytest.raises(ValueError, match="expected ids from 0 to"):
                model.loss(numpy.array([[1]]), numpy.array([[1, bad]]))


def test_ids_masks_and_labels_may_live_on_either_side():
    case = Case(("t5 v1.1", "q and v"), 2, 5, "float32", 0)
    model, batch = case.model().to(strict), case.batch()
    with minipeft.use(strict):
        there = {name: strict.asarray(a) for name, a in batch.items()}
        assert float(model.loss(**batch)) == float(model.loss(**there))
        ids = model.generate(there["input_ids"], there["attention_mask"], 3)
        assert (ids == model.generate(batch["input_ids"], batch["attention_mask"], 3)).all()


def test_gradients_are_checked_under_the_strict_namespace_too():
    with minipeft.use(strict):
        p = Leaf(to_device(draw_array(0, (3, 2))))
        minipeft.check_gradients(lambda: ops.sum(ops.gelu(ops.mul(p, p))), {"p": p}, numpy.random.default_rng(0))


@pytest.mark.parametrize("wrong", [5, None, object()])
def test_what_is_no_backend_is_refused(wrong):
    with pytest.raises(TypeError, match="expected 'numpy', 'cupy' or an array namespace"):
        with minipeft.use(wrong):
            pass


def test_a_device_can_be_named():
    assert isinstance(to_device([1.0, 2.0], "numpy"), numpy.ndarray)
