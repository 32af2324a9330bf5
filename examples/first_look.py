"""A first look: teach a pretrained model six words in about a second, then unplug what it learned.

The base model pronounces English words with an American accent: to "american: water" it answers "wˈɔɾəɹ". From six
words, a LoRA learns to answer the same prompt with a British accent. Plugged in, it makes the model pronounce these
six words as the British do. Unplugged, the model computes its first logits again, bit for bit, because training never
changed its own weights.

Six words do not teach an accent. The last line counts the unseen words whose answer is right in British. To see an
accent learned from a thousand words, and methods compared, run accents.py.

    python examples/first_look.py          a few seconds; training takes about one of them
"""
import argparse
from pathlib import Path

import numpy

import minipeft
from data.g2p import CODEC, asked_in_american, ids_of, load_tasks
from lab.comparison import ask
from lab.measure import logits
from lab.scoring import exact_match

WORDS = ("water", "dance", "laugh", "leisure", "zebra", "clerk")

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

model = minipeft.Transformer.from_pretrained(Path(__file__).parent / "data" / "checkpoints" / "g2p")
train, test = load_tasks()
taught, unseen = asked_in_american(train["british"], WORDS), asked_in_american(test["british"])[:500]


def look(who: str) -> tuple[float, numpy.ndarray]:
    """Print what the model answers to the six words; return its score on unseen words, in percent, and its logits."""
    said = [CODEC.decode(ids) for ids in ask(model, taught)]
    print(f"{who:16}" + "".join(f"{ipa:10}" for ipa in said).rstrip())
    return exact_match(ask(model, unseen), unseen, CODEC), logits(model, ids_of(taught))


print(" " * 16 + "".join(f"{word:10}" for word in WORDS).rstrip())
before, base_logits = look("the base")
lora = minipeft.attach(model, minipeft.LoRA(rank=8, alpha=16), numpy.random.default_rng(0))
minipeft.fit(model, lora.parameters, minipeft.Batches(ids_of(taught), len(taught)), steps=100,
             optimizer=minipeft.AdamW(lr=1e-3), progress=False)
after, _ = look("with the LoRA")
lora.unplug()
_, unplugged_logits = look("unplugged")

assert numpy.array_equal(unplugged_logits, base_logits), "unplugging must give the base's logits back, bit for bit"
print("\nUnplugged, every logit is the base's, bit for bit. The LoRA was taught these six words and nothing else:")
print(f"of {len(unseen)} unseen words, right in British: {before:.1f} % without it, {after:.1f} % with it.")
