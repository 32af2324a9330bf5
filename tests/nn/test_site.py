"""Sites: the identity until something is plugged, then a composition in the order of plugging or of the routing."""
import numpy
import pytest

import minipeft
from minipeft.engine import ops
from minipeft.nn.routing import routed, view_of
from minipeft.nn.site import KINDS, Site
from minipeft.nn.weight import Parameter
from minipeft.laws.bounds import close
from tests.by_hand import put, replug
from tests.models_under_test import FAMILIES, Case, logits


def plugged(site, **pieces):
    """Attach and plug these by hand, in order."""
    return put(site, pieces)


def stream(batch=3):
    rng = numpy.random.default_rng(0)
    return [rng.standard_normal((batch, 2, 4)) for _ in range(3)]


def data(x):
    return getattr(x, "data", x) if not isinstance(x, numpy.ndarray) else x


# ---- by itself


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_site_hands_on_the_very_objects(kind):
    x, n, f = stream()
    out = Site(kind, 2, "float64")(x, n, f) if kind != "input" else Site(kind, 2, "float64")(x, n)
    assert out is f if kind == "sublayer" else out[0] is x and out[1] is n


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="site kind is 'layer'; expected one of sublayer, input, keys_values"):
        Site("layer", 2, "float64")


def test_a_sublayer_piece_sees_the_residual_what_was_read_and_the_output_so_far():
    seen, (x, n, f) = [], stream()

    def piece(factor):
        def run(x, n, f):
            seen.append((x, n, f))
            return f * factor
        return run

    out = plugged(Site("sublayer", 2, "float64"), a=piece(2), b=piece(3))(x, n, f)
    assert numpy.array_equal(out, f * 2 * 3)
    assert seen[0][0] is x and seen[0][1] is n and seen[0][2] is f
    assert seen[1][0] is x and seen[1][1] is n and numpy.array_equal(seen[1][2], f * 2)


def test_input_and_keys_values_pieces_replace_the_whole_stream():
    longer = plugged(Site("input", 2, "float64"),
                     prompt=lambda e, mask: (numpy.concatenate([e[:, :1], e], axis=1), None))
    e, mask, _ = stream()
    out, new_mask = longer(e, mask)
    assert out.shape == (3, 3, 4) and new_mask is None
    twice = plugged(Site("keys_values", 2, "float64"),
                    a=lambda k, v, b: (k + 1, v, b), c=lambda k, v, b: (k * 2, v - 1, "bias"))
    k, v, b = stream()
    found = twice(k, v, b)
    assert numpy.array_equal(found[0], (k + 1) * 2) and numpy.array_equal(found[1], v - 1) and found[2] == "bias"


def test_what_is_attached_but_not_plugged_does_nothing():
    site, (x, n, f) = Site("sublayer", 2, "float64"), stream()
    put(site, {"a": lambda x, n, f: 1 / 0}, plugged=())
    assert site(x, n, f) is f


def test_a_mixed_routing_gives_each_row_of_a_sublayer_its_own_pieces_in_its_own_order():
    site = plugged(Site("sublayer", 2, "float64"), a=lambda x, n, f: ops.add(f, 1.0), b=lambda x, n, f: ops.mul(f, 2.0),
                   c=lambda x, n, f: 1 / 0)
    x, n, f = stream(5)
    routing = ["a", None, ("a", "b"), ("b", "a"), "a"]
    with routed(site.host, routing, 5):
        out = site(x, n, f).data
    wanted = [f[0] + 1, f[1], (f[2] + 1) * 2, f[3] * 2 + 1, f[4] + 1]
    assert all(numpy.array_equal(out[i], w) for i, w in enumerate(wanted))


def test_pieces_get_the_same_rows_of_all_three_streams():
    site, seen = Site("sublayer", 2, "float64"), []
    put(site, {"a": lambda x, n, f: seen.append((data(x), data(n), data(f))) or f}, plugged=())
    x, n, f = stream(4)
    with routed(site.host, ["a", None, None, "a"], 4):
        site(x, n, f)
    assert all(numpy.array_equal(found, whole[[0, 3]]) for found, whole in zip(seen[0], (x, n, f), strict=True))


def more_keys(value, count):
    """A piece that puts `count` keys in front, with this value and this bias."""
    def run(k, v, bias):
        front = numpy.full((k.shape[0], count, k.shape[2]), value)
        if bias is not None:
            bias = ops.concat(numpy.full((*bias.shape[:-1], count), value), bias, axis=-1)
        return ops.concat(front, k, axis=1), ops.concat(-front, v, axis=1), bias
    return run


@pytest.mark.parametrize("lead", [None, (1, 1, 1), (5, 1, 1), (1, 3, 7), (5, 3, 7)], ids=str)
@pytest.mark.parametrize("tensors", [False, True])
def test_a_keys_values_site_pads_rows_with_fewer_keys_on_the_left_and_hides_that(lead, tensors):
    """Rows: none, two keys, one, none, three (one, then two in front of it): the real keys stand at the right."""
    site = plugged(Site("keys_values", 4, "float64"), two=more_keys(2.0, 2), one=more_keys(1.0, 1))
    k, v, _ = stream(5)
    bias = None if lead is None else numpy.random.default_rng(1).standard_normal((*lead, 2))
    given = [Parameter(x) if tensors and x is not None else x for x in (k, v, bias)]
    with routed(site.host, [None, "two", "one", None, ("one", "two")], 5):
        found = [data(x) for x in site(*given)]
    assert found[0].shape == found[1].shape == (5, 5, 4)
    assert found[2].shape == (5, *(lead or (1, 1, 1))[1:], 5)
    for row, front in enumerate([[], [2, 2], [1], [], [2, 2, 1]]):
        padding = 3 - len(front)
        assert numpy.array_equal(found[0][row, 3:], k[row]) and numpy.array_equal(found[1][row, 3:], v[row])
        assert found[0][row, padding:3, 0].tolist() == front and found[1][row, padding:3, 0].tolist() == [
            -x for x in front]
        assert (found[2][row, ..., :padding] == -numpy.inf).all()
        assert (found[2][row, ..., padding:3] == (front if lead else 0)).all()
        own = 0 if bias is None else bias[row if lead[0] == 5 else 0]
        assert numpy.array_equal(found[2][row, ..., 3:], numpy.broadcast_to(own, found[2][row, ..., 3:].shape))


def test_rows_with_as_many_keys_and_no_bias_need_none():
    site = plugged(Site("keys_values", 4, "float64"), a=lambda k, v, b: (k * 2, v, b), elsewhere=None)
    k, v, _ = stream(2)
    with routed(site.host, [None, "a"], 2):
        found = site(k, v, None)
    assert found[2] is None and numpy.array_equal(found[0].data, numpy.stack([k[0], 2 * k[1]]))
    with routed(site.host, ["a", ("a", "elsewhere")], 2):
        assert isinstance(site(k, v, None)[0], numpy.ndarray), "what is attached elsewhere makes no difference here"


def test_a_query_that_sees_nothing_averages_the_values_of_its_own_row_however_many_keys_others_have():
    """In value and gradient. All keys of row 0 are hidden, and the first query of row 1 sees none."""
    site = plugged(Site("keys_values", 4, "float64"), many=more_keys(1.0, 3))
    q, k, v = (Parameter(x) for x in stream(3))
    bias = numpy.zeros((3, 1, 2, 2))
    bias[0], bias[1, :, 0] = -numpy.inf, -numpy.inf

    def run(routing, rows):
        def step():
            with routed(site.host, routing, len(rows)):
                kvb = site(ops.index(k, key=rows), ops.index(v, key=rows), bias[rows])
            out.append(ops.attention(ops.index(q, key=rows), *kvb, heads=2, scale=1.0))
            return (out[-1] * out[-1]).sum()
        out = []
        grads = minipeft.value_and_grad(step, {"q": q, "k": k, "v": v})[1]
        return out[0].data, grads

    found, grads = run([None, None, "many"], numpy.arange(3))
    for row, name in enumerate([None, None, "many"]):
        alone, own = run([name], numpy.array([row]))
        assert abs(found[row] - alone[0]).max() < 1e-15
        assert all(abs(grads[leaf][row] - own[leaf][row]).max() < 1e-14 for leaf in grads)
    assert abs(found[0] - v.data[0].mean(axis=0)).max() < 1e-15


def test_places_that_a_piece_reads_see_the_rows_of_its_group_and_the_old_view_is_back_when_it_fails():
    """The row's own table: of four rows the piece sees the second and the last."""
    site, other, seen = Site("keys_values", 4, "float64"), Site("sublayer", 4, "float64"), []
    other.host = site.host

    def piece(k, v, bias):
        seen.append([tuple(e.name for e in entries) for entries, _ in view_of(other.host).groups(other)])
        return (k, v, bias) if len(seen) == 1 else 1 / 0

    put(site, {"a": piece, "b": None}, plugged=())
    put(other, {"b": lambda x, n, f: f}, plugged=())
    with routed(site.host, ["b", ("b", "a"), None, "a"], 4):
        before = view_of(site.host)
        site(*stream(4)[:2], None)
        assert view_of(site.host) is before and seen == [[("b",), ()]]
        with pytest.raises(ZeroDivisionError):
            site(*stream(4)[:2], None)
        assert view_of(site.host) is before


def test_an_input_site_pads_shorter_rows_on_the_left_and_masks_that():
    """Rows: none, two vectors, one, three (one, then two in front of it): each [prompt; row] stands at the right."""
    def piece(value, count):
        def run(e, mask):
            front = numpy.full((e.shape[0], count, 4), value)
            return ops.concat(front, e, axis=1), numpy.concatenate([numpy.ones(front.shape[:2], bool), mask], axis=1)
        return run

    site, (e, _, _) = plugged(Site("input", 2, "float64"), two=piece(2.0, 2), one=piece(1.0, 1)), stream(4)
    mask = numpy.array([[True, True], [True, False], [False, True], [True, True]])
    for given_mask in (mask, None):
        with routed(site.host, [None, "two", "one", ("one", "two")], 4):
            x, seen = site(e, given_mask)
        assert x.shape == (4, 5, 4)
        kept = mask if given_mask is not None else numpy.ones((4, 2), bool)
        for row, prompt in enumerate([[], [2, 2], [1], [2, 2, 1]]):
            assert numpy.array_equal(x.data[row, 5 - 2:], e[row])
            padding = 3 - len(prompt)
            assert x.data[row, padding:3, 0].tolist() == prompt
            assert seen[row].tolist() == [False] * padding + [True] * len(prompt) + kept[row].tolist()


# ---- in a model


def test_every_model_has_the_sites_of_its_docstring_and_uses_each_one():
    for family in FAMILIES:
        model, used = Case((family, "q and v"), 1, 1, "float64", 0).model(), []
        for name, site in model.sites.items():
            if site.kind == "sublayer":
                plugged(site, probe=lambda x, n, f, name=name: used.append(name) or f)
            else:
                plugged(site, probe=lambda *s, name=name: used.append(name) or s)
        model(numpy.ones((2, 3), int), numpy.ones((2, 4), int))
        assert sorted(used) == sorted(model.sites) and used[0] == "encoder.input"


@pytest.mark.parametrize("family, kind", [("t5 v1.0", "pre"), ("post-LN", "post")])
def test_a_sublayer_site_stands_before_the_residual_and_after_the_sublayer(family, kind):
    """pre-LN: the block gives x + F', and n is norm(x). post-LN: the block gives norm(x + F'), and n is x."""
    model = Case((family, "q and v"), 1, 1, "float64", 0).model()
    block, seen = model.encoder.blocks[0], {}

    def attn_piece(x, n, f):
        seen["attn"] = (data(x), data(n), data(f))
        return ops.mul(f, 2.0)

    plugged(block.attn.out, probe=attn_piece)
    plugged(block.ff.out, probe=lambda x, n, f: seen.update(ff=data(x)) or f)
    model.encode(numpy.arange(1, 5)[None])
    x, n, f = seen["attn"]
    norm = block.attn_norm
    assert numpy.array_equal(n, norm(x).data if kind == "pre" else x)
    assert numpy.array_equal(seen["ff"], x + 2 * f if kind == "pre" else norm(x + 2 * f).data)


def test_an_input_site_can_lengthen_the_source_and_its_mask_goes_to_both_stacks():
    """A prompt of two vectors in front: encoder states and cross-attention both see two more positions."""
    model = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).model()
    prompt, seen = Parameter(numpy.random.default_rng(1).standard_normal((2, 12))), []

    def piece(e, mask):
        batch = e.shape[0]
        rows = ops.add(numpy.zeros((batch, 2, 12)), prompt)
        return ops.concat(rows, e, axis=1), numpy.concatenate([numpy.ones((batch, 2), bool), mask], axis=1)

    plugged(model.encoder.input, prompt=piece)
    plugged(model.decoder.blocks[0].cross.keys_values,
            probe=lambda k, v, b: seen.append((k.shape, b.shape)) or (k, v, b))
    ids = numpy.array([[3, 4, 5], [6, 0, 0]])
    assert model.encode(ids, ids != 0).shape == (2, 5, 12)
    labels = numpy.array([[1, 2], [3, -100]])
    _, grads = minipeft.value_and_grad(lambda: model.loss(ids, labels, ids != 0), {"prompt": prompt})
    assert grads["prompt"].any() and seen == [((2, 5, 15), (2, 1, 1, 5))]
    again = model.encode(ids[1:, :1], numpy.ones((1, 1)))  # the padding is masked behind the prompt too
    assert close(model.encode(ids, ids != 0).data[1, :3], again.data[0], 2 ** -53)


def test_a_keys_values_site_sees_what_a_cache_holds_and_adds_nothing_to_it():
    """Decoding with a cache: the piece gets the keys so far at every step, and generates what it does without."""
    case = Case(("pre-LN", "q and v"), 1, 1, "float64", 3)
    model, lengths = case.model(), []

    def piece(k, v, bias):
        lengths.append(k.shape[1])
        return ops.mul(k, 1.5), v, bias

    plugged(model.decoder.blocks[0].attn.keys_values, probe=piece)
    ids = case.batch()["input_ids"]
    cached = model.generate(ids, max_new_tokens=4)
    assert lengths == list(range(1, cached.shape[1]))
    assert numpy.array_equal(cached, model.generate(ids, max_new_tokens=4, use_cache=False))


def test_a_stream_of_pieces_by_hand_is_undone_by_emptying_the_list():
    case = Case(("t5 v1.1", "q and v"), 1, 1, "float64", 0)
    model = case.model()
    before = logits(model, case.batch())
    site = plugged(model.sites["decoder.0.ff.out"], a=lambda x, n, f: ops.mul(f, 3.0))
    assert not numpy.array_equal(logits(model, case.batch()), before)
    replug(site)
    assert logits(model, case.batch()).tobytes() == before.tobytes()


def test_a_site_is_used_where_a_row_of_the_forward_under_way_sees_something_there():
    site = put(Site("keys_values", 2, "float64"), {"a": lambda *s: s}, plugged=())
    assert not site.used
    with routed(site.host, ["a", "a"], 2):
        assert site.used
    replug(site, "a")
    with routed(site.host, [None], 1):
        assert not site.used
    with routed(site.host):
        replug(site)
        assert site.used, "the state that the forward began with"
    assert not site.used
