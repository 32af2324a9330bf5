"""Defects of other libraries in prefixes and prompts, each as the statement that it would break."""
from __future__ import annotations

import re
from typing import Any

import numpy
import pytest

import minipeft
from minipeft import PrefixTuning, PromptTuning, T5, T5Config, attach
from minipeft.files import read_tensors
from minipeft.laws.bounds import close
from minipeft.laws.models import bits, logits, moved
from minipeft.nn.positions import bucket
from tests.by_hand import put, replug

RNG, U = numpy.random.default_rng, 2 ** -53
KINDS = {"encoder": r"encoder\.\d+\.attn", "decoder": r"decoder\.\d+\.attn", "cross": r"decoder\.\d+\.cross"}
every_way = pytest.mark.parametrize("method", [
    PrefixTuning(3), PrefixTuning(3, bias="earlier"), PrefixTuning(3, mlp=5)], ids=["none", "earlier", "mlp"])


def t5(layers: int = 2, decoder_layers: int = 2, **fields: Any) -> T5:
    """A T5 in float64 with large tables of relative positions. Its attention is 18 wide, its d_model is 16."""
    sizes = {"d_model": 16, "d_kv": 6, "num_heads": 3, **fields}
    config = T5Config(23, d_ff=11, num_layers=layers, num_decoder_layers=decoder_layers,
                      relative_attention_num_buckets=8, relative_attention_max_distance=20, **sizes)
    model = T5(config, RNG(0), "float64")
    for stack in (model.encoder, model.decoder):
        stack.position.weight.base.data = 2 * RNG(1).standard_normal(stack.position.weight.shape)
    for name, p in model.base_parameters.items():  # so that attention decides, not the embedding of the last token
        p.data = p.data * (6 if name.endswith(".o.weight") else 1)
    return model


def prefixed(method: Any, model: Any) -> Any:
    """The attachment, as after training."""
    return moved(attach(model, method, RNG(2), "a"), RNG(3))


def batch(rows: int = 3) -> dict[str, numpy.ndarray]:
    ids = RNG(4).integers(2, 23, (2, rows, 7))
    return {"input_ids": ids[0], "attention_mask": numpy.ones_like(ids[0]), "labels": ids[1]}


@every_way
def test_D1_every_layer_of_every_kind_has_keys_and_values_of_its_own_and_all_that_is_trained_has_a_gradient(method):
    """PEFT: two layers of a decoder share theirs, and half of the parameters never get a gradient."""
    model = t5(4, 4)
    attachment = prefixed(method, model)
    assert {kind: sum(bool(re.match(where, name)) for name in attachment.places) for kind, where in KINDS.items()} == {
        "encoder": 4, "decoder": 4, "cross": 4}
    made = [x.data for piece in attachment.at.values() for x in piece.prefix]
    assert len({x.tobytes() for x in made}) == len(made) == 2 * 12
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch()), attachment.parameters)
    assert all(g.any() for g in grads.values()) and minipeft.report(model).trainable == sum(
        g.size for g in grads.values())
    if method.mlp is None:
        assert minipeft.report(model).trainable == 2 * 3 * 18 * (4 + 2 * 4)


@pytest.mark.parametrize("method", [PrefixTuning(2), PrefixTuning(2, mlp=3), PromptTuning(2)], ids=repr)
def test_D8_switched_off_it_leaves_the_bits_of_the_base_in_a_forward_and_in_generation(method):
    """PEFT: generation on an encoder-decoder still reads the prompt."""
    model, data = t5(), batch()
    before = logits(model, data).tobytes(), model.generate(data["input_ids"], max_new_tokens=6).tolist()
    steps = minipeft.value_and_grad(lambda: model.loss(**data), model.base_parameters)
    attachment = prefixed(method, model)
    assert before[0] != logits(model, data).tobytes()
    assert before[1] != model.generate(data["input_ids"], max_new_tokens=6).tolist()

    def is_base() -> bool:
        again = minipeft.value_and_grad(lambda: model.loss(**data), model.base_parameters)
        return steps[0] == again[0] and bits(steps[1]) == bits(again[1]) and all(
            model.generate(data["input_ids"], max_new_tokens=6, use_cache=cached).tolist() == before[1]
            for cached in (True, False)) and logits(model, data).tobytes() == before[0]

    with attachment.off():
        assert is_base()
    assert not is_base()
    attachment.unplug()
    assert is_base()


def test_D9_a_prompt_of_p_vectors_has_p_rows_and_each_gets_a_gradient():
    """PEFT: 2 p rows on an encoder-decoder, of which p are dead."""
    model = t5()
    attachment = prefixed(PromptTuning(5), model)
    ((name, g),) = minipeft.value_and_grad(lambda: model.loss(**batch()), attachment.parameters)[1].items()
    assert g.shape == (5, 16) and g.any(axis=1).all() and minipeft.report(model).trainable == 5 * 16


@pytest.mark.parametrize("sizes", [
    {"num_heads": 6, "d_kv": 4}, {"num_heads": 3, "d_kv": 16}, {"layers": 1, "decoder_layers": 3},
    {"layers": 3, "decoder_layers": 1}], ids=str)
@every_way
def test_D13_it_fits_a_model_whose_attention_is_not_d_model_wide_and_whose_stacks_are_not_equally_deep(method, sizes):
    """PEFT: a shape error, or slices that no layer uses."""
    model = t5(**sizes)
    attachment = prefixed(method, model)
    c = model.config
    assert {x.shape for piece in attachment.at.values() for x in piece.prefix} == {(3, c.num_heads * c.d_kv)}
    assert len(attachment.places) == c.num_layers + 2 * c.num_decoder_layers
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch()), attachment.parameters)
    assert all(g.any() for g in grads.values())
    ids = batch()["input_ids"]
    assert model.generate(ids, max_new_tokens=4).tolist() == model.generate(ids, max_new_tokens=4,
                                                                            use_cache=False).tolist()


@pytest.mark.parametrize("method", [PrefixTuning(3), PrefixTuning(3, bias="earlier"), PrefixTuning(2, mlp=3),
                                    PromptTuning(3, next_to_text=True)], ids=repr)
def test_D14_padding_on_the_left_changes_nothing(method):
    """PEFT: a prompt is put in front of the padding, so the output changes with every column of it."""
    model, data = t5(), batch(2)
    prefixed(method, model)
    wanted = logits(model, data)
    for pads in ((4, 0), (1, 2), (0, 3)):
        padded = {**data, "input_ids": numpy.pad(data["input_ids"], ((0, 0), pads), constant_values=3),
                  "attention_mask": numpy.pad(data["attention_mask"], ((0, 0), pads))}
        assert close(logits(model, padded), wanted, U)
    ids = numpy.pad(model.shift_right(data["labels"]), ((0, 0), (3, 0)), constant_values=5)
    mask = numpy.pad(numpy.ones_like(data["labels"]), ((0, 0), (3, 0)))
    assert close(model(data["input_ids"], ids, None, mask).data[:, 3:], wanted, U)


@pytest.mark.parametrize("method", [PrefixTuning(2), PrefixTuning(2, bias="earlier", mlp=3), PromptTuning(2)], ids=repr)
def test_D15_a_saved_prefix_goes_on_in_training_to_the_bits_of_one_that_was_never_saved(method, tmp_path):
    """PEFT: prompts and prefixes cannot be resumed, and the network that makes a prefix is not in the file."""
    def steps(model: Any, attachment: Any) -> Any:
        optimizer = minipeft.AdamW(1e-2)
        for _ in range(3):
            _, grads = minipeft.value_and_grad(lambda: model.loss(**batch()), attachment.parameters)
            optimizer.step(attachment.parameters, grads)
        return bits(attachment.tensors)

    model = t5()
    attachment = attach(model, method, RNG(2), "a")
    steps(model, attachment)
    attachment.save(tmp_path / "a")
    saved = bits(attachment.tensors)
    fresh = t5()
    loaded = minipeft.load(fresh, tmp_path / "a")
    assert list(loaded.parameters) == list(attachment.parameters)
    assert steps(fresh, loaded) == steps(model, attachment) != saved
    assert logits(fresh, batch()).tobytes() == logits(model, batch()).tobytes()


@pytest.mark.parametrize("bias", ["none", "earlier"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_A1_real_tokens_keep_their_distances_under_a_prefix(stack, bias):
    """AdapterHub: the query at i, the key at p + j. Here a whole attention is computed by hand, with a prefix of zeros:
    it takes a share of the probability, and the distances of the others are those without it."""
    model, data, p = t5(1, 1), batch(1), 3
    attachment = attach(model, PrefixTuning(p, ("encoder", "decoder"), bias, std=0), RNG(0))
    assert not any(x.data.any() for x in attachment.parameters.values())
    seen: list[Any] = []
    part = getattr(model, stack)
    put(part.blocks[0].attn.out, {"probe": lambda x, n, F: seen.append((n.data, F.data)) or F})
    logits(model, data)
    replug(part.blocks[0].attn.out)
    (n, found), = seen
    attention, table = part.blocks[0].attn, part.position.weight.base.data

    def entry(distance: int) -> numpy.ndarray:
        return table[bucket(numpy.array(distance), len(table), 20, stack == "encoder")]

    q, k, v = (n[0] @ part.weight.base.data.T for part in (attention.q, attention.k, attention.v))
    mixed = numpy.zeros_like(q)
    for head in range(3):
        d = slice(6 * head, 6 * head + 6)
        for i in range(len(q)):
            keys = range(len(q)) if stack == "encoder" else range(i + 1)
            real = numpy.exp([q[i, d] @ k[j, d] + entry(j - i)[head] for j in keys])
            prefix = numpy.exp([entry(j - (p + i))[head] if bias == "earlier" else 0.0 for j in range(p)])
            mixed[i, d] = sum(w * v[j, d] for j, w in zip(keys, real)) / (real.sum() + prefix.sum())
    assert close(found[0], mixed @ attention.o.weight.base.data.T, U)


@every_way
def test_A6_each_array_is_in_the_file_once(method, tmp_path):
    """AdapterHub: what all layers share is written once for every attention."""
    model = t5()
    prefixed(method, model).save(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")[0]
    assert sum(a.size for a in tensors.values()) == minipeft.report(model).trainable
    assert len({a.tobytes() for a in tensors.values()}) == len(tensors)
    if method.mlp:
        assert [name for name in tensors if name.endswith((".P", ".W", ".b"))] == sorted(
            f"{kind}.{leaf}" for kind in KINDS for leaf in ("P", "W", "b"))
