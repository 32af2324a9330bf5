"""Prompt tuning and P-tuning in PEFT's files."""
from __future__ import annotations

import numpy
import pytest

import minipeft
from minipeft import PromptTuning, Transformer, TransformerConfig, attach
from minipeft.formats.peft import save, to_peft
from minipeft.formats.peft.codec import CODECS
from minipeft.laws.models import bits, logits
from tests.formats.golden import check
from tests.formats.peft.prompt_folders import KEY, RNG, TASK, batch, changed, fields, folder, stored, t5
from tests.methods.golden import FIXTURES

FOLDERS = ("prompt_tuning", "prompt_tuning_tied", "p_tuning", "p_tuning_lstm")
V11 = minipeft.T5.from_pretrained(FIXTURES / "t5/v11")  # on which nothing may stay


@pytest.mark.parametrize("source", FOLDERS)
def test_a_directory_of_peft_gives_its_logits_and_gradients_and_is_written_back_with_the_rows_that_it_never_reads(
        source, tmp_path):
    attachment = check(f"adapters/{source}", tmp_path)
    ((name, p),) = attachment.parameters.items()
    said = fields(FIXTURES / "adapters" / source)
    assert name == f"encoder.input@{source}.P" and p.shape == (said["num_virtual_tokens"], said["token_dim"])
    written = fields(tmp_path / "written")
    assert {key: written[key] for key in said} == said and attachment.source.notes == ()


@pytest.mark.parametrize("drop, values", [
    (("num_transformer_submodules", "token_dim", "num_layers", "num_attention_heads", "peft_version",
      "prompt_tuning_init", "modules_to_save", "inference_mode"), {}),
    ((), {"num_transformer_submodules": None, "token_dim": None, "num_layers": None, "num_attention_heads": None}),
    ((), {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "sum up", "tokenizer_name_or_path": "t5",
          "tokenizer_kwargs": {"legacy": True}}), ((), {"modules_to_save": []})],
    ids=["the fewest", "null", "text", "no modules"])
def test_fields_that_peft_fills_in_may_be_missing_or_null_and_those_of_the_start_are_kept(drop, values, tmp_path):
    model = V11.clone()
    attachment = minipeft.load(model, changed("prompt_tuning", tmp_path / "a", drop, **values))
    assert numpy.array_equal(attachment.tensors["encoder.input.P"], stored(tmp_path / "a")[:3])
    save(attachment, tmp_path / "b")
    written = fields(tmp_path / "b")
    assert written["num_transformer_submodules"] == 2 and stored(tmp_path / "b").shape == (6, 16)
    assert (written["token_dim"], written["num_layers"], written["num_attention_heads"]) == (16, 2, 4)
    assert {key: written[key] for key in values if key.startswith(("prompt", "tokenizer"))} == {
        key: v for key, v in values.items() if key.startswith(("prompt", "tokenizer"))}


def test_more_submodules_than_two_mean_more_rows_that_are_never_read(tmp_path):
    rows = RNG(0).standard_normal((9, 16))
    model = V11.clone()
    attachment = minipeft.load(model, changed("prompt_tuning", tmp_path / "a", tensor=rows,
                                              num_transformer_submodules=3))
    assert attachment.tensors["encoder.input.P"].shape == (3, 16)
    save(attachment, tmp_path / "b")
    assert stored(tmp_path / "b").tobytes() == rows.astype("float32").tobytes()


@pytest.mark.parametrize("drop, values, message", [
    (("task_type",), {}, "task_type is missing; expected it in a file of PROMPT_TUNING"),
    ((), {"task_type": None}, "task_type is null; expected it"),
    ((), {"task_type": "CAUSAL_LM"}, "task_type is 'CAUSAL_LM'; expected 'SEQ_2_SEQ_LM': with another one PEFT"),
    ((), {"task_type": ["SEQ_2_SEQ_LM"]}, r"task_type is \['SEQ_2_SEQ_LM'\]; expected"),
    (("num_virtual_tokens",), {}, "num_virtual_tokens is missing"),
    ((), {"num_virtual_tokens": 0}, "num_virtual_tokens is 0; expected an integer >= 1"),
    ((), {"num_virtual_tokens": 3.0}, r"num_virtual_tokens is 3\.0; expected an integer >= 1"),
    ((), {"num_virtual_tokens": True}, "num_virtual_tokens is True"),
    ((), {"num_virtual_tokens": 10 ** 18}, r"has shape \[6, 16\]; expected \[2000000000000000000, 16\]"),
    ((), {"num_virtual_tokens": 10 ** 4200}, r"has shape \[6, 16\]; expected \[2000.*\.\.\.: a row for each of"),
    ((), {"num_virtual_tokens": 2}, r"prompt_embeddings has shape \[6, 16\]; expected \[4, 16\]: a row for each of "
                                    r"num_transformer_submodules \(2\) \* num_virtual_tokens \(2\)"),
    ((), {"num_transformer_submodules": 1}, r"has shape \[6, 16\]; expected \[3, 16\]"),
    ((), {"num_transformer_submodules": 0}, "num_transformer_submodules is 0; expected an integer >= 1"),
    ((), {"num_transformer_submodules": "2"}, "num_transformer_submodules is '2'; expected an integer >= 1"),
    ((), {"token_dim": 8}, "token_dim is 8; expected 16, as in this model"),
    ((), {"num_layers": 7}, "num_layers is 7; expected 2, as in this model"),
    ((), {"num_attention_heads": "x"}, "num_attention_heads is 'x'; expected an integer >= 1"),
    ((), {"encoder_scale": 3}, "encoder_scale is 3, a field of PROMPT_TUNING that is not known"),
    ((), {"peft_type": "P_TUNING", "tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs is .*, a field of P_TUNING that"),
], ids=str)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_attached(drop, values, message, tmp_path):
    path = changed("prompt_tuning", tmp_path / "a", drop, **values)
    with pytest.raises(ValueError, match=message) as caught:
        minipeft.load(V11, path)
    assert str(caught.value).startswith(str(path)) and not V11.attachments


def test_a_file_that_was_cut_to_half_of_its_rows_is_no_prompt_and_neither_is_one_for_another_model(tmp_path):
    rows = stored(FIXTURES / "adapters/prompt_tuning")
    with pytest.raises(ValueError, match=r"has shape \[3, 16\]; expected \[6, 16\]: a row for each of num_transf"):
        minipeft.load(V11, changed("prompt_tuning", tmp_path / "cut", tensor=rows[:3]))
    with pytest.raises(ValueError, match="token_dim is 16; expected 12, as in this model"):
        minipeft.load(t5(), FIXTURES / "adapters/prompt_tuning")
    other = Transformer(TransformerConfig(23, d_model=16, num_heads=4, d_ff=7, num_layers=2, num_decoder_layers=2),
                        RNG(0))
    with pytest.raises(ValueError, match="Transformer is no model of Hugging Face's"):
        minipeft.load(other, FIXTURES / "adapters/prompt_tuning")
    prompt = attach(other, PromptTuning(2), RNG(0))
    with pytest.raises(ValueError, match="Transformer is no model of Hugging Face's"):
        save(prompt, tmp_path / "b")


@pytest.mark.parametrize("key", [f"_orig_mod.{KEY}", f"module.{KEY}", f"{KEY}.default"])
def test_what_tools_leave_behind_is_stripped_and_said(key, tmp_path):
    config, rows = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, **TASK}, RNG(0).standard_normal((4, 12))
    with pytest.warns(UserWarning, match="read under the names"):
        attachment = minipeft.load(t5(), folder(tmp_path / "a", config, {key: rows}))
    assert numpy.array_equal(attachment.tensors["encoder.input.P"], rows[:2])


def test_a_second_tensor_beside_the_prompt_is_refused(tmp_path):
    config, rows = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, **TASK}, RNG(0).standard_normal((4, 12))
    with pytest.raises(ValueError, match="base_model.lm_head.weight' is for lm_head alone"):
        minipeft.load(t5(), folder(tmp_path / "a", config, {KEY: rows, "base_model.lm_head.weight": rows}))


# ---- written


@pytest.mark.parametrize("method", [PromptTuning(1, "random"), PromptTuning(3), PromptTuning(2, "tokens", (5, 7))],
                         ids=["1", "3", "tokens"])
def test_a_prompt_made_here_is_written_as_p_rows_with_every_field_that_peft_has(method, tmp_path):
    model = t5(3, 1)
    attachment = attach(model, method, RNG(0), "mine")
    save(attachment, tmp_path / "a", base_model="t5-small")
    assert stored(tmp_path / "a").tobytes() == attachment.tensors["encoder.input.P"].tobytes()
    assert fields(tmp_path / "a") == {
        "peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": method.length,
        "num_transformer_submodules": 1, "token_dim": 12, "num_layers": 3, "num_attention_heads": 3,
        "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None, "modules_to_save": None, "inference_mode": True, "auto_mapping": None,
        "base_model_name_or_path": "t5-small", "revision": None, "peft_version": "0.21.2"}
    again = minipeft.load(t5(3, 1), tmp_path / "a")
    assert bits(again.tensors) == bits(attachment.tensors)
    assert set(to_peft(again, again.tensors)) == {KEY}


def test_what_peft_computes_otherwise_is_not_written(tmp_path):
    model = t5()
    beside = attach(model, PromptTuning(2, next_to_text=True), RNG(0), "beside")
    with pytest.raises(ValueError, match="next_to_text is True; expected False, because PEFT puts every prompt"):
        save(beside, tmp_path / "a")

    class Elsewhere(PromptTuning):
        def places(self, model):
            return {"decoder.input": None}

    for kind in ("PROMPT_TUNING", "P_TUNING"):
        with pytest.raises(ValueError, match="this prompt is at decoder.input; PEFT has prompts at encoder.input"):
            CODECS[kind].config(Elsewhere(2), model)
    assert not list(tmp_path.iterdir())


# ---- what PEFT gets wrong


def test_D8_a_loaded_prompt_that_is_off_is_off_in_generation_too():
    model, ids = V11.clone(), RNG(0).integers(2, 50, (3, 6))
    before = model.generate(ids, max_new_tokens=6).tolist()
    attachment = minipeft.load(model, FIXTURES / "adapters/prompt_tuning")
    assert model.generate(ids, max_new_tokens=6).tolist() != before
    with attachment.off():
        assert model.generate(ids, max_new_tokens=6).tolist() == before


def test_D9_the_rows_that_are_never_read_are_not_trained_and_not_counted():
    model = V11.clone()
    attachment = minipeft.load(model, FIXTURES / "adapters/prompt_tuning")
    assert minipeft.report(model).trainable == 3 * 16
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch()), attachment.parameters)
    whole = to_peft(attachment, grads)[KEY]
    assert whole.shape == (6, 16) and whole[:3].any(axis=1).all() and not whole[3:].any()


@pytest.mark.parametrize("source", ["prompt_tuning", "p_tuning"])
def test_D15_a_loaded_prompt_is_trained_further_and_written_back_under_its_own_type(source, tmp_path):
    """As if it had never been in a file, bit for bit."""
    start = stored(FIXTURES / "adapters" / source)
    live, loaded = V11.clone(), V11.clone()
    prompt = attach(live, PromptTuning(3, "random"), RNG(0), "live")
    prompt.parameters["encoder.input@live.P"].data = start[:3].copy()
    attachments = (prompt, minipeft.load(loaded, FIXTURES / "adapters" / source))
    for attachment in attachments:
        optimizer, model = minipeft.AdamW(1e-2), attachment.model
        for _ in range(3):
            _, grads = minipeft.value_and_grad(lambda: model.loss(**batch()), attachment.parameters)
            optimizer.step(attachment.parameters, grads)
    assert bits(attachments[0].tensors) == bits(attachments[1].tensors)
    assert logits(live, batch()).tobytes() == logits(loaded, batch()).tobytes()
    save(attachments[1], tmp_path / "a")
    after = stored(tmp_path / "a")
    assert fields(tmp_path / "a")["peft_type"] == fields(FIXTURES / "adapters" / source)["peft_type"]
    assert after[:3].tobytes() == attachments[1].tensors["encoder.input.P"].tobytes() != start[:3].tobytes()
    assert after[3:].tobytes() == start[3:].tobytes()
