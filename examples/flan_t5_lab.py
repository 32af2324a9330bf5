"""The FLAN-T5 lab: summarize dialogues with a T5 as it comes, with all of its weights tuned, and with a LoRA.

It follows the well-known notebook (DialogSum, FLAN-T5-base, LoRA with r = 32 on q and v, ROUGE), on any T5 folder and
any file of dialogues with summaries. Nothing is downloaded.

    --model DIR    config.json, model.safetensors (or shards; float16 and bfloat16 are widened) and tokenizer.json
    --data FILE    .csv or .jsonl with the columns dialogue and summary; id and topic are shown if they are there.
                   examples/data/dialogues.csv has a dozen to try it with

    1. parameters         how many there are, by part of the model; of them, trained: all, then the LoRA's
    2. zero shot          the original summarizes a dialogue that nothing is trained on
    3. full fine-tuning   all weights of a copy: "instruct"
    4. LoRA               on the original, whose weights stay as they are: "peft"
    5. comparison         the same dialogues summarized by all three; ROUGE, and its differences
    6. files              the LoRA as a file of this library and as a directory of PEFT's, each read again

The notebook has five pitfalls, which are avoided here:

    (a) It pads summaries and trains on the padding (its first losses are near 50). Here the labels of padding are -100,
        which the loss does not count. A loss is the mean over the summaries' own tokens.
    (b) It passes no attention_mask, so the padding of a dialogue is read as text. Here every call gets the mask.
    (c) Its prompts differ in white space between training and test. (A SentencePiece tokenizer drops the difference,
        another need not.) Here one template makes both. A dialogue that is too long loses its own end, not the last
        words of the template.
    (d) Its "original" is changed by training, so its ROUGE-1 is .166 in one cell and .236 in another. Here full
        fine-tuning works on a copy, and the LoRA beside the weights. Checks compare the original bit for bit.
    (e) One of its texts says "+18.82 %" for absolute points, another "+80.63 %" for a relative change of the same kind
        of score. Here points are called points, and a table of its own has the relative changes.

    python examples/flan_t5_lab.py --model flan-t5-base --data dialogsum.csv
    python examples/flan_t5_lab.py --model flan-t5-base --data train.csv --test test.csv --steps 100
    python examples/flan_t5_lab.py --dry-run           FLAN-T5-base with random weights, no files: what a step costs

The program writes the LoRA, a picture and results.json to --out. It ends with checks that fail if padding counts, the
original was changed, a file does not give the same answers, or nothing was learned. In a step or two, and by a model
with random weights, little is learned. It returns 1 if a check fails, and 2 for arguments or files that do not fit.
The notebook trains for one step, at learning rates of 1e-5 (full) and 1e-3 (LoRA).
"""
from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What the two kinds of run need, {module: package}; a dry run draws no picture and reads no text.
DRY = {"rich": "rich"}
NEEDED = {**DRY, "matplotlib": "matplotlib", "tokenizers": "tokenizers", "rouge_score": "rouge-score"}
SIZES = {"batch": (8, 2), "max_source": (512, 128), "max_target": (128, 32)}        # of the lab, of a dry run


def count_or_file(text: str) -> int | Path:
    """A number of rows, or the path of a file."""
    return at_least(1)(text) if text.isdecimal() else Path(text)


def at_least(least: int):
    """A type of arguments: an integer of at least `least`."""
    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; expected an integer >= {least}")
        return value
    return integer


def positive(text: str) -> float:
    """A type of arguments: a number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected a finite number > 0")
    return value


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--model", type=Path, metavar="DIR", help="folder of a T5 and its tokenizer.json")
    add("--data", type=Path, metavar="FILE", help="dialogues with summaries, to train on and to test on")
    add("--test", type=count_or_file, metavar="N or FILE", help="how many dialogues of --data to test on, or a file of "
        "its own for that (default: a quarter of them, at most 10)")
    add("--train", type=at_least(1), metavar="N", help="how many of the others to train on (default: at most 125)")
    add("--dialogue-column", default="dialogue", metavar="NAME", help="its name in the files (default: %(default)s)")
    add("--summary-column", default="summary", metavar="NAME", help="its name in the files (default: %(default)s)")
    add("--rank", type=at_least(1), default=32, help="r of the LoRA (default: %(default)s)")
    add("--alpha", type=positive, default=32, help="alpha of the LoRA; its factor is alpha / r (default: %(default)s)")
    add("--steps", type=at_least(1), metavar="N", help="optimizer steps of the LoRA (default: one epoch)")
    add("--full-steps", type=at_least(0), metavar="N", help="steps of full fine-tuning (default: as many as --steps; 0 "
        "leaves it out)")
    add("--lr", type=positive, default=1e-3, help="learning rate of the LoRA (default: %(default)s)")
    add("--full-lr", type=positive, default=1e-4, help="learning rate of full fine-tuning (default: %(default)s)")
    for name, what in (("batch", "dialogues in a batch"), ("max_source", "most tokens of a prompt"),
                       ("max_target", "most tokens of a summary, in training")):
        lab, dry = SIZES[name]
        add(f"--{name.replace('_', '-')}", type=at_least(1), metavar="N",
            help=f"{what} (default: {lab}; of a dry run {dry})")
    add("--max-new", type=at_least(1), default=200, metavar="N", help="most tokens of an answer (default: %(default)s)")
    add("--beams", type=at_least(1), default=1, help="width of the beam search; 1 is greedy (default: %(default)s)")
    add("--show", type=at_least(1), default=3, metavar="N",
        help="how many test dialogues are shown side by side (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="seed of all random numbers (default: %(default)s)")
    add("--dtype", choices=("float32", "float64"), default="float32", help="to compute in (default: %(default)s)")
    add("--save-full", action="store_true", help="save the fully tuned model, too")
    add("--out", type=Path, default=HERE / "out" / "flan_t5_lab", help="folder for the results (default: %(default)s)")
    add("--dry-run", action="store_true", help="build FLAN-T5-base at random and measure training steps")
    return found


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with the defaults that depend on the kind of run."""
    options = parser()
    args = options.parse_args(argv)
    if not args.dry_run and (args.model is None or args.data is None):
        options.error("expected --model DIR and --data FILE, or --dry-run, which needs no files")
    for name, (lab, dry) in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, dry if args.dry_run else lab)
    args.columns = (args.dialogue_column, args.summary_column)
    return args


def missing(packages: dict[str, str]) -> list[str]:
    """The packages, {module: name}, that are not installed."""
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if absent := missing(DRY if args.dry_run else NEEDED):
        print(f"this program needs {', '.join(absent)}: pip install -e '.[lab]', in the root of the repository",
              file=sys.stderr)
        return 2
    import minipeft
    minipeft.keep_heap()
    from lab import flan_base, flan_run
    try:
        begun = flan_base.Base(args) if args.dry_run else flan_run.Lab(args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"{parser().prog}: error: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        return flan_base.run(begun)
    from lab import flan_lab
    return flan_lab.run(begun)


if __name__ == "__main__":
    sys.exit(main())
