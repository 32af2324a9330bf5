"""Selecting: a question asked of names, answered with Parameters in model order."""
import pytest

import minipeft
from tests.models_under_test import Case

POST = Case(("post-LN", "q and v"), 2, 3, "float64", 0)
T5 = Case(("t5 v1.0", "q and v"), 2, 3, "float64", 0)


def test_everything_is_selected_once_in_model_order_with_a_tied_table_under_one_name():
    model = T5.model()
    chosen = minipeft.select(model, ".")
    assert list(chosen) == list(model.slots) and "head.weight" not in chosen
    assert all(chosen[name] is slot.base for name, slot in model.slots.items())
    assert len({id(p) for p in chosen.values()}) == len(chosen)


def test_patterns_are_searched_callables_asked_and_lists_united():
    model = POST.model()
    biases = minipeft.select(model, r"\.bias$")
    assert set(biases) == {n for n in model.slots if n.endswith(".bias")} and len(biases) > 20
    assert list(minipeft.select(model, lambda name: name.endswith(".bias"))) == list(biases)
    both = minipeft.select(model, (r"^decoder.*bias$", "^embedding", r"\.bias$"))
    assert list(both) == ["embedding.weight", *biases], "model order, and each once"


def test_a_t5_has_no_biases_and_selecting_them_says_so():
    with pytest.raises(ValueError, match=r"where='\\\\.bias\$' matches none of the \d+ parameter names; nearest: "):
        minipeft.select(T5.model(), r"\.bias$")


def test_one_pattern_of_a_list_that_matches_nothing_raises():
    with pytest.raises(ValueError, match="where='nonesuch' matches none"):
        minipeft.select(POST.model(), ["bias", "nonesuch"])


def test_plugged_attachments_are_seen_and_those_that_are_off_are_not():
    model = T5.model()
    attachment = T5.attach(model)
    assert minipeft.select(model, "@lora") == attachment.parameters
    assert minipeft.select(model, "@") == attachment.parameters
    attachment.unplug()
    assert list(minipeft.select(model, ".")) == list(model.slots)
    with pytest.raises(ValueError, match="where='@lora' matches none"):
        minipeft.select(model, "@lora")


@pytest.mark.parametrize("where", [".", "@lora", r"^encoder\.0\.attn\.q\.weight$", lambda name: "attn.q" in name])
def test_merged_weights_and_merged_attachments_say_unmerge_first(where):
    model = T5.model()
    attachment = T5.attach(model)
    attachment.merge()
    with pytest.raises(ValueError, match=r"cannot be trained while 'lora' is merged: unmerge first "
                                         r"\(model.attachments\['lora'\].unmerge\(\)\)"):
        minipeft.select(model, where)
    assert set(minipeft.select(model, "norm|ff")), "what is not merged can still be trained"
    attachment.unmerge()
    assert minipeft.select(model, where)


def test_the_message_names_the_topmost_of_two_that_are_merged():
    model = T5.model()
    T5.attach(model, "lower").merge()
    T5.attach(model, "upper", 3).merge()
    with pytest.raises(ValueError, match="while 'upper' is merged"):
        minipeft.select(model, r"^encoder\.0\.attn\.q\.weight$")


def test_a_weight_beside_a_merged_one_is_not_merged():
    model = T5.model()
    T5.attach(model, where="encoder").merge()
    assert "decoder.0.attn.q.weight" in minipeft.select(model, "^decoder")
