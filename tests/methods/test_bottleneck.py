"""Bottleneck adapters: fields, sites, sizes, the equation of every placement in a block, start, gradients, batches."""
import dataclasses
import math
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.nn.layers import ACTIVATIONS
from minipeft.methods.bottleneck import PLACEMENTS
from minipeft.laws.bounds import WHOLE_MODEL, close, tau, wide, within
from tests.models_under_test import FAMILIES, Case, bits, logits, same_values

U, D_MODEL = 2.0 ** -53, 12
RNG = numpy.random.default_rng
every_family = pytest.mark.parametrize("family", FAMILIES)
every_placement = pytest.mark.parametrize("placement, reads", [
    ("houlsby", "stream"), ("pfeiffer", "stream"), ("parallel", "stream"), ("parallel", "norm")])


def model_of(family, dtype="float64", seed=0):
    """A base without zeros and ones in its biases and norms."""
    return Case((family, "q and v"), 1, 1, dtype, seed).model()


def batch_of(rows=4, seed=0):
    return Case(("t5 v1.0", "q and v"), 1, 1, "float64", seed).batch(rows)


def trained(model, method, name="bottleneck", seed=0, std=0.3):
    """An attachment as it might be after training: nothing of it is 0."""
    rng = RNG(seed)
    attachment = minipeft.attach(model, method, rng, name)
    for p in attachment.parameters.values():
        p.data = (p.data + std * rng.standard_normal(p.shape)).astype(p.dtype)
    return attachment


# ---- fields


@pytest.mark.parametrize("fields, message", [
    ({"placement": "lora"}, "placement is 'lora'; expected one of houlsby, pfeiffer, parallel"),
    ({"placement": None}, "placement is None"),
    *(({"reduction": value}, f"reduction is {value!r}; expected a number >= 1")
      for value in (0, 0.5, -2, math.nan, math.inf, True, "16")),
    ({"reduction": 10 ** 400}, f"reduction is 1{199 * '0'}...; expected a number >= 1"),
    *(({"size": value}, f"size is {value!r}; expected an integer >= 1, or None") for value in (0, -1, 2.0, True, "4")),
    ({"activation": "selu"}, "activation is 'selu'; expected one of relu, gelu, "),
    *(({"init": value}, f"init is {value!r}; expected one of zeros, bert, houlsby") for value in ("mam", None, 0.02)),
    ({"input": "norm", "placement": "par_bn"}, "input is 'norm'; expected 'stream', or 'norm' with placement 'paral"),
    *(({"scale": value}, f"scale is {value!r}; expected a finite number other than 0, or None")
      for value in (0, 0.0, math.nan, math.inf, True, "4")),
    ({"input": "norm"}, "input is 'norm'; expected 'stream', or 'norm' with placement 'parallel'"),
    ({"input": "norm", "placement": "pfeiffer"}, "input is 'norm'"),
    ({"input": "F", "placement": "parallel"}, "input is 'F'"), ({"input": None}, "input is None"),
    *(({"cross": value}, f"cross is {value!r}; expected True or False") for value in (1, None, "yes")),
    *(({"stacks": value}, "stacks is .*; expected 'encoder', 'decoder', or both")
      for value in ((), "", "both", ("encoder", "body"), ("encoder", 1)))])
def test_a_field_out_of_range_is_refused_by_name(fields, message):
    message = message.replace("(", "[(]").replace("+", "[+]")
    with pytest.raises(ValueError, match=f"Bottleneck: {message}"):
        minipeft.Bottleneck(**fields)


def test_an_unknown_field_is_refused_and_no_field_can_be_changed():
    with pytest.raises(TypeError, match="reduction_factor"):
        minipeft.Bottleneck(reduction_factor=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        minipeft.Bottleneck().size = 4


def test_what_means_the_same_is_the_same_method():
    assert minipeft.Bottleneck(stacks="decoder", reduction=numpy.int64(4)) == minipeft.Bottleneck(
        stacks=["decoder"], reduction=4)


@pytest.mark.parametrize("scale", [1e300, -3.5e38])
def test_a_scale_that_is_not_finite_in_the_models_dtype_is_refused_before_anything_is_drawn(scale):
    """3.5e38 is above the largest float32, 3.4028...e38; in float64 both are numbers like any other."""
    model, rng = model_of("t5 v1.0", "float32"), RNG(0)
    state = rng.bit_generator.state
    with pytest.raises(ValueError) as error:
        minipeft.attach(model, minipeft.Bottleneck(scale=scale), rng)
    assert str(error.value) == f"Bottleneck: scale is {scale!r}; expected a finite number in float32"
    assert rng.bit_generator.state == state and not model.attachments
    minipeft.attach(model, minipeft.Bottleneck(scale=3.4e38), rng)
    wide, batch = model_of("t5 v1.0"), batch_of()
    before = logits(wide, batch)
    minipeft.attach(wide, minipeft.Bottleneck(scale=scale), rng)
    assert same_values(logits(wide, batch), before)


# ---- which sites


def sites_of(family, **fields):
    return list(minipeft.Bottleneck(**fields).places(model_of(family)))


def named(family, encoder, decoder):
    """The sites after these sublayers, blocks in order."""
    c = model_of(family).config
    return ([f"encoder.{i}.{s}.out" for i in range(c.num_layers) for s in encoder]
            + [f"decoder.{i}.{s}.out" for i in range(c.num_decoder_layers) for s in decoder])


@every_family
def test_a_placement_and_cross_and_stacks_choose_the_sublayers_that_they_say(family):
    """In model order. The families have 1 + 2, 2 + 1, 2 + 1 and 1 + 2 blocks."""
    attn, ff, all_three = ["attn", "ff"], ["ff"], ["attn", "cross", "ff"]
    assert sites_of(family) == sites_of(family, placement="houlsby") == named(family, attn, attn)
    assert sites_of(family, placement="pfeiffer") == sites_of(family, placement="parallel") == named(family, ff, ff)
    assert sites_of(family, cross=True) == named(family, attn, all_three)
    assert sites_of(family, placement="pfeiffer", cross=True) == named(family, ff, ["cross", "ff"])
    assert sites_of(family, stacks="encoder") == named(family, attn, [])
    assert sites_of(family, stacks=("decoder",), cross=True) == named(family, [], all_three)
    assert sites_of(family, stacks="encoder", cross=True) == sites_of(family, stacks="encoder"), "none is there"


def test_where_chooses_instead_of_placement_cross_and_stacks():
    family = "t5 v1.0"
    assert sites_of(family, where="cross", stacks="encoder") == ["decoder.0.cross.out", "decoder.1.cross.out"]
    assert sites_of(family, where=[r"^encoder\.0", lambda name: name == "decoder.1.cross.out"],
                    placement="pfeiffer") == ["encoder.0.attn.out", "encoder.0.ff.out", "decoder.1.cross.out"]


@pytest.mark.parametrize("where", ["input", "memory", r"attn\.q\.weight", "nonesuch"])
def test_only_sublayers_can_be_chosen_and_a_pattern_that_chooses_none_raises(where):
    with pytest.raises(ValueError, match=r"matches none of the \d+ sublayer site names; nearest: \w+coder"):
        sites_of("t5 v1.0", where=where)


def test_when_it_raises_on_a_model_nothing_was_drawn_and_nothing_is_attached():
    model, rng = model_of("post-LN"), RNG(0)
    state = rng.bit_generator.state
    with pytest.raises(ValueError, match="nonesuch"):
        minipeft.attach(model, minipeft.Bottleneck(where="nonesuch"), rng)
    assert rng.bit_generator.state == state and not model.attachments


# ---- how large


@pytest.mark.parametrize("fields, m", [
    ({"reduction": 4}, 3), ({"reduction": 5}, 2), ({"reduction": 12}, 1), ({"reduction": 13}, 1), ({}, 1),
    ({"reduction": 1}, 12), ({"reduction": 2.5}, 4), ({"reduction": 1e300}, 1), ({"size": 7}, 7), ({"size": 1}, 1),
    ({"size": 30}, 30), ({"size": 7, "reduction": 4}, 7)])
def test_the_width_is_size_or_d_model_over_reduction_rounded_down_and_at_least_1(fields, m):
    model = model_of("t5 v1.0")
    attachment = minipeft.attach(model, minipeft.Bottleneck(**fields), RNG(0), "a")
    assert {name: p.shape for name, p in attachment.parameters.items() if name.startswith("encoder.0.ff")} == {
        "encoder.0.ff.out@a.D": (m, D_MODEL), "encoder.0.ff.out@a.b_D": (m,),
        "encoder.0.ff.out@a.U": (D_MODEL, m), "encoder.0.ff.out@a.b_U": (D_MODEL,)}
    sizes = [sum(p.data.size for name, p in attachment.parameters.items() if name.startswith(f"{site}@"))
             for site in attachment.places]
    assert sizes == [2 * m * D_MODEL + D_MODEL + m] * len(attachment.places)
    assert minipeft.report(model).trainable == sum(sizes)


def test_flan_t5_base_with_houlsby_of_reduction_16_has_36_adapters_of_74544_numbers():
    """12 + 12 blocks, two sites each, and twelve after cross-attention; 2 * 48 * 768 + 768 + 48 numbers each."""
    model = minipeft.T5(minipeft.T5Config(32128, 768, 64, 12, 2048, 12, 12, feed_forward_proj="gated-gelu",
                                          tie_word_embeddings=False), None)
    for cross, count in ((False, 48), (True, 60)):
        attachment = minipeft.attach(model, minipeft.Bottleneck(cross=cross), RNG(0), f"cross-{cross}")
        assert len(attachment.places) == count
        assert sum(p.data.size for p in attachment.parameters.values()) == count * 74_544


# ---- how it starts


@every_placement
def test_the_up_projection_and_the_biases_start_at_0_and_nothing_changes(placement, reads):
    for family in FAMILIES:
        model, batch = model_of(family, "float32"), batch_of()
        before = logits(model, batch)
        attachment = minipeft.attach(model, minipeft.Bottleneck(placement, 4, input=reads, cross=True), RNG(0))
        assert same_values(logits(model, batch), before)
        for name, p in attachment.parameters.items():
            assert p.dtype == numpy.float32 and p.data.any() == name.endswith(".D")


def test_the_down_projection_starts_uniform_in_one_over_root_d():
    """N numbers of variance 1 / 3d: their mean square has deviation (1 / 3d) sqrt(4 / 5N). Five of them."""
    model = minipeft.T5(minipeft.T5Config(13, 400, 5, 3, 17, 1, 1, 8, 20), RNG(0))
    attachment = minipeft.attach(model, minipeft.Bottleneck("pfeiffer", 4, stacks="encoder"), RNG(0), "a")
    d = attachment.parameters["encoder.0.ff.out@a.D"].data
    assert d.shape == (100, 400) and 0.999 / 20 < abs(d).max() <= 1 / 20
    assert abs((d.astype(float) ** 2).mean() * 1200 - 1) < 5 * math.sqrt(4 / 5 / d.size)


def test_what_is_drawn_depends_on_the_generator_alone_and_differs_from_site_to_site():
    def drawn(seed):
        return [p.data.tobytes() for p in minipeft.attach(
            model_of("t5 v1.0"), minipeft.Bottleneck(), RNG(seed)).parameters.values() if p.data.any()]
    assert drawn(3) == drawn(3) != drawn(4) and len(set(drawn(3))) == len(drawn(3)) == 6


# ---- the equations, in NumPy: x the stream, n what the sublayer read, F its output


def silu(h):
    return h / (1 + numpy.exp(-h))


def gelu(h):
    return h * (1 + numpy.vectorize(math.erf, otypes=[float])(h / math.sqrt(2))) / 2


def gelu_tanh(h):
    return h / 2 * (1 + numpy.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))


BY_HAND = {"relu": lambda h: numpy.maximum(h, 0), "gelu": gelu, "gelu_new": gelu_tanh, "gelu_tanh": gelu_tanh,
           "silu": silu, "swish": silu}
FORMULAS = {  # the paper's block, before a post-LN norm: A of what
    ("houlsby", "stream"): lambda x, n, F, A: x + F + A(F),
    ("pfeiffer", "stream"): lambda x, n, F, A: x + F + A(x + F),
    ("parallel", "stream"): lambda x, n, F, A: x + F + A(x),
    ("parallel", "norm"): lambda x, n, F, A: x + F + A(n)}


# AdapterHub's names, each for one of the placements above
SAME = {"double_seq_bn": "houlsby", "seq_bn": "pfeiffer", "par_bn": "parallel"}


def test_every_activation_and_placement_has_a_formula_here():
    assert set(BY_HAND) == set(ACTIVATIONS) and set(PLACEMENTS) == {*SAME, *SAME.values()} and set(
        SAME.values()) == {placement for placement, _ in FORMULAS}


def by_hand(piece, s, activation="relu"):
    """A(h) = s (U f(D h + b_D) + b_U), all numbers in longdouble."""
    D, b_D, U_, b_U = map(wide, (piece.D, piece.b_D, piece.U, piece.b_U))
    f = BY_HAND[activation] if activation == "relu" else lambda h: wide(BY_HAND[activation](h.astype(float)))
    return lambda h: s * (f(h @ D.T + b_D) @ U_.T + b_U)


@every_placement
@given(st.integers(0, 999), st.sampled_from([None, 0.75, -3]), st.sampled_from(["float64", "float32"]))
def test_an_adapter_is_the_equation_of_its_placement(placement, reads, seed, scale, dtype):
    """relu is exact on what it is given, so the bound is that of the sums: d + 2, then m + 3 terms."""
    model, rng = model_of("t5 v1.0", dtype), RNG([seed, 1])
    method = minipeft.Bottleneck(placement, size=5, input=reads, scale=scale)
    piece = next(iter(trained(model, method, seed=seed).places.values())).attached["bottleneck"]
    x, n, F = (rng.standard_normal((2, 3, D_MODEL)).astype(dtype) for _ in range(3))
    found = wide(piece(x, n, F)) + wide(x)
    s = (4 if placement == "parallel" else 1) if scale is None else scale
    assert piece.scale == Fraction(s)
    formula = FORMULAS[placement, reads]
    wanted = formula(*map(wide, (x, n, F)), by_hand(piece, wide(numpy.float64(s))))
    absolute = type("Absolute", (), {leaf: abs(wide(getattr(piece, leaf))) for leaf in ("D", "b_D", "U", "b_U")})
    magnitude = formula(*map(abs, map(wide, (x, n, F))), by_hand(absolute, abs(wide(numpy.float64(s)))))
    u = float(numpy.finfo(dtype).eps) / 2
    assert piece(x, n, F).dtype == dtype
    assert within(found, wanted, tau(magnitude, D_MODEL + 5 + 5, 6, u))


@every_placement
@pytest.mark.parametrize("family", ["t5 v1.1", "pre-LN", "post-LN"])
def test_a_block_computes_the_equation_pre_ln_and_post_ln(family, placement, reads):
    """The streams of a block without adapters, taken at its sites; then every sublayer with one, by hand.

    Sublayer by sublayer: the first adapter's output is what the next sublayer reads, so that one is run on it."""
    model, rng = model_of(family), RNG(5)
    attachment = trained(model, minipeft.Bottleneck(placement, size=5, input=reads))
    block, x = model.encoder.blocks[0], rng.standard_normal((2, 4, D_MODEL))
    found = block(x, None).data
    for sublayer, norm, run in ((block.attn, block.attn_norm, lambda n: block.attn(n, n)),
                                (block.ff, block.ff_norm, block.ff)):
        n = norm(x).data if block.pre_norm else x
        F = run(n).data
        if "bottleneck" in sublayer.out.attached:
            A = by_hand(sublayer.out.attached["bottleneck"], 4 if placement == "parallel" else 1)
            y = FORMULAS[placement, reads](x, n, F, A).astype(float)
        else:
            assert placement != "houlsby"
            y = x + F
        x = y if block.pre_norm else norm(y).data
    assert close(found, x, U)
    attachment.unplug()
    assert not close(block(rng.standard_normal((2, 4, D_MODEL)), None).data, found, 2.0 ** -20)


def test_parallel_reads_the_stream_and_not_its_norm_unless_it_is_asked_to():
    """On pre-LN the two differ; on post-LN the sublayer reads the stream itself."""
    for family, same in (("t5 v1.0", False), ("pre-LN", False), ("post-LN", True)):
        outputs = []
        for reads in ("stream", "norm"):
            model = model_of(family)
            trained(model, minipeft.Bottleneck("parallel", 4, input=reads))
            outputs.append(logits(model, batch_of()))
        assert numpy.array_equal(*outputs) == same


@pytest.mark.parametrize("activation", BY_HAND)
def test_the_activation_is_the_one_that_was_asked_for(activation):
    """Within a hundred roundings of the largest number: exp, tanh and erf are not rounded as well as a sum."""
    model, x = model_of("t5 v1.0"), RNG(1).standard_normal((2, 3, D_MODEL))
    piece = trained(model, minipeft.Bottleneck(size=5, activation=activation)).places["encoder.0.ff.out"].attached[
        "bottleneck"]
    zero = numpy.zeros_like(x)
    wanted = by_hand(piece, 1, activation)(wide(x)) + x
    assert abs(wide(piece(zero, zero, x)) - wanted).max() < 100 * U * abs(wanted).max()
    others = [by_hand(piece, 1, other)(wide(x)) + x for other in ("relu", "gelu", "gelu_tanh", "silu")
              if BY_HAND[other] is not BY_HAND[activation]]
    assert all(abs(wanted - other).max() > 1e-6 for other in others) and len(others) == 3


@pytest.mark.parametrize("name", SAME)
def test_an_adapterhub_name_is_a_placement_with_the_defaults_of_adapterhub(name):
    """relu, d / 16 and s = 1, but swish in double_seq_bn, and d / 2 and s = 4 in par_bn."""
    defaults = {"double_seq_bn": ("swish", 16, 1), "seq_bn": ("relu", 16, 1), "par_bn": ("relu", 2, 4)}[name]
    method = minipeft.Bottleneck(name)
    assert (method.activation, method.reduction, method._scale) == defaults
    assert method == minipeft.Bottleneck(name, None, activation=None, scale=None)
    activation, reduction, scale = defaults
    ours = minipeft.Bottleneck(SAME[name], reduction, activation=activation, scale=scale)
    outputs = []
    for each in (method, ours):
        model = model_of("t5 v1.1")
        trained(model, each)
        outputs.append(logits(model, batch_of()))
    assert numpy.array_equal(*outputs)
    other = minipeft.Bottleneck(name, 3, activation="gelu", scale=0.5)
    assert (other.activation, other.reduction, other._scale) == ("gelu", 3, Fraction(1, 2)), "what is said holds"


def test_the_other_placements_keep_their_defaults_and_files_say_what_they_said():
    for placement in ("houlsby", "pfeiffer", "parallel"):
        method = minipeft.Bottleneck(placement)
        assert (method.activation, method.reduction) == ("relu", 16)
        assert method.fields() == {
            "placement": placement, "reduction": 16, "size": None, "activation": "relu", "scale": None,
            "input": "stream", "cross": False, "stacks": ("encoder", "decoder")}
    assert minipeft.Bottleneck(init="bert").fields()["init"] == "bert"


# ---- how it starts


@pytest.mark.parametrize("init, std, bound", [("bert", 0.02, math.inf), ("houlsby", 0.01 * 0.8796, 0.02)])
def test_other_inits_draw_D_and_U_and_leave_the_biases_at_0(init, std, bound):
    """0.8796 is the deviation of a standard normal number within 2. The mean square of N numbers of kurtosis k has the
    relative deviation sqrt((k - 1) / N), with k = 3 at most. Five of them."""
    model = minipeft.T5(minipeft.T5Config(13, 400, 5, 3, 17, 1, 1, 8, 20), RNG(0))
    attachment = minipeft.attach(model, minipeft.Bottleneck("pfeiffer", 4, stacks="encoder", init=init), RNG(0), "a")
    drawn = {leaf: attachment.parameters[f"encoder.0.ff.out@a.{leaf}"].data for leaf in ("D", "b_D", "U", "b_U")}
    assert not drawn["b_D"].any() and not drawn["b_U"].any()
    for leaf in "DU":
        x = drawn[leaf].astype(float)
        assert abs((x ** 2).mean() / std ** 2 - 1) < 5 * math.sqrt(2 / x.size) and abs(x).max() <= bound * (1 + 1e-6)
    assert drawn["D"].shape == (100, 400) and not numpy.array_equal(drawn["D"], drawn["U"].T)


@every_family
@pytest.mark.parametrize("init", ["zeros", "bert", "houlsby"])
def test_an_attachment_is_transparent_if_and_only_if_it_says_so(family, init):
    model, batch = model_of(family), batch_of()
    before, method = logits(model, batch), minipeft.Bottleneck(init=init, size=4)
    minipeft.attach(model, method, RNG(0))
    assert same_values(logits(model, batch), before) == method.transparent == (init == "zeros")
    assert abs(logits(model, batch) - before).max() < 0.1 * abs(before).max(), "near the identity"


# ---- training and using it


@every_placement
@pytest.mark.parametrize("family", ["t5 v1.1", "pre-LN"])
def test_gradients_are_those_of_central_differences(family, placement, reads):
    """Of smooth models with smooth adapters (relu has kinks, at which differences are wrong); and the gradient of a
    weight below, which comes through them."""
    model, batch = model_of(family), batch_of(2)
    attachment = trained(model, minipeft.Bottleneck(placement, 4, activation="swish", input=reads, cross=True))
    params = attachment.parameters | minipeft.select(model, r"^encoder\.0\.attn\.v\.weight$")
    assert minipeft.check_gradients(lambda: model.loss(**batch), params, RNG(0)) <= 1
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
    assert all(g.any() for g in grads.values())


def test_at_the_start_the_up_projection_alone_has_a_gradient():
    """dD and db_D go through U, which is 0: the first step moves U and b_U."""
    model, batch = model_of("t5 v1.0"), batch_of()
    attachment = minipeft.attach(model, minipeft.Bottleneck(reduction=3), RNG(0))
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
    assert all(g.any() == name.endswith(("U", "b_U")) for name, g in grads.items()) and len(grads) == 4 * 6


def test_training_lowers_the_loss_and_never_touches_the_base():
    model, batch = model_of("pre-LN"), batch_of()
    attachment = minipeft.attach(model, minipeft.Bottleneck(reduction=2), RNG(0))
    base, optimizer, losses = bits(model.state()), minipeft.AdamW(1e-2), []
    for _ in range(8):
        loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
        optimizer.step(attachment.parameters, grads)
        losses.append(loss)
    assert losses[-1] < losses[0] and bits(model.state()) == base


@every_placement
def test_it_cannot_be_merged_and_the_error_says_why(placement, reads):
    model = model_of("t5 v1.0")
    attachment = trained(model, minipeft.Bottleneck(placement, input=reads))
    before = logits(model, batch_of())
    with pytest.raises(ValueError, match="'bottleneck' cannot be merged: at encoder.0.*out it acts on hidden states, "
                                         "which no weight of the model can absorb"):
        attachment.merge()
    assert attachment.state == "plugged" and logits(model, batch_of()).tobytes() == before.tobytes()


@every_family
def test_rows_of_one_batch_see_their_own_adapters(family):
    """Two of them, of another placement and width each, one row with none, and one with both in either order."""
    model, batch = model_of(family), batch_of(5)
    trained(model, minipeft.Bottleneck("houlsby", size=5, activation="gelu", cross=True), "a", 1)
    trained(model, minipeft.Bottleneck("pfeiffer", size=2, stacks="decoder"), "b", 2)
    rows = ["b", None, ("a", "b"), ("b", "a"), "a"]
    mixed = logits(model, batch, adapter=rows)
    alone = [logits(model, {key: value[i:i + 1] for key, value in batch.items()}, adapter=[row])
             for i, row in enumerate(rows)]
    assert close(mixed, numpy.concatenate(alone), U)
    apart = [abs(mixed[2] - logits(model, batch, adapter=rows[2:3] * 5)[2]).max(),
             abs(mixed[3] - logits(model, batch, adapter=rows[2:3] * 5)[3]).max()]
    assert apart[0] <= WHOLE_MODEL * U * abs(mixed).max() < 1e-6 < apart[1], "the order counts"


def test_two_adapters_at_one_site_are_applied_in_the_order_in_which_they_were_plugged():
    """The upper one reads the lower one's output: F' = F + A(F), F'' = F' + B(F')."""
    model, x = model_of("t5 v1.0"), RNG(1).standard_normal((2, 3, D_MODEL))
    for name in ("a", "b"):
        trained(model, minipeft.Bottleneck(size=4, where=r"encoder\.0\.ff"), name, ord(name))
    site = model.sites["encoder.0.ff.out"]
    first = x + by_hand(site.attached["a"], 1)(x).astype(float)
    second = first + by_hand(site.attached["b"], 1)(first).astype(float)
    zero = numpy.zeros_like(x)
    assert close(site(zero, zero, x).data, second, U)


def test_what_is_saved_says_all_of_it(tmp_path):
    model = model_of("t5 v1.1", "float32")
    method = minipeft.Bottleneck("parallel", 3.5, None, "gelu", -0.5, "norm", True, "decoder")
    attachment = trained(model, method)
    output = logits(model, batch_of())
    attachment.save(tmp_path / "a")
    attachment.remove()
    loaded = minipeft.load(model, tmp_path / "a")
    assert dataclasses.replace(loaded.method, where=None) == method
    assert list(loaded.places) == ["decoder.0.cross.out", "decoder.0.ff.out"]
    assert logits(model, batch_of()).tobytes() == output.tobytes()
