"""Pretrain the small character-level Transformer that `past_tense.py` adapts.

Five inflection tasks (plural, gerund, third person, comparative, superlative), one model, told apart by a prefix in
the text. The past tense is not among them. The result is what `examples/checkpoints/inflection` holds.

    python examples/pretrain_inflection.py                   about a quarter of an hour on two cores
    python examples/pretrain_inflection.py --stop-after 50   the first 50 steps only, nothing is saved
"""
from inflection import CODEC, OLD_TASKS, load_tasks
from pretraining import Recipe, small_transformer

RECIPE = Recipe(
    "inflection", small_transformer(CODEC.vocab_size, max_length=48), CODEC, load_tasks, OLD_TASKS, steps=2600,
    pairs_per_task=16000)       # of 68,000 plurals; the other tasks have fewer

if __name__ == "__main__":
    RECIPE.main(__doc__)
