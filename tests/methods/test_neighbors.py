"""The vocabulary's nearest tokens to a soft prompt, and how tight a cluster they form."""
import math
import warnings

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from tests.models_under_test import FAMILIES, VOCAB, Case

U, RNG = 2.0 ** -53, numpy.random.default_rng


def model_of(family, dtype="float64", seed=0):
    return Case((family, "q and v"), 1, 1, dtype, seed).model()


def prompted(model, vectors):
    """A prompt of these vectors."""
    attachment = minipeft.attach(model, minipeft.PromptTuning(len(vectors), "random"), RNG(0), "prompt")
    (p,) = attachment.parameters.values()
    p.data = numpy.asarray(vectors, p.dtype)
    return attachment


def embedded(model):
    """[vocab, d]: every token as the encoder reads it."""
    return model.embed(numpy.arange(model.config.vocab_size)[None]).data[0]


def with_table(table):
    """A T5 of this table [vocab, 4], and of nothing else that matters."""
    config = minipeft.T5Config(len(table), 4, 2, 2, 5, 1, 1, 8, 20)
    model = minipeft.T5(config, RNG(0), "float64")
    model.slots["embedding.weight"].base.data = numpy.array(table, float)
    return model


def cosine(a, b):
    return math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b))


def distance(a, b):
    return math.sqrt(math.fsum((a - b) ** 2))


@given(st.sampled_from(list(FAMILIES)), st.integers(0, 999), st.integers(1, VOCAB), st.integers(1, 4),
       st.sampled_from(["float64", "float32"]))
def test_neighbors_are_those_of_one_comparison_after_the_other(family, seed, k, p, dtype):
    """In float64 whatever the model computes in. Random numbers leave no ties, so the order is the same; values within
    the roundings of sums of 12 products, of numbers no larger than their magnitudes."""
    model = model_of(family, dtype, seed)
    attachment = prompted(model, RNG([seed, 77]).standard_normal((p, 12)))
    (parameter,), rows = attachment.parameters.values(), embedded(model).astype(float)
    found = minipeft.nearest_tokens(attachment, k, RNG(0))
    for i, v in enumerate(parameter.data.astype(float)):
        by_cosine = sorted(range(VOCAB), key=lambda t: -cosine(v, rows[t]))[:k]
        by_distance = sorted(range(VOCAB), key=lambda t: distance(v, rows[t]))[:k]
        assert found.cosine_ids[i].tolist() == by_cosine and found.l2_ids[i].tolist() == by_distance
        assert abs(found.cosine[i] - [cosine(v, rows[t]) for t in by_cosine]).max() < 40 * U
        wanted = numpy.array([distance(v, rows[t]) for t in by_distance])
        assert (abs(found.l2[i] - wanted) <= 40 * U * wanted).all()
        pairs = [cosine(rows[a], rows[b]) for n, a in enumerate(by_cosine) for b in by_cosine[:n]]
        if k > 1:
            assert abs(found.tightness[i] - math.fsum(pairs) / len(pairs)) < 80 * U
    assert numpy.array_equal(found.nearest_distance, found.l2[:, 0])
    assert found.cosine.shape == found.l2.shape == found.cosine_ids.shape == found.l2_ids.shape == (p, k)
    assert found.tightness.shape == found.random_tightness.shape == found.nearest_distance.shape == (p,)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_vector_that_is_a_row_is_at_distance_0_of_it_exactly(family, dtype):
    """As it starts from the vocabulary; what the model multiplies its table by included."""
    model = model_of(family, dtype)
    attachment = minipeft.attach(model, minipeft.PromptTuning(3, "tokens", (7, 2, 11)), RNG(0))
    found = minipeft.nearest_tokens(attachment, 2, RNG(0))
    assert found.l2_ids[:, 0].tolist() == found.cosine_ids[:, 0].tolist() == [7, 2, 11]
    assert found.nearest_distance.tolist() == [0, 0, 0] and (found.l2[:, 1] > 0.1).all()
    assert abs(found.cosine[:, 0] - 1).max() < 40 * U


def test_cosine_and_distance_can_disagree():
    """A long row in the very direction; a short one near in another."""
    model = with_table([[100, 0, 0, 0], [1, 0.5, 0, 0], [-1, 0, 0, 0]])
    found = minipeft.nearest_tokens(prompted(model, [[1, 0, 0, 0]]), 3, RNG(0))
    assert found.cosine_ids.tolist() == [[0, 1, 2]] and found.l2_ids.tolist() == [[1, 2, 0]]
    assert found.l2.tolist() == [[0.5, 2, 99]] and found.cosine[0, 0] == 1 and found.cosine[0, 2] == -1


def test_tightness_of_clusters_made_by_hand():
    """Three tokens in one direction: 1. Three at right angles: 0. Two opposite ones: -1. One equal pair of
    three: a third."""
    e = numpy.eye(4)
    tight = with_table([e[0], 2 * e[0], 9 * e[0], -e[0], e[1]])
    assert minipeft.nearest_tokens(prompted(tight, [e[0]]), 3, RNG(0)).tightness.tolist() == [1.0]
    loose = with_table([e[0], e[1], e[2], -e[0], -e[1], -e[2]])
    assert minipeft.nearest_tokens(prompted(loose, [[3, 2, 1, 0]]), 3, RNG(0)).tightness.tolist() == [0.0]
    opposite = with_table([e[0], -e[0]])
    assert minipeft.nearest_tokens(prompted(opposite, [e[1]]), 2, RNG(0)).tightness.tolist() == [-1.0]
    one_pair = minipeft.nearest_tokens(prompted(with_table([-e[0], e[0], e[1], e[0]]), [e[0] + e[1] / 2]), 3, RNG(0))
    assert one_pair.cosine_ids.tolist() == [[1, 3, 2]] and abs(one_pair.tightness[0] - 1 / 3) < 20 * U
    mixed = minipeft.nearest_tokens(prompted(with_table([e[0], -e[0], e[0] * 2, -e[3]]), [e[0]]), 4, RNG(0))
    assert mixed.cosine_ids.tolist() == [[0, 2, 3, 1]]
    assert abs(mixed.tightness[0] - (1 - 1 - 1) / 6) < 20 * U, "pairs: one of 1, two of -1, three of 0"


def test_a_row_of_zeros_has_the_cosine_0_with_everything():
    e = numpy.eye(4)
    model = with_table([0 * e[0], e[0], e[0], -e[1]])
    found = minipeft.nearest_tokens(prompted(model, [e[0], 0 * e[0]]), 3, RNG(0))
    assert found.cosine_ids[0].tolist() == [1, 2, 0] and found.cosine[0].tolist() == [1, 1, 0]
    assert abs(found.tightness[0] - 1 / 3) < 20 * U, "one pair of 1, two of 0"
    assert found.cosine[1].tolist() == [0, 0, 0] and found.nearest_distance[1] == 0 and found.l2_ids[1, 0] == 0
    assert all(numpy.isfinite(array).all() for array in vars(found).values())


def test_equal_neighbors_come_in_the_order_of_their_ids():
    table = numpy.tile(numpy.eye(4)[0], (5, 1))
    found = minipeft.nearest_tokens(prompted(with_table(table), table[:1]), 3, RNG(0))
    assert found.cosine_ids.tolist() == found.l2_ids.tolist() == [[0, 1, 2]]


def test_random_vectors_depend_on_the_generator_alone_and_their_tightness_is_of_gaussian_directions():
    """Length does not matter to a cosine: it is the tightness of the nearest tokens of a drawn direction."""
    model = model_of("t5 v1.0")
    attachment = prompted(model, RNG(1).standard_normal((3, 12)))
    first, again, other = (minipeft.nearest_tokens(attachment, 4, RNG(seed)) for seed in (0, 0, 5))
    assert first.random_tightness.tolist() == again.random_tightness.tolist() != other.random_tightness.tolist()
    assert first.tightness.tolist() == other.tightness.tolist() and first.l2.tolist() == other.l2.tolist()
    drawn = minipeft.nearest_tokens(prompted(model_of("t5 v1.0"), RNG(0).standard_normal((3, 12))), 4, RNG(9))
    assert first.random_tightness.tolist() == pytest.approx(drawn.tightness.tolist(), rel=0, abs=80 * U)


def test_a_prompt_that_is_off_has_neighbors_too_and_nothing_is_changed_by_asking():
    model = model_of("post-LN")
    attachment = prompted(model, RNG(1).standard_normal((2, 12)))
    (p,) = attachment.parameters.values()
    before = p.data.tobytes()
    plugged = minipeft.nearest_tokens(attachment, 3, RNG(0))
    attachment.unplug()
    off = minipeft.nearest_tokens(attachment, 3, RNG(0))
    assert all(numpy.array_equal(a, b) for a, b in zip(vars(plugged).values(), vars(off).values(), strict=True))
    assert p.data.tobytes() == before and all(isinstance(a, numpy.ndarray) for a in vars(off).values())


def test_one_neighbor_has_no_pair_and_so_no_tightness():
    """NaN, and no warning (which would be an error here)."""
    model = model_of("t5 v1.0")
    attachment = prompted(model, RNG(1).standard_normal((3, 12)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = minipeft.nearest_tokens(attachment, 1)
    two = minipeft.nearest_tokens(attachment, 2)
    assert one.tightness.shape == one.random_tightness.shape == (3,)
    assert numpy.isnan(one.tightness).all() and numpy.isnan(one.random_tightness).all()
    assert one.cosine_ids.tolist() == two.cosine_ids[:, :1].tolist() and one.l2.tolist() == two.l2[:, :1].tolist()
    assert one.nearest_distance.tolist() == two.nearest_distance.tolist()


@pytest.mark.parametrize("k", [0, -1, 14, 2.0, True, None, "3"])
def test_a_k_out_of_range_is_refused_with_the_range(k):
    attachment = prompted(model_of("t5 v1.0"), numpy.ones((1, 12)))
    with pytest.raises(ValueError, match="nearest_tokens: k is .*; expected 1 to 13, the size of the vocabulary"):
        minipeft.nearest_tokens(attachment, k, RNG(0))


def test_other_methods_and_prompts_that_were_removed_are_refused():
    model = model_of("t5 v1.0")
    lora, prompt = minipeft.attach(model, minipeft.LoRA(1), RNG(0)), prompted(model, numpy.ones((1, 12)))
    with pytest.raises(TypeError, match=r"nearest_tokens: Attachment\('lora', LoRA, plugged, 10 places\) is not a soft "
                                        "prompt on a model; expected a PromptTuning"):
        minipeft.nearest_tokens(lora, 3, RNG(0))
    prompt.remove()
    with pytest.raises(TypeError, match="removed, 0 places"):
        minipeft.nearest_tokens(prompt, 3, RNG(0))


@pytest.mark.parametrize("other, shown", [(None, "None"), ("prompt", "'prompt'"), (3, "3"),
                                          (minipeft.PromptTuning(2), r"PromptTuning\(length=2, .*\)")])
def test_what_is_no_attachment_is_refused_with_what_is_expected(other, shown):
    with pytest.raises(TypeError, match=f"^nearest_tokens: {shown} is not a soft prompt on a model; expected a Prompt"):
        minipeft.nearest_tokens(other, 3)


def test_without_a_generator_it_is_that_of_seed_0_every_time():
    attachment = prompted(model_of("t5 v1.0"), RNG(1).standard_normal((3, 12)))
    first, again, seeded, other = (minipeft.nearest_tokens(attachment, 4, *rng).random_tightness.tolist()
                                   for rng in ((), (None,), (RNG(0),), (RNG(1),)))
    assert first == again == seeded != other


@pytest.mark.parametrize("rng", [0, "seed", numpy.random.RandomState(0)])
def test_what_is_no_generator_is_refused_with_what_to_pass(rng):
    model = FAMILIES["t5 v1.0"](numpy.random.default_rng(0), "float64")
    attachment = minipeft.attach(model, minipeft.PromptTuning(2), numpy.random.default_rng(0))
    with pytest.raises(TypeError, match="expected a numpy.random.Generator"):
        minipeft.nearest_tokens(attachment, 2, rng)
