"""Sites: the identity until something is plugged, then a composition in the order of plugging or of the routing."""
import numpy
import pytest

import minipeft
from minipeft.engine import ops
from minipeft.nn.routing import routed
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


def test_a_keys_values_site_refuses_rows_that_differ():
    site = plugged(Site("keys_values", 2, "float64"), a=lambda *s: s, elsewhere=None)
    with routed(site.host, ["a", None], 2), pytest.raises(ValueError, match="run these rows apart"):
        site(*stream(2))
    with routed(site.host, ["a", ("a", "elsewhere")], 2):
        assert len(site(*stream(2))) == 3, "what is attached elsewhere makes no difference here"


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
