"""The examples' data, the shipped checkpoint, and checks that fail when nothing was learned."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import minipeft

EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "checkpoints" / "inflection"


@pytest.fixture
def example(monkeypatch):
    """Import a module of examples/ by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_no_test_word_is_seen_in_any_task(example):
    train, test = example("inflection").load_tasks()

    def words(tasks):
        return {prompt.split(": ")[1] for pairs in tasks.values() for prompt, _ in pairs}

    assert not words(train) & words(test)
    assert len(test["past"]) >= 500 and len(train["past"]) >= 4000


def test_every_character_of_the_data_can_be_spelled_and_read_back(example):
    inflection = example("inflection")
    for pairs in inflection.load_tasks()[1].values():
        for prompt, answer in pairs[:50]:
            assert inflection.decode(inflection.encode(prompt)) == prompt
            assert inflection.decode([0, *inflection.encode(answer), 0, 0]) == answer


def test_the_shipped_checkpoint_is_small_complete_and_says_where_it_is_from(example):
    files = {file.name: file.stat().st_size for file in CHECKPOINT.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "vocab.json", "log.jsonl", "SOURCE.md"}
    assert sum(files.values()) < 2_000_000
    model = minipeft.Transformer.from_pretrained(CHECKPOINT)
    assert model.config == example("pretrain_inflection").CONFIG
    assert json.loads((CHECKPOINT / "vocab.json").read_text())["characters"] == example("inflection").CHARACTERS
    source = (CHECKPOINT / "SOURCE.md").read_text()
    assert "python examples/pretrain_inflection.py" in source and "seed 0" in source and "pyinflect" in source


def test_the_script_makes_the_first_50_losses_of_the_shipped_log(example, tmp_path):
    """Other kernels and thread counts round otherwise, and 50 steps of Adam let that grow: by up to 2.5e-5 over three
    generations of BLAS kernels, with one thread and two. 1e-3 leaves room for kernels that were not at hand."""
    logged = [json.loads(line) for line in (CHECKPOINT / "log.jsonl").read_text().splitlines()]
    made = example("pretrain_inflection").pretrain(tmp_path, stop_after=50)
    assert [line["step"] for line in logged[:50]] == list(range(1, 51))
    assert made == pytest.approx([line["loss"] for line in logged[:50]], rel=1e-3)


def test_the_checks_of_the_past_tense_example_fail_when_nothing_was_learned(tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLES / "past_tense.py"), "--steps", "1", "--pairs", "64",
                           "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "FAILS" in done.stdout and "learns it" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} >= {"results.json", "past_tense.png"}
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["base", "full", "LoRA r=8", "LoRA r=4"]
    assert all(row["off_is_base"] for row in rows if row["method"].startswith("LoRA"))
