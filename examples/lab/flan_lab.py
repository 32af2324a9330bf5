"""The FLAN-T5 lab from its first line to its last check: `run` does what `flan_t5_lab.py` explains."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console

import minipeft
from lab.claims import Claim, failures
from lab.flan_page import compared, picture, side_by_side, tables
from lab.flan_run import INSTRUCT, ORIGINAL, Lab, Row, lora_numbers, reloaded
from lab.free_memory import free_memory
from minipeft.formats import peft
from minipeft.nn.fingerprint import fingerprint

ROUNDING = 1e-4             # of a loss: float32 sums, whose order depends on the shape of the batch
OURS, PEFTS = "lora.safetensors", "peft_lora"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
MIB = 2 ** 20


def run(lab: Lab) -> int:
    """The whole lab; it writes to the folder --out, which is there. Returns 1 if a check fails, else 0."""
    console, args = Console(), lab.args
    opening(lab, console)
    claims: list[Claim] = [padding(lab)]
    original = lab.original()
    zero_shot(lab, original, console)
    rows = [original, *full(lab, console)]
    peft_row, lora = lab.peft()
    rows.append(peft_row)
    console.print(f"peft: a LoRA with r = {args.rank}, alpha = {args.alpha:g} on q and v of every attention, "
                  f"{lab.steps} steps in {peft_row.seconds:.0f} s\n{counts(lab.base)}")
    side_by_side(lab.test[:args.show], rows, console)
    for table in tables(rows, len(lab.test)):
        console.print(table)
    claims += saved(lab, peft_row, lora, console) + untouched(lab, original, lora) + learned(lab, rows)
    picture(rows, args.out / "flan_t5_lab.png")
    (args.out / "results.json").write_text(json.dumps(results(lab, rows, claims), indent=1), "utf-8")
    console.print(f"picture and figures: {args.out}/flan_t5_lab.png, {args.out}/results.json", soft_wrap=True)
    return 1 if failures(claims, console) else 0


def opening(lab: Lab, console: Console) -> None:
    """Print the model's parameters and the sizes of the data."""
    console.print(f"{lab.args.model}\n{minipeft.report(lab.base)}\n", markup=False, highlight=False)
    for name, rows in (("train", lab.train), ("test", lab.test)):
        console.print(f"{name}: {len(rows)} dialogues, {lab.prompts.sizes(rows)}", markup=False)


def counts(model: Any, params: Any = None) -> str:
    """The three lines of the lab on parameters."""
    return "\n".join(str(minipeft.report(model, params)).splitlines()[:3])


def zero_shot(lab: Lab, original: Row, console: Console) -> None:
    """Print one test dialogue as the model is asked it, a person's summary, and the original's."""
    for title, text in (("the prompt", lab.prompts.prompt(lab.test[0].dialogue)),
                        ("a person's summary", lab.test[0].summary),
                        ("zero shot, by the original", original.answers[0])):
        console.rule(title)
        console.print(text, markup=False, highlight=False)
    console.rule()


def full(lab: Lab, console: Console) -> list[Row]:
    """The row of full fine-tuning, if it is asked for. The copy that was trained is dropped, or saved before."""
    if not lab.full_steps:
        console.print("full fine-tuning is left out (--full-steps 0)")
        return []
    costs, free = minipeft.report(lab.base), free_memory()
    need = costs.weight_bytes + costs.training_bytes
    console.print(f"full fine-tuning holds {need / MIB:,.0f} MiB beside the original, for a copy, gradients and "
                  f"moments, and its activations" + (f"; {free / MIB:,.0f} MiB are free" if free is not None else ""))
    row, model = lab.instruct()
    console.print(f"instruct: all weights of a copy, {lab.full_steps} steps in {row.seconds:.0f} s\n{counts(model)}")
    if lab.args.save_full:
        model.save_pretrained(lab.args.out / INSTRUCT)
        console.print(f"saved: {lab.args.out / INSTRUCT}", soft_wrap=True)
    return [row]


def saved(lab: Lab, row: Row, lora: minipeft.Attachment, console: Console) -> list[Claim]:
    """Save the LoRA in both formats, read each onto a model that was read anew, and return the claims."""
    out, logits = lab.args.out, lab.first_logits(lab.base)
    lora.save(out / OURS)
    for name in PEFT_FILES:                     # of an earlier run
        (out / PEFTS / name).unlink(missing_ok=True)
    peft.save(lora, out / PEFTS, base_model=str(lab.args.model))
    claims = []
    for path, file in ((out / OURS, out / OURS), (out / PEFTS, out / PEFTS / PEFT_FILES[1])):
        fresh, same = reloaded(lab, path, logits, row.ids)
        claims.append((f"{path.name}, read onto a model that was read anew: the same logits, bit for bit, and the same "
                       f"answers", same))
        console.print(f"saved and read again: {path}, {file.stat().st_size / 1e6:,.2f} MB", soft_wrap=True)
    console.print(f"read again, nothing is trained:\n{counts(fresh, {})}")
    return claims


def padding(lab: Lab) -> Claim:
    """Pitfalls (a) and (b)."""
    gap = lab.padding_gap()
    return (f"(a), (b) padding does not count: the loss of a padded batch is that of its rows alone, to {ROUNDING:.0e} "
            f"({gap:.0e})", gap <= ROUNDING)


def untouched(lab: Lab, original: Row, lora: minipeft.Attachment) -> list[Claim]:
    """Pitfall (d). The LoRA is switched off for it."""
    with lora.off():
        logits, ids = lab.first_logits(lab.base), lab.ids(lab.base)
    return [("(d) training wrote to no weight of the original: all are the same, bit for bit",
             fingerprint(lab.base.state()) == lab.weights),
            ("(d) with the LoRA off, the model is the original: the same logits, bit for bit, and the same answers",
             numpy.array_equal(logits, lab.logits) and ids == original.ids)]


def learned(lab: Lab, rows: list[Row]) -> list[Claim]:
    """What training is for. original is the first row, peft the last."""
    expected = lora_numbers(lab.base, lab.args)
    claims = [(f"the LoRA trains r (d_in + d_out) numbers at every place: {rows[-1].trainable:,} = {expected:,}",
               rows[-1].trainable == expected)]
    before = rows[0]
    for row in rows[1:]:
        r, r_before = (float(numpy.mean(found.rouge["rouge1"])) for found in (row, before))
        claims += [(f"{row.method} has a lower loss on held-out dialogues than the {ORIGINAL}: {row.loss:.3f} < "
                    f"{before.loss:.3f}", row.loss < before.loss),
                   (f"{row.method} has a higher rouge1 than the {ORIGINAL}: {r:.2f} > {r_before:.2f}", r > r_before)]
    return claims


def results(lab: Lab, rows: list[Row], claims: list[Claim]) -> dict[str, Any]:
    """Everything that was found, as JSON can hold it."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(lab.args).items()}
    shown = [{key: value for key, value in dataclasses.asdict(row).items() if key != "ids"} for row in rows]
    return {"settings": {**settings, "steps": lab.steps, "full_steps": lab.full_steps},
            "train": [row.id for row in lab.train], "test": [dataclasses.asdict(row) for row in lab.test],
            "rows": shown,
            "differences": {pair: {kind: dataclasses.asdict(found) for kind, found in kinds.items()}
                            for pair, kinds in compared(rows).items()},
            "claims": {claim: holds for claim, holds in claims}}
