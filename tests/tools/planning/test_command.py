"""`python -m minipeft plan` at a terminal: output, help, and exit status 2 with one clear line for bad input."""
import json
import subprocess
import sys

import pytest

from minipeft.__main__ import COMMANDS
from minipeft.__main__ import main as command_line
from minipeft.tools.planning.command import main
from tests.tools.planning.models import D64

SIZES = ["--batch", "2", "--source", "8", "--target", "4"]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(D64[0].to_hf()))
    return str(tmp_path)


def test_it_prints_the_plan_and_draws_it(config, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert command_line(["plan", "--config", config, "--rank", "4", *SIZES, "--budget", "1GB",
                         "--png", str(tmp_path / "plan.png")]) == 0
    said = capsys.readouterr().out
    assert "> lora r=4" in said and "budget 1.0 GB (953.7 MiB): fits" in said and "dora r=4" in said
    assert (tmp_path / "plan.png").stat().st_size > 5000


def test_options_reach_the_plan(config, capsys):
    assert main(["--config", config, "--alone", *SIZES, "--dtype", "bfloat16", "--quantize", "nf4", "--double",
                 "--checkpointing", "--optimizer", "sgd", "--where", "all-linear", "--cast-rest", "--master",
                 "--quantize-where", "ff", "--dropout", "0"]) == 0
    said = capsys.readouterr().out
    assert "bfloat16; SGD; nf4 with double quantization; quantized as it is read; checkpointing; " in said
    assert "float32 master copies" in said
    assert "dora" not in said and "master copies" in said


@pytest.mark.parametrize("arguments, said", [
    (["--method", "lorra"], "error: method is 'lorra'"), (["--rank", "0"], "error: rank is 0"),
    (["--where", "("], "error: where='('"), (["--budget", "24 cards"], "error: budget is '24 cards'"),
    (["--batch", "0"], "error: batch is 0"),
    (["--method", "full", "--rank", "8"], "error: full trains all weights and has no rank; leave it out"),
    (["--method", "full", "--where", "q"], "error: full trains all weights and has no where; leave it out"),
    (["--batch", str(10 ** 30)], f"error: batch is 1{30 * '0'} with source 512 and target 128; expected at most"),
    (["--batch", "1", "--source", str(10 ** 12)], "error: batch is 1 with source 1000000000000 and target 128"),
    (["--png", "nowhere/at/all.png", "--alone", *SIZES], "error: ")])
def test_bad_input_is_one_line_and_exit_status_2(config, arguments, said, capsys):
    assert main(["--config", config, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "x", "--quantize", "nf5"], ["--nothing"]])
def test_wrong_usage_is_exit_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: " in capsys.readouterr().err


def test_a_missing_file_is_named(capsys):
    assert main(["--config", "no/such/config.json"]) == 2
    assert "no/such/config.json does not exist" in capsys.readouterr().err


def test_without_a_command_the_commands_are_listed(capsys):
    assert command_line(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert command_line([]) == 2 and command_line(["plam"]) == 2
    assert "'plam' is not a command; expected one of plan" in capsys.readouterr().err


def test_the_help_teaches_with_examples_and_the_module_runs(tmp_path):
    done = subprocess.run([sys.executable, "-m", "minipeft", "plan", "--help"], capture_output=True, text=True,
                          cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "python -m minipeft plan --config t5-small/config.json --method lora" in done.stdout
    assert "--budget 24GB" in done.stdout
