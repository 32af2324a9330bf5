"""What the Transformer and T5 share: names, inputs, masks, loss, dropout, dtypes, clones."""
from __future__ import annotations

import contextlib
import math
import re
from typing import Any, Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeft import (LoRA, T5, T5Config, Transformer, TransformerConfig, attach, select, value_and_grad)
from minipeft.engine import tensor
from minipeft.models import t5, transformer
from minipeft.nn import attention
from minipeft.engine.ops import drop

VOCAB = 23
SIZES: dict[str, Any] = dict(vocab_size=VOCAB, d_model=12, num_heads=3, d_ff=20, num_layers=2, num_decoder_layers=3)
T5_SIZES: dict[str, Any] = dict(SIZES, d_kv=5, relative_attention_num_buckets=8, relative_attention_max_distance=16)


def t5_v10(seed: int = 0, dtype: str = "float64", **fields: Any) -> T5:
    return T5(T5Config(**{**T5_SIZES, **fields}), np.random.default_rng(seed), dtype)


def t5_v11(seed: int = 0, dtype: str = "float64", **fields: Any) -> T5:
    v11 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False)
    return t5_v10(seed, dtype, **v11, **fields)


def post_ln(seed: int = 0, dtype: str = "float64", **fields: Any) -> Transformer:
    return Transformer(TransformerConfig(**{**SIZES, **fields}), np.random.default_rng(seed), dtype)


def pre_ln(seed: int = 0, dtype: str = "float64", **fields: Any) -> Transformer:
    pre = dict(pre_norm=True, final_norm=True, activation="gelu", positions="learned", max_length=16,
               tie_embeddings=False)
    return post_ln(seed, dtype, **pre, **fields)


MODELS: dict[str, Callable[..., Any]] = {"t5 v1.0": t5_v10, "t5 v1.1": t5_v11, "post-LN": post_ln, "pre-LN": pre_ln}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
any_model = st.sampled_from(sorted(MODELS)).map(lambda name: MODELS[name])


def batch(seed: int = 0, rows: int = 3, source: int = 7, target: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, mask (row 0 full, the others padded on the left or the right), labels with some -100."""
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(2, VOCAB, (rows, source)), rng.integers(2, VOCAB, (rows, target))
    mask = np.ones((rows, source), int)
    for row in range(1, rows):
        pads = int(rng.integers(1, source))
        mask[row, slice(None, pads) if row % 2 else slice(source - pads, None)] = 0
        labels[row, int(rng.integers(1, target + 1)):] = -100
    return ids, mask, labels


# ------------------------------------------------------------------------------------------------------------- names

def expanded(name: str) -> list[str]:
    """a.{b,c} -> a.b, a.c."""
    match = re.search(r"\{([^}]*)\}", name)
    if not match:
        return [name]
    return [full for option in match[1].split(",") for full in expanded(name.replace(match[0], option, 1))]


def name_table(doc: str) -> tuple[dict[str, tuple[list[str], str]], dict[str, str]]:
    """The table in a module docstring: {name with i for a layer: (shape in words, remark)}, {site: kind}."""
    table, sites = doc.split("this table against the model)")[1].split("\n\n", 1)[1].split("    sites: ")
    one = r"(?:encoder|decoder|embedding|head)\.(?:[\w.*]|\{[\w,]+\})+"
    rows: list[tuple[str, list[str], str]] = []
    for line in table.splitlines():
        match = re.match(rf"    ({one}(?:, {one})*)\s*((?:, )?(?:\[[^\]]*\](?:, )?)*)\s*(.*)$", line)
        if match:
            rows.append((match[1], re.findall(r"\[([^\]]*)\]", match[2]), match[3]))
        elif line.strip():  # a remark that did not fit
            rows[-1] = (*rows[-1][:2], f"{rows[-1][2]} {line.strip()}")
    found: dict[str, tuple[list[str], str]] = {}
    for cell, shapes, remark in rows:
        for pattern in re.findall(one, cell):
            for name in expanded(pattern):
                if shapes:
                    shape = shapes[len(shapes) == 2 and name.endswith(".bias")]
                    found[name] = (shape.split(", "), remark)
                    continue
                twin = name.replace("decoder.", "encoder.").replace("cross", "attn")  # "as in the encoder"
                twins = [t for t in found if t == twin or name.endswith(".*") and t.startswith(twin[:-1])]
                assert twins, f"{name} refers to a row that is not there"
                for t in twins:
                    found[name.removesuffix("*") + t[len(twin) - 1:] if name.endswith("*") else name] = \
                        (found[t][0], found[t][1])
    kinds = {site.strip(): kind for group, kind in re.findall(r"([^()]+)\((\w+)\)", sites.replace(";", ""))
             for site in group.split(",")}
    return found, kinds


def expected_names(module: Any, model: Any) -> dict[str, tuple[int, ...]]:
    """What the table of `module` says that `model` has: {name: shape}."""
    c = model.config
    sizes = {"vocab": c.vocab_size, "V": c.vocab_size, "d_model": c.d_model, "d": c.d_model, "d_ff": c.d_ff,
             "max_length": getattr(c, "max_length", 0), "heads": c.num_heads,
             "buckets": getattr(c, "relative_attention_num_buckets", 0), "inner": c.num_heads * getattr(c, "d_kv", 0)}
    present = {"learned positions only": getattr(c, "positions", "") == "learned",
               "final_norm only": getattr(c, "final_norm", False),
               "untied only": not getattr(c, "tie_embeddings", getattr(c, "tie_word_embeddings", None))}
    names = {}
    for name, (shape, remark) in name_table(module.__doc__)[0].items():
        if not all(holds for condition, holds in present.items() if condition in remark):
            continue
        gated = "v1.1 has wi_0 (activated) and wi_1" in remark and c.gated
        for variant in (name.replace(".wi.", ".wi_0."), name.replace(".wi.", ".wi_1.")) if gated else (name,):
            names[variant] = tuple(sizes[word] for word in shape)
    return names


def general(name: str) -> str:
    return re.sub(r"\.\d+\.", ".i.", name)


@pytest.mark.parametrize("module, model", [
    (t5, t5_v10()), (t5, t5_v11()), (t5, t5_v10(tie_word_embeddings=False)), (t5, t5_v11(num_heads=2)),
    (transformer, post_ln()), (transformer, pre_ln()), (transformer, post_ln(final_norm=True)),
    (transformer, post_ln(positions="learned", tie_embeddings=False))],
    ids=["v1.0", "v1.1", "untied", "heads", "post-LN", "pre-LN", "final norm", "learned, untied"])
def test_the_table_of_names_in_the_docstring_is_the_model_in_both_directions(module, model):
    expected = expected_names(module, model)
    found: dict[str, tuple] = {}
    layers: dict[str, set[str]] = {}
    for name, p in model.base_parameters.items():
        assert found.setdefault(general(name), p.shape) == p.shape, "layers of one stack are alike"
        layers.setdefault(general(name), set()).update(re.findall(r"\.(\d+)\.", name))
    assert found == expected
    for name, numbers in layers.items():
        count = {"e": model.config.num_layers, "d": model.config.num_decoder_layers}[name[0]] if ".i." in name else 0
        assert numbers == {str(i) for i in range(count)}, name


@every_model
def test_the_sites_in_the_docstring_are_the_model_s_in_both_directions(build):
    model = build()
    sites = name_table((t5 if isinstance(model, T5) else transformer).__doc__)[1]
    assert len(sites) == 9
    found = {(name, site.kind) for name, site in model.sites.items()}
    assert {(general(name), kind) for name, kind in found} == set(sites.items())
    assert len(found) == 1 + 3 * 2 + 5 * 3, "one input, 2 x (attn.out, attn.keys_values, ff.out), 3 x 5 in the decoder"


@pytest.mark.parametrize("build", [t5_v10, post_ln])
def test_a_tied_weight_is_one_object_with_one_name(build):
    model = build()
    assert model.head.weight is model.embedding.weight
    assert [name for name in model.base_parameters if "head" in name or "embedding" in name] == ["embedding.weight"]
    assert len({id(p) for p in model.base_parameters.values()}) == len(model.base_parameters)


@pytest.mark.parametrize("build, tied", [(t5_v10, "tie_word_embeddings"), (post_ln, "tie_embeddings")])
def test_a_tied_weight_s_gradient_is_the_sum_over_its_uses(build, tied):
    scale = {"scale_decoder_outputs": True} if build is t5_v10 else {}  # else it would follow the tie
    one, two = build(), build(**{tied: False}, **scale)
    two.load_state({**one.state(), "head.weight": one.embedding.weight.base.data})
    ids, mask, labels = batch()
    _, g1 = value_and_grad(lambda: one.loss(ids, labels, mask), select(one, "^embedding"))
    _, g2 = value_and_grad(lambda: two.loss(ids, labels, mask), select(two, "^(embedding|head)"))
    total = g2["embedding.weight"] + g2["head.weight"]
    # the same terms in another order: 1e-12 is what a whole float64 model is allowed everywhere here
    assert np.abs(g1["embedding.weight"] - total).max() <= 1e-12 * np.abs(total).max()
    assert np.abs(g2["head.weight"]).max() > 1e-3 < np.abs(g2["embedding.weight"]).max()


# ---------------------------------------------------------------------------------------------------- seeds and clones

@every_model
def test_a_model_is_determined_by_its_seed_and_without_one_it_is_zero_but_for_norms(build):
    a, b, other = build(3), build(3), build(4)
    assert all(np.array_equal(b.state()[name], array) for name, array in a.state().items())
    assert not np.array_equal(a.embedding.weight.base.data, other.embedding.weight.base.data)
    empty = type(a)(a.config, None, "float32")
    for name, array in empty.state().items():
        assert array.dtype == np.float32
        assert (array == ("norm." in name and name.endswith("weight"))).all(), name


@every_model
def test_a_clone_shares_no_array_and_computes_the_same(build):
    model = build()
    attach(model, LoRA(2, 4), np.random.default_rng(1))
    other = attach(model, LoRA(2, 4, where=r"ff\.wo\.weight$"), np.random.default_rng(1), "other")
    model.attachments["lora"].merge()
    ids, mask, labels = batch()
    before = model(ids, labels.clip(0), mask).data
    twin = model.clone()
    assert np.array_equal(twin(ids, labels.clip(0), mask).data, before)
    assert {n: a.state for n, a in twin.attachments.items()} == {"lora": "merged", "other": "plugged"}
    assert all(a.model is twin for a in twin.attachments.values())
    ours, theirs = ([*m.base_parameters.values(), *m.attachments["lora"].parameters.values(),
                     *m.attachments["other"].parameters.values()] for m in (model, twin))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert np.array_equal(a.data, b.data) and not np.shares_memory(a.data, b.data)
    if model.head.weight is model.embedding.weight:
        assert twin.head.weight is twin.embedding.weight
    for p in theirs:
        p.data += 1
    twin.attachments["other"].unplug()
    assert np.array_equal(model(ids, labels.clip(0), mask).data, before)
    assert other.state == "plugged"


@every_model
def test_a_loaded_state_is_copied_in_the_model_s_own_dtype(build):
    source, model, single = build(1), build(2), build(3, "float32")
    model.load_state(source.state())
    single.load_state(source.state())
    for name, array in source.state().items():
        assert np.array_equal(model.state()[name], array) and not np.shares_memory(model.state()[name], array)
        assert single.state()[name].dtype == np.float32
    assert np.array_equal(model(IDS, IDS, MASK).data, source(IDS, IDS, MASK).data)


# ------------------------------------------------------------------------------------------------------------ bad input

IDS, MASK, LABELS = batch()
BAD_IDS = [("shape \\[7\\]", IDS[0]), ("shape \\[3, 7, 1\\]", IDS[..., None]), ("shape \\[0, 7\\]", IDS[:0]),
           ("shape \\[3, 0\\]", IDS[:, :0]), ("shape \\[\\]", np.int64(3)), ("dtype float64", IDS.astype(float)),
           ("dtype bool", IDS > 0), ("holds -1", np.where(IDS == IDS[1, 2], -1, IDS)),
           ("holds -100", np.where(IDS == IDS[1, 2], -100, IDS)),
           (f"holds {VOCAB}.*0 to {VOCAB - 1}", np.where(IDS == IDS[1, 2], VOCAB, IDS)),
           (f"holds {2**40}", np.where(IDS == IDS[1, 2], 2**40, IDS))]


@contextlib.contextmanager
def nothing_is_computed() -> Iterator[None]:
    ran: list[str] = []
    token = tensor._observer.set(lambda forward, *_: ran.append(forward.__name__))
    try:
        yield
    finally:
        tensor._observer.reset(token)
    assert ran == []


@every_model
@pytest.mark.parametrize("message, ids", BAD_IDS, ids=[m for m, _ in BAD_IDS])
def test_ids_that_are_no_ids_are_refused_everywhere_before_anything_is_computed(build, message, ids):
    model = build()
    with nothing_is_computed():
        with pytest.raises(ValueError, match="^input_ids .*" + message):
            model(ids, IDS)
        with pytest.raises(ValueError, match="decoder_input_ids .*" + message):
            model(IDS, ids)
        with pytest.raises(ValueError, match="input_ids .*" + message):
            model.encode(ids)
        with pytest.raises(ValueError, match="input_ids .*" + message):
            model.generate(ids)
        with pytest.raises(ValueError, match="input_ids .*" + message):
            model.loss(ids, IDS)
        if "-100" not in message:
            with pytest.raises(ValueError, match="labels .*" + message):
                model.loss(IDS, ids)


@every_model
@pytest.mark.parametrize("message, mask", [
    (r"shape \[7\]; expected \[3, 7\]", MASK[0]), (r"shape \[3, 6\]", MASK[:, :6]), (r"shape \[2, 7\]", MASK[:2]),
    (r"shape \[3, 1, 7\]", MASK[:, None]), (r"shape \[3, 1\]", MASK[:, :1]), ("other than 0 and 1", MASK * 2),
    ("other than 0 and 1", MASK - 1), ("other than 0 and 1", np.where(MASK, 0.0, -1e9)),
    ("other than 0 and 1", MASK * math.nan)])
def test_a_mask_of_another_shape_or_with_other_values_is_refused(build, message, mask):
    model = build()
    with nothing_is_computed():
        for call in (lambda: model(IDS, IDS, mask), lambda: model.encode(IDS, mask),
                     lambda: model.loss(IDS, LABELS, mask), lambda: model.generate(IDS, mask)):
            with pytest.raises(ValueError, match="^attention_mask .*" + message):
                call()
        with pytest.raises(ValueError, match="decoder_attention_mask .*" + message):
            model(IDS, IDS, None, mask)


@every_model
def test_labels_are_refused_when_all_are_ignored_and_batches_must_agree(build):
    model = build()
    with nothing_is_computed():
        with pytest.raises(ValueError, match="every label is -100"):
            model.loss(IDS, np.full((3, 5), -100))
        with pytest.raises(ValueError, match="input_ids has 3 rows and decoder_input_ids 2"):
            model(IDS, IDS[:2])
        with pytest.raises(ValueError, match="input_ids has 3 rows and decoder_input_ids 2"):
            model.loss(IDS, LABELS[:2])


@every_model
def test_lists_small_integers_and_boolean_masks_are_taken_as_they_mean(build):
    model = build()
    expected = model(IDS, IDS, MASK).data
    for ids, mask in ((IDS.tolist(), MASK.tolist()), (IDS.astype(np.int8), MASK.astype(bool)),
                      (IDS.astype(np.uint64), MASK.astype(float))):
        assert np.array_equal(model(ids, ids, mask).data, expected)
    assert model.loss(IDS, LABELS.astype(np.int16), MASK).data == model.loss(IDS.tolist(), LABELS.tolist(), MASK).data


# ------------------------------------------------------------------------------------------------------ masks and time

@given(any_model, st.integers(0, 2**32), st.integers(1, 4))
def test_a_later_token_never_changes_earlier_logits(build, seed, at):
    model = build(seed)
    ids, mask, _ = batch(seed)
    targets = np.random.default_rng(seed).integers(0, VOCAB, (3, 5))
    later = targets.copy()
    later[:, at:] = (later[:, at:] + 1) % VOCAB
    a, b = model(ids, targets, mask).data, model(ids, later, mask).data
    assert np.array_equal(a[:, :at], b[:, :at]), "a probability of exactly 0: not a bit moves"
    assert (a[:, at:] != b[:, at:]).any(axis=-1).all()


@given(any_model, st.integers(0, 2**32))
def test_what_is_masked_is_never_seen(build, seed):
    model = build(seed)
    ids, mask, labels = batch(seed)
    other = np.where(mask, ids, (ids + 1) % VOCAB)
    targets = model.shift_right(labels)
    assert np.array_equal(model(ids, targets, mask).data, model(other, targets, mask).data)
    seen = model(ids, targets, mask).data
    assert (model(ids, targets).data[1:] != seen[1:]).any(), "without the mask, padding is seen"
    decoder_mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 0, 1, 1, 0]])
    masked = model(ids, targets, mask, decoder_mask).data
    changed = model(ids, np.where(decoder_mask, targets, (targets + 1) % VOCAB), mask, decoder_mask).data
    assert np.array_equal(masked[decoder_mask == 1], changed[decoder_mask == 1])
    assert np.array_equal(masked[0], seen[0]) and not np.array_equal(masked[1], seen[1])


@every_model
def test_no_mask_is_a_mask_of_ones(build):
    model, ids = build(), batch()[0]
    ones = np.ones_like(ids)
    assert np.array_equal(model(ids, ids).data, model(ids, ids, ones, ones).data)
    assert np.array_equal(model.encode(ids).data, model.encode(ids, ones).data)


@every_model
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_that_is_all_padding_is_finite_and_changes_no_other(build, dtype):
    model = build(dtype=dtype)
    ids, mask, labels = batch()
    padded = mask.copy()
    padded[1] = 0
    logits = model(ids, model.shift_right(labels), padded).data
    assert np.isfinite(logits).all()
    assert np.array_equal(logits[[0, 2]], model(ids, model.shift_right(labels), mask).data[[0, 2]])
    loss, grads = value_and_grad(lambda: model.loss(ids, labels, padded), select(model, ".*"))
    assert math.isfinite(loss) and all(np.isfinite(g).all() for g in grads.values())
    assert np.isfinite(model.encode(ids, padded).data).all()
    assert model.generate(ids, padded, 3).shape[0] == 3
    everything = np.zeros_like(labels)
    assert np.isfinite(model(ids, model.shift_right(labels), padded, everything).data).all()


@given(any_model, st.integers(0, 2**32))
def test_each_row_of_a_batch_is_that_row_alone(build, seed):
    model = build(seed)
    ids, mask, labels = batch(seed)
    targets = model.shift_right(labels)
    together = model(ids, targets, mask).data
    for row in range(3):
        alone = model(ids[row:row + 1], targets[row:row + 1], mask[row:row + 1]).data[0]
        # BLAS may sum a batch of another size in another order: 1e-12, as for a whole float64 model everywhere here
        assert np.abs(alone - together[row]).max() <= 1e-12 * np.abs(together).max()


# ----------------------------------------------------------------------------------------------------------------- loss

def reference_loss(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> float:
    """(1 - e) on the gold token and e / V on each of the V tokens, the mean over counted positions."""
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    terms = []
    for row, column in zip(*np.nonzero(labels != -100)):
        gold = log_p[row, column, labels[row, column]]
        terms.append(-(1 - smoothing) * gold - smoothing / logits.shape[-1] * log_p[row, column].sum())
    return math.fsum(terms) / len(terms)


@given(any_model, st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.7]))
def test_the_loss_is_the_mean_over_label_tokens_with_smoothing_e_over_v(build, seed, smoothing):
    model = build(seed)
    if isinstance(model, Transformer):
        model = build(seed, label_smoothing=smoothing)
    else:
        smoothing = 0.0
    ids, mask, labels = batch(seed)
    targets = np.concatenate([np.zeros((3, 1), int), labels[:, :-1]], axis=1)
    targets[targets == -100] = 0
    expected = reference_loss(model(ids, targets, mask).data, labels, smoothing)
    # at most 15 terms, each a sum of 23: fewer than 100 roundings of relative 2^-53, so 1e-13 with room for exp, log
    assert abs(model.loss(ids, labels, mask).data - expected) <= 1e-13 * abs(expected)


@every_model
def test_an_ignored_label_has_no_part_in_the_loss_or_its_gradient(build):
    model = build()
    ids, mask, labels = batch()
    longer = np.concatenate([labels, np.full((3, 2), -100)], axis=1)
    params = select(model, ".*")
    a, ga = value_and_grad(lambda: model.loss(ids, labels, mask), params)
    b, gb = value_and_grad(lambda: model.loss(ids, longer, mask), params, unused="zeros")
    assert abs(a - b) <= 1e-13 * abs(a)
    for name in params:
        if name != "decoder.position.weight":  # whose later rows are now read, without effect
            assert np.abs(ga[name] - gb[name]).max() <= 1e-12 * max(np.abs(ga[name]).max(), 1e-3), name


def test_shifted_labels_use_the_configured_start_and_pad():
    model = t5_v10(pad_token_id=3, decoder_start_token_id=4, eos_token_id=2)
    labels = np.array([[5, 6, 2, -100], [7, 2, -100, -100]])
    assert model.shift_right(labels).tolist() == [[4, 5, 6, 2], [4, 7, 2, 3]]
    assert labels.tolist() == [[5, 6, 2, -100], [7, 2, -100, -100]], "the caller's array is left alone"


# -------------------------------------------------------------------------------------------------------------- dropout

@every_model
def test_dropout_is_on_if_and_only_if_a_generator_is_given(build):
    model, (ids, mask, labels) = build(dropout_rate=0.3), batch()
    plain = model(ids, labels.clip(0), mask).data
    assert np.array_equal(model(ids, labels.clip(0), mask).data, plain)
    dropped = model(ids, labels.clip(0), mask, rng=np.random.default_rng(5)).data
    again = model(ids, labels.clip(0), mask, rng=np.random.default_rng(5)).data
    other = model(ids, labels.clip(0), mask, rng=np.random.default_rng(6)).data
    assert np.array_equal(dropped, again)
    assert (dropped != plain).any(axis=(1, 2)).all() and (dropped != other).any(axis=(1, 2)).all()
    for run in (lambda rng: model.encode(ids, mask, rng=rng), lambda rng: model.loss(ids, labels, mask, rng=rng)):
        assert np.array_equal(run(np.random.default_rng(1)).data, run(np.random.default_rng(1)).data)
        assert not np.array_equal(run(np.random.default_rng(1)).data, run(None).data)


@every_model
def test_dropout_of_rate_0_is_no_dropout_and_draws_nothing(build):
    model, (ids, mask, labels) = build(dropout_rate=0.0), batch()
    rng = np.random.default_rng(0)
    start = rng.bit_generator.state
    assert np.array_equal(model(ids, labels.clip(0), mask, rng=rng).data, model(ids, labels.clip(0), mask).data)
    assert rng.bit_generator.state == start


@every_model
def test_dropout_acts_at_the_listed_places_and_nowhere_else(build, monkeypatch):
    """After the embedding, on probabilities, after the attention's output, inside the feed-forward, after it; in T5
    also after each stack's last norm."""
    shapes: list[tuple] = []
    real = drop.dropout_mask

    def spy(shape, p, rng, dtype):
        assert p == 0.25
        shapes.append(tuple(shape))
        return real(shape, p, rng, dtype)

    monkeypatch.setattr(drop, "dropout_mask", spy)
    monkeypatch.setattr(attention, "dropout_mask", spy)
    model, (ids, mask, labels) = build(dropout_rate=0.25), batch()
    model(ids, labels.clip(0), mask, rng=np.random.default_rng(0))
    b, s, t, d, ff, h = 3, 7, 5, 12, 20, 3
    last = [(b, s, d)] if isinstance(model, T5) else []
    encoder = [(b, s, d)] + [(b, h, s, s), (b, s, d), (b, s, ff), (b, s, d)] * 2 + last
    last = [(b, t, d)] if isinstance(model, T5) else []
    decoder = [(b, t, d)] + [(b, h, t, t), (b, t, d), (b, h, t, s), (b, t, d), (b, t, ff), (b, t, d)] * 3 + last
    assert shapes == encoder + decoder


def test_a_dropout_mask_keeps_the_expected_share_scaled_to_keep_the_mean():
    keep = drop.dropout_mask((400, 500), 0.3, np.random.default_rng(0), np.dtype("float32"))
    assert keep.dtype == np.float32 and set(np.unique(keep)) == {np.float32(0), np.float32(1 / 0.7)}
    # 200,000 draws: the share kept is within 5 standard deviations, sqrt(0.21 / 200000) each, of 0.7
    assert abs((keep > 0).mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / keep.size)


# --------------------------------------------------------------------------------------------------------------- dtypes

@every_model
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_dtype_of_the_model_is_that_of_every_array_it_computes(build, dtype, training, monkeypatch):
    """One NumPy scalar in the wrong place would silently promote all that follows."""
    fields = {"label_smoothing": 0.1} if build in (post_ln, pre_ln) else {}
    model, (ids, mask, labels) = build(dtype=dtype, **fields), batch()
    attach(model, LoRA(2, 3.0, dropout=0.1), np.random.default_rng(0))
    seen: list[str] = []

    def observe(forward: Any, inputs: tuple, out: np.ndarray, vjps: Any, node: Any) -> None:
        name = forward.__name__
        for array in (out, *map(tensor.array_of, inputs)):
            if getattr(array, "dtype", np.dtype(int)).kind == "f":
                assert array.dtype == dtype, f"{name}: {array.dtype}"
        seen.append(name)

    real = tensor.sum_to

    def sum_to(term: np.ndarray, shape: tuple) -> np.ndarray:
        assert term.dtype == dtype, f"a gradient of shape {shape} is {term.dtype}"
        seen.append("vjp")
        return real(term, shape)

    monkeypatch.setattr(tensor, "sum_to", sum_to)
    token = tensor._observer.set(observe)
    try:
        loss, grads = value_and_grad(
            lambda: model.loss(ids, labels, mask, rng=np.random.default_rng(0) if training else None),
            select(model, ".*"))
        model.generate(ids, mask, 3)
    finally:
        tensor._observer.reset(token)
    assert isinstance(loss, float) and all(g.dtype == dtype for g in grads.values())
    assert seen.count("vjp") > 100 < len(seen) - seen.count("vjp")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int64", object, None])
def test_a_model_computes_in_float32_or_float64_alone(dtype):
    with pytest.raises(ValueError, match="dtype"):
        T5(T5Config(8, 4, 2, 2, 4, 1, 1), None, dtype)


@pytest.mark.parametrize("build", [t5_v10, post_ln])
def test_what_is_no_batch_no_generator_and_no_adapter_name_is_refused_by_name(build):
    model, ragged = build(), [[3, 4], [5]]
    for call in (lambda: model.generate(ragged), lambda: model(ragged, ragged), lambda: model.loss([[3]], ragged)):
        with pytest.raises(ValueError, match="rows of different length"):
            call()
    lora = attach(model, LoRA(1), np.random.default_rng(0))
    for wrong in (lora, 5, [5]):
        with pytest.raises(TypeError, match="adapter holds .*; expected names"):
            model([[3]], [[4]], adapter=wrong)
    for rng in (0, np.random):
        for call in (lambda: model([[3]], [[4]], rng=rng), lambda: type(model)(model.config, rng)):
            with pytest.raises(TypeError, match="expected a numpy.random.Generator"):
                call()
    with pytest.raises(TypeError, match="config is dict; expected .*Config"):
        type(model)({}, None)


@pytest.mark.parametrize("build", [t5_v10, post_ln])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_replaced(build):
    model = build()
    state = {name: array.copy() for name, array in model.state().items()}
    for bad in (np.nan, np.inf):
        arrays = {**state, "encoder.0.attn.o.weight": np.full_like(state["encoder.0.attn.o.weight"], bad)}
        with pytest.raises(ValueError, match="encoder.0.attn.o.weight holds numbers that are not finite"):
            model.load_state(arrays)
    assert all(np.array_equal(model.state()[name], array) for name, array in state.items())


def test_a_tuple_of_names_is_a_stack_for_all_rows():
    model, rng = t5_v10(), np.random.default_rng(0)
    for name in ("a", "b"):
        for p in attach(model, LoRA(1), rng, name).parameters.values():
            p.data += rng.standard_normal(p.shape)
    ids = np.array([[3, 4], [5, 6]])
    stacked = model(ids, ids, adapter=("a", "b")).data
    assert np.array_equal(stacked, model(ids, ids, adapter=[("a", "b")] * 2).data)
    assert not np.allclose(stacked, model(ids, ids, adapter=["a", "b"]).data)
