"""The file of the best weights: what it holds, whom it fits, and what `restore` refuses."""
from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.files import read_metadata, read_tensors, write_tensors
from tests.train import tiny


def case(kind: str = "lora", dtype: str = "float32") -> tuple[Any, Any]:
    """A model, and what is trained in it: an attachment, two, or all weights."""
    model = tiny.model(dtype=dtype)
    if kind == "full":
        return model, tiny.everything(model)
    attachments = [minipeft.attach(model, method, numpy.random.default_rng(0), name) for name, method in (
        ("one", minipeft.LoRA(2)), ("two", minipeft.PromptTuning(2)))[:2 if kind == "two" else 1]]
    if kind == "mask":
        attachments[0].remove()
        mask = minipeft.top(minipeft.magnitude(model.base_parameters), 0.05)
        attachments = [minipeft.attach(model, minipeft.Selective(mask=mask), numpy.random.default_rng(0), "one")]
    return model, attachments[0] if kind != "two" else {n: p for a in attachments for n, p in a.parameters.items()}


def parameters(chosen: Any) -> dict[str, Any]:
    return dict(getattr(chosen, "parameters", chosen))


def trained(kind: str, path: Path, steps: int = 3, best_at: int = 2) -> tuple[Any, Any, Any]:
    """A model that was trained for so many steps, of which one was the best; what was trained; the best bits."""
    model, chosen = case(kind)
    optimizer, bits = minipeft.AdamW(lr=1e-2), []

    def evaluate() -> float:
        bits.append(tiny.bits(parameters(chosen)))
        return -abs(optimizer.made - best_at)

    minipeft.fit(model, chosen, tiny.batches(), steps=steps, optimizer=optimizer, eval_every=1, evaluate=evaluate,
                 best=path)
    return model, chosen, bits[best_at - 1]


@pytest.mark.parametrize("kind", ["lora", "mask", "two", "full"])
def test_restore_puts_the_best_weights_back(tmp_path: Path, kind: str) -> None:
    model, chosen, best = trained(kind, tmp_path / "best")
    arrays = {name: p.data for name, p in parameters(chosen).items()}
    assert tiny.bits(parameters(chosen)) != best
    minipeft.restore(chosen, tmp_path / "best")
    assert tiny.bits(parameters(chosen)) == best
    assert not any(p.data is arrays[name] for name, p in parameters(chosen).items()), "the old numbers are told apart"
    kept = read_metadata(tmp_path / "best")["format"]
    assert kept == ("minipeft-adapter" if kind in ("lora", "mask") else "minipeft-parameters")
    if kind == "lora":
        other = tiny.model()
        assert tiny.bits(minipeft.load(other, tmp_path / "best").parameters) == best
        twin = minipeft.attach(tiny.model(), minipeft.LoRA(2), numpy.random.default_rng(5), "called-otherwise")
        minipeft.restore(twin, tmp_path / "best")
        assert list(tiny.bits(twin.parameters)["params"].values()) == list(best["params"].values())
        minipeft.restore(parameters(chosen), tmp_path / "best")  # by name, too
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("change, message", [
    (lambda t, m: t.pop("encoder.0.ff.wi.weight"), "it holds no 'encoder.0.ff.wi.weight'"),
    (lambda t, m: t.update(more=numpy.ones(2)), "it holds 'more', which is not one of these parameters"),
    (lambda t, m: t.update({"x" * 5000: numpy.ones(2)}), "it holds 'xxx"),
    (lambda t, m: t.update({"embedding.weight": t["embedding.weight"][1:]}), r"is float32 \[11, 8\]; expected flo"),
    (lambda t, m: t.update({"embedding.weight": t["embedding.weight"].astype("float64")}), "is float64 .*; expected"),
    (lambda t, m: t["embedding.weight"].__setitem__((0, 0), numpy.nan), "embedding.weight holds NaN or infinity"),
    (lambda t, m: m.update(format="minipeft"), "not a file of parameters: its metadata says format 'minipeft'"),
    (lambda t, m: m.clear(), "not a file of parameters: its metadata says format None")])
def test_a_file_that_does_not_fit_is_refused_before_anything_changes(tmp_path: Path, change: Any, message: str) -> None:
    _, chosen, _ = trained("full", tmp_path / "best")
    tensors, metadata = read_tensors(tmp_path / "best")
    metadata = {"format": metadata["format"]}
    change(tensors, metadata)
    write_tensors(tmp_path / "best", tensors, metadata)
    before = tiny.bits(chosen)
    with pytest.raises(ValueError, match=f"best.*{message}") as found:
        minipeft.restore(chosen, tmp_path / "best")
    assert tiny.bits(chosen) == before and len(str(found.value)) < 1000


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    _, chosen, _ = trained("full", tmp_path / "best")
    content = bytearray((tmp_path / "best").read_bytes())
    content[-5] ^= 1
    (tmp_path / "best").write_bytes(bytes(content))
    before = tiny.bits(chosen)
    with pytest.raises(ValueError, match="best"):
        minipeft.restore(chosen, tmp_path / "best")
    assert tiny.bits(chosen) == before


def test_a_mask_of_other_indices_does_not_fit(tmp_path: Path) -> None:
    trained("mask", tmp_path / "best")
    model = tiny.model()
    shapes = read_tensors(tmp_path / "best")[0]
    other = {name[:-len(".indices")]: (array + 1) % 8 for name, array in shapes.items() if name.endswith(".indices")}
    if not other:  # whatever the method calls them
        pytest.skip("no constants in the file")
    attachment = minipeft.attach(model, minipeft.Selective(mask={n: numpy.unique(a) for n, a in other.items()}),
                                 numpy.random.default_rng(0), "one")
    with pytest.raises(ValueError, match="best"):
        minipeft.restore(attachment, tmp_path / "best")


@pytest.mark.parametrize("params", [None, [], "x", {"a": numpy.ones(2)}, minipeft.LoRA(2)], ids=str)
def test_what_holds_no_parameters_is_refused(tmp_path: Path, params: Any) -> None:
    trained("full", tmp_path / "best")
    with pytest.raises(TypeError, match="params is .*; expected an attachment, or"):
        minipeft.restore(params, tmp_path / "best")


def test_an_old_best_file_is_written_over_and_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "best").write_text("old")
    model, params = case("full")

    def spoil() -> float:
        params["embedding.weight"].data[0, 0] = numpy.nan
        return 1.0

    with pytest.raises(FloatingPointError, match="embedding.weight holds NaN or infinity: .*best is not written"):
        minipeft.fit(model, params, tiny.batches(), steps=1, evaluate=spoil, best=tmp_path / "best")
    assert (tmp_path / "best").read_text() == "old"
    trained("full", tmp_path / "best")
    assert read_metadata(tmp_path / "best")["format"] == "minipeft-parameters"
