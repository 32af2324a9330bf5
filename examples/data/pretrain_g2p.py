"""The base of `accents.py`: a small character-level Transformer that says words in American and spells what it hears.

One model has two tasks: American pronunciation ("american: sweaty" -> "swˈɛɾi") and spelling ("spell: swˈɛɾi" ->
"sweaty"). A prefix in the text tells them apart. British is not among the tasks, and neither task contains a test word.
Training makes four passes over 54,000 words. `python examples/pretrain.py g2p` runs this recipe.
"""
from data.g2p import CODEC, OLD_TASKS, load_tasks
from data.pretraining import Recipe, small_transformer

RECIPE = Recipe("g2p", small_transformer(CODEC.vocab_size, max_length=64), CODEC, load_tasks, OLD_TASKS, steps=3388)
