"""(IA)^3, selective tuning and the zoo in PEFT's files: read, refused, and written."""
from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Callable

import numpy
import pytest

import minipeft
from minipeft import IA3, OFT, HiRA, LoHa, LoKr, Selective, T5, VeRA
from minipeft.files import read_tensors, write_tensors
from minipeft.formats.peft import codec, save
from minipeft.formats.peft.directory import codec_for
from minipeft.formats.peft.ia3 import feedforward
from minipeft.formats.peft.names import modules
from minipeft.formats.peft.oft import block_size
from minipeft.formats.peft.others import OTHERS
from minipeft.laws.models import moved
from tests.formats.golden import check, golden, logits
from tests.methods.golden import FIXTURES, close

FOLDERS = [*(f"adapters/{name}" for name in ("ia3", "ia3_relu", "ia3_inputs", "ln_tuning", "trainable_tokens")),
           *(f"zoo/{name}_t5" for name in ("hira", "loha", "loha_patterns", "lokr", "lokr_both", "lokr_full", "oft",
                                           "oft_blocks", "shira", "vera", "vera_no_projection"))]
MODEL = T5.from_pretrained(FIXTURES / "t5" / "v11", "float64")  # on which nothing stays
KEY = "base_model.model.encoder.block.0.layer.0.SelfAttention.q."
Q, WO = "encoder.0.attn.q.weight", "encoder.0.ff.wo.weight"
OUTPUTS = sorted(path for path in modules(MODEL) if path.endswith((".o", ".wo")))
IDS = numpy.arange(2, 12).reshape(2, 5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_directory_of_peft_gives_its_logits_gradients_and_merged_logits_and_is_written_back(folder, tmp_path):
    check(folder, tmp_path)


def model_of(base: str = "v11") -> Any:
    return T5.from_pretrained(FIXTURES / "t5" / base, "float64")


def attached(method: Any, base: str = "v11", seed: int = 0) -> Any:
    """The method on a model, with numbers that are no start."""
    model = model_of(base)
    return moved(minipeft.attach(model, method, numpy.random.default_rng(seed), "a"), numpy.random.default_rng(1), 0.3)


def edited(folder: str, target: Path, fields: dict | None = None, drop: tuple = (),
           tensors: Callable[[dict], Any] = lambda tensors: None) -> Path:
    """A copy of a golden directory with other `fields`, without those in `drop`, and with other tensors: `tensors`
    changes a dictionary of them."""
    config = {**json.loads((FIXTURES / folder / "adapter_config.json").read_text()), **(fields or {})}
    arrays = dict(read_tensors(FIXTURES / folder / "adapter_model.safetensors")[0])
    tensors(arrays)
    target.mkdir(exist_ok=True)
    write_tensors(target / "adapter_model.safetensors", arrays, {"format": "pt"}, None)
    (target / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    return target


def written(attachment: Any, target: Path) -> tuple[dict, dict]:
    """(configuration, tensors) as they are saved."""
    save(attachment, target)
    return (json.loads((target / "adapter_config.json").read_text()),
            read_tensors(target / "adapter_model.safetensors")[0])


def outputs(model: Any) -> numpy.ndarray:
    return model(IDS, IDS[:, ::-1]).data


def again(attachment: Any, target: Path) -> Any:
    """What is saved, loaded on a fresh model: it gives the same outputs."""
    save(attachment, target)
    with attachment.off():
        model = attachment.model.clone()
    model.attachments["a"].remove()
    found = minipeft.load(model, target, name="again")
    assert close(outputs(model), outputs(attachment.model), 1e-12)
    return found


def warned(table: bool) -> Any:
    """For a block that saves or loads an adapter of a table that PEFT's own forward ignores."""
    return pytest.warns(UserWarning, match="PEFT's own forward ignores") if table else contextlib.nullcontext()


# ---- what is refused


@pytest.mark.parametrize("kind", ["MISS", "VBLORA", *OTHERS])
def test_a_method_of_peft_that_is_not_here_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=rf"^{kind} is a method of PEFT that minipeft does not have \(.*\); it has "):
        codec_for({"peft_type": kind, "r": 8})


@pytest.mark.parametrize("kind", ["QLORA", "lora", 7, None])
def test_an_unknown_peft_type_is_said_to_be_unknown(kind):
    with pytest.raises(ValueError, match="peft_type is .*, which is unknown; expected one of .*SHIRA"):
        codec_for({"peft_type": kind})


def test_every_peft_type_of_the_real_peft_is_read_or_refused_by_name():
    peft = pytest.importorskip("peft")
    unnamed = {kind.value for kind in peft.PeftType} - set(codec.CODECS) - set(OTHERS)
    assert unnamed <= {"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"}, "those of prompts.py and prefix.py"


REFUSED = [
    ("adapters/ia3", {"fan_in_fan_out": True}, "fan_in_fan_out is True, which changes what IA3 computes"),
    ("adapters/ia3", {"feedforward_modules": [1]}, r"feedforward_modules is \[1\]; expected a list of names, or a reg"),
    ("adapters/ia3", {"feedforward_modules": "("}, r"'\(' is not a regular expression"),
    ("adapters/ia3", {"target_modules": ["k", "shared"]}, "an embedding table; expected a linear layer"),
    ("adapters/ln_tuning", {"target_modules": ["shared"]}, "an embedding table; expected a norm or a linear "),
    ("adapters/trainable_tokens", {"token_indices": [3, 3]}, r"token_indices is \[3, 3\]; expected distinct ids from"),
    ("adapters/trainable_tokens", {"token_indices": [-1, 53]}, r"token_indices is \[-1, 53\]; expected distinct ids"),
    ("adapters/trainable_tokens", {"token_indices": []}, r"token_indices is \[\]; expected distinct ids"),
    ("adapters/trainable_tokens", {"target_modules": "lm_head"}, "chooses lm_head; expected the table of the vocab"),
    ("zoo/vera_t5", {"bias": "all"}, "bias is 'all', which changes what VERA computes"),
    ("zoo/vera_t5", {"save_projection": "yes"}, "save_projection is 'yes'; expected true or false"),
    ("zoo/vera_no_projection_t5", {"projection_prng_key": -1}, "projection_prng_key is -1; expected an integer from 0"),
    ("zoo/vera_no_projection_t5", {"r": 10 ** 6}, r"r is 1000000, for which A and B would have 48,000,000 numbers"),
    ("zoo/loha_t5", {"alpha": 0}, "alpha is 0; expected a finite number other than 0"),
    ("zoo/loha_t5", {"alpha": None}, "alpha is null; expected it in a file of LOHA"),
    ("zoo/loha_t5", {"target_modules": ["q", "wo", "layer_norm"]}, "layer_norm, a norm; expected a linear layer"),
    ("zoo/lokr_t5", {"decompose_factor": 0}, "decompose_factor is 0; expected -1 or an integer >= 1"),
    ("zoo/lokr_t5", {"decompose_both": 1}, "decompose_both is 1; expected true or false"),
    ("zoo/hira_t5", {"fan_in_fan_out": True}, "fan_in_fan_out is True, which changes what HIRA computes"),
    ("zoo/oft_t5", {"coft": True}, "coft is True, which changes what OFT computes"),
    ("zoo/oft_t5", {"r": 2}, "oft_block_size is 8 and r is 2; expected two integers, one of them 0"),
    ("zoo/oft_t5", {"oft_block_size": 1}, "blocks of one number, which nothing can turn, at a width of 16"),
    ("zoo/oft_t5", {"num_cayley_neumann_terms": 2}, "terms is 2; expected an integer from 3 to 1000"),
    ("zoo/oft_t5", {"num_cayley_neumann_terms": 10 ** 9}, "terms is 1000000000; expected an integer from 3"),
    ("zoo/oft_t5", {"peft_version": "0.17.1"}, "before 0.18, use_cayley_neumann meant another series"),
    ("zoo/shira_t5", {"r": 100}, r"r is 100, which means r \(16 \+ 24\) elements; expected at most the 384"),
    ("zoo/shira_t5", {"modules_to_save": ["layer_norm"]}, "modules_to_save|Missing")]


@pytest.mark.parametrize("folder, fields, message", REFUSED)
def test_a_field_that_does_not_fit_is_refused_by_name(folder, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        minipeft.load(MODEL, edited(folder, tmp_path / "a", fields))
    assert not MODEL.attachments


@pytest.mark.parametrize("folder, field", [
    ("adapters/trainable_tokens", "token_indices"), ("zoo/vera_t5", "r"), ("zoo/loha_t5", "r"), ("zoo/hira_t5", "r"),
    ("zoo/lokr_t5", "alpha"), ("zoo/oft_t5", "oft_block_size"), ("zoo/oft_t5", "use_cayley_neumann"),
    ("zoo/shira_t5", "r")])
def test_a_field_without_which_peft_would_compute_something_else_must_be_there(folder, field, tmp_path):
    with pytest.raises(ValueError, match=f"{field} is missing; expected it in a file of"):
        minipeft.load(MODEL, edited(folder, tmp_path / "a", drop=(field,)))


@pytest.mark.parametrize("folder", ["adapters/ia3", "adapters/ln_tuning"])
def test_the_smallest_configuration_means_what_peft_takes_for_t5(folder, tmp_path):
    _, g, model = golden(folder)
    fields = json.loads((FIXTURES / folder / "adapter_config.json").read_text())
    minipeft.load(model, edited(folder, tmp_path / "a", drop=tuple(set(fields) - {"peft_type"})))
    assert close(logits(model, g), g["logits"], 1e-10)


# ---- (IA)^3


def test_an_ending_in_feedforward_modules_counts_without_a_dot_before_it():
    paths = ["a.SelfAttention.o", "a.DenseReluDense.wo", "a.DenseReluDense.wi"]
    assert feedforward(["o"], paths) == paths[:2] and feedforward(["wo"], paths) == paths[1:2]
    assert feedforward([], paths) == [] and feedforward(r".*\.o", paths) == paths[:1]
    assert feedforward(".*", paths) == paths


@pytest.mark.parametrize("method, targets, inputs", [
    (IA3(), ["k", "v", "wo"], ["wo"]), (IA3("before"), ["k", "v", "wi_1"], []),
    (IA3(where=r"\.(v|o)\.weight$", inputs=r"\.o\."), ["o", "v"], ["o"]),
    (IA3(where=r"\.(o|wo)\.weight$", inputs=r"\.o\."), OUTPUTS, [path for path in OUTPUTS if path.endswith(".o")]),
    (IA3(where=r"encoder\.0\.(attn\.o|ff\.wo)\.", inputs=r"\.o\."), [
        "encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo"],
     ["encoder.block.0.layer.0.SelfAttention.o"])])
def test_ia3_is_written_with_endings_that_mean_exactly_its_inputs(method, targets, inputs, tmp_path):
    attachment = attached(method)
    config, _ = written(attachment, tmp_path / "a")
    assert (config["target_modules"], config["feedforward_modules"]) == (targets, inputs)
    again(attachment, tmp_path / "b")


# ---- selective tuning


def test_a_copy_of_the_rows_that_differs_is_refused_with_both_keys(tmp_path):
    def differ(tensors: dict) -> None:
        tensors["base_model.model.lm_head.trainable_tokens_delta"] = tensors[
            "base_model.model.lm_head.trainable_tokens_delta"] + 1

    with pytest.raises(ValueError, match="shared.trainable_tokens_delta and .*lm_head.trainable_tokens_delta differ"):
        minipeft.load(model_of("v10"), edited("adapters/trainable_tokens", tmp_path / "a", tensors=differ))


@pytest.mark.filterwarnings("ignore:.*stored for 'shared'")
@pytest.mark.parametrize("base, keys", [("v10", 4), ("v11", 1)])
def test_rows_are_written_in_their_order_at_every_use_of_a_tied_table(base, keys, tmp_path):
    attachment = attached(Selective(rows=(9, 2, 5)), base)
    with warned(base == "v11"):
        config, tensors = written(attachment, tmp_path / "a")
    assert config["token_indices"] == [9, 2, 5] and len(tensors) == keys
    table = attachment.places["embedding.weight"].fold().dense().data
    assert all(numpy.array_equal(rows, table[[9, 2, 5]]) for rows in tensors.values())
    with warned(base == "v11"):
        again(attachment, tmp_path / "b")


def test_ln_tuning_holds_norms_linear_layers_and_positions_and_no_table(tmp_path):
    for i, component in enumerate(("norm", "attention", ("position", "head"))):
        again(attached(Selective(component=component)), tmp_path / f"a{i}")
    with pytest.raises(ValueError, match="embedding.weight is an embedding table; LN_TUNING of PEFT is for a norm or"):
        save(attached(Selective(component="embedding")), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def unsorted(tensors: dict) -> None:
    """The elements of one weight in another order, and of another as Windows has them."""
    order = numpy.random.default_rng(0).permutation(80)
    tensors[f"{KEY}shira_weight"] = tensors[f"{KEY}shira_weight"][order]
    tensors[f"{KEY}shira_indices"] = tensors[f"{KEY}shira_indices"][:, order]
    other = KEY.replace("q.", "v.") + "shira_indices"
    tensors[other] = tensors[other].astype("float32")


def test_elements_in_any_order_are_read_and_written_back_in_it(tmp_path):
    _, g, model = golden("zoo/shira_t5")
    path = edited("zoo/shira_t5", tmp_path / "a", tensors=unsorted)
    attachment = minipeft.load(model, path)
    assert close(logits(model, g), g["logits"], 1e-10)
    assert (numpy.diff(attachment.tensors[f"{Q}.indices"]) > 0).all()
    _, tensors = written(attachment, tmp_path / "b")
    for key, array in read_tensors(path / "adapter_model.safetensors")[0].items():
        assert numpy.array_equal(tensors[key], array), key
        assert tensors[key].dtype == ("int32" if key.endswith("indices") else "float64")


@pytest.mark.parametrize("change, message", [
    (lambda at: at.__setitem__((0, 0), 24), "points outside of encoder.0.attn.q.weight; expected rows from 0 to 23"),
    (lambda at: at.__setitem__((1, 3), -1), "points outside of encoder.0.attn.q.weight"),
    (lambda at: at.__setitem__((slice(None), 1), at[:, 0]), "holds an element twice; expected distinct ones")])
def test_elements_that_are_not_there_or_there_twice_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=f"shira_indices {message}"):
        minipeft.load(MODEL, edited("zoo/shira_t5", tmp_path / "a",
                                    tensors=lambda tensors: change(tensors[f"{KEY}shira_indices"])))


def test_a_mask_is_written_where_all_weights_have_as_many_elements_as_one_r_gives(tmp_path):
    rng = numpy.random.default_rng(0)
    chosen = {Q: rng.permutation(384)[:80], WO: rng.permutation(384)[:80]}
    config, _ = written(attached(Selective(mask=chosen)), tmp_path / "a")
    assert config["r"] == 2 and config["mask_type"] == "random"
    flags = {name: numpy.isin(numpy.arange(384), at).reshape(MODEL.slots[name].shape) for name, at in chosen.items()}
    again(attached(Selective(mask=flags)), tmp_path / "b")
    with pytest.raises(ValueError, match=rf"the mask of {WO} has 79 elements; SHIRA of PEFT has r \(24 \+ 16\), with "):
        save(attached(Selective(mask={**chosen, WO: chosen[WO][1:]})), tmp_path / "c")
    with pytest.raises(ValueError, match="is a norm; SHIRA of PEFT is for a linear layer"):
        save(attached(Selective(mask={"encoder.norm.weight": [0, 1]})), tmp_path / "d")


# ---- VeRA


def test_vera_is_written_with_its_projections_whatever_drew_them(tmp_path):
    for i, (key, said) in enumerate(((None, 0), (7, 7))):
        attachment = attached(VeRA(3, key=key, where=["q", "wo"]))
        config, tensors = written(attachment, tmp_path / f"a{i}")
        assert config["save_projection"] is True and config["projection_prng_key"] == said
        assert numpy.array_equal(tensors["base_model.vera_B"], attachment.tensors["vera.B"])
        again(attachment, tmp_path / f"b{i}")


def test_a_dropout_and_a_projection_that_is_not_saved_are_written_back_as_they_were(tmp_path):
    path = edited("zoo/vera_no_projection_t5", tmp_path / "a", {"vera_dropout": 0.25})
    config, tensors = written(minipeft.load(model_of(), path), tmp_path / "b")
    assert config["vera_dropout"] == 0.25 and config["save_projection"] is False
    assert config["projection_prng_key"] == 2 ** 32 - 1 and not any("vera_A" in key for key in tensors)


# ---- LoHa, LoKr, HiRA


def test_ranks_and_alphas_of_single_places_are_written_under_their_paths(tmp_path):
    method = LoHa(2, 3, ["q"], rank_pattern={"decoder": 1}, alpha_pattern={r"encoder\.0": 5})
    config, _ = written(attached(method), tmp_path / "a")
    assert config["alpha_pattern"] == {"encoder.block.0.layer.0.SelfAttention.q": 5}
    assert set(config["rank_pattern"].values()) == {1} and len(config["rank_pattern"]) == 4
    again(attached(method), tmp_path / "b")


def test_two_full_factors_without_a_scale_are_written_with_alpha_equal_to_r(tmp_path):
    """Where one of them is a product, alpha stays."""
    method = LoKr(4, 7, ["q", "wo"], rank_pattern={"wo": 1})
    config, _ = written(attached(method), tmp_path / "a")
    assert set(config["alpha_pattern"].values()) == {4} and len(config["alpha_pattern"]) == 6
    assert again(attached(method), tmp_path / "b").method.full == "alpha / r"


@pytest.mark.parametrize("method, message", [
    (LoHa(2, 3, scaling="alpha"), "scaling is 'alpha'; LOHA of PEFT has 'alpha/r' alone"),
    (LoHa(2, where=["embedding"]), "embedding.weight is an embedding table; LOHA of PEFT is for a linear layer"),
    (VeRA(2, where=["embedding"]), "embedding.weight is an embedding table; VERA of PEFT is for a linear layer"),
    (HiRA(2, rank_pattern={"encoder": 1}), "HIRA of PEFT 0.21 ignores it and gives all weights the rank r"),
    (OFT(2, ["q", "wo"], block_size_pattern={"wo": 12}),
     "block sizes are 2 for a width of 16, 12 for a width of 24; OFT of PEFT has one oft_block_size or one r")])
def test_a_method_that_peft_cannot_hold_is_not_written(method, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(attached(method), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_rank_pattern_of_hira_counts_where_the_tensors_have_its_ranks_alone(tmp_path):
    """PEFT 0.21 writes tensors of rank r, whatever the pattern says."""
    pattern = {"rank_pattern": {"q": 1}}
    _, g, model = golden("zoo/hira_t5")
    assert minipeft.load(model, edited("zoo/hira_t5", tmp_path / "a", pattern)).method.rank_pattern == ()
    assert close(logits(model, g), g["logits"], 1e-10)

    def ranks_of_the_pattern(tensors: dict) -> None:
        for key in tensors:
            if ".q.hira" in key:
                tensors[key] = tensors[key][:1] if key.endswith("A") else tensors[key][:, :1]

    path = edited("zoo/hira_t5", tmp_path / "b", pattern, tensors=ranks_of_the_pattern)
    attachment = minipeft.load(model_of(), path)
    assert attachment.tensors[f"{Q}.A"].shape == (1, 16) and attachment.tensors[f"{WO}.A"].shape == (2, 24)


# ---- OFT


def test_the_block_size_is_the_nearest_divisor_of_the_width_as_in_peft():
    for fields, width, expected in (((32, 0), 24, 24), ((5, 0), 24, 4), ((7, 0), 24, 6), ((9, 0), 24, 8),
                                    ((0, 4), 16, 4), ((0, 5), 16, 4), ((0, 3), 16, 8), ((2 ** 70, 0), 16, 16)):
        assert block_size(dict(zip(("oft_block_size", "r"), fields)), width) == expected, fields


@pytest.mark.parametrize("method, fields", [
    (OFT(8, ["q", "wo"]), (8, 0)), (OFT(4, ["q", "wo"], block_size_pattern={"wo": 6}), (0, 4)),
    (OFT(16, ["q", "wo"], block_size_pattern={"wo": 12}), (16, 0)),
    (OFT(16, ["q", "wo"], block_size_pattern={"wo": 24}), (0, 1)), (OFT(8, ["q"]), (8, 0))])
def test_block_sizes_are_written_as_one_field_that_gives_them_all(method, fields, tmp_path):
    config, _ = written(attached(method), tmp_path / "a")
    assert (config["oft_block_size"], config["r"]) == fields
    assert again(attached(method), tmp_path / "b").method.size_at(WO) == method.size_at(WO)


@pytest.mark.filterwarnings("ignore:.*stored for 'shared'")
@pytest.mark.parametrize("cayley, sign", [("paper", -1), ("transposed", 1), ("neumann", 1)])
@pytest.mark.parametrize("where", ["q", "embedding"])
def test_a_rotation_that_turns_the_other_way_in_peft_is_written_with_the_other_sign(cayley, sign, where, tmp_path):
    attachment = attached(OFT(4, [where], cayley=cayley))
    with warned(where == "embedding"):
        config, tensors = written(attachment, tmp_path / "a")
    assert config["use_cayley_neumann"] == (cayley == "neumann")
    name = Q if where == "q" else "embedding.weight"
    key = f"{KEY}oft_R.weight" if where == "q" else "base_model.model.shared.oft_embedding_R.weight"
    sign = sign if where == "q" else -sign
    assert numpy.array_equal(tensors[key], sign * attachment.tensors[f"{name}.q"])
    with warned(where == "embedding"):
        again(attachment, tmp_path / "b")


def test_a_series_of_an_unknown_version_is_read_with_a_warning(tmp_path):
    path = edited("zoo/oft_t5", tmp_path / "a", drop=("peft_version",))
    with pytest.warns(UserWarning, match="peft_version is missing; before 0.18, use_cayley_neumann meant another se"):
        minipeft.load(model_of(), path)
