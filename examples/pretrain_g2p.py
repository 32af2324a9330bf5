"""Pretrain the small character-level Transformer that `accents.py` adapts.

Two tasks, one model: American pronunciation ("american: sweaty" -> "swˈɛɾi") and spelling ("spell: swˈɛɾi" ->
"sweaty"), told apart by a prefix in the text. British is not among them, and no test word is in either. Four passes
over 54,000 words. The result is what `examples/checkpoints/g2p` holds.

    python examples/pretrain_g2p.py                   about 20 minutes on two cores
    python examples/pretrain_g2p.py --stop-after 50   the first 50 steps only, nothing is saved
"""
from g2p import CODEC, OLD_TASKS, load_tasks
from pretraining import Recipe, small_transformer

RECIPE = Recipe("g2p", small_transformer(CODEC.vocab_size, max_length=64), CODEC, load_tasks, OLD_TASKS, steps=3388)

if __name__ == "__main__":
    RECIPE.main(__doc__)
