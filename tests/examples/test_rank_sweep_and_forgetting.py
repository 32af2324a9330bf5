"""The rank sweep and the forgetting example: their checks fail when nothing was learned, their tables say what their
rows say, and a sweep that was interrupted goes on."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import minipeft

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def untrained(example, tmp_path):
    """A folder with a model that was never trained, of the shape that the examples adapt."""
    minipeft.Transformer(example("data.pretrain_g2p").RECIPE.config, numpy.random.default_rng(0)).save_pretrained(
        tmp_path / "base")
    return tmp_path / "base"


def run(program, base, out, *arguments):
    """(the finished process, results.json)."""
    done = subprocess.run([sys.executable, str(EXAMPLES / program), "--base", str(base), "--out", str(out), *arguments],
                          capture_output=True, text=True, timeout=300)
    return done, json.loads((out / "results.json").read_text("utf-8")) if done.returncode in (0, 1) else None


def test_the_checks_of_the_rank_sweep_fail_when_nothing_was_learned(untrained, tmp_path):
    out, arguments = tmp_path / "out", ["--ranks", "1", "8", "--sizes", "64:1:2", "128:1:1", "--words", "20",
                                        "--lr", "1e-3"]
    done, results = run("rank_sweep.py", untrained, out, *arguments)
    assert done.returncode == 1, done.stderr
    assert "FAILS 64 pairs: r=1 learns British" in done.stdout and "FAILS 128 pairs: r=8" in done.stdout
    assert "holds a LoRA trains r x 9,216 numbers, exactly, at every rank" in done.stdout
    assert (out / "rank_sweep.png").stat().st_size > 0 and results["lr"] == 1e-3
    assert [(r["pairs"], r["seed"], r["rank"], r["trainable"]) for r in results["rows"]] == [
        (64, 0, 1, 9216), (64, 0, 8, 73728), (64, 1, 1, 9216), (64, 1, 8, 73728), (128, 0, 1, 9216),
        (128, 0, 8, 73728)]
    assert all(math.isfinite(r["loss"]) and r["curve"][-1][0] == 1 for r in results["rows"])


def test_the_checks_of_the_forgetting_example_fail_when_nothing_was_learned(untrained, tmp_path):
    out = tmp_path / "out"
    done, results = run("forgetting.py", untrained, out, "--steps", "2", "--words", "20", "--pairs", "64")
    assert done.returncode == 1, done.stderr
    assert "FAILS full learns British at some rate" in done.stdout
    assert "holds unplugged, every answer of every task is the base's, id for id" in done.stdout
    assert (out / "forgetting.png").stat().st_size > 0
    assert [(row["name"], row["off_is_base"]) for row in results["rows"]] == [
        ("full", None), ("LoRA r=8", True), ("Houlsby adapters", True), ("BitFit", True)]
    assert all([point[0] for point in row["curve"]] == [0, 2] for row in results["rows"])


def test_an_interrupted_sweep_makes_only_the_rows_that_are_missing(example, tmp_path):
    rank_lines, log = example("lab.rank_lines"), example("lab.row_log").RowLog
    path, key, made = tmp_path / "rows.jsonl", ("pairs", "steps", "rank", "seed"), []

    def make(**place):
        made.append(place["rank"])
        return rank_lines.Row(**place, trainable=9, exact=1.5, error=2.0, loss=0.1, train_seconds=3.0, curve=[[1, 2.0]])

    first = log(path, rank_lines.Row, key, {"words": 20}, go_on=True)
    before = [first.row(make, pairs=64, steps=1, rank=rank, seed=0) for rank in (1, 2)]
    again = log(path, rank_lines.Row, key, {"words": 20}, go_on=True)
    after = [again.row(make, pairs=64, steps=1, rank=rank, seed=0) for rank in (1, 2, 4)]
    assert made == [1, 2, 4] and after[:2] == before
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(SystemExit, match="is of another sweep"):
        log(path, rank_lines.Row, key, {"words": 30}, go_on=True)
    log(path, rank_lines.Row, key, {"words": 30}, go_on=False)
    assert len(path.read_text().splitlines()) == 1


def test_a_row_that_was_cut_off_as_it_was_written_is_made_again(example, tmp_path):
    rank_lines, log = example("lab.rank_lines"), example("lab.row_log").RowLog
    path, key = tmp_path / "rows.jsonl", ("rank",)

    def make(rank):
        return rank_lines.Row(64, 1, rank, 0, 9, 1.5, 2.0, 0.1, 3.0, [])

    first = log(path, rank_lines.Row, key, {}, go_on=True)
    for rank in (1, 2):
        first.row(make, rank=rank)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    again = log(path, rank_lines.Row, key, {}, go_on=True)
    assert list(again.found) == [(1,)]
    again.row(make, rank=2)
    assert path.read_bytes() == whole


def test_the_published_sweep_is_best_where_its_paper_says(example):
    published = example("lab.rank_lines").PUBLISHED
    assert list(published) == [2 ** i for i in range(11)]
    loss, *higher_is_better = ([row[i] for row in published.values()] for i in range(6))
    assert [r for r, value in zip(published, loss) if value == min(loss)] == [16, 32, 64, 128, 256, 512]
    assert [[*published][values.index(max(values))] for values in higher_is_better] == [4, 4, 4, 8, 4]


@pytest.fixture
def sweep(example):
    """(rank_lines, rows of a sweep in which every rank from 8 on is as good as the next)."""
    rank_lines = example("lab.rank_lines")
    exact = {1: 20.0, 2: 26.0, 4: 32.0, 8: 36.0, 64: 37.0, 128: 35.0}
    rows = [rank_lines.Row(1000, 300, rank, seed, 9216 * rank, value + 2 * seed - 2, 50 - value, 1 / value, 30.0, [])
            for rank, value in exact.items() for seed in (0, 2)]
    return rank_lines, rows


def test_a_rank_is_the_mean_of_its_seeds_with_the_errors_of_words_and_of_seeds(example, sweep):
    rank_lines, rows = sweep
    lines = rank_lines.lines_of(rows, words=2000)
    assert rank_lines.seed_spread(rows) == pytest.approx(math.sqrt(8))        # two seeds, 2 above and 2 below
    first = lines[0]
    assert (first.rank, first.exact, first.trainable) == (1, 20.0, 9216)
    assert first.exact_error == pytest.approx(math.sqrt(20 * 80 / 2000 + 8 / 2))
    cells = example("lab.tables").cells
    assert cells([first], rank_lines.MEASURED) == [["r=1", "9,216", "20.0 ± 2.2", "30.0 %", "0.050", "30 s"]]
    beside = cells([lines[2], rank_lines.Line(1024)], rank_lines.MEASURED + rank_lines.TABLE_18)
    assert beside[0][-6:] == ["1.18", "70.38", "8.8439", "0.4689", "0.7186", "2.5349"]
    assert beside[1][:6] == ["r=1024", *"-----"] and beside[1][6:8] == ["1.17", "69.37"]


def test_the_claims_of_the_rank_sweep_hold_for_a_plateau_and_fail_without_it(example, sweep):
    rank_lines, rows = sweep

    def failing(rows):
        return [claim for claim, holds in rank_lines.claims_about(rows, 2000, 4.0, 9216) if not holds]

    def changed(rank, **values):
        return [rank_lines.dataclasses.replace(row, **values) if row.rank == rank else row for row in rows]

    assert failing(rows) == []
    assert any("exactly" in claim for claim in failing(changed(64, trainable=9216 * 64 + 1)))
    assert any("r=64 is within" in claim for claim in failing(changed(64, exact=20.0)))
    assert failing(changed(128, exact=20.0)) == []              # beyond the break-even: reported, not claimed
    assert any("r=128 learns" in claim for claim in failing(changed(128, exact=5.0)))
    many, equal = ([rank_lines.dataclasses.replace(row, pairs=8000) for row in found]
                   for found in (rows, changed(1, exact=35.0)))
    assert failing(many) == [] == failing(changed(1, exact=35.0))
    assert [claim.split(":")[1] for claim in failing(equal)] == [" a larger rank (64) beats r=1"]


@pytest.mark.parametrize("least, verdict", [(20.0, "20.0 %, less by"), (36.0, "36.0 %, not less by")])
def test_what_is_found_of_the_ranks_is_said_either_way(sweep, least, verdict):
    rank_lines, rows = sweep
    rows = [rank_lines.dataclasses.replace(row, exact=least) if row.rank == 1 else row for row in rows]
    found = rank_lines.findings(rank_lines.lines_of(rows, 2000))
    assert found[0].startswith("best: r=64, 37.0 %") and verdict in found[0]
    assert found[1] == f"less than the best by three standard errors: {'r=1, r=2' if least == 20.0 else 'r=2'}"
    assert found[2] == "lowest loss: r=64"
    assert ("r=1," in found[3]) == (least == 36.0) and "r=8, r=64, r=128" in found[3]


def test_a_lora_of_rank_1_has_as_many_numbers_as_its_matrices_have_rows_and_columns(example, untrained):
    model = minipeft.Transformer.from_pretrained(untrained)
    attention, feed_forward = 4 * (128 + 128), 2 * (128 + 256)
    assert example("rank_sweep").numbers_per_rank(model) == 2 * (attention + feed_forward) + 2 * (
        2 * attention + feed_forward)


def test_the_loss_of_a_sweep_is_the_mean_over_characters_whatever_the_batches(example, untrained):
    model, mean_loss = minipeft.Transformer.from_pretrained(untrained), example("rank_sweep").mean_loss
    pairs = [([5, 6, 1], [7] * n + [1]) for n in (1, 5, 2, 9, 3)]
    whole = float(model.loss(**minipeft.batch_of(pairs)).data)
    # float32 losses of a few nats, each rounded some hundred times: 1e-5 of it is ten times that
    assert mean_loss(model, pairs, batch_size=2) == pytest.approx(whole, rel=1e-5)


@pytest.fixture
def frontier_row(example):
    """Makes a Row of the forgetting example from its curve."""
    def make(name, curve, factor=1, off=True):
        return example("lab.frontier").Row(name, factor, 0, 1e-3 * factor, 10, 1.0, off, curve)
    return make


def test_what_is_kept_is_read_off_where_british_first_reaches_a_level(example, frontier_row):
    kept_at = example("lab.frontier").kept_at
    row = frontier_row("LoRA r=8", [[0, 4, 50, 40, 0], [6, 8, 40, 36, 1], [9, 16, 20, 30, 2], [12, 9, 6, 5, 3],
                                    [20, 30, 2, 4, 9]])
    assert kept_at(row, 10, 2) == 35.0 and kept_at(row, 10, 3) == 34.5          # a quarter of the way from 8 to 16
    assert kept_at(row, 31, 2) is None


@pytest.mark.parametrize("other, verdict", [(42, "one curve, as far"), (10, "not one curve")])
def test_runs_are_told_apart_if_they_keep_more_than_chance_apart(example, frontier_row, other, verdict):
    rows = [frontier_row(f"m{i}", [[0, 4, 50, 50, 0], [9, 10, kept, kept, 0], [9, 21, kept, kept, 0]])
            for i, kept in enumerate((40, 41, 39, other))]
    found = [line for line in example("lab.frontier").findings(rows, words=500) if "chi squared" in line]
    assert len(found) == 4 and all(verdict in line for line in found)


def test_the_claims_of_the_forgetting_example_need_learning_and_an_undone_adapter(example, frontier_row):
    def failing(*rows):
        return [claim for claim, holds in example("lab.frontier").claims_about(rows, 500) if not holds]

    learned, idle = [[0, 4, 50, 40, 0], [9, 30, 5, 6, 1]], [[0, 4, 50, 40, 0], [9, 5, 50, 40, 0]]
    assert failing(frontier_row("full", learned, off=None), frontier_row("BitFit", learned)) == []
    assert failing(frontier_row("BitFit", idle, 0.25), frontier_row("BitFit", learned, 4)) == []
    assert ["BitFit learns" in claim for claim in failing(frontier_row("BitFit", idle))] == [True]
    assert ["unplugged" in c for c in failing(frontier_row("BitFit", learned, off=False))] == [True]


def test_an_american_question_answered_in_british_is_overwritten_where_the_accents_differ(example, untrained):
    forgetting, codec = example("forgetting"), example("data.g2p").CODEC
    asked = {"british": [("british: a", "ɑ"), ("british: b", "b"), ("british: c", "k"), ("british: d", "d")],
             "american": [("american: a", "æ"), ("american: b", "b"), ("american: c", "s"), ("american: d", "t")],
             "spell": [("spell: æ", "a"), ("spell: b", "b"), ("spell: s", "c"), ("spell: t", "d")]}
    experiment = forgetting.Experiment(minipeft.Transformer.from_pretrained(untrained), [], asked, 1)

    def said(*texts):
        return [numpy.array([0, *codec.encode(text)]) for text in texts]

    assert experiment.scores({"british": said("ɑ", "b", "k", "x"), "american": said("ɑ", "b", "s", "d"),
                              "spell": said("a", "x", "x", "x")}) == (75, 50, 25, pytest.approx(200 / 3))


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_the_tasks_are_asked_more_and_more_rarely_and_at_the_end(example, steps):
    points = example("forgetting").points(steps)
    assert points[-1] == steps and points == sorted(set(points)) and points[0] == min(6, steps)


def test_the_usual_rates_are_those_of_the_comparison_of_methods(example):
    known = [(variant.method, variant.lr) for variant in example("lab.variants").VARIANTS.values() if not variant.fresh]
    methods = example("forgetting").METHODS
    same = [name for name, variant in methods.items() if variant.method in [method for method, _ in known]]
    assert {"full", "LoRA r=8", "Houlsby adapters", "BitFit", "norms"} <= set(same)
    assert all((methods[name].method, methods[name].lr) in known for name in same)
    sweep = example("rank_sweep")
    assert (minipeft.LoRA(rank=8, alpha=8 * sweep.ALPHA_PER_RANK, where=sweep.EVERY_LINEAR), sweep.LR) in known


def test_the_recorded_rank_sweep_bears_out_its_claims(example):
    rank_sweep, rank_lines = example("rank_sweep"), example("lab.rank_lines")
    recorded = json.loads((EXAMPLES / "recorded" / "rank_sweep.json").read_text("utf-8"))
    rows = [rank_lines.Row(**row) for row in recorded["rows"]]
    assert sorted((r.pairs, r.steps, r.seed, r.rank) for r in rows) == sorted(
        (size.pairs, size.steps, seed, rank) for size in rank_sweep.ALL for seed in range(size.seeds)
        for rank in rank_sweep.RANKS)
    claims = rank_lines.claims_about(rows, recorded["words"], recorded["base"], recorded["numbers_per_rank"])
    assert len(claims) == 1 + 2 * 8 + 2 * 3 + 1 and all(holds for _, holds in claims)


def test_the_recorded_frontier_bears_out_its_claims(example):
    forgetting, frontier = example("forgetting"), example("lab.frontier")
    recorded = json.loads((EXAMPLES / "recorded" / "forgetting.json").read_text("utf-8"))
    rows = [frontier.Row(**{name: value for name, value in row.items() if name != "method"})
            for row in recorded["rows"]]
    assert [(row.name, row.factor) for row in rows if row.seed == 0] == [
        (name, factor) for name in forgetting.METHODS for factor in forgetting.FACTORS]
    assert [point[0] for point in rows[0].curve] == [0, *forgetting.points(recorded["steps"])]
    claims = frontier.claims_about(rows, recorded["words"])
    assert len(claims) == len(forgetting.METHODS) + 1 and all(holds for _, holds in claims)
