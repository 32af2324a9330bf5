"""The decoder's shapes: names, heads, biases, norms, tying; and what cannot be planned."""
import re

import numpy
import pytest

import minipeft
from minipeft.tools.hollow.ledger import Ledger
from minipeft.tools.hollow.namespace import Hollow
from minipeft.tools.planning import decoder
from minipeft.tools.planning.configs import built, elsewhere, of_values
from minipeft.tools.planning.decoder import DecoderConfig, hf_name
from tests.tools.planning.models import llama

QWEN3 = {**llama(40, 56, 3, 4, 100, num_key_value_heads=2, head_dim=6), "model_type": "qwen3"}


def shapes(values):
    """{Hugging Face's name: shape} of all weights."""
    with minipeft.use(Hollow(Ledger())):
        model = built(of_values(values), "float32")
        return {hf_name(name): slot.shape for name, slot in model.slots.items()}


def test_the_weights_of_qwen_3_have_the_names_and_shapes_of_hugging_face():
    layer = {"input_layernorm.weight": (40,), "post_attention_layernorm.weight": (40,),
             "self_attn.q_proj.weight": (24, 40), "self_attn.k_proj.weight": (12, 40),
             "self_attn.v_proj.weight": (12, 40), "self_attn.o_proj.weight": (40, 24),
             "self_attn.q_norm.weight": (6,), "self_attn.k_norm.weight": (6,), "mlp.gate_proj.weight": (56, 40),
             "mlp.up_proj.weight": (56, 40), "mlp.down_proj.weight": (40, 56)}
    assert shapes(QWEN3) == {
        "model.embed_tokens.weight": (100, 40), "lm_head.weight": (100, 40), "model.norm.weight": (40,),
        **{f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}}


def test_biases_are_those_of_the_kind_and_of_its_options():
    def biases(values):
        return {name.removeprefix("model.layers.0.") for name in shapes(values)
                if name.endswith(".bias") and ".0." in name}
    qkv = {f"self_attn.{part}_proj.bias" for part in "qkv"}
    one = llama(40, 56, 1, 4, 100)
    assert biases(one) == set()
    assert biases({**one, "model_type": "qwen2"}) == qkv
    assert biases({**one, "attention_bias": True}) == qkv | {"self_attn.o_proj.bias"}
    assert biases({**one, "mlp_bias": True}) == {f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")}


def test_a_tied_head_is_the_table_and_counts_once():
    assert "lm_head.weight" not in shapes(llama(40, 56, 1, 4, 100, tie_word_embeddings=True))


def test_logits_are_those_of_every_token_with_and_without_a_prompt():
    config = of_values(QWEN3)
    with minipeft.use(Hollow(Ledger())) as hollow:
        model = built(config, "float32")
        ids = hollow.asarray(numpy.zeros((2, 7), "int64"))
        assert model(ids).shape == (2, 7, 100)
        from minipeft.tools.planning.step import attached
        attached(model, minipeft.PromptTuning(5, init="random", where=r"^decoder\.input$"))
        assert model(ids).shape == (2, 12, 100)


def test_patterns_are_searched_in_our_names_and_then_in_hugging_faces():
    from minipeft.tools.planning.methods import chosen
    config = of_values(QWEN3)
    with minipeft.use(Hollow(Ledger())):
        model = built(config, "float32")
        assert chosen(r"\.(q|v)\.weight$", config, model) == r"\.(q|v)\.weight$"
        theirs = chosen("q_proj|v_proj", config, model)
        assert sorted(filter(theirs, model.slots)) == [f"decoder.{i}.attn.{p}.weight" for i in range(3) for p in "qv"]
        with pytest.raises(ValueError, match="matches none"):
            chosen("w_pack", config, model)
        with pytest.raises(ValueError, match="is not a regular expression"):
            chosen("(", config, model)
    assert elsewhere(minipeft.T5Config(), "encoder.0.attn.q.weight").endswith("SelfAttention.q.weight")
    assert elsewhere(minipeft.T5Config(), "encoder.0.attn.out") == "encoder.0.attn.out"


@pytest.mark.parametrize("change, said", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; expected one of t5, mt5, llama"),
    ({"hidden_size": 0}, "hidden_size is 0; expected an integer >= 1"),
    ({"vocab_size": None}, "vocab_size is None; expected an integer"),
    ({"num_attention_heads": 7}, "expected a multiple of num_attention_heads, 7"),
    ({"num_key_value_heads": 3}, "expected a multiple of the 3 key/value heads"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected True or False"),
    ({"attention_bias": 1}, "attention_bias is 1; expected True or False"),
    ({"attention_dropout": {"a": 1}}, "attention_dropout is {'a': 1}; expected a finite number"),
    ({"attention_dropout": float("nan")}, "attention_dropout is nan; expected a finite number"),
    ({"num_local_experts": 8}, "a mixture of experts"), ({"hidden_size": 2.5}, "hidden_size is 2.5")])
def test_a_config_that_cannot_be_planned_is_refused_by_the_field(change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        of_values({**llama(40, 56, 1, 4, 100), **change})


@pytest.mark.parametrize("kind, kv_heads, head_dim", [("llama", 32, 2), ("mistral", 8, 2), ("qwen2", 32, 2),
                                                      ("qwen3", 32, 128)])
def test_a_field_that_is_not_there_is_what_transformers_takes_for_it(kind, kv_heads, head_dim):
    """Read off LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config of transformers 4.57. A null is another case."""
    values = llama(64, 96, 1, 32, 100, model_type=kind)
    found = of_values(values)
    assert (found.num_kv_heads, found.head_dim, found.tied) == (kv_heads, head_dim, False)
    null = of_values({**values, "num_key_value_heads": None, "tie_word_embeddings": None, "attention_dropout": None})
    assert (null.num_kv_heads, null.tied, null.dropout_rate) == (32, False, 0.0)
    assert of_values(llama(64, 96, 1, 4, 100, model_type=kind)).num_kv_heads == 4, "8 or 32 would not divide 4"


@pytest.mark.parametrize("kind, biases", [("mistral", (False, False, False)), ("qwen2", (True, False, False)),
                                          ("llama", (True, True, True)), ("qwen3", (True, True, False))])
def test_options_for_biases_count_only_where_transformers_reads_them(kind, biases):
    found = of_values(llama(64, 96, 1, 32, 100, model_type=kind, attention_bias=True, mlp_bias=True))
    assert (found.qkv_bias, found.o_bias, found.ff_bias) == biases
    assert of_values(llama(64, 96, 1, 32, 100, model_type=kind, attention_bias=False)).qkv_bias == (kind == "qwen2")


def test_the_page_lists_every_name():
    for line in ("decoder.i.attn.{q,k,v,o}.weight", "decoder.i.ff.{wi_0,wi_1,wo}.weight", "head.weight"):
        assert line in decoder.__doc__
    assert isinstance(of_values(QWEN3), DecoderConfig)
