"""Plug-ins that are broken in ways that once took the report with them, or blamed somebody else."""
import time
import types

import numpy
import pytest

from minipeft.conformance import check
from minipeft.conformance.fault import Fault
from minipeft.conformance.methods.lora_linear.plain import LoraLinear
from tests.conformance.plugins import module

FEW = {"cases": 6, "methods": ["lora_linear"], "folder": None}


def failed(report, id):
    return next(r for r in report.failures if r.id == id)


def inside(build, **fields):
    """A report on a class, run in this process."""
    fields = {**FEW, "dtypes": ["float64"], **fields}
    dtypes = fields["dtypes"]
    return check(types.SimpleNamespace(capabilities={"dtypes": dtypes}, lora_linear=build), **fields)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_what_is_not_implemented_is_a_skip_wherever_it_is_called(dtype):
    """Also by the survey of half-precision merges, and while a bug is looked for."""
    class NoMerge(LoraLinear):
        def merge(self):
            raise NotImplementedError("merging")

        def scale(self, A, alpha):
            return alpha

    class Small(NoMerge):
        def __init__(self, W, *args, **kwargs):
            if W.shape[1] > 6:
                raise NotImplementedError("large layers")
            super().__init__(W, *args, **kwargs)

    for build in (NoMerge, Small):
        report = inside(build, dtypes=[dtype])
        assert report.troubles == [] and "s = alpha, not alpha / r" in failed(report, "L1").diagnosis


def test_an_attribute_that_raises_is_a_failure_of_what_calls_it(tmp_path, monkeypatch):
    change = "Layer.merge = property(lambda self: 1 / 0)\n"
    report = check(module(tmp_path, monkeypatch, "raising", change), **FEW)
    assert "lora_linear.merge: ZeroDivisionError" in failed(report, "L3").failure
    assert {"L1", "L2"} <= {r.id for r in report.results if r.status == "pass"}


def test_a_factory_that_forgets_to_return_is_told_so():
    report = inside(lambda W, b, A, B, alpha, dtype, *, dropout=0.0: None)
    assert report.exit_code == 1
    assert "lora_linear() returned None; expected an object with forward()" in failed(report, "L1").failure
    assert str(report).count("FAILED") == 1  # one mistake, however many properties see it


def test_a_call_that_does_not_fit_looks_like_no_bug():
    class Arity(LoraLinear):
        def step(self, x):
            """Without g and lr."""

    report = inside(Arity)
    assert "TypeError" in failed(report, "L7s").failure and "looks like" not in failed(report, "L7s").diagnosis


def test_errors_are_alike_in_one_call_whatever_type_a_library_gives_them_but_for_slips():
    numpys, torchs, slip, elsewhere = (Fault("raises", f"lora_linear.{text}: shapes") for text in (
        "merge: ValueError", "merge: RuntimeError", "merge: TypeError", "step: ValueError"))
    assert numpys.like(torchs) and not numpys.like(slip) and not slip.like(slip) and not numpys.like(elsewhere)
    shape = Fault("wrong shape", "lora_linear.forward returned [3]; expected [2]")
    assert shape.gist == "wrong shape: lora_linear.forward"
    assert numpys.gist == "raises: lora_linear.merge: ValueError"


def test_a_gradient_that_leaks_is_told_from_one_of_zeros():
    class Leaks(LoraLinear):
        def vjp(self, x, g):
            return {**super().vjp(x, g), "W": g.T @ x}

    class Zeros(LoraLinear):
        def vjp(self, x, g):
            return {**super().vjp(x, g), "W": 0 * self.W}

    leaks, zeros = (failed(inside(build), "L7") for build in (Leaks, Zeros))
    assert "['W']" in leaks.failure and "a frozen array has a gradient" in leaks.diagnosis
    assert "['W (zeros)']" in zeros.failure and "gradients of zeros" in zeros.diagnosis


@pytest.mark.parametrize("what, words", [
    (lambda y: y * numpy.nan, "not finite"), (lambda y: y[:1, :1], "wrong shape"), (lambda y: None, "wrong type")])
def test_where_sane_data_give_no_answer_refusals_are_not_asked_for_and_one_mistake_is_one_block(what, words):
    class Broken(LoraLinear):
        def forward(self, x):
            return what(super().forward(x))

    report = inside(Broken)
    (refusals,) = {r.status for r in report.results if r.id == "X1"}
    assert refusals == "skip" and f"even valid input gives no usable result: {words}: lora_linear.forward" in "".join(
        r.reason for r in report.results if r.id == "X1")
    assert sum(line.startswith("FAILED") and words in line for line in str(report).splitlines()) == 1


def test_a_plug_in_that_is_slow_in_every_call_is_not_taken_for_dead(tmp_path, monkeypatch):
    """A hundred cycles of merging take longer than anybody waits for one call: each of them is heard of."""
    change = """
        slept = []
        def merge(self):
            self.times = getattr(self, "times", 0) + 1
            if self.times > 20 and len(slept) < 80:
                slept.append(time.sleep(0.05))
            self.merged = True
        def unmerge(self):
            self.merged = False
        Layer.merge, Layer.unmerge = merge, unmerge
        """
    from minipeft.conformance import worker
    monkeypatch.setattr(worker, "_PATIENCE", 2)
    report = check(module(tmp_path, monkeypatch, "slow", change), limit=1.0, vectors=False, **FEW)
    assert report.exit_code == 0, str(report)
    assert any(r.id == "L5c" and r.status == "pass" for r in report.results)


def test_a_call_that_hangs_outside_of_python_is_named_and_not_made_again(tmp_path, monkeypatch):
    change = "def forward(self, x):\n    return sum(range(10 ** 15))\nLayer.forward = forward\n"
    from minipeft.conformance import worker
    monkeypatch.setattr(worker, "_PATIENCE", 2)
    begun = time.monotonic()
    report = check(module(tmp_path, monkeypatch, "stuck", change), limit=1.0, **FEW)
    assert time.monotonic() - begun < 60
    first = failed(report, "V y")
    assert "was silent for 3 s and was ended, in lora_linear.forward" in first.failure
    assert "of the vectors" in first.title
    assert "was not called again" in failed(report, "L1").failure
    assert any(r.id == "L7" and r.status == "pass" for r in report.results)


def test_a_process_that_ends_itself_says_how_and_an_interruption_by_the_plug_in_is_an_error(tmp_path, monkeypatch):
    change = "def vjp(self, x, g):\n    os._exit(7)\nLayer.vjp = vjp\n"
    ends = check(module(tmp_path, monkeypatch, "ends", change), **FEW)
    assert "status 7, in lora_linear.vjp" in failed(ends, "L2").failure
    for what in ("KeyboardInterrupt", "MemoryError"):
        change = f"def vjp(self, x, g):\n    raise {what}()\nLayer.vjp = vjp\n"
        report = check(module(tmp_path, monkeypatch, f"ends_by_{what}", change), **FEW)
        assert f"raises: lora_linear.vjp: {what}" in failed(report, "L2").failure


def test_a_mistake_of_the_kit_in_looking_into_failures_is_said_and_takes_nothing_with_it(monkeypatch):
    from minipeft.conformance import stages

    class Wrong(LoraLinear):
        def scale(self, A, alpha):
            return 2 * alpha

    def broken(*_):
        raise RuntimeError("of the kit")

    monkeypatch.setattr(stages, "explained", broken)
    report = inside(Wrong)
    assert failed(report, "L1").rho > 10 and "TROUBLE" in str(report) and "RuntimeError: of the kit" in str(report)


def test_a_machine_that_stood_still_is_not_a_call_that_hangs():
    """The clock jumps: one alarm is heard, however much time has passed."""
    import os
    import signal

    from minipeft.conformance.guard import time_limit
    with time_limit(100.0):
        for _ in range(9):
            os.kill(os.getpid(), signal.SIGALRM)
    with pytest.raises(BaseException, match="^$"), time_limit(100.0):
        for _ in range(10):
            os.kill(os.getpid(), signal.SIGALRM)


def test_an_answer_of_no_use_names_the_call_that_gave_it():
    class Nothing(LoraLinear):
        def trainable(self):
            """Forgets to return."""

    assert "an unusable result: lora_linear.trainable: TypeError" in failed(inside(Nothing), "L7t").failure


def test_one_last_digit_can_be_read():
    class Off(LoraLinear):
        def forward(self, x):
            return numpy.nextafter(super().forward(x), 99)

    text = failed(inside(Off), "V y").failure.split(", must be")[0]
    got, want = (part.split()[-1] for part in text.split(", expected"))
    assert float(got) != float(want)
