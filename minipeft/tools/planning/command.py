"""The memory that training takes, planned from a config.json: by phase, by purpose, and by method.

The library's own training step runs on arrays that have shapes and no numbers, and every allocation is counted. So no
weights are needed, and a plan takes seconds even for a model of 65 billion parameters.

  python -m minipeft plan --config t5-small/config.json --method lora --rank 8 --batch 8 --source 512 --target 128

QLoRA on a LLaMA of 7 billion parameters: does it fit on a card of 24 GB?

  python -m minipeft plan --config llama-7b/config.json --rank 64 --where all-linear --batch 1 \\
      --dtype bfloat16 --quantize nf4 --double --checkpointing --budget 24GB --png plan.png

Sizes are in KiB, MiB or GiB (2^10, 2^20, 2^30 bytes); a budget in GB is 10^9 bytes. By default the plan describes this
library: float32, and AdamW with two float32 moments. --dtype, --optimizer, --master and --checkpointing describe what
is common elsewhere. docs/memory.md explains every line.
"""
from __future__ import annotations

import argparse
import sys

from minipeft.tools.planning.configs import read
from minipeft.tools.planning.methods import ALL_LINEAR, known
from minipeft.tools.planning.picture import check, drawn
from minipeft.tools.planning.plan import plan
from minipeft.tools.planning.quantized import KINDS
from minipeft.tools.planning.settings import DTYPES, STATES

SUMMARY = "the memory that training takes, from a config.json alone"


def main(argv: list[str]) -> int:
    """The command with the arguments `argv`. Returns its exit status; argparse raises SystemExit for wrong usage."""
    args = vars(_parser().parse_args(argv))
    png, config, alone = args.pop("png"), args.pop("config"), args.pop("alone")
    try:
        if png is not None:
            check(png)
        found = plan(read(config), others=not alone, **args)
        print(found)
        if png is not None:
            drawn(found, png)
    except BrokenPipeError:  # an OSError, and no fault of the plan
        raise
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minipeft plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE|DIR", help="a config.json of Hugging Face (T5, mT5, LLaMA, Mistral, "
        "Qwen 2 and 3), or its folder")
    add("--method", default="lora", help=f"one of {', '.join(known())} (default lora)")
    add("--rank", type=int, metavar="R", help="the rank, for a method that has one")
    add("--where", metavar="REGEX", help=f"the places to train, by minipeft's names or Hugging Face's; {ALL_LINEAR}: "
        f"every matrix but the embedding and the head")
    add("--batch", type=int, default=8, metavar="N", help="rows of a batch (default 8)")
    add("--source", type=int, default=512, metavar="N", help="tokens of a row's input (default 512)")
    add("--target", type=int, default=128, metavar="N", help="tokens of a row's labels (default 128); a decoder "
        "reads both, one after the other")
    add("--quantize", choices=tuple(KINDS), metavar="KIND", help=f"quantize the frozen matrices: {', '.join(KINDS)}")
    add("--double", action="store_true", help="quantize the scales of nf4 or fp4, too")
    add("--quantize-where", metavar="REGEX", help="the matrices to quantize (default: all but the embedding and the "
        "head)")
    add("--cast-rest", action="store_true", help="cast what is not quantized to float32, as peft's "
        "prepare_model_for_kbit_training does")
    add("--streaming", action=argparse.BooleanOptionalAction, help="quantize each tensor as it is read, as "
        "transformers does with bitsandbytes; the float model is then never whole (default: in half precision)")
    add("--budget", metavar="SIZE", help="such as 24GB or 23.5GiB: say whether the peak fits, and which batch and "
        "which rank are the largest that fit")
    add("--dtype", choices=DTYPES, default="float32", help="the dtype of weights and activations (default float32)")
    add("--optimizer", choices=tuple(STATES), default="adamw", help="the optimizer (default adamw)")
    add("--master", action="store_true", help="keep a float32 copy of what is trained in half precision")
    add("--checkpointing", action="store_true", help="keep only the input of each block, and run the block again in "
        "the backward pass")
    add("--dropout", type=float, metavar="P", help="dropout rate of the model (default: that of the configuration)")
    add("--alone", action="store_true", help="leave out the other methods")
    add("--png", metavar="FILE", help="also draw the table as a picture (needs matplotlib)")
    return parser
