"""Quantized bases in the examples: checks can fail, numbers are those of formulas, and the record bears them out."""
import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import minipeft

EXAMPLES = Path(__file__).parents[2] / "examples"
RECORDED = EXAMPLES / "recorded" / "qlora.json"
# bits of a number: its code, and its share of the scales and offsets of its block or group
BITS = {"16 bit": 16, "NF4": 4 + 32 / 64, "NF4, double": 4 + 8 / 64, "FP4": 4 + 32 / 64, "INT4": 4 + 64 / 32,
        "INT3": 3 + 64 / 32, "INT2": 2 + 64 / 32, "Q4_1": 4 + 32 / 32}
# of 200 words: those that LoRA gets right in made-up rows, 4 points fewer, and 4 points more
RIGHT, FEWER, MORE = (numpy.packbits(numpy.arange(200) < n).tobytes().hex() for n in (72, 64, 80))


@pytest.fixture
def parts(example):
    """The module that makes the rows."""
    return example("lab.quantized_bases")


@pytest.fixture
def experiment(example, parts):
    """Two steps of training, 20 test words and 10 American ones."""
    return few(parts, example("data.g2p"))


@functools.cache
def few(parts, g2p):
    train, test = g2p.load_tasks()
    return parts.Experiment(parts.loaded(EXAMPLES / "data" / "checkpoints" / "g2p"), train["british"][:64],
                            test["british"][:20], test["american"][:10], 2)


def test_the_quick_form_fails_when_nothing_was_learned_but_its_merges_are_exact_all_the_same(tmp_path, example):
    done = subprocess.run([sys.executable, str(EXAMPLES / "qlora.py"), "--quick", "--steps", "2", "--pairs", "64",
                           "--words", "40", "--side", "10", "--out", str(tmp_path)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "qlora.png").stat().st_size > 0
    qlora = example("qlora")
    run = qlora.recorded([tmp_path / "results.json"])
    assert [row.method for row in run["rows"]] == list(qlora.QUICK_ROWS)
    failed = [claim for claim, holds in qlora.claims_about(run["rows"], run["words"], run["base"]) if not holds]
    assert [claim.partition(":")[0] for claim in failed] == ["LoRA on 16 bit learns British"]
    assert done.stdout.count("FAILS") == len(failed) == 1 and done.stdout.count("holds") == 10
    (tmp_path / "again").mkdir()
    qlora.save(run, tmp_path / "again")
    assert (tmp_path / "again" / "results.json").read_text() == (tmp_path / "results.json").read_text()


def test_the_shipped_base_is_one_of_16_bits_and_no_number_is_rounded(parts):
    folder = EXAMPLES / "data" / "checkpoints" / "g2p"
    rounded, stored = parts.loaded(folder), minipeft.Transformer.from_pretrained(folder)
    assert parts.same_bits(rounded.state(), stored.state())
    size = parts.stored_bytes(rounded, list(rounded.slots))
    assert size == 2 * minipeft.report(stored).all
    assert 0 <= (folder / "model.safetensors").stat().st_size - size < 10_000          # the header of the file


def test_numbers_beyond_float16_are_refused_by_name(parts):
    with pytest.raises(SystemExit, match="head.weight holds 70000"):
        parts.in_16_bits(numpy.array([1.0, -70000.0], "float32"), "head.weight")
    assert parts.in_16_bits(numpy.array([1.0, 1 + 2.0 ** -12], "float32"), "w").tolist() == [1.0, 1.0]


def test_a_base_takes_the_bytes_of_its_codes_and_scales_and_two_for_every_other_number(parts, experiment):
    assert list(BITS) == list(parts.BASES)
    numbers = 655_360                                                  # of the 32 linear weights of the base
    nested = {"NF4, double": 32 * (4 + 4) + 8 * 4}                     # their offset, and one scale per 256 blocks
    for kind, bits in BITS.items():
        model, _, error = experiment.quantized(kind)
        size = parts.stored_bytes(model, experiment.names)
        assert numbers * bits / 8 <= size <= numbers * bits / 8 + nested.get(kind, 0), kind
        assert parts.stored_bytes(model, list(model.slots)) - size == 2 * (687_232 - numbers)
        assert (error == 0) == (kind == "16 bit")


def test_bases_of_fewer_bits_are_further_from_the_original_in_the_order_of_their_codes(experiment):
    """NF4's error on normal weights in blocks of 64 is 9.3 %, FP4's 12.3 %, and INT4's in groups of 32 is 7.8 %
    (independent measurements of random weights). The trained weights are near these, a little below."""
    error = {kind: experiment.quantized(kind)[2] for kind in BITS}
    assert 8 < error["NF4"] < 9.3 and 10.5 < error["FP4"] < 12.3 and 6.5 < error["INT4"] < 7.8
    assert error["NF4"] == pytest.approx(error["NF4, double"], rel=0.01)
    assert error["INT4"] == pytest.approx(error["Q4_1"], rel=0.01)
    assert 2 * error["INT4"] < error["INT3"] and 2 * error["INT3"] < error["INT2"]


@pytest.mark.parametrize("kind, offset", [("INT4", "offset"), ("Q4_1", "m")])
def test_a_qa_lora_moves_the_offsets_alone_and_the_checks_see_it(example, experiment, kind, offset):
    row = experiment.row(f"QA-LoRA on {kind}", 0)
    merged, = row.merges
    assert merged.into == "offsets" and merged.moved == [offset] and merged.weight_bytes == row.weight_bytes
    assert 0 < merged.lost < 5 and row.kept
    assert all(holds for _, holds in example("qlora").exact(row.method, row.merges, 20))


def test_a_lora_on_nf4_loses_much_of_a_small_change_when_quantized_again_and_little_in_16_bits(experiment):
    row = experiment.row("LoRA on NF4", 0)
    into_float, requantized, original = row.merges
    assert row.kept and (into_float.moved, original.moved) == (None, None)
    assert requantized.moved == ["absmax", "packed"]
    assert requantized.weight_bytes == row.weight_bytes
    assert into_float.weight_bytes == original.weight_bytes == 2 * 655_360
    assert into_float.lost < 2 and into_float.worst < 0.1 and requantized.lost > 50 and original.lost > 100


def test_what_is_lost_is_what_the_library_reports(experiment, parts):
    """Its report has a number for each weight. For all of them together the number lies between the extremes."""
    model, _, _ = experiment.quantized("NF4")
    attachment = minipeft.attach(model, parts.LORA, numpy.random.default_rng(0))
    for name, p in attachment.parameters.items():
        p.data = numpy.random.default_rng(len(name)).normal(0, 0.1, p.shape).astype(p.dtype)
    reports = []

    def merge():
        reports.append(attachment.merge("requantized"))
        return reports[0]

    found = experiment.merged("requantized", model, attachment, parts.ask(model, experiment.british), merge)
    errors = list(reports[0].errors.values())
    assert 100 * min(errors) < found.lost < 100 * max(errors) == found.worst
    assert attachment.state == "plugged"


def test_a_row_is_the_same_each_time_and_another_one_with_another_seed(experiment):
    small = dataclasses.replace(experiment, british=experiment.british[:2], american=experiment.american[:2])
    first, again, other = (small.row("QA-LoRA on INT4", seed) for seed in (0, 0, 1))
    assert dataclasses.asdict(first) == dataclasses.asdict(again)
    assert first.merges[0].lost != other.merges[0].lost


def test_the_standard_error_of_a_difference_counts_the_words_on_which_two_models_differ(parts):
    difference, error = parts.paired([True, True, False, True], [True, False, False, False])
    assert (difference, error) == (50, 100 * math.sqrt(0.25 / 4))      # d = 0, 1, 0, 1
    assert parts.paired([True, False], [True, False]) == (0, 0)


def made(example, **changes):
    """(module qlora, rows of three seeds that bear out every claim, but for `changes` of a field of a row, or of its
    first merge, by method)."""
    qlora, rows = example("qlora"), []
    sizes = {"LoRA on 16 bit": 2000, "LoRA on NF4": 562, "QA-LoRA on INT4": 750, "QA-LoRA on Q4_1": 625}
    offset = {"QA-LoRA on INT4": ["offset"], "QA-LoRA on Q4_1": ["m"]}
    for seed in range(3):
        for method, size in sizes.items():
            moved = offset.get(method)
            merge = {"into": "offsets" if moved else "16 bit", "weight_bytes": size, "british": 36.0, "changed": 0.0,
                     "gap": 1e-6, "lost": 0.5, "worst": None, "rounding": 1e-8, "moved": moved}
            row = {"method": method, "seed": seed, "scheme": "", "trainable": 1, "weight_bytes": size,
                   "base_bytes": size, "weight_error": 0.0, "american": 50.0, "british": 36.0,
                   "british_interval": (30, 42), "right": RIGHT, "kept": True}
            for name, value in changes.get(method, {}).items():
                assert name in row or name in merge
                (row if name in row else merge)[name] = value
            rows.append(qlora.Row(**row, merges=[qlora.Merged(**merge)]))
    return qlora, rows


def test_every_claim_holds_for_rows_that_bear_it_out(example):
    qlora, rows = made(example)
    claims = qlora.claims_about(rows, 200, 5.0)
    assert len(claims) == 11 and all(holds for _, holds in claims)


@pytest.mark.parametrize("method, change, claim", [
    ("LoRA on 16 bit", {"british": 13.0}, "LoRA on 16 bit learns British"),
    ("QA-LoRA on Q4_1", {"kept": False}, "training changed no bit of a base"),
    ("LoRA on NF4", {"weight_bytes": 601}, "LoRA on NF4: its weights take"),
    ("LoRA on NF4", {"right": FEWER}, "LoRA on NF4 is within 3.0"),
    ("LoRA on NF4", {"right": MORE}, "LoRA on NF4 is within 3.0"),
    ("QA-LoRA on INT4", {"moved": ["codes", "offset"]}, "QA-LoRA on INT4: merging changes codes and offset"),
    ("QA-LoRA on Q4_1", {"moved": ["d", "m"]}, "QA-LoRA on Q4_1: merging changes d and m"),
    ("QA-LoRA on Q4_1", {"moved": None}, "QA-LoRA on Q4_1: merging changes the whole weight"),
    ("QA-LoRA on INT4", {"rounding": 1e-6}, "QA-LoRA on INT4: merged weights = unmerged ones"),
    ("QA-LoRA on Q4_1", {"rounding": 1e-3}, "QA-LoRA on Q4_1: merged weights = unmerged ones"),
    ("QA-LoRA on INT4", {"gap": 2e-5}, "QA-LoRA on INT4: merged logits = unmerged ones"),
    ("QA-LoRA on INT4", {"changed": 1.0}, "QA-LoRA on INT4: at most one answer changes"),
    ("LoRA on NF4", {"lost": 6.0}, "merged into 16 bits")])
def test_each_claim_fails_where_its_numbers_speak_against_it(example, method, change, claim):
    qlora, rows = made(example, **{method: change})
    failed = [text for text, holds in qlora.claims_about(rows, 200, 5.0) if not holds]
    assert len(failed) == 1 and failed[0].startswith(claim)


def test_a_single_seed_may_miss_three_points_by_chance_and_three_seeds_may_not(example):
    qlora, rows = made(example, **{"LoRA on NF4": {"right": FEWER}})
    behind, error = qlora.behind_lora(rows, "LoRA on NF4", 200)
    assert behind == 4 and 3 * error == pytest.approx(300 * math.sqrt(0.04 * 0.96 / 200)) and behind < 3 * error

    def fails(some):
        return [text for text, holds in qlora.claims_about(some, 200, 5.0) if not holds]

    assert fails([row for row in rows if row.seed == 0]) == []
    assert len(fails(rows)) == 1


def test_the_recorded_run_has_every_row_and_bears_out_the_claims(example):
    qlora = example("qlora")
    run = qlora.recorded([RECORDED])
    assert {key: run[key] for key in qlora.LONG} == qlora.LONG
    seeds = {name: {row.seed for row in run["rows"] if row.method == name} for name in qlora.METHODS}
    assert len(run["rows"]) == sum(map(len, seeds.values())) and set(map(frozenset, seeds.values())) == {
        frozenset(row.seed for row in run["rows"])}
    assert all(holds for _, holds in qlora.claims_about(run["rows"], run["words"], run["base"]))


def test_records_of_other_settings_are_not_put_together(example, tmp_path):
    qlora = example("qlora")
    for name, words in (("a", 200), ("b", 300)):
        (tmp_path / name).write_text(json.dumps({**qlora.LONG, "words": words, "base": 1.0, "rows": []}))
    with pytest.raises(SystemExit, match="has other settings than"):
        qlora.recorded([tmp_path / "a", tmp_path / "b"])
