"""The base of `past_tense.py`: a small character-level Transformer that inflects English words.

One model has five tasks (plural, gerund, third person, comparative, superlative). A prefix in the text tells them
apart. The past tense is not among them. `python examples/pretrain.py inflection` runs this recipe.
"""
from data.inflection import CODEC, OLD_TASKS, load_tasks
from data.pretraining import Recipe, small_transformer

RECIPE = Recipe(
    "inflection", small_transformer(CODEC.vocab_size, max_length=48), CODEC, load_tasks, OLD_TASKS, steps=2600,
    pairs_per_task=16000)       # of 68,000 plurals; the other tasks have fewer
