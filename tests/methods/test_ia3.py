"""(IA)^3: which features are scaled, the paper's equations by hand, biases, counts."""
from __future__ import annotations

import numpy
import pytest

import minipeft
from minipeft.engine.ops import gelu_tanh
from minipeft.engine.tensor import array_of
from minipeft.laws.models import FAMILIES, bits, model_of, moved

RNG = numpy.random.default_rng


def attached(family, *arguments, **fields):
    """(model, attachment with factors of both signs)."""
    model = model_of(family, "float64", 0)
    return model, moved(minipeft.attach(model, minipeft.IA3(*arguments, **fields), RNG(0), "a"), RNG(1), 1.0)


def factor(attachment, layer):
    return attachment.parameters[f"{layer}@a.l"].data


def test_attention_is_the_paper_s_with_scaled_keys_and_values():
    model, attachment = attached("t5 v1.0")
    layer, x = model.encoder.blocks[0].attn, RNG(2).standard_normal((2, 6, 12))
    Q, K, V = (x @ array_of(part.weight.base).T for part in (layer.q, layer.k, layer.v))
    K, V = K * factor(attachment, "encoder.0.attn.k"), V * factor(attachment, "encoder.0.attn.v")
    heads = []
    for h in range(3):
        q, k, v = (m[..., 5 * h:5 * h + 5] for m in (Q, K, V))
        e = numpy.exp(q @ k.swapaxes(1, 2))
        heads.append(e / e.sum(-1, keepdims=True) @ v)
    wanted = numpy.concatenate(heads, -1) @ layer.o.weight.base.data.T
    assert abs(layer(x, x).data - wanted).max() < 1e-13 * abs(wanted).max()


@pytest.mark.parametrize("family", ["t5 v1.0", "t5 v1.1"])
@pytest.mark.parametrize("placement", ["after", "before"])
def test_the_feed_forward_is_scaled_after_the_activation_or_before_it(family, placement):
    model, attachment = attached(family, placement)
    ff, x = model.encoder.blocks[0].ff, RNG(2).standard_normal((2, 6, 12))
    gated = family == "t5 v1.1"
    before = {"after": "wo", "before": "wi_1" if gated else "wi"}[placement]
    l = factor(attachment, f"encoder.0.ff.{before}")  # noqa: E741
    if gated:  # the factor is on the linear branch, so both placements are one function
        hidden = gelu_tanh(x @ ff.wi_0.weight.base.data.T).data * (x @ ff.wi_1.weight.base.data.T) * l
    elif placement == "after":
        hidden = numpy.maximum(x @ ff.wi.weight.base.data.T, 0) * l
    else:
        hidden = numpy.maximum(x @ ff.wi.weight.base.data.T * l, 0)
    wanted = hidden @ ff.wo.weight.base.data.T
    assert (l < 0).any() and abs(ff(x).data - wanted).max() < 1e-13 * abs(wanted).max()


def test_the_bias_of_k_and_v_is_scaled_by_the_same_l_and_that_of_wo_is_not():
    model, attachment = attached("post-LN")
    x, layer = RNG(2).standard_normal((2, 6, 12)), model.encoder.blocks[0].attn.k
    W, b = layer.weight.base.data, layer.bias.base.data
    wanted = (x @ W.T + b) * factor(attachment, "encoder.0.attn.k")
    assert abs(layer(x).data - wanted).max() < 1e-13
    attachment.merge()
    assert abs(layer(x).data - wanted).max() < 1e-13
    attachment.unmerge()
    wo, h = model.encoder.blocks[0].ff.wo, RNG(3).standard_normal((2, 6, 17))
    wanted = (h * factor(attachment, "encoder.0.ff.wo")) @ wo.weight.base.data.T + wo.bias.base.data
    assert abs(wo(h).data - wanted).max() < 1e-13
    assert "encoder.0.ff.wo.bias" not in attachment.places and "encoder.0.attn.k.bias" in attachment.places


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_as_many_factors_as_the_page_says_one_vector_for_each_layer(family):
    model, attachment = attached(family)
    c, inner = model.config, model.decoder.blocks[0].attn.k.weight.shape[0]
    encoder, decoder = inner + inner + c.d_ff, 2 * inner + 2 * inner + c.d_ff
    wanted = c.num_layers * encoder + c.num_decoder_layers * decoder
    assert sum(p.data.size for p in attachment.parameters.values()) == wanted
    assert all(p.ndim == 1 and name.endswith("@a.l") for name, p in attachment.parameters.items())
    counts = minipeft.report(model).methods["a"]
    assert counts == {"attention": wanted - (c.num_layers + c.num_decoder_layers) * c.d_ff,
                      "feed-forward": (c.num_layers + c.num_decoder_layers) * c.d_ff}


def test_where_chooses_matrices_and_their_biases_come_with_them():
    model = model_of("post-LN", "float64", 0)
    for where in (r"encoder\.0\.attn\.q\.weight$", r"encoder\.0\.attn\.q\.", [r"encoder\.0\.attn\.q\.weight$"]):
        attachment = minipeft.attach(model, minipeft.IA3(where=where), RNG(0))
        assert list(attachment.places) == ["encoder.0.attn.q.weight", "encoder.0.attn.q.bias"]
        assert list(attachment.parameters) == ["encoder.0.attn.q@ia3.l"]
        attachment.remove()
    attachment = minipeft.attach(model, minipeft.IA3(where=["wo"]), RNG(0))
    assert all(name.endswith("wo.weight") for name in attachment.places) and len(attachment.places) == 3


def test_inputs_chooses_the_matrices_whose_columns_are_scaled():
    model = model_of("post-LN", "float64", 0)
    where = [r"encoder\.0\.attn\.[qk]\.weight$", r"encoder\.0\.ff\.wo\.weight$"]
    attachment = moved(minipeft.attach(model, minipeft.IA3(where=where, inputs=r"\.q\."), RNG(0), "a"), RNG(1), 1.0)
    layer, x = model.encoder.blocks[0], RNG(2).standard_normal((2, 6, 12))
    q, wo = layer.attn.q, layer.ff.wo
    wanted = (x * factor(attachment, "encoder.0.attn.q")) @ q.weight.base.data.T + q.bias.base.data
    assert abs(q(x).data - wanted).max() < 1e-13 and "encoder.0.attn.q.bias" not in attachment.places
    h = RNG(3).standard_normal((2, 6, 17))
    wanted = (h @ wo.weight.base.data.T + wo.bias.base.data) * factor(attachment, "encoder.0.ff.wo")
    assert abs(wo(h).data - wanted).max() < 1e-13 and "encoder.0.ff.wo.bias" in attachment.places


@pytest.mark.parametrize("fields, message", [
    ({"inputs": "("}, "IA3: inputs is '\\('; expected a regular expression"),
    ({"placement": "output"}, "IA3: placement is 'output'; expected 'after' or 'before'"),
    ({"placement": ["after"]}, "IA3: placement is")])
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        minipeft.IA3(**fields)


@pytest.mark.parametrize("where, message", [
    (r"encoder\.0\.attn\.k\.bias", r"IA3: where chooses encoder.0.attn.k.bias, and no matrix beside it; expected"),
    ("nothing", "where='nothing' matches none of the")])
def test_a_where_without_matrices_is_refused_and_changes_nothing(where, message):
    model = model_of("post-LN", "float64", 0)
    before = bits(model.state())
    with pytest.raises(ValueError, match=message):
        minipeft.attach(model, minipeft.IA3(where=where), RNG(0))
    assert not model.attachments and bits(model.state()) == before


def test_a_product_never_forms_the_scaled_matrix():
    """Neither for rows nor for columns: 2 n numbers are multiplied in place of d_out d_in."""
    from minipeft.engine.tensor import _observer
    model, attachment = attached("t5 v1.0", where=[r"encoder\.0\.(attn\.k|ff\.wo)\.weight"])
    for name, slot in attachment.places.items():
        seen = []
        token = _observer.set(lambda forward, inputs, out, *_: seen.append((forward.__name__, out.shape)))
        try:
            slot.project(RNG(0).standard_normal((2, 3, slot.shape[1])))
        finally:
            _observer.reset(token)
        assert sorted(op for op, _ in seen) == ["linear", "mul"] and slot.shape not in [shape for _, shape in seen]
