"""QA-LoRA in PEFT's files. PEFT runs it on GPTQ layers alone, so the equation of its source is stated here again."""
import json
import warnings

import numpy
import pytest

import minipeft
from minipeft import T5, LoRA, QALoRA, attach
from minipeft.files import read_tensors
from minipeft.formats.peft import save
from minipeft.laws.models import moved
from tests.formats.edited import CONFIG, WEIGHTS, edited
from tests.methods.golden import FIXTURES

QV = "adapters/lora_qv"  # r = 3, on q and v; d_in = 16 everywhere
RNG = numpy.random.default_rng
POOLED = "outputs differ by as much as the bases do"
PEFT = dict(pooling="mean * groups")


def base(dtype="float64"):
    return T5.from_pretrained(FIXTURES / "t5" / "v11", dtype)


def pooled_by(size, columns=None):
    """What makes the A [r, d_in] of a folder the A [r, d_in / size] of a QA-LoRA; `columns`, if given, in its place."""
    return lambda tensors: {key: array[:, :columns or array.shape[1] // size] if "lora_A" in key else array
                            for key, array in tensors.items()}


def folder(tmp_path, size=4, name="theirs", **fields):
    """A folder as PEFT writes it for GPTQ layers."""
    return edited(QV, tmp_path / name, {"use_qalora": True, "qalora_group_size": size, **fields}, pooled_by(size))


def peft_forward(x, A, B, scaling, size):
    """QALoraLinearVariant.forward of PEFT 0.21.2, without the result of the quantized layer that it is added to.
    x [batch, time, in_features]; pooled_features is the number of groups."""
    x_flat = x.reshape(-1, x.shape[-1])
    batch_size, in_features = x_flat.shape
    pooled_features = in_features // size
    x_pooled = x_flat.reshape(batch_size, pooled_features, size).mean(axis=2)
    x_pooled_scaled = x_pooled * pooled_features
    delta = x_pooled_scaled @ A.T @ B.T * scaling
    return delta.reshape(*x.shape[:-1], delta.shape[-1])


@pytest.mark.parametrize("size, fields", [(4, {}), (2, {}), (8, {"use_rslora": True, "r": 3})])
def test_a_folder_gives_what_the_source_of_peft_computes_and_is_written_back(size, fields, tmp_path):
    model, path = base(), folder(tmp_path, size, **fields)
    with pytest.warns(UserWarning, match=POOLED):
        attachment = minipeft.load(model, path)
    config, theirs = json.loads((path / CONFIG).read_text()), read_tensors(path / WEIGHTS)[0]
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if fields else config["r"])
    assert attachment.method.group == size and attachment.method.pooling == "mean * groups"
    for name, slot in attachment.places.items():
        key = f"base_model.model.{model.to_hf_name(name).removesuffix('.weight')}"
        A, B = (theirs[f"{key}.lora_{leaf}.weight"].astype("float64") for leaf in "AB")
        x = RNG(0).standard_normal((2, 3, slot.shape[1]))
        wanted = peft_forward(x, A, B, scaling, size)
        assert abs(wanted).max() > 1e-3
        assert abs(slot.project(x).data - slot.base.project(x).data - wanted).max() < 1e-14 * abs(wanted).max() * x.size
    save(attachment, tmp_path / "ours")
    ours = read_tensors(tmp_path / "ours" / WEIGHTS)[0]
    assert ours.keys() == theirs.keys()
    assert all(numpy.array_equal(ours[key].astype("float32"), array) for key, array in theirs.items())
    written = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert {field: written[field] for field in config} == config


def test_one_that_was_trained_here_is_written_and_read_again_with_ranks_beyond_the_number_of_groups(tmp_path):
    model = base()
    method = QALoRA(3, 5, 8, 0.25, any_rank=True, rank_pattern={"decoder": 1}, **PEFT)  # L = 2
    attachment = moved(attach(model, method, RNG(0), "a"), RNG(1))
    save(attachment, tmp_path / "a")
    with pytest.warns(UserWarning, match="in training, PEFT drops inputs before they are pooled"):
        again = minipeft.load(base(), tmp_path / "a")
    assert {k: v.tobytes() for k, v in again.tensors.items()} == {k: v.tobytes() for k, v in attachment.tensors.items()}
    found = again.method
    assert (found.rank, found.alpha, found.group, found.dropout, found.pooling) == (3, 5, 8, 0.25, "mean * groups")
    ids = numpy.array([[3, 4, 5]])
    assert not numpy.array_equal(model(ids, ids).data, base()(ids, ids).data)
    assert numpy.array_equal(model(ids, ids).data, again.model(ids, ids).data)


def test_use_qalora_on_layers_that_are_not_gptq_made_an_ordinary_lora_and_is_read_as_one(tmp_path):
    """PEFT takes no notice of the field there: A has a column for each input."""
    plain, flagged = (edited(QV, tmp_path / name, fields) for name, fields in (
        ("plain", {}), ("flagged", {"use_qalora": True, "qalora_group_size": 4})))
    wanted = minipeft.load(base(), plain)
    with pytest.warns(UserWarning, match="PEFT pools on GPTQ layers alone, so this is an ordinary LoRA"):
        found = minipeft.load(base(), flagged)
    assert found.method == wanted.method and type(found.method) is LoRA
    save(found, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["use_qalora"] is False


@pytest.mark.parametrize("fields, tensors, match", [
    ({"qalora_group_size": 1}, dict, "qalora_group_size is 1; expected an integer >= 2: with 1, A has"),
    ({"qalora_group_size": "4"}, pooled_by(4), "qalora_group_size is '4'; expected an integer >= 2"),
    ({"qalora_group_size": 3}, pooled_by(4), "q has 16 inputs; expected a qalora_group_size that divides them, not 3"),
    ({"qalora_group_size": 4}, pooled_by(2), r"lora_A.weight has shape \[3, 8\]; expected \[3, 4\]"),
    ({"use_dora": True}, pooled_by(4), "use_qalora is true beside use_dora, which PEFT does not have"),
    ({"init_lora_weights": "PiSSA"}, pooled_by(4), "use_qalora is true beside PiSSA")])
def test_a_folder_that_means_nothing_is_refused_in_words(fields, tensors, match, tmp_path):
    model = base()
    path = edited(QV, tmp_path / "a", {"use_qalora": True, "qalora_group_size": 4, **fields}, tensors)
    with pytest.raises(ValueError, match=match) as error:
        minipeft.load(model, path)
    assert str(path) in str(error.value) and not model.attachments


def test_the_field_is_ignored_beside_a_table_as_in_peft(tmp_path):
    folders = [edited("adapters/lora_embedding", tmp_path / name, fields) for name, fields in (
        ("plain", {}), ("flagged", {"use_qalora": True, "qalora_group_size": 4}))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PEFT's own forward ignores the table is not the point here
        plain, flagged = (minipeft.load(base(), path) for path in folders)
    assert plain.method == flagged.method
    assert {k: v.tobytes() for k, v in plain.tensors.items()} == {k: v.tobytes() for k, v in flagged.tensors.items()}


def test_layers_of_both_kinds_in_one_folder_are_refused(tmp_path):
    def some(tensors):
        return {key: array[:, :4] if key.endswith("q.lora_A.weight") else array for key, array in tensors.items()}
    path = edited(QV, tmp_path / "a", {"use_qalora": True, "qalora_group_size": 4}, some)
    with pytest.raises(ValueError, match="v has a column for each input, as on a layer that is not GPTQ, and A of .*q"):
        minipeft.load(base(), path)


@pytest.mark.parametrize("method, match", [
    (QALoRA(2, group=4), r"pooling is 'sum'.*expected pooling='mean \* groups'"),
    (QALoRA(2, group=4, pooling="mean"), "pooling is 'mean', and PEFT multiplies"),
    (QALoRA(2, group=1, **PEFT), "group is 1, where PEFT's files of LoRA and of QA-LoRA look the same"),
    (QALoRA(2, group=4, where="^embedding", **PEFT), "embedding.weight is an embedding table; use_qalora")])
def test_what_peft_cannot_hold_is_not_written(method, match, tmp_path):
    attachment = attach(base(), method, RNG(0))
    with pytest.raises(ValueError, match=match):
        save(attachment, tmp_path / "a")
    assert not (tmp_path / "a").exists()
