"""What `fit` and its parts say to arguments that cannot be right, and which ones they take."""
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Callable

import numpy
import pytest

import minipeft
from tests.train import tiny


class Case:
    """A model with an adapter that is plugged, and one call of fit."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, tiny.model()
        self.lora = minipeft.attach(self.model, minipeft.LoRA(2), numpy.random.default_rng(0))
        self.other = tiny.model()
        self.foreign = minipeft.attach(self.other, minipeft.LoRA(2), numpy.random.default_rng(0))
        self.batches = tiny.batches()
        (folder / "folder").mkdir(exist_ok=True)

    def bits(self) -> list:
        return [tiny.bits({**model.base_parameters, **attachment.parameters})
                for model, attachment in ((self.model, self.lora), (self.other, self.foreign))]

    def fit(self, **settings: Any) -> Any:
        settings = {"model": self.model, "params": self.lora, "batches": self.batches, "steps": 2, **settings}
        return minipeft.fit(settings.pop("model"), settings.pop("params"), settings.pop("batches"), **settings)


def one_place(case: Case, move: str) -> dict:
    """The adapter after a move, as the argument `params`."""
    getattr(case.lora, move)()
    return {"params": case.lora}


def as_dict(case: Case, move: str) -> dict:
    params = case.lora.parameters
    getattr(case.lora, move)()
    return {"params": params}


def score() -> float:
    return 0.5


WRONG: list[tuple[str, Callable[[Case], dict], type, str]] = [
    # ---- params
    ("a list", lambda c: {"params": list(c.lora.parameters.values())}, TypeError,
     r"params is a list; expected an attachment, or \{name: Parameter\} as minipeft.select"),
    ("names", lambda c: {"params": ["encoder"]}, TypeError, "params is a list; expected an attachment"),
    ("None", lambda c: {"params": None}, TypeError, "params is None; expected an attachment"),
    ("a pattern", lambda c: {"params": ".*"}, TypeError, "params is '.*'; expected an attachment"),
    ("the model", lambda c: {"params": c.model}, TypeError, "params is .*Transformer.*; expected an attachment"),
    ("a method", lambda c: {"params": minipeft.LoRA(2)}, TypeError, "params is LoRA.*; expected an attachment"),
    ("a class", lambda c: {"params": minipeft.Attachment}, TypeError, "params is <class .*; expected an attachment"),
    ("arrays", lambda c: {"params": c.model.state()}, TypeError, "params.'embedding.weight'. is ndarray; expected a"),
    ("nothing", lambda c: {"params": {}}, ValueError, "nothing is selected: params is empty"),
    ("off", lambda c: one_place(c, "unplug"), ValueError, r"the attachment 'lora' is off.*: plug\(\) it first"),
    ("merged", lambda c: one_place(c, "merge"), ValueError, r"'lora' is merged.*: unmerge\(\) first"),
    ("removed", lambda c: one_place(c, "remove"), ValueError, "'lora' was removed from its model: attach it again"),
    ("of another model", lambda c: {"params": c.foreign}, ValueError, "'lora' belongs to another model"),
    ("dict, off", lambda c: as_dict(c, "unplug"), ValueError, r"the attachment 'lora' is off.*: plug\(\) it first"),
    ("dict, merged", lambda c: as_dict(c, "merge"), ValueError, r"'lora' is merged.*: unmerge\(\) first"),
    ("dict, removed", lambda c: as_dict(c, "remove"), ValueError, "not a parameter of this model: .* was removed"),
    ("dict, of another model", lambda c: {"params": c.foreign.parameters}, ValueError, "belongs to another model"),
    ("dict, another base", lambda c: {"params": tiny.everything(tiny.model())}, ValueError, "belongs to another model"),
    ("dict, one merged", lambda c: {"params": {**c.model.base_parameters, **as_dict(c, "merge")["params"]}}, ValueError,
     "'lora' is merged"),
    # ---- model, batches
    ("a class as model", lambda c: {"model": minipeft.T5}, TypeError, "model is <class .*; expected a model"),
    ("no model", lambda c: {"model": None}, TypeError, "model is None; expected a model, with a method `loss`"),
    ("a list of pairs", lambda c: {"batches": tiny.pairs()}, TypeError,
     r"batches is a list; .*: wrap pairs of ids with Batches\(pairs, batch_size\)"),
    ("the class Batches", lambda c: {"batches": minipeft.Batches}, TypeError,
     r"batches is the class Batches; expected Batches\(pairs, batch_size\)"),
    ("one batch", lambda c: {"batches": c.batches.next()}, TypeError, "batches is a dict; expected a stream"),
    ("a generator of batches", lambda c: {"batches": (b for b in [])}, TypeError, "batches is a generator; expected a"),
    # ---- optimizer and schedule
    ("the class AdamW", lambda c: {"optimizer": minipeft.AdamW}, TypeError,
     r"optimizer is the class AdamW; .*: AdamW\(lr=...\)"),
    ("a rate as optimizer", lambda c: {"optimizer": 1e-3}, TypeError, r"optimizer is 0.001; expected AdamW\(lr=...\)"),
    ("linear_decay itself", lambda c: {"schedule": minipeft.linear_decay}, TypeError,
     r"schedule is the function linear_decay; expected the schedule that it returns: linear_decay\(steps\)"),
    ("cosine_decay itself", lambda c: {"schedule": minipeft.cosine_decay}, TypeError, r"it returns: cosine_decay"),
    ("constant itself", lambda c: {"schedule": minipeft.constant}, TypeError, r"that it returns: constant\(\)"),
    ("inverse_sqrt itself", lambda c: {"schedule": minipeft.inverse_sqrt}, TypeError, r": inverse_sqrt\(d_model\)"),
    ("a maker behind a lambda", lambda c: {"schedule": lambda step: minipeft.linear_decay(9)}, TypeError,
     r"schedule\(1\) is linear_decay\(steps=9, warmup=0\), itself a schedule: pass that, not the function that makes"),
    ("a rate as schedule", lambda c: {"schedule": 0.1}, TypeError, "schedule is 0.1; expected a function of the step"),
    ("a schedule of None", lambda c: {"schedule": lambda step: None}, TypeError, r"schedule\(1\) is None; expected"),
    ("a schedule of texts", lambda c: {"schedule": lambda step: "1"}, TypeError, r"schedule\(1\) is '1'; expected a f"),
    ("a schedule of NaN", lambda c: {"schedule": lambda step: math.nan}, ValueError, "lr is nan; expected a finite"),
    ("a short schedule", lambda c: {"steps": 4, "schedule": minipeft.cosine_decay(3)}, ValueError,
     r"schedule is cosine_decay\(steps=3, warmup=0\), which ends before the 4 steps .*; make it for 4 steps"),
    ("a short linear one", lambda c: {"steps": 4, "schedule": minipeft.linear_decay(3, 1)}, ValueError,
     r"schedule is linear_decay\(steps=3, warmup=1\), which ends before the 4 steps"),
    # ---- evaluation
    ("a score", lambda c: {"evaluate": 0.5}, TypeError, "evaluate is 0.5; expected a function without arguments"),
    ("eval_every alone", lambda c: {"eval_every": 2}, ValueError, "there is nothing to evaluate: pass evaluate="),
    ("patience alone", lambda c: {"patience": 2}, ValueError, "patience is 2, but there is no .*: pass evaluate="),
    ("best alone", lambda c: {"best": c.folder / "b"}, ValueError, "best is .*, but without scores .*: pass evaluate="),
    ("patience without eval_every", lambda c: {"patience": 2, "evaluate": score}, ValueError, "pass eval_every="),
    ("patience of 0", lambda c: {"patience": 0, "evaluate": score, "eval_every": 1}, ValueError, "patience is 0; e"),
    ("patience of 1.5", lambda c: {"patience": 1.5, "evaluate": score, "eval_every": 1}, ValueError, "is 1.5; e"),
    # ---- numbers
    ("steps as a float", lambda c: {"steps": 2.0}, ValueError, "steps is 2.0; expected an integer >= 1"),
    ("steps as a NumPy float", lambda c: {"steps": numpy.float64(2)}, ValueError, r"steps is .*; expected an integer"),
    ("steps as a text", lambda c: {"steps": "2"}, ValueError, "steps is '2'; expected an integer >= 1"),
    ("accumulate as a bool", lambda c: {"accumulate": numpy.bool_(True)}, ValueError, "accumulate is .*; expected an"),
    ("clip as a text", lambda c: {"clip": "1"}, ValueError, "clip is '1'; expected a finite number > 0, or None"),
    ("clip beyond a float", lambda c: {"clip": 10 ** 400}, ValueError, "clip is 10+.*; expected a finite number > 0"),
    # ---- files
    *[(f"{what} {how}", lambda c, what=what, path=path: {"evaluate": score, what: path(c)}, error,
       f"{what} is {message}")
      for what in ("log", "checkpoint", "best") for how, path, error, message in [
          ("into a missing folder", lambda c: c.folder / "no" / "x", ValueError, "'.*x', in a folder that does not ex"),
          ("below ~", lambda c: "~/x", ValueError, r"'~/x', in a folder .*: '~' is not expanded: pass Path\(...\).ex"),
          ("that is a folder", lambda c: c.folder / "folder", ValueError, "'.*folder', a folder; expected the path"),
          ("without a name", lambda c: "", ValueError, "'', not a path; expected the path of a file"),
          ("with a zero byte", lambda c: "a\0b", ValueError, r"'a\\x00b', not a path"),
          ("that is a number", lambda c: 1, TypeError, "1; expected the path of a file"),
          ("that is an open file", lambda c: sys.stderr, TypeError, ".*; expected the path of a file")]],
]


@pytest.mark.parametrize("wrong, error, message", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_cannot_be_right_is_named_with_what_to_do_and_nothing_changes(
        tmp_path: Path, wrong: Callable, error: type, message: str) -> None:
    case = Case(tmp_path)
    settings = wrong(case)
    before, cursor, files = case.bits(), case.batches.state(), sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message) as found:
        case.fit(**settings)
    assert len(str(found.value)) < 1000
    assert case.bits() == before and case.batches.state() == cursor and sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("pairs, size, error, message", [
    ((p for p in []), 1, TypeError, r"pairs is a generator; .*: pass list\(pairs\)"),
    (iter([([1], [1])]), 1, TypeError, "pairs is a list_iterator"), (zip([[1]], [[1]]), 1, TypeError, "pairs is a zip"),
    ({"a": "b"}, 1, TypeError, r"pairs is a dict; .*list\(pairs.items\(\)\)"), ("ab", 1, TypeError, "pairs is a str"),
    (None, 1, TypeError, "pairs is a NoneType"), ([1, 2], 1, TypeError, "pair 0 is 1; expected .source ids, target"),
    ([([1], [1]), ([1], [1], [1])], 1, TypeError, r"pair 1 is .*; expected \(source ids, target ids\)"),
    ([([1], 1)], 1, TypeError, "pair 0 is"), ([([1], [1])], 1.5, ValueError, "in batches of 1.5"),
    ([([1], [1])], "1", ValueError, "in batches of '1'"), ([([1], [1])], True, ValueError, "in batches of True"),
    ([([1], [1])], numpy.float64(1), ValueError, "in batches of")])
def test_what_is_no_list_of_pairs_or_size_of_a_batch_is_refused_at_once(
        pairs: Any, size: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        minipeft.Batches(pairs, size)


@pytest.mark.parametrize("settings, message", [({"seed": 0.5}, "seed 0.5"), ({"seed": -1}, "seed -1"),
                                               ({"pad_token_id": 0.5}, "pad_token_id is 0.5"),
                                               ({"pad_token_id": None}, "pad_token_id is None")])
def test_other_numbers_of_a_stream_are_checked_too(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minipeft.Batches([([1], [1])], 1, **settings)


# ---- one file for two things

@pytest.mark.parametrize("one, other", [("log", "checkpoint"), ("log", "best"), ("checkpoint", "best")])
@pytest.mark.parametrize("how", ["same", "another spelling", "symlink", "hard link", "symlink to nothing"])
def test_log_checkpoint_and_best_are_three_files(tmp_path: Path, one: str, other: str, how: str) -> None:
    case = Case(tmp_path)
    a = b = tmp_path / "a"
    if how == "another spelling":
        b = tmp_path / "folder" / ".." / "a"
    elif how == "symlink to nothing":
        (b := tmp_path / "b").symlink_to(a)
    elif how != "same":
        a.write_text("old")
        b = tmp_path / "b"
        b.symlink_to(a) if how == "symlink" else os.link(a, b)
    for first, second in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=f"({one} and {other}|{other} and {one}) are both .*; expected different"):
            case.fit(evaluate=score, **{one: first, other: str(second)})
    assert not a.exists() or a.read_text() == "old"


# ---- what is taken

def test_an_attachment_trains_like_its_parameters(tmp_path: Path) -> None:
    one, other = Case(tmp_path), Case(tmp_path)
    one.fit()
    other.fit(params=other.lora.parameters)
    assert tiny.bits(one.lora.parameters) == tiny.bits(other.lora.parameters)
    assert tiny.bits(one.lora.parameters) != tiny.bits(one.foreign.parameters)


def test_a_base_below_an_adapter_that_is_off_may_be_trained(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.lora.unplug()
    assert case.fit(params=case.model.base_parameters).step == 2


F32, I64 = numpy.float32, numpy.int64


@pytest.mark.parametrize("settings", [
    {"steps": I64(3)}, {"steps": numpy.uint8(3)}, {"steps": numpy.array(3)}, {"accumulate": I64(2)}, {"seed": I64(7)},
    {"checkpoint_every": numpy.int32(1)}, {"eval_every": I64(1)}, {"patience": I64(1), "eval_every": I64(1)},
    {"clip": F32(0.5)}, {"clip": numpy.float64(0.5)}, {"clip": I64(1)}, {"clip": numpy.array(0.5)},
    {"optimizer": dict(lr=F32(1e-3))}, {"optimizer": dict(lr=numpy.array(1e-3), eps=F32(1e-8), weight_decay=F32(0.25))},
    {"optimizer": dict(betas=(F32(0.5), F32(0.75)))}, {"optimizer": dict(betas=numpy.array([0.5, 0.75]))},
    {"schedule": lambda step: F32(0.5)}, {"schedule": lambda step: numpy.array(0.5)}, {"schedule": lambda step: I64(1)},
    {"schedule": minipeft.linear_decay(I64(5), warmup=I64(1))}, {"schedule": minipeft.cosine_decay(F32(5), I64(1))},
    {"schedule": minipeft.inverse_sqrt(I64(8), I64(4))}, {"dropout": numpy.bool_(False)},
    {"evaluate": lambda: F32(0.5)}, {"evaluate": lambda: numpy.array(0.5)}, {"evaluate": lambda: I64(1)},
    {"evaluate": lambda: numpy.array([0.5])}, {"evaluate": lambda: minipeft.Tensor(numpy.array(0.5))},
    {"evaluate": lambda: True},
    {"batches": minipeft.Batches(tiny.pairs(), I64(4), I64(3), I64(0))},
    {"batches": minipeft.Batches(tiny.pairs(), numpy.array(4))},
    {"batches": minipeft.Batches([(numpy.array(s), numpy.array(t)) for s, t in tiny.pairs()], 4)}])
def test_numpy_scalars_are_numbers_and_files_hold_pythons(tmp_path: Path, settings: dict) -> None:
    """And a run of them resumes."""
    for steps in (1, settings.get("steps", 3)):
        case = Case(tmp_path)
        now = {"evaluate": score, "log": tmp_path / "log", "checkpoint": tmp_path / "run", **settings, "steps": steps}
        now["optimizer"] = minipeft.AdamW(**settings.get("optimizer", {}))
        history = case.fit(**now)
    assert history.step == (2 if "patience" in settings else 3)
    for value in (history.step, history.seconds, *history.losses, *history.best, *history.scores[0]):
        assert type(value) in (int, float)
    for line in (tmp_path / "log").read_text().splitlines():
        assert all(type(value) in (int, float) for value in json.loads(line).values())
    assert not case.lora.parameters["encoder.0.attn.q.weight@lora.B"].data.dtype != "float32"


# ---- schedules that end

def test_a_schedule_that_ends_says_how_long_it_is_and_what_it_is() -> None:
    for make in (minipeft.linear_decay, minipeft.cosine_decay):
        schedule = make(numpy.int64(7), warmup=2)
        assert schedule.steps == 7 and type(schedule.steps) is int
        assert repr(schedule) == f"{make.__name__}(steps=7, warmup=2)" and schedule == make(7, 2) != make(8, 2)
    for schedule in (minipeft.constant(), minipeft.inverse_sqrt(8)):
        assert getattr(schedule, "steps", math.inf) == math.inf


@pytest.mark.parametrize("make", [minipeft.linear_decay, minipeft.cosine_decay])
def test_lengthening_a_run_whose_schedule_ends_explains_what_to_do(tmp_path: Path, make: Any) -> None:
    Case(tmp_path).fit(steps=3, schedule=make(3), checkpoint=tmp_path / "run")
    file = (tmp_path / "run").read_bytes()
    with pytest.raises(ValueError, match="which ends before the 5 steps"):
        Case(tmp_path).fit(steps=5, schedule=make(3), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=f"its 3 steps were made at other rates than {make.__name__}.steps=5, warmup=0."
                       " gives.*finish it with the schedule that it began with, and start a second run on the result "
                       "with a checkpoint of its own; or start afresh with resume=False"):
        Case(tmp_path).fit(steps=5, schedule=make(5), checkpoint=tmp_path / "run")
    assert (tmp_path / "run").read_bytes() == file
    assert Case(tmp_path).fit(steps=5, schedule=make(5), checkpoint=tmp_path / "run", resume=False).step == 5


def test_a_run_without_an_end_in_its_schedule_can_be_lengthened(tmp_path: Path) -> None:
    for steps in (2, 4):
        history = Case(tmp_path).fit(steps=steps, schedule=minipeft.inverse_sqrt(8, 3), checkpoint=tmp_path / "run")
    assert history.step == 4 and len(history.losses) == 2


@pytest.mark.parametrize("what", ["log", "checkpoint", "best"])
def test_a_link_to_itself_is_refused_before_a_step_is_made(tmp_path, what):
    (tmp_path / "loop").symlink_to("loop")
    model = tiny.model()
    params = minipeft.select(model, ".")
    before = tiny.bits(params)
    with pytest.raises(ValueError, match=f"{what} is '.*loop', which cannot be reached: Too many levels"):
        minipeft.fit(model, params, tiny.batches(), steps=1, progress=False, evaluate=lambda: 1.0,
                     **{what: tmp_path / "loop"})
    assert tiny.bits(params) == before
