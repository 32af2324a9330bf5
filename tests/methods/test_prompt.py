"""Prompt tuning: fields, starts, and the strongest law, that a prompt is p more tokens of a longer vocabulary."""
import dataclasses
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.laws.bounds import WHOLE_MODEL, close, close_gradients
from tests.by_hand import put
from tests.models_under_test import FAMILIES, VOCAB, Case, bits, logits, same_values

U, RNG, D_MODEL, NAME = 2.0 ** -53, numpy.random.default_rng, 12, "encoder.input@prompt.P"
SPECIAL = {0, 1}  # pad and decoder start are 0 here, eos is 1
every_family = pytest.mark.parametrize("family", FAMILIES)


def case_of(family, seed=0, dtype="float64"):
    return Case((family, "q and v"), 2, 3, dtype, seed)


def model_of(family, seed=0, dtype="float64"):
    """A base without zeros and ones in its biases and norms."""
    return case_of(family, seed, dtype).model()


def prompted(model, length, name="prompt", seed=0):
    """A prompt of random vectors, plugged."""
    attachment = minipeft.attach(model, minipeft.PromptTuning(length, "random"), RNG(0), name)
    (p,) = attachment.parameters.values()
    p.data = RNG([seed, length]).standard_normal(p.shape).astype(p.dtype)
    return attachment


def vectors(attachment):
    """P [p, d]."""
    (p,) = attachment.parameters.values()
    return p.data


def start(family="post-LN", seed=0, dtype="float64", model=None, **fields):
    """(the model, P as it starts)."""
    model = model_of(family, dtype=dtype) if model is None else model
    return model, vectors(minipeft.attach(model, minipeft.PromptTuning(**fields), RNG(seed), "prompt"))


def embedded(model):
    """[vocab, d]: every token as the encoder reads it, the table times what the model multiplies it by."""
    return model.embed(numpy.arange(model.config.vocab_size)[None]).data[0]


# ---- fields


@pytest.mark.parametrize("fields, message", [
    *(({"length": value}, "length is .*; expected an integer >= 1") for value in (0, -1, 2.0, True, "20", None)),
    *(({"init": value}, "init is .*; expected one of vocabulary, random, tokens") for value in ("zeros", None, 0)),
    ({"init": "tokens"}, r"tokens is \(\); expected 1 to 20 ids, or tuples of ids, with init='tokens', and none w"),
    ({"tokens": (3,)}, r"tokens is \(3,\)"), ({"tokens": (3,), "init": "random"}, "tokens is"),
    *(({"next_to_text": value}, "next_to_text is .*; expected True or False") for value in (1, None, "left")),
    ({"length": 2, "init": "tokens", "tokens": (3, 4, 5)}, "tokens is .*; expected 1 to 2 ids"),
    *(({"init": "tokens", "tokens": value}, "tokens is")
      for value in (3, "ab", ("a",), (1.0,), (True,), (-1,), ((),), ((2, -1),), (((1,),),), {2}, (None,)))])
def test_a_field_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"PromptTuning: {message}"):
        minipeft.PromptTuning(**fields)


def test_ids_of_numpy_and_lists_are_taken_as_plain_ids_which_a_file_can_hold():
    method = minipeft.PromptTuning(4, "tokens", [numpy.int64(2), [3, numpy.int32(4)], numpy.array([5, 6])])
    assert method == minipeft.PromptTuning(4, "tokens", (2, (3, 4), (5, 6)))
    assert {type(i) for token in method.tokens for i in (token if isinstance(token, tuple) else (token,))} == {int}


@pytest.mark.parametrize("tokens", [(13,), (2, (3, 13))])
def test_a_token_that_the_vocabulary_lacks_is_refused_before_anything_is_drawn(tokens):
    model, rng = model_of("t5 v1.0"), RNG(0)
    state = rng.bit_generator.state
    with pytest.raises(ValueError, match="tokens holds 13; expected ids from 0 to 12"):
        minipeft.attach(model, minipeft.PromptTuning(5, "tokens", tokens), rng)
    assert rng.bit_generator.state == state and not model.attachments


@every_family
def test_it_stands_at_the_encoders_input_and_has_p_d_numbers(family):
    model = model_of(family)
    attachment = minipeft.attach(model, minipeft.PromptTuning(5), RNG(0), "prompt")
    assert list(attachment.places) == ["encoder.input"]
    assert {n: p.shape for n, p in attachment.parameters.items()} == {NAME: (5, D_MODEL)}
    assert minipeft.report(model).trainable == 5 * D_MODEL


@pytest.mark.parametrize("where", [r"ff\.out", "memory", "decoder"])
def test_no_other_place_is_an_input(where):
    with pytest.raises(ValueError, match=r"matches none of the 1 input site names; nearest: encoder.input"):
        minipeft.PromptTuning(where=where).places(model_of("t5 v1.0"))


# ---- how it starts


@every_family
@pytest.mark.parametrize("length", [1, 7, 11])
def test_vocabulary_starts_as_distinct_tokens_of_the_vocabulary_without_special_ones(family, length):
    """As the encoder reads them: the Transformer multiplies its table by sqrt(d_model)."""
    model, p = start(family, length=length)
    rows = embedded(model)
    ids = [int(numpy.flatnonzero((rows == v).all(axis=1)).item()) for v in p]
    assert len(set(ids)) == length and not SPECIAL & set(ids)


def test_with_fewer_tokens_than_vectors_some_come_twice_and_none_is_special():
    model, p = start("t5 v1.0", length=60)
    ids = [int(numpy.flatnonzero((embedded(model) == v).all(axis=1)).item()) for v in p]
    assert len(ids) == 60 and not SPECIAL & set(ids) and len(set(ids)) > 8


def test_every_word_of_the_vocabulary_is_drawn_about_as_often_as_any_other():
    """600 drawn of 11 words: each count is binomial, of mean n / 11. Five deviations."""
    model, p = start("t5 v1.0", length=600)
    counts = (p[:, None] == embedded(model)[None, 2:]).all(axis=2).sum(axis=0)
    assert counts.sum() == 600 and abs(counts - 600 / 11).max() < 5 * math.sqrt(600 * (1 / 11) * (10 / 11))


def test_special_ids_are_those_of_the_configuration():
    config = minipeft.TransformerConfig(6, 12, 3, 17, 1, 1, pad_token_id=5, eos_token_id=3, decoder_start_token_id=2)
    model, p = start(model=minipeft.Transformer(config, RNG(0), "float64"), length=3)
    assert {tuple(v) for v in p} == {tuple(v) for v in embedded(model)[[0, 1, 4]]}


def test_random_starts_uniform_between_minus_and_plus_a_half():
    """N = 2,400 of variance 1 / 12: the mean has deviation sqrt(1 / 12 N), the mean square sqrt(1 / 180 N)."""
    _, p = start("t5 v1.0", length=200, init="random")
    assert abs(p).max() <= 0.5 and abs(p).max() > 0.499
    assert abs(p.mean()) < 5 * math.sqrt(1 / 12 / p.size)
    assert abs((p * p).mean() - 1 / 12) < 5 * math.sqrt(1 / 180 / p.size)


@pytest.mark.parametrize("family", ["t5 v1.0", "post-LN"])
def test_tokens_starts_as_these_tokens_the_mean_of_a_tuple_and_the_rest_drawn(family):
    """In their order; a special token that is asked for is taken."""
    model, p = start(family, length=5, init="tokens", tokens=(4, (6, 7, 9), 1))
    rows = embedded(model)
    assert numpy.array_equal(p[0], rows[4]) and numpy.array_equal(p[2], rows[1])
    assert close(p[1], (rows[6] + rows[7] + rows[9]) / 3, U)
    drawn = [int(numpy.flatnonzero((rows == v).all(axis=1)).item()) for v in p[3:]]
    assert len(set(drawn)) == 2 and not SPECIAL & set(drawn)


def test_a_text_as_long_as_the_prompt_draws_nothing():
    model, rng = model_of("t5 v1.0"), RNG(0)
    state = rng.bit_generator.state
    attachment = minipeft.attach(model, minipeft.PromptTuning(2, "tokens", (5, 3)), rng)
    assert numpy.array_equal(vectors(attachment), embedded(model)[[5, 3]]) and rng.bit_generator.state == state


@pytest.mark.parametrize("fields", [{}, {"init": "random"}, {"init": "tokens", "tokens": (3, (4, 5))}])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_is_drawn_depends_on_the_generator_alone_and_has_the_models_dtype(fields, dtype):
    first, again, other = (start(seed=seed, dtype=dtype, length=6, **fields)[1] for seed in (3, 3, 4))
    assert first.dtype == dtype and first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("fields", [{}, {"init": "tokens", "tokens": (4, (6, 7, 9), 1, (2,))}])
def test_all_tokens_are_embedded_in_one_call(monkeypatch, fields):
    """What it starts as, tokens of several ids included, is one lookup of [1, ids]."""
    model, calls = model_of("post-LN"), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda ids, *more: calls.append(ids.shape) or embed(ids, *more), raising=False)
    start(model=model, length=7, **fields)
    assert calls == [(1, 7 if not fields else 6 + 3)]


def test_it_starts_as_a_copy_training_which_leaves_the_table_alone():
    model, p = start("t5 v1.0", length=3)
    before = bits(model.state())
    p += 1
    assert bits(model.state()) == before


# ---- the law: a prompt is p virtual tokens


def longer(model, p):
    """The same model with a vocabulary of V + p, whose last p tokens the encoder reads as the rows of P."""
    config = dataclasses.replace(model.config, vocab_size=VOCAB + len(p))
    twin, factor = type(model)(config, None, "float64"), embedded(model)[2, 0] / model.state()["embedding.weight"][2, 0]
    state = dict(model.state())
    state["embedding.weight"] = numpy.concatenate([state["embedding.weight"], p / factor])
    if "head.weight" in state:
        state["head.weight"] = numpy.concatenate([state["head.weight"], numpy.zeros_like(p)])
    twin.load_state(state)
    return twin, factor


def in_front(batch, length, with_mask):
    """The batch with the p new ids in front of every row, masked or not."""
    rows, ids = len(batch["input_ids"]), numpy.arange(VOCAB, VOCAB + length)
    mask = numpy.concatenate([numpy.ones((rows, length), int), batch["attention_mask"]], axis=1) if with_mask else None
    return {"input_ids": numpy.concatenate([numpy.tile(ids, (rows, 1)), batch["input_ids"]], axis=1),
            "attention_mask": mask, "labels": batch["labels"]}


def padded(case, side):
    """A batch of rows of 6, 4, 1 and 3 tokens, the rest padding on one side."""
    batch = case.batch()
    kept = numpy.arange(6)[None] < numpy.array([6, 4, 1, 3])[:, None]
    kept = kept if side == "right" else kept[:, ::-1]
    return {**batch, "input_ids": numpy.where(kept, batch["input_ids"], 0), "attention_mask": kept.astype(int)}


every_side = pytest.mark.parametrize("side, with_mask", [("right", True), ("left", True), ("left", False)])


@every_side
@given(st.sampled_from(list(FAMILIES)), st.integers(0, 99), st.sampled_from([1, 2, 3]))
def test_prompting_is_running_the_base_on_a_vocabulary_longer_by_the_prompt(side, with_mask, family, seed, length):
    """Logits of the first V tokens (a tied head has p more), for any padding, and without a mask."""
    case = case_of(family, seed)
    model, batch = case.model(), padded(case, side)
    if not with_mask:
        batch["attention_mask"] = None
    p = vectors(prompted(model, length, seed=seed))
    twin, _ = longer(model, p)
    extended = in_front(batch, length, with_mask)
    found, wanted = logits(model, batch), logits(twin, extended)
    assert found.shape == (4, 7, VOCAB) and wanted.shape == (4, 7, VOCAB + length)
    assert close(found, wanted[..., :VOCAB], U)
    encoded = twin.encode(extended["input_ids"], extended["attention_mask"])
    assert close(model.encode(batch["input_ids"], batch["attention_mask"]).data, encoded.data, U)


@every_family
@every_side
def test_the_gradient_of_the_prompt_is_that_of_its_rows_in_the_longer_table(family, side, with_mask):
    """Summed over the batch, of a loss on the first V logits, where a tied head gives nothing to rows V to V + p. The
    table's rows are P / factor, so their gradient is factor times that of P."""
    case = case_of(family)
    model, batch, length = case.model(), padded(case, side), 3
    if not with_mask:
        batch["attention_mask"] = None
    attachment = prompted(model, length)
    twin, factor = longer(model, vectors(attachment))
    g = RNG(1).standard_normal((4, 7, VOCAB))

    _, found = minipeft.value_and_grad(lambda: loss_of_logits(model, batch, g), attachment.parameters)
    _, wanted = minipeft.value_and_grad(lambda: loss_of_logits(twin, in_front(batch, length, with_mask), g),
                                        minipeft.select(twin, "^embedding"))
    assert close_gradients(found, {NAME: wanted["embedding.weight"][VOCAB:] / factor}, U) is None
    alone = [minipeft.value_and_grad(lambda i=i: loss_of_row(model, batch, i, g), attachment.parameters)[1][NAME]
             for i in range(4)]
    assert close_gradients(found, {NAME: sum(alone)}, U) is None and all(a.any() for a in alone)


def loss_of_logits(model, batch, g):
    """Of the first V."""
    z = model(batch["input_ids"], model.shift_right(batch["labels"]), batch["attention_mask"])
    return ops.sum(ops.mul(ops.index(z, key=(Ellipsis, slice(0, VOCAB))), g))


def loss_of_row(model, batch, i, g):
    mask = batch["attention_mask"]
    z = model(batch["input_ids"][i:i + 1], model.shift_right(batch["labels"][i:i + 1]),
              None if mask is None else mask[i:i + 1])
    return ops.sum(ops.mul(z, g[i:i + 1]))


@pytest.mark.parametrize("family", ["t5 v1.1", "pre-LN"])
def test_gradients_are_those_of_central_differences(family):
    model = model_of(family)
    attachment = prompted(model, 3)
    params = attachment.parameters | minipeft.select(model, "^embedding")
    assert minipeft.check_gradients(lambda: model.loss(**case_of(family).batch()), params, RNG(0)) <= 1


@every_family
def test_cross_attention_sees_the_prompt_and_not_the_padding(family):
    """At its memory site: p + time keys; 0 is added to the scores of prompt and tokens, the smallest number to those of
    the padding. Without a mask nothing is added."""
    case, seen = case_of(family), []
    model, batch = case.model(), padded(case, "left")
    prompted(model, 2)
    site = model.decoder.blocks[0].cross.keys_values
    put(site, {"probe": lambda k, v, bias: seen.append((k.shape[:2], bias)) or (k, v, bias)})
    logits(model, batch)
    (shape, bias), mask = seen.pop(), batch["attention_mask"]
    assert shape == (4, 8) and bias.shape == (4, 1, 1, 8)
    assert numpy.array_equal(bias[:, 0, 0] == 0, numpy.concatenate([numpy.ones((4, 2)), mask], axis=1) == 1)
    logits(model, {**batch, "attention_mask": None})
    assert seen[0][0] == (4, 8) and seen[0][1] is None


def test_a_token_moves_by_p_positions_and_the_first_vector_has_the_first():
    """The encoder adds position p + i to token i: with all else taken away, states are embeddings plus positions."""
    model = model_of("pre-LN")
    model.encoder.blocks, model.encoder.norm = [], None
    p, ids = vectors(prompted(model, 3)), numpy.array([[4, 5, 6, 7], [8, 9, 2, 3]])
    wanted = numpy.concatenate([numpy.tile(p, (2, 1, 1)), embedded(model)[ids]], axis=1)
    wanted = wanted + model.state()["encoder.position.weight"][None, :7]
    assert numpy.array_equal(model.encode(ids).data, wanted)


def test_a_prompt_that_goes_beyond_learned_positions_is_refused_with_where_they_end():
    """As many vectors as six tokens leave positions for fit, one more does not; nor where one row of a batch has it."""
    model, batch = model_of("pre-LN"), case_of("pre-LN").batch()
    length = model.config.max_length
    prompted(model, length - 6, "fits")
    assert logits(model, batch).shape == (4, 7, VOCAB)
    model.attachments["fits"].unplug()
    prompted(model, length - 5, "long")
    message = (rf"the input, with any prompt in front of it, reaches position {length}; the table of learned "
               rf"positions ends at {length - 1} \(config.max_length\)")
    with pytest.raises(ValueError, match=message):
        logits(model, batch)
    with pytest.raises(ValueError, match=message):
        logits(model, batch, adapter=["fits", "long", None, "fits"])
    assert logits(model, batch, adapter=["fits", None, None, "fits"]).shape == (4, 7, VOCAB)


@pytest.mark.parametrize("length", [12, 13, 10 ** 9])
def test_a_prompt_that_learned_positions_leave_no_room_for_is_refused_when_it_is_attached(length):
    """Before anything is drawn. One vector fewer leaves one position, for a row of one token."""
    model, rng = model_of("pre-LN"), RNG(0)
    state = rng.bit_generator.state
    for start in ("vocabulary", "random"):
        with pytest.raises(ValueError) as error:
            minipeft.attach(model, minipeft.PromptTuning(length, start), rng)
        assert str(error.value) == (f"PromptTuning: length is {length}; expected fewer than the 12 positions that the "
                                    f"encoder has learned (config.max_length)")
    assert rng.bit_generator.state == state and not model.attachments
    minipeft.attach(model, minipeft.PromptTuning(11), rng)
    assert model([[3]], [[0, 4]]).shape == (1, 2, VOCAB)


@pytest.mark.parametrize("family", ["t5 v1.0", "t5 v1.1", "post-LN"])
def test_relative_and_sinusoidal_positions_have_room_for_any_prompt(family):
    model = model_of(family)
    minipeft.attach(model, minipeft.PromptTuning(300), RNG(0))
    assert model([[3]], [[0, 4]]).shape == (1, 2, VOCAB)


# ---- decoding, and rows that see different prompts


@every_family
@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_reads_the_prompt_when_it_is_plugged_and_not_when_it_is_off(family, use_cache):
    """Off, unplugged or by adapter=[None, ..], it is the base, forward and decoding alike. Plugged, every id is the
    argmax of the logits that a call gives for what was decoded so far."""
    different = []
    for seed in range(4):
        case = case_of(family, seed)
        model, batch = case.model(), padded(case, "right")
        ids, mask, options = batch["input_ids"], batch["attention_mask"], {"max_new_tokens": 6, "use_cache": use_cache}
        base = model.generate(ids, mask, **options)
        attachment = prompted(model, 3)
        found = model.generate(ids, mask, **options)
        different.append(found.tolist() != base.tolist())
        best = model(ids, found[:, :-1], mask).data.argmax(axis=-1)
        running = numpy.cumsum(found[:, :-1] == 1, axis=1) == 0
        assert numpy.array_equal(found[:, 1:][running], best[running]) and not found[:, 1:][~running].any()
        assert numpy.array_equal(model.generate(ids, None, **options), found), "pads are taken as padding"
        assert numpy.array_equal(model.generate(ids, mask, adapter=[None] * 4, **options), base)
        attachment.unplug()
        assert numpy.array_equal(model.generate(ids, mask, **options), base)
        assert numpy.array_equal(model.generate(ids, mask, adapter="prompt", **options), found)
    assert any(different), "a prompt changes what is said"


ROWS = ["a", None, "b", ("a", "b"), ("b", "a")]


def of_row(batch, i):
    return {key: None if value is None else value[i:i + 1] for key, value in batch.items()}


def mixed(family, with_mask, seed=0):
    """(model with prompts of 1 and 2 vectors, neither plugged; a batch of five rows)."""
    case = case_of(family, seed)
    model, batch = case.model(), case.batch(5)
    for length, name in ((1, "a"), (2, "b")):
        prompted(model, length, name, seed).unplug()
    return model, batch if with_mask else {**batch, "attention_mask": None}


@given(st.sampled_from(list(FAMILIES)), st.booleans(), st.integers(0, 99), st.permutations(ROWS))
def test_rows_of_one_batch_see_their_own_prompts(family, with_mask, seed, rows):
    """Two prompts of different lengths, one row with none, two with both, in either order; each is that row alone."""
    model, batch = mixed(family, with_mask, seed)
    found = logits(model, batch, adapter=rows)
    alone = [logits(model, of_row(batch, i), adapter=[row]) for i, row in enumerate(rows)]
    assert close(found, numpy.concatenate(alone), U)


@every_family
def test_both_prompts_stand_in_the_order_of_their_names_from_the_right(family):
    """("a", "b"): a first, then b in front of it, as if one were plugged after the other."""
    model, batch = mixed(family, True)
    a, b = (vectors(model.attachments[name]) for name in "ab")
    both = prompted(model, 3, "both")
    for order, stacked in ((("a", "b"), (b, a)), (("b", "a"), (a, b))):
        (p,) = both.parameters.values()
        p.data = numpy.concatenate(stacked)
        assert close(logits(model, batch, adapter=[order] * 5), logits(model, batch, adapter=["both"] * 5), U)
    both.remove()
    model.attachments["b"].plug()
    model.attachments["a"].plug()
    assert close(logits(model, batch), logits(model, batch, adapter=("b", "a")), U)


@every_family
def test_loss_and_gradients_of_a_mixed_batch_are_the_weighted_sums_of_its_rows(family):
    """A row's weight is its share of the label tokens."""
    model, batch = mixed(family, True)
    params = {f"{name}.{n}": p for name in "ab" for n, p in model.attachments[name].parameters.items()}
    loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch, adapter=ROWS), params)
    tokens, total = (batch["labels"] != -100).sum(axis=1), 0.0
    sums = {n: numpy.zeros(p.shape) for n, p in params.items()}
    for i, row in enumerate(ROWS):
        def step(i=i, row=row):
            return model.loss(**of_row(batch, i), adapter=[row])
        one, g = minipeft.value_and_grad(step, params, "zeros")
        total += one * tokens[i] / tokens.sum()
        for n in params:
            sums[n] += g[n] * tokens[i] / tokens.sum()
    assert len(set(tokens)) > 1 and abs(loss - total) <= WHOLE_MODEL * U * abs(total)
    assert close_gradients(grads, sums, U) is None


@every_family
def test_every_row_of_a_mixed_batch_generates_what_it_does_alone(family):
    said = set()
    for seed in range(3):
        model, batch = mixed(family, True, seed)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        found = model.generate(ids, mask, 5, adapter=ROWS)
        for i, row in enumerate(ROWS):
            alone = model.generate(ids[i:i + 1], mask[i:i + 1], 5, adapter=[row])[0]
            assert found[i].tolist() == alone.tolist() + [0] * (found.shape[1] - len(alone))
        assert numpy.array_equal(model.generate(ids, mask, 5, adapter=ROWS, use_cache=False), found)
        said |= {tuple(row) for row in found.tolist()}
    assert len(said) > 3, "rows say different things"


# ---- with others, and in a file


@every_family
def test_a_prompt_and_a_lora_act_together_and_apart(family):
    """Together they are the LoRA on the longer vocabulary; a row may have either, both or none of them."""
    case = case_of(family)
    model, batch = case.model(), case.batch()
    prompt, lora = prompted(model, 3), case.attach(model)
    twin, _ = longer(model, vectors(prompt))
    case.attach(twin)
    together = logits(model, batch)
    assert close(together, logits(twin, in_front(batch, 3, True))[..., :VOCAB], U)
    rows = [None, "prompt", "lora", ("lora", "prompt")]
    alone = [logits(model, of_row(batch, i), adapter=[row]) for i, row in enumerate(rows)]
    found = logits(model, batch, adapter=rows)
    assert close(found, numpy.concatenate(alone), U) and close(found[3:], together[3:], U)
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), minipeft.select(model, "@(lora|prompt)"))
    assert NAME in grads and len(grads) == 1 + len(lora.parameters) and all(g.any() for g in grads.values())
    lora.merge()
    assert close(logits(model, batch), together, U), "what lies beside it can be merged"
    with pytest.raises(ValueError, match="'prompt' cannot be merged: at encoder.input it acts on hidden states"):
        prompt.merge()


@every_family
def test_training_moves_the_prompt_and_nothing_else(family):
    case, optimizer, losses = case_of(family), minipeft.AdamW(0.05), []
    model, batch = case.model(), case.batch()
    attachment = minipeft.attach(model, minipeft.PromptTuning(3), RNG(0), "prompt")
    base, before = bits(model.state()), vectors(attachment).copy()
    for _ in range(8):
        loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
        optimizer.step(attachment.parameters, grads)
        losses.append(loss)
    assert losses[-1] < losses[0] and (vectors(attachment) != before).all() and bits(model.state()) == base
    attachment.unplug()
    assert same_values(logits(model, batch), logits(case.model(), batch))


@pytest.mark.parametrize("fields", [{}, {"init": "random"}, {"init": "tokens", "tokens": [numpy.int64(3), (4, 5)]}])
def test_what_was_saved_comes_back_and_goes_on(fields, tmp_path):
    """In every bit, and it can be trained further as if it had never left."""
    case, models = case_of("t5 v1.1", dtype="float32"), []
    for loaded in (False, True):
        model, batch = case.model(), case.batch()
        attachment = minipeft.attach(model, minipeft.PromptTuning(3, **fields), RNG(0), "prompt")
        vectors(attachment)[:] += RNG(1).standard_normal((3, D_MODEL)).astype("float32")
        before = logits(model, batch)
        if loaded:
            attachment.save(tmp_path / "p")
            attachment.remove()
            method = attachment.method
            attachment = minipeft.load(model, tmp_path / "p")
            assert dataclasses.replace(attachment.method, where=method.where) == method
            assert logits(model, batch).tobytes() == before.tobytes() and attachment.name == "prompt"
        grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)[1]
        minipeft.AdamW(0.1).step(attachment.parameters, grads)
        models.append((bits(attachment.parameters), logits(model, batch).tobytes()))
    assert models[0] == models[1]


def test_a_vocabulary_of_special_tokens_alone_is_refused_unless_nothing_is_drawn_from_it():
    model = minipeft.T5(minipeft.T5Config(2, 6, 3, 2, 9, 1, 1, 8, 20), RNG(0))
    with pytest.raises(ValueError, match="special tokens alone; expected others to draw from, or init='random'"):
        minipeft.attach(model, minipeft.PromptTuning(2), RNG(0))
    assert minipeft.attach(model, minipeft.PromptTuning(2, "tokens", (1, 0)), RNG(0)).state == "plugged"
    assert minipeft.attach(model, minipeft.PromptTuning(2, "random"), RNG(0), "again").state == "plugged"
