"""Pretrain one of the small models that the other examples adapt: this is how the shipped bases were made.

    g2p          words to American pronunciation, and pronunciation to spelling; accents.py and others adapt it
    inflection   five inflections of English words; past_tense.py adapts it
    bible_small, bible_large
                 the King James Bible into the American Standard; soft_prompts.py adapts them

    python examples/pretrain.py g2p                    about 20 minutes on two cores
    python examples/pretrain.py inflection             about a quarter of an hour on two cores
    python examples/pretrain.py bible_small            about 7 minutes on a free core
    python examples/pretrain.py bible_large            about a quarter of an hour on a free core
    python examples/pretrain.py g2p --stop-after 50    only the first 50 steps: prints their losses, saves nothing

The result is a folder like those in examples/data/checkpoints: config.json, model.safetensors (float16), vocab.json and
log.jsonl. The recipes are the modules pretrain_*.py in examples/data. No recipe sees the task that the examples teach
later, nor a test word or test verse.
"""
from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Callable

import minipeft
from data import pretrain_bible, pretrain_g2p, pretrain_inflection

HERE = Path(__file__).parent
BASES: dict[str, Callable[..., list[float]]] = {
    "g2p": pretrain_g2p.RECIPE.pretrain, "inflection": pretrain_inflection.RECIPE.pretrain,
    **{f"bible_{size}": functools.partial(pretrain_bible.pretrain, size) for size in pretrain_bible.WIDTHS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES, help="which base to make")
    parser.add_argument("--out", type=Path, help="folder for the model and its log (default: examples/out/BASE)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of the shipped base)")
    parser.add_argument("--stop-after", type=int, metavar="N", help="make only N steps and print their losses")
    parser.add_argument("--checkpoint", type=Path, help="file from which an interrupted run goes on")
    args = parser.parse_args()
    minipeft.keep_heap()
    losses = BASES[args.base](args.out or HERE / "out" / args.base, args.steps, args.stop_after, args.checkpoint)
    if args.stop_after:
        print("\n".join(f"{loss:.6f}" for loss in losses))


if __name__ == "__main__":
    main()
