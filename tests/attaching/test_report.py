"""The report's numbers, against those that are known from elsewhere."""
import numpy
import pytest

import minipeft
from minipeft.attaching.report import component
from tests.models_under_test import FAMILIES, Case

RNG = numpy.random.default_rng


def flan_t5_base():
    """Weights of 0: the pages of a zero array cost nothing."""
    config = minipeft.T5Config(32128, 768, 64, 12, 2048, 12, 12, feed_forward_proj="gated-gelu",
                               tie_word_embeddings=False, scale_decoder_outputs=False)
    return minipeft.T5(config, None)


def test_flan_t5_base_with_rank_32_on_q_and_v_trains_3538944_of_251116800():
    model = flan_t5_base()
    minipeft.attach(model, minipeft.LoRA(32, 64), RNG(0))
    report = minipeft.report(model)
    assert (report.trainable, report.all) == (3_538_944, 251_116_800)
    assert round(report.percent, 2) == 1.41 and report.trainable == 72 * 32 * (768 + 768)
    text = str(report)
    assert text.startswith("trainable model parameters: 3538944\nall model parameters: 251116800\n"
                           "percentage of trainable model parameters: 1.41%\n")
    assert report.methods == {"lora": {"attention": 3_538_944}}
    assert sum(report.components.values()) == 247_577_856 == report.all - report.trainable
    assert report.weight_bytes == 4 * report.all and report.training_bytes == 3 * 4 * report.trainable


def test_the_papers_base_model_by_component():
    """d = 512, d_ff = 2048, 6 + 6 blocks, 37,000 tokens: 18 attentions of 4 d^2, 12 feed-forwards of 2 d d_ff; biases
    4 d and d_ff + d each; 30 norms of 2 d; no norm after the stacks; sinusoids have no parameters."""
    report = minipeft.report(minipeft.Transformer.base())
    assert report.components == {
        "attention": 18 * 4 * 512 ** 2, "feed-forward": 12 * 2 * 512 * 2048, "embedding": 37000 * 512,
        "norm": 30 * 2 * 512, "position": 0, "head": 0, "bias": 18 * 4 * 512 + 12 * (2048 + 512)}
    assert report.all == report.trainable == sum(report.components.values())
    assert round(report.all / 1e6) == 63 and report.percent == 100


def test_the_notes_example_stands_beside_the_true_figure_for_a_whole_projection():
    """512 x 64 with r = 8: 4,608 of 32,768, 85.94 % fewer; the whole 512 x 512 projection: 8,192 of 262,144."""
    text = str(minipeft.report(minipeft.Transformer.base()))
    assert "one head's query 512 x 64: 4,608 for 32,768, 85.94 % fewer" in text
    assert "the whole query projection 512 x 512: 8,192 for 262,144, 96.88 % fewer" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_a_model_belongs_to_one_component_and_is_counted_once(family):
    model = Case((family, "q and v"), 1, 1, "float32", 0).model()
    report = minipeft.report(model)
    assert sum(report.components.values()) == report.all == sum(p.data.size for p in model.base_parameters.values())
    assert report.weight_bytes == sum(p.data.nbytes for p in model.base_parameters.values())


@pytest.mark.parametrize("name, kind", [
    ("embedding.weight", "embedding"), ("head.weight", "head"), ("encoder.position.weight", "position"),
    ("encoder.0.attn.q.weight", "attention"), ("decoder.1.cross.o.weight", "attention"),
    ("encoder.0.attn.q.bias", "bias"), ("encoder.0.ff.wi.weight", "feed-forward"), ("decoder.0.ff.wo.bias", "bias"),
    ("encoder.0.attn_norm.weight", "norm"), ("encoder.0.attn_norm.bias", "norm"), ("decoder.norm.bias", "norm")])
def test_what_a_slot_counts_for(name, kind):
    model = Case(("pre-LN", "q and v"), 1, 1, "float32", 0).model()
    assert component(name, model.slots[name]) == kind


def test_what_is_plugged_is_trained_and_what_is_off_or_merged_is_not():
    case = Case(("t5 v1.1", "q and v"), 2, 3, "float32", 0)
    model = case.model()
    base = minipeft.report(model).all
    first, second = case.attach(model, "first"), case.attach(model, "second", 3, where="^head")
    sizes = [sum(p.data.size for p in a.parameters.values()) for a in (first, second)]
    assert sizes[1] == 2 * (13 + 12)
    assert (minipeft.report(model).trainable, minipeft.report(model).all) == (sum(sizes), base + sum(sizes))
    first.unplug()
    second.merge()  # nothing is plugged that could be trained, and nobody asked for the rest of the base
    assert (minipeft.report(model).trainable, minipeft.report(model).all) == (0, base)
    assert "percentage of trainable model parameters: 0.00%" in str(minipeft.report(model))
    second.unmerge()
    assert (minipeft.report(model).trainable, minipeft.report(model).all) == (sizes[1], base + sizes[1])


def test_weight_bytes_are_all_arrays_that_are_held_each_once():
    """Base 4 bytes a number; d of a mask and its indices 4 each; a LoRA that is off; the constant that a merge made,
    beside the base that it keeps. What is selected and held already is not counted again."""
    case = Case(("t5 v1.1", "q and v"), 2, 3, "float32", 0)
    model = case.model()
    base = 4 * sum(p.data.size for p in model.base_parameters.values())
    assert minipeft.report(model).weight_bytes == base
    mask = minipeft.attach(model, minipeft.Selective(mask={"head.weight": [5, 7, 100]}), RNG(0), "mask")
    assert minipeft.report(model).weight_bytes == base + 3 * (4 + 4)
    mask.unplug()
    lora = case.attach(model, "off", 3, where="^embedding")
    assert minipeft.report(model).weight_bytes == base + 24 + 4 * 2 * (13 + 12)
    lora.unplug()
    assert minipeft.report(model).weight_bytes == base + 24 + 200
    assert (minipeft.report(model).all, minipeft.report(model).trainable) == (base // 4, base // 4)
    lora.plug()
    lora.merge()
    report = minipeft.report(model)
    assert report.weight_bytes == base + 24 + 200 + 4 * 13 * 12
    assert report.trainable == report.training_bytes == 0
    assert minipeft.report(model, mask.parameters).weight_bytes == report.weight_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_what_can_be_selected_under_a_merge_is_counted_and_the_rest_refused(family):
    """Without a selection nothing is trained, as nothing is plugged; the bases under a merge cannot be selected."""
    case = Case((family, "q and v"), 2, 3, "float32", 0)
    model = case.model()
    names = set(model.base_parameters)
    attachment = case.attach(model)
    attachment.merge()
    free = names - set(attachment.places)
    params = minipeft.select(model, lambda name: name in free)
    assert minipeft.report(model).trainable == 0
    assert minipeft.report(model, params).trainable == sum(p.data.size for p in params.values()) > 0
    with pytest.raises(ValueError, match="unmerge"):
        minipeft.select(model, next(iter(attachment.places)))


def test_a_selection_can_be_counted_and_a_tied_table_counts_once():
    model = Case(("post-LN", "q and v"), 2, 3, "float32", 0).model()
    report = minipeft.report(model, minipeft.select(model, "^embedding"))
    assert report.trainable == 13 * 12 and report.all == minipeft.report(model).all


def test_every_method_that_is_plugged_has_a_column_of_what_it_trains_where():
    """The Transformer of the laws, d = 12, d_ff = 17, 1 + 2 layers: adapters of size 3 after attention and feed-forward
    have 2 m d + d + m = 87 numbers each, BitFit is every bias, norms' among them, two prompt vectors are 24."""
    model = Case(("pre-LN", "q and v"), 2, 3, "float32", 0).model()
    for name, method in (("adapters", minipeft.Bottleneck(size=3)), ("bitfit", minipeft.Selective(type="bias")),
                         ("prompt", minipeft.PromptTuning(2)), ("lora", minipeft.LoRA(1, where="^head"))):
        minipeft.attach(model, method, RNG(0), name)
    report = minipeft.report(model)
    assert report.methods == {
        "adapters": {"attention": 3 * 87, "feed-forward": 3 * 87},
        "bitfit": {"norm": 10 * 12, "bias": 5 * 4 * 12 + 3 * (17 + 12)},
        "prompt": {"embedding": 24}, "lora": {"head": 13 + 12}}
    assert report.trainable == sum(n for found in report.methods.values() for n in found.values())
    head, *rows = [line.split() for line in str(report).splitlines()[4:12]]
    assert head == ["base", "adapters", "bitfit", "prompt", "lora"]
    assert ["head", "156", f"{15600 / sum(report.components.values()):.1f}", "%", "0", "0", "0", "25"] in rows


def test_attention_and_feed_forward_shares_of_flan_t5_base():
    """Most parameters are not in the attention: 34.3 % of them, 45.7 % in the feed-forward, 19.9 % in the tables."""
    report = minipeft.report(flan_t5_base())
    share = {part: round(100 * n / report.all, 1) for part, n in report.components.items()}
    assert (share["attention"], share["feed-forward"]) == (34.3, 45.7)
    assert round(100 * (report.components["embedding"] + report.components["head"]) / report.all, 1) == 19.9


def test_an_attachment_can_be_counted_and_a_parameter_of_another_model_cannot():
    case = Case(("t5 v1.1", "q and v"), 2, 3, "float32", 0)
    model = case.model()
    attachment = case.attach(model)
    attachment.unplug()
    assert minipeft.report(model, attachment) == minipeft.report(model, attachment.parameters)
    assert minipeft.report(model, attachment).trainable == sum(p.data.size for p in attachment.parameters.values())
    for params in ({"mine": minipeft.Parameter(numpy.zeros(2))}, minipeft.select(case.model(), "head"),
                   {"other": next(iter(attachment.parameters.values()))}):
        with pytest.raises(ValueError, match="is not a parameter of this model under its name; select"):
            minipeft.report(model, params)
    with pytest.raises(TypeError, match="params is list; expected an Attachment, or {name: Parameter}"):
        minipeft.report(model, list(attachment.parameters))


def test_the_example_at_the_end_is_of_the_rank_that_is_plugged_and_never_of_a_negative_saving():
    case = Case(("t5 v1.1", "q and v"), 2, 3, "float32", 0)
    model = case.model()
    case.attach(model)
    assert "LoRA of rank 2 in place" in str(minipeft.report(model)) and "rank 8" not in str(minipeft.report(model))
    minipeft.attach(model, minipeft.LoRA(12, where=r"ff\.wi"), RNG(0), "wide")
    text = str(minipeft.report(model))
    assert "LoRA of rank 2" in text and "LoRA of rank 12" in text and "-" not in text.split("LoRA of rank 12")[1]
    assert "the whole query projection 12 x 15: 324 for 180, no fewer" in text
