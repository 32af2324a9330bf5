"""`minipeft.tools.plan`: its rows, its report, its picture, and its errors."""
import builtins
import json
import re

import pytest

import minipeft
from minipeft.tools import plan
from minipeft.tools.planning.picture import drawn
from minipeft.tools.planning.settings import Settings
from tests.tools.planning.models import D64, LLAMA_3_8B, llama

CONFIG, SIZES = D64
SIZES = {**SIZES, "batch": 2}


@pytest.fixture(scope="module")
def whole():
    return plan(CONFIG, rank=4, budget="10MiB", **SIZES)


def test_it_is_there_without_an_import_of_its_own():
    assert minipeft.tools.plan is plan


def test_every_registered_method_has_a_row_or_a_reason(whole):
    assert list(whole.steps)[:2] == ["full", "lora r=4"] and whole.method == "lora r=4"
    assert {row.split()[0] for row in whole.steps} | set(whole.absent) >= {
        "lora", "dora", "vera", "loha", "lokr", "hira", "oft", "ia3", "norms", "biases", "addedbias", "bottleneck",
        "prompt", "prefix"}
    assert "the model has none" in whole.absent["biases"]
    assert {"dora r=4", "loha r=4", "vera r=256"} <= set(whole.steps)      # a rank of VeRA's means something else


def test_the_report_fits_a_page_and_says_all(whole):
    text = str(whole)
    assert max(map(len, text.splitlines())) <= 130
    for said in ("t5: 238,592 parameters", "batch 2, 32 and 32 tokens a row", "the peak is", "> lora r=4",
                 "not on this model: biases", "budget 0.0 GB (10.0 MiB): fits", "largest batch that fits",
                 "largest rank that fits at batch 2", "left out: the program itself", "bytes of weights", "12 to 20"):
        assert said in text, said
    total = re.search(r"^together +(.*)$", text, re.MULTILINE)[1].split()
    assert len(total) == len(whole.step.phases)


def test_a_budget_beyond_all_batches_is_answered_up_to_a_bound_on_the_tokens():
    found = plan(CONFIG, rank=4, others=False, batch=8, source=2 ** 14, target=2 ** 14, budget="1000000TB")
    assert found.budget.batch == 2 ** 30 // 2 ** 15, "2^30 tokens"


def test_65_billion_parameters_fit_on_48_gb_if_they_are_quantized_as_they_are_read():
    """Dettmers et al., 2023, arXiv:2305.14314: a model of 65 billion parameters is finetuned on one card of 48 GB."""
    settings = dict(rank=64, where="all-linear", batch=1, source=384, target=128, dtype="bfloat16", quantize="nf4",
                    double=True, checkpointing=True, budget="48GB", others=False)
    whole, streamed = (plan(llama(8192, 22016, 80, 64), "lora", streaming=s, **settings) for s in (False, True))
    assert not whole.budget.fits and "the step itself fits: with --streaming" in str(whole)
    assert streamed.budget.fits and "--streaming" not in str(streamed) and "quantized as it is read" in str(streamed)
    assert plan(llama(8192, 22016, 80, 64), "lora", **settings).step == streamed.step  # in half precision, the default
    assert not Settings(quantize="nf4").streaming and not Settings(dtype="bfloat16").streaming


@pytest.mark.parametrize("settings, said", [
    (dict(double="no", quantize="nf4"), "double is 'no'; expected True or False"),
    (dict(checkpointing="no"), "checkpointing is 'no'; expected True or False"),
    (dict(streaming=True), "streaming says how to quantize, and nothing is quantized"),
    (dict(quantize=["nf4"]), r"quantize is \['nf4'\]; expected one of nf4"),
    (dict(optimizer=["adamw"]), r"optimizer is \['adamw'\]; expected one of adamw"),
    (dict(dtype=["float32"]), r"dtype is \['float32'\]; expected one of float32")])
def test_settings_of_another_type_are_refused_in_words(settings, said):
    with pytest.raises(ValueError, match=said):
        plan(CONFIG, **settings)


@pytest.mark.parametrize("size", [2 ** 31, 10 ** 30])
def test_sizes_that_no_array_can_have_are_refused_by_name(size):
    for values, name in (CONFIG.to_hf(), "d_ff"), (llama(64, 96, 2, 4), "hidden_size"):
        with pytest.raises(ValueError, match=f"config: {name} is {size}; expected at most 2147483647"):
            plan({**values, name: size})


def test_the_budget_is_answered_by_plans_of_the_neighbors(whole):
    b = whole.budget
    limit = 10 * 2 ** 20
    sizes = {name: n for name, n in SIZES.items() if name != "batch"}
    assert plan(CONFIG, rank=4, others=False, **sizes, batch=b.batch).step.peak <= limit
    assert plan(CONFIG, rank=4, others=False, **sizes, batch=b.batch + 1).step.peak > limit
    assert b.rank == 64 and b.rank_is_bound
    small = plan(CONFIG, budget="1MiB", others=False, **SIZES)
    assert not small.budget.fits and small.budget.batch == 0
    assert "the phase 'load' alone is too large, whatever the batch is: 1,864.0 KiB" in str(small)


def test_a_method_may_be_given_as_an_object_and_a_config_as_a_path_a_folder_or_its_contents(tmp_path):
    given = plan(CONFIG, minipeft.LoRA(rank=4), others=False, **SIZES)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    for config in (tmp_path, str(tmp_path / "config.json"), CONFIG.to_hf()):
        assert plan(config, rank=4, others=False, **SIZES).steps == given.steps
    assert plan(LLAMA_3_8B, "full", others=False, batch=1, source=1, target=1).step.base == 8_030_261_248


def test_a_method_of_ones_own_is_planned_by_its_own_declarations():
    from tests.foreign_methods import ForeignIA3
    step = plan(CONFIG, ForeignIA3(), others=False, **SIZES).step
    assert step.trained == plan(CONFIG, "ia3", others=False, **SIZES).step.trained


def test_quantized_plans_say_that_full_fine_tuning_is_not():
    found = plan(CONFIG, others=True, quantize="int4", **SIZES)
    assert "full fine-tuning is planned without quantization" in str(found)
    assert "quantize" not in found.steps["full"].phases and "quantize" in found.step.phases


def test_a_picture_is_drawn_with_a_bar_for_each_row(whole, tmp_path):
    pytest.importorskip("matplotlib")
    drawn(whole, tmp_path / "plan.svg")
    picture = (tmp_path / "plan.svg").read_text("utf-8")
    assert all(row.split()[0] in picture for row in whole.steps) and "budget" in picture
    drawn(whole, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(whole, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **options)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'minipeft\[examples\]'"):
        drawn(whole, tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, said", [
    ({"method": "lorra"}, "method is 'lorra'; expected one of full, "),
    ({"batch": 0}, "batch is 0; expected an integer >= 1"), ({"target": True}, "target is True"),
    ({"rank": 0}, "rank is 0; expected an integer >= 1"), ({"rank": 65}, "rank 65 exceeds 64"),
    ({"method": "ia3", "rank": 4}, "ia3 has no rank"), ({"where": "w_pack"}, "matches none of the"),
    ({"dtype": "float8"}, "dtype is 'float8'; expected one of float32"),
    ({"optimizer": "lion"}, "optimizer is 'lion'; expected one of adamw"),
    ({"quantize": "nf5"}, "quantize is 'nf5'"), ({"double": True}, "double says how to quantize"),
    ({"quantize": "int4", "double": True}, "int4 has none"), ({"dropout": 1.0}, "dropout is 1.0"),
    ({"quantize": "nf4", "quantize_where": "nothing"}, "matches none of the"),
    ({"method": "full", "quantize": "nf4"}, "full fine-tuning trains the weights that quantize would freeze"),
    ({"method": "biases"}, "the model has none"), ({"budget": "much"}, "budget is 'much'"),
    ({"method": minipeft.LoRA(4), "rank": 4}, "fields of the method that was given")])
def test_what_cannot_be_planned_is_refused_by_its_name(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(CONFIG, **options)


def test_a_wrong_config_is_refused_with_the_name_of_its_file(tmp_path):
    file = tmp_path / "config.json"
    for text, said in (("{", "not"), (json.dumps(llama(40, 56, 1, 7)), "multiple"), ("[]", "expected"),
                       (json.dumps(llama(40, 56, 10 ** 6, 4)), "num_layers is 1000000; expected at most 1000")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said) as raised:
            plan(tmp_path)
        assert str(file) in str(raised.value)
    with pytest.raises(FileNotFoundError, match="expected a config.json"):
        plan(tmp_path / "elsewhere")
    with pytest.raises(TypeError, match="config is int"):
        plan(7)
    with pytest.raises(TypeError, match="colour"):
        plan(CONFIG, colour="red")
