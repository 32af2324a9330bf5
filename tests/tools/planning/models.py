"""The sizes that the tests plan: those of the benchmark, and the published ones of LLaMA and T5."""
import minipeft


def t5(d_model, d_kv, heads, d_ff, layers, vocab=32128, **options):
    """A T5's configuration with as many layers in both stacks, without dropout unless it is asked for."""
    return minipeft.T5Config(**{
        "vocab_size": vocab, "d_model": d_model, "d_kv": d_kv, "num_heads": heads, "d_ff": d_ff, "num_layers": layers,
        "num_decoder_layers": layers, "dropout_rate": 0.0, **options})


def llama(hidden, wide, layers, heads, vocab=32000, **options):
    """The contents of a LLaMA's config.json."""
    return {"model_type": "llama", "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
            "num_attention_heads": heads, "vocab_size": vocab, **options}


D64 = t5(64, 16, 4, 256, 2, 128), {"batch": 32, "source": 32, "target": 32}
D256 = t5(256, 64, 4, 1024, 4, 2048), {"batch": 16, "source": 64, "target": 64}
SMALL = t5(512, 64, 8, 2048, 6), {"batch": 8, "source": 128, "target": 64}
LLAMAS = {"7B": llama(4096, 11008, 32, 32), "13B": llama(5120, 13824, 40, 40), "33B": llama(6656, 17920, 60, 52),
          "65B": llama(8192, 22016, 80, 64)}
LLAMA_3_8B = llama(4096, 14336, 32, 32, 128256, num_key_value_heads=8)
