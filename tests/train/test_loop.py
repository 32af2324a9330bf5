"""`fit` is the loop that one would write by hand; what it logs, what it refuses, and what it never touches."""
import io
import json
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.engine.tensor import op
from minipeft.engine.ops import add, mul
from minipeft.train import loop
from tests.train import tiny
from tests.strict_namespace import strict


def fit(model: Any, steps: int, params: Any = None, batches: Any = None, **settings: Any) -> Any:
    """All parameters on the tiny stream, unless told otherwise."""
    return minipeft.fit(model, tiny.everything(model) if params is None else params, batches or tiny.batches(),
                        steps=steps, **settings)


class Spy(minipeft.AdamW):
    """Remembers what each step was given."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.seen: list[tuple[dict, float, float]] = []

    def step(self, params: Any, grads: Any, lr: Any = None, scale: float = 1.0) -> None:
        self.seen.append((dict(grads), lr, scale))
        super().step(params, grads, lr, scale)

    def gradient(self, at: int) -> dict[str, Any]:
        grads, _, scale = self.seen[at]
        return {name: g * scale for name, g in grads.items()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def length(grads: dict) -> float:
    return math.sqrt(sum(float((g.astype("float64") ** 2).sum()) for g in grads.values()))


# ---- what it computes

def test_a_tiny_model_learns_to_copy() -> None:
    model, pairs = tiny.model(dropout=0.0), tiny.pairs(8)
    history = fit(model, 150, batches=minipeft.Batches(pairs, 8), optimizer=minipeft.AdamW(lr=2e-2),
                  schedule=minipeft.cosine_decay(150, warmup=10))
    batch = minipeft.batch_of(pairs)
    written = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=6)
    assert [row[1:1 + len(t)].tolist() for row, (_, t) in zip(written, pairs)] == [t for _, t in pairs]
    assert history.step == len(history.losses) == 150 and history.seconds > 0
    assert history.losses[0] > math.log(tiny.VOCAB) > 20 * history.losses[-1]  # from worse than a guess


@pytest.mark.parametrize("clip", [None, 1e-2, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_the_loop_one_would_write_by_hand_to_the_bit(dtype: str, clip: float | None) -> None:
    schedule = minipeft.linear_decay(7, warmup=2)
    model, hand = tiny.model(dtype=dtype), tiny.model(dtype=dtype)
    history = fit(model, 5, optimizer=minipeft.AdamW(lr=1e-2), schedule=schedule, clip=clip, seed=3)

    params, stream, rng = tiny.everything(hand), tiny.batches(), numpy.random.default_rng(3)
    optimizer, losses = minipeft.AdamW(), []
    for step in range(1, 6):
        batch = stream.next()
        loss, grads = minipeft.value_and_grad(lambda: hand.loss(**batch, rng=rng), params)
        norm = loop.global_norm(grads)
        if clip is not None and norm > clip:
            grads = {name: g * (clip / norm) for name, g in grads.items()}
        optimizer.step(params, grads, lr=1e-2 * schedule(step))
        losses.append(loss)
    assert history.losses == losses
    assert tiny.bits(tiny.everything(model)) == tiny.bits(params)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 10])
def test_accumulated_micro_batches_are_the_one_big_batch(size: int) -> None:
    """Law 13, with a short last micro-batch: the same gradient within 1e-12 of its scale, the same mean loss. Lengths
    differ, so weighing by rows, or equally, would show in the third digit."""
    seen = []
    for split, micro in ((size, -(-10 // size)), (10, 1)):
        spy = Spy()
        history = fit(tiny.model(dtype="float64"), 1, batches=tiny.batches(size=split), accumulate=micro,
                      optimizer=spy, dropout=False, clip=None)
        seen.append((spy.gradient(0), history.losses[0]))
    (parts, loss), (whole, wanted) = seen
    largest = max(abs(g).max() for g in whole.values())
    assert abs(loss - wanted) <= 1e-12 * wanted
    assert max(abs(parts[name] - whole[name]).max() for name in whole) <= 1e-12 * largest


@pytest.mark.parametrize("accumulate, limit", [(1, 1.8), (3, 1.25)])  # norms lie between 1.3 and 2.6, 1.15 and 1.36
def test_clipping_scales_all_gradients_by_one_number_to_the_limit_and_only_above_it(
        tmp_path: Path, accumulate: int, limit: float) -> None:
    spy, log = Spy(), tmp_path / "log.jsonl"
    fit(tiny.model(dtype="float64"), 12, optimizer=spy, clip=limit, accumulate=accumulate, log=log)
    clipped = 0
    for at, line in enumerate(lines(log)):
        weight = line["tokens"] if accumulate > 1 else 1  # the optimizer is handed the sum, and the scale
        raw, found = length(spy.seen[at][0]) / weight, length(spy.gradient(at))
        assert line["grad_norm"] == pytest.approx(raw, rel=1e-12)  # the norm before clipping
        assert found == pytest.approx(min(raw, limit), rel=1e-12)  # a sum of 1,000 squares, in another order
        if raw <= limit:
            assert spy.seen[at][2] == 1 / weight
        clipped += raw > limit
    assert 0 < clipped < 12


def test_the_norm_counts_every_array() -> None:
    assert loop.global_norm({"a": numpy.array([[3.0]]), "b": numpy.float64(4.0), "c": numpy.zeros((0, 2))}) == 5


@pytest.mark.parametrize("dtype, sizes", [("float32", [8e-26, 1e-40, 1e-45, 3e-20, 1e20, 3e38, 1.0, 1e-15]),
                                          ("float64", [1e-200, 5e-324, 1e-160, 1e200, 1e308, 1.0])])
def test_the_norm_is_right_where_squares_have_no_room(dtype: str, sizes: list[float]) -> None:
    """Against the norm of the same numbers, scaled by a power of two, in the longest floats there are."""
    rng = numpy.random.default_rng(0)
    for size in sizes:
        with numpy.errstate(under="ignore"):
            grads = {"a": (rng.uniform(0.1, 1, (3, 4)) * size).astype(dtype), "b": numpy.array(-size, dtype),
                     "none": numpy.zeros((0, 2), dtype), "tiny": numpy.zeros(5, dtype)}
        wide = numpy.concatenate([g.ravel() for g in grads.values()]).astype(numpy.longdouble)
        scale = numpy.longdouble(2.0) ** -math.frexp(size)[1]
        wanted = numpy.sqrt(((wide * scale) ** 2).sum()) / scale
        close = pytest.approx(float(wanted), rel=1e-6 if dtype == "float32" else 1e-15, abs=0)
        assert loop.global_norm(grads) == close, size


def test_the_bits_of_an_ordinary_norm_are_those_of_the_plain_sum_even_where_one_array_underflows() -> None:
    rng = numpy.random.default_rng(0)
    grads = {"a": rng.normal(size=(30, 4)).astype("float32"), "b": numpy.full(5, 1e-30, "float32")}
    assert loop.global_norm(grads) == math.hypot(*(math.sqrt((g * g).sum()) for g in grads.values()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_norm_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    for other in (1.0, 1e-30, 1e30):
        assert not math.isfinite(loop.global_norm({"a": numpy.array([bad, other], "float32"),
                                                   "b": numpy.array([other], "float32")}))


@pytest.mark.parametrize("factor", [1e-26, 1e20])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_logged_norm_of_tiny_and_of_huge_gradients_is_right(tmp_path: Path, factor: float, accumulate: int) -> None:
    """The loss is multiplied by a number, so the gradient is, too."""
    norms = []
    for scale in (1.0, factor):
        model = tiny.model(dropout=0.0)
        plain = model.loss
        model.loss = lambda **batch: mul(plain(**batch), scale)  # type: ignore[method-assign]
        fit(model, 1, log=tmp_path / "log", accumulate=accumulate)
        norms.append(lines(tmp_path / "log")[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0] * factor, rel=1e-4, abs=0) and norms[0] > 0.1


def test_gradients_whose_squares_overflow_stop_the_run_unless_they_are_clipped() -> None:
    for clip in (None, 1e25, 1.0):
        model, optimizer = tiny.model(dropout=0.0), minipeft.AdamW()
        plain = model.loss
        model.loss = lambda **batch: mul(plain(**batch), 1e25)  # type: ignore[method-assign]
        if clip == 1.0:
            fit(model, 1, clip=clip, optimizer=optimizer)
            assert all(numpy.isfinite(v).all() for v in optimizer.v.values())
            continue
        with pytest.raises(FloatingPointError, match="the gradient's norm, squared, is inf, in step 1"):
            fit(model, 1, clip=clip, optimizer=optimizer)
        assert not optimizer.steps and tiny.bits(tiny.everything(model)) == tiny.bits(tiny.everything(tiny.model()))


def test_without_accumulation_the_gradients_are_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to clip them: the optimizer is handed the arrays that value_and_grad returned."""
    returned = []

    def watched(*arguments: Any) -> Any:
        returned.append(minipeft.value_and_grad(*arguments))
        return returned[-1]

    monkeypatch.setattr(loop, "value_and_grad", watched)
    spy = Spy()
    fit(tiny.model(), 2, optimizer=spy, clip=1e-3)
    for (_, grads), (seen, _, scale) in zip(returned, spy.seen, strict=True):
        assert scale < 1 and all(seen[name] is g for name, g in grads.items())


class Shared:
    """A model whose two parameters get one and the same gradient array."""

    def __init__(self) -> None:
        self.a, self.b = minipeft.Parameter(numpy.array([1.0])), minipeft.Parameter(numpy.array([2.0]))

    def loss(self, labels: Any, rng: Any = None, **_: Any) -> Any:
        return mul(add(self.a, self.b), float((labels != -100).sum()))


def test_gradients_that_share_an_array_are_accumulated_apart() -> None:
    """Targets of 3 to 6 tokens, one pair at a time: sum n^2 / sum n, for both."""
    model, spy = Shared(), Spy()
    fit(model, 1, params={"a": model.a, "b": model.b}, batches=tiny.batches(size=1), accumulate=10, optimizer=spy,
        clip=None)
    n = [len(target) for _, target in tiny.pairs()]
    wanted = pytest.approx(sum(k * k for k in n) / sum(n), rel=1e-15)
    assert spy.gradient(0)["a"] == wanted and spy.gradient(0)["b"] == wanted


def test_what_is_not_selected_keeps_every_bit() -> None:
    model = tiny.model()
    attachment = minipeft.attach(model, minipeft.LoRA(2, dropout=0.1), numpy.random.default_rng(0))
    base, adapter = tiny.bits(model.base_parameters), tiny.bits(attachment.parameters)
    optimizer = minipeft.AdamW(lr=1e-2)
    fit(model, 4, params=attachment.parameters, optimizer=optimizer)
    assert tiny.bits(model.base_parameters) == base
    after = tiny.bits(attachment.parameters)["params"]
    assert all(after[name] != before for name, before in adapter["params"].items())
    assert set(optimizer.m) == set(attachment.parameters)

    some = minipeft.select(model, r"norm\.weight$")
    rest = {name: p for name, p in tiny.everything(model).items() if name not in some}
    before = tiny.bits(rest)
    fit(model, 2, params=some)
    assert tiny.bits(rest) == before


def test_dropout_is_drawn_from_the_seed_and_can_be_turned_off() -> None:
    def trained(rate: float = 0.1, **settings: Any) -> Any:
        model = tiny.model(dropout=rate)
        fit(model, 2, **settings)
        return tiny.bits(tiny.everything(model))

    assert trained(seed=1) == trained(seed=1) != trained(seed=2)
    assert trained(dropout=False) == trained(dropout=False, seed=2) == trained(rate=0.0) != trained(seed=1)


def test_the_default_optimizer_and_schedule_are_adamw_at_a_constant_rate(tmp_path: Path) -> None:
    fit(tiny.model(), 3, log=tmp_path / "log")
    assert [line["lr"] for line in lines(tmp_path / "log")] == [minipeft.AdamW().lr] * 3


# ---- what it tells

def test_the_log_has_a_line_per_step_and_per_evaluation(tmp_path: Path) -> None:
    scores, spy = iter([0.25, 0.75, 0.75]), Spy(lr=0.5)
    history = fit(tiny.model(), 5, optimizer=spy, schedule=minipeft.linear_decay(5), accumulate=2, eval_every=2,
                  evaluate=lambda: next(scores), log=tmp_path / "log.jsonl")
    log = lines(tmp_path / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert [line for line in log if "score" in line] == [{"step": 2, "score": 0.25}, {"step": 4, "score": 0.75},
                                                         {"step": 5, "score": 0.75}]
    steps = [line for line in log if "loss" in line]
    assert [line["loss"] for line in steps] == history.losses
    assert [line["lr"] for line in steps] == [lr for _, lr, _ in spy.seen] == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert all(line["grad_norm"] > 0 for line in steps)
    tokens, stream = [], tiny.batches()
    for _ in range(5):
        tokens.append(sum(int((stream.next()["labels"] != -100).sum()) for _ in range(2)))
    assert [line["tokens"] for line in steps] == tokens
    assert history.scores == [(2, 0.25), (4, 0.75), (5, 0.75)] and history.best == (4, 0.75)


def test_an_evaluation_is_made_after_the_last_step_whatever_the_interval() -> None:
    for settings in ({}, {"eval_every": 100}, {"eval_every": 3}):
        model = tiny.model()
        seen: list[Any] = []
        history = fit(model, 3, evaluate=lambda: len(seen.append(tiny.bits(tiny.everything(model))) or seen),
                      **settings)
        assert history.scores == [(3, 1.0)] and seen == [tiny.bits(tiny.everything(model))]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_stops_with_a_clear_error(tmp_path: Path, score: float) -> None:
    with pytest.raises(ValueError, match=rf"evaluate\(\) returned {score} after step 2"):
        fit(tiny.model(), 4, evaluate=lambda: score, eval_every=2, log=tmp_path / "log")
    assert [line["step"] for line in lines(tmp_path / "log")] == [1, 2]


class Terminal:
    """sys.stderr as a pseudo-terminal, read while it is written to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        master, slave = os.openpty()
        self._file, self.shown = os.fdopen(slave, "w"), io.BytesIO()
        self._thread = threading.Thread(target=self._read, args=(master,))
        self._thread.start()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "stderr", self._file)

    def _read(self, master: int) -> None:
        try:
            while data := os.read(master, 4096):
                self.shown.write(data)
        except OSError:  # how Linux tells that the other side was closed
            pass
        os.close(master)

    def close(self) -> str:
        self._file.close()
        self._thread.join()
        return self.shown.getvalue().decode()


def test_a_terminal_sees_the_label_the_steps_the_loss_and_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    try:
        history = fit(tiny.model(), 6, evaluate=lambda: 0.625, label="copying")
    finally:
        shown = terminal.close()
    for text in ("copying", "6/6", f"loss {history.losses[-1]:.4f}", "score 0.6250"):
        assert text in shown, shown


def test_a_terminal_sees_nothing_if_progress_is_off_or_rich_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    try:
        fit(tiny.model(), 1, progress=False)
        monkeypatch.setitem(sys.modules, "rich.progress", None)
        fit(tiny.model(), 1)
    finally:
        assert terminal.close() == ""


def test_nothing_is_printed_where_nobody_watches(capfd: pytest.CaptureFixture) -> None:
    fit(tiny.model(), 2, evaluate=lambda: 1.0)
    assert capfd.readouterr() == ("", "")


# ---- what it refuses

@pytest.mark.parametrize("wrong, message", [
    ({"steps": 0}, "steps is 0; expected an integer >= 1"), ({"steps": 2.0}, "steps is 2.0"),
    ({"accumulate": 0}, "accumulate is 0"), ({"accumulate": True}, "accumulate is True"),
    ({"checkpoint_every": 0}, "checkpoint_every is 0"), ({"eval_every": 0}, "eval_every is 0"),
    ({"eval_every": 2}, "nothing to evaluate"),
    ({"seed": -1}, "seed is -1; expected an integer >= 0"), ({"clip": 0}, "clip is 0; expected a finite number > 0"),
    ({"clip": -1.0}, "clip is -1.0"), ({"clip": math.nan}, "clip is nan"), ({"clip": math.inf}, "clip is inf"),
    ({"params": {}}, "nothing is selected"),
    ({"optimizer": minipeft.AdamW(decay="nothing"), "checkpoint": None}, "'nothing' matches none"),
    ({"checkpoint": "no/such/folder/c"}, "checkpoint is 'no/such/folder/c', in a folder that does not exist"),
    ({"log": "no/such/folder/l"}, "log is 'no/such/folder/l', in a folder that does not exist")])
def test_arguments_out_of_range_are_named_before_anything_changes(tmp_path: Path, wrong: dict, message: str) -> None:
    model = tiny.model()
    (tmp_path / "log").write_text("an old log\n")
    settings: dict[str, Any] = {"steps": 2, "batches": tiny.batches(), "log": tmp_path / "log",
                                "checkpoint": tmp_path / "c", "optimizer": minipeft.AdamW(), **wrong}
    before = tiny.bits(tiny.everything(model))
    with pytest.raises(ValueError, match=message):
        fit(model, **settings)
    assert tiny.bits(tiny.everything(model)) == before and not settings["optimizer"].steps
    assert settings["batches"].state() == tiny.batches().state()
    assert tiny.files(tmp_path) == {"log": b"an old log\n"}


@pytest.mark.parametrize("factor", [math.nan, -1.0, math.inf])
def test_a_schedule_that_gives_no_rate_stops_before_the_step(factor: float) -> None:
    model, optimizer = tiny.model(), minipeft.AdamW()
    before = tiny.bits(tiny.everything(model), optimizer)
    with pytest.raises(ValueError, match="lr is .*; expected a finite number >= 0"):
        fit(model, 2, optimizer=optimizer, schedule=lambda step: factor)
    assert tiny.bits(tiny.everything(model), optimizer) == before


NOTHING = ([5, 6], [-100, -100])  # a pair without a label token


def test_a_pair_without_label_tokens_contributes_nothing_in_a_batch_or_alone(tmp_path: Path) -> None:
    """Three batches of one are one batch of three, wherever the pair stands; also as the first and the last."""
    ordinary, seen = tiny.pairs(2), []
    for at in (0, 1, 2):
        pairs = [*ordinary[:at], NOTHING, *ordinary[at:]]
        for size, accumulate in ((1, 3), (3, 1)):
            spy = Spy(lr=0.0, weight_decay=0.0)
            model = tiny.model(dtype="float64", dropout=0.0)
            calls: list[Any] = []
            plain = model.loss
            model.loss = lambda **batch: calls.append(batch) or plain(**batch)  # type: ignore[func-returns-value]
            history = fit(model, 1, batches=minipeft.Batches(pairs, size), accumulate=accumulate, optimizer=spy,
                          clip=None, log=tmp_path / "log")
            assert len(calls) == (2 if size == 1 else 1)  # no forward for nothing
            seen.append((history.losses[0], lines(tmp_path / "log")[0]["tokens"], spy.gradient(0)))
    loss, tokens, grads = seen[0]
    assert tokens == sum(len(target) for _, target in ordinary)
    for other, count, others in seen:
        assert count == tokens and other == pytest.approx(loss, rel=1e-12)
        assert all(abs(others[name] - g).max() <= 1e-12 * max(1, abs(g).max()) for name, g in grads.items())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_without_any_label_token_is_refused_before_anything_changes(tmp_path: Path, accumulate: int) -> None:
    order = numpy.random.default_rng([0, 0]).permutation(6)
    pairs = [([5], [6]) if list(order).index(i) < 3 else NOTHING for i in range(6)]
    model, optimizer, stream = tiny.model(), minipeft.AdamW(), minipeft.Batches(pairs, 1)
    with pytest.raises(ValueError, match=r"step (2|4) has no label tokens: .*'position': (5|3)") as found:
        fit(model, 6, batches=stream, optimizer=optimizer, accumulate=accumulate, checkpoint=tmp_path / "c")
    done = 3 // accumulate
    assert set(optimizer.steps.values()) == {done} and found.value.history.step == done
    twin, other = tiny.model(), minipeft.AdamW()
    fit(twin, done, batches=minipeft.Batches(pairs, 1), optimizer=other, accumulate=accumulate)
    assert tiny.bits(tiny.everything(model), optimizer) == tiny.bits(tiny.everything(twin), other)


class Breaks:
    """A tiny model's loss, through an operation that spoils its value or its gradient at one call."""

    def __init__(self, at: int, value: float = 1.0, gradient: float = 1.0):
        model = tiny.model()
        self.params, self.state, self.calls = tiny.everything(model), model.state, 0
        good = model.loss

        def loss(**batch: Any) -> Any:
            self.calls += 1
            return spoiled(good(**batch)) if self.calls == at else good(**batch)

        @op
        def spoiled(x: Any) -> Any:
            return x * value, (lambda g: g * gradient,)

        self.loss = loss


BAD = [{"value": math.nan}, {"value": math.inf}, {"gradient": math.nan}, {"gradient": math.inf}, {"gradient": 1e39}]


@pytest.mark.parametrize("accumulate, checkpoint_every", [(1, 1), (3, 1), (3, 2), (1, 100)])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_it_is_used_and_the_last_checkpoint_is_good(
        tmp_path: Path, accumulate: int, checkpoint_every: int, bad: dict) -> None:
    """The eighth micro-batch is spoiled: in the middle of the third step where three are accumulated. What was made
    before it is saved. The run then goes on, without the spoiling, to the bits of a run that never broke."""
    settings: dict[str, Any] = {"accumulate": accumulate, "checkpoint_every": checkpoint_every}
    broken, optimizer = Breaks(at=8, **bad), minipeft.AdamW()
    states: list[Any] = []
    step = optimizer.step

    def watched(*arguments: Any) -> None:
        step(*arguments)
        states.append(tiny.bits(broken.params, optimizer))

    optimizer.step = watched  # type: ignore[method-assign]
    with numpy.errstate(all="ignore"), pytest.raises(FloatingPointError, match="is nan|is inf|NaN or infinity"):
        fit(broken, 12 // accumulate, params=broken.params, optimizer=optimizer, checkpoint=tmp_path / "c", **settings)
    assert len(states) == 7 // accumulate and tiny.bits(broken.params, optimizer) == states[-1]

    healed, whole = Breaks(at=0), Breaks(at=0)
    fit(healed, 12 // accumulate, params=healed.params, checkpoint=tmp_path / "c", **settings)
    fit(whole, 12 // accumulate, params=whole.params, **settings)
    assert tiny.bits(healed.params) == tiny.bits(whole.params)
    assert healed.calls == 12 - 7


def test_nan_in_the_weights_stops_before_anything_is_trained(tmp_path: Path) -> None:
    model, optimizer = tiny.model(), minipeft.AdamW()
    model.base_parameters["encoder.0.ff.wi.weight"].data[0, 0] = numpy.nan
    before = tiny.bits(tiny.everything(model))
    with pytest.raises(FloatingPointError, match="the loss of the batch at .* is nan, in step 1: .*NaN in the weights"):
        fit(model, 3, optimizer=optimizer, checkpoint=tmp_path / "c")
    assert tiny.bits(tiny.everything(model)) == before and not optimizer.steps and not (tmp_path / "c").exists()


def test_parameters_that_a_step_made_infinite_do_not_reach_the_checkpoint(tmp_path: Path) -> None:
    model = tiny.model()
    rates = {1: 1e-3, 2: 1e-3, 3: 1e39}
    with numpy.errstate(all="ignore"), pytest.raises(FloatingPointError, match="param/.* holds NaN or infinity"):
        fit(model, 5, schedule=lambda step: rates[step] / 1e-3, checkpoint=tmp_path / "c", checkpoint_every=1)
    again = tiny.model()
    history = fit(again, 5, schedule=lambda step: rates.get(step, 1e-3) / 1e-3 if step < 3 else 1.0,
                  checkpoint=tmp_path / "c")
    assert history.step == 5 and len(history.losses) == 3  # it went on from step 2


def test_ids_that_are_nan_or_out_of_range_stop_before_anything_is_trained() -> None:
    for source, message in (([math.nan], "row 0 holds float64"), ([tiny.VOCAB], "input_ids")):
        model, optimizer = tiny.model(), minipeft.AdamW()
        with pytest.raises(ValueError, match=message):
            fit(model, 1, batches=minipeft.Batches([(source, [3])], 1), optimizer=optimizer)
        assert tiny.bits(tiny.everything(model)) == tiny.bits(tiny.everything(tiny.model())) and not optimizer.steps


# ---- elsewhere

def test_on_another_backend_a_stopped_and_resumed_run_has_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """Moments are made where the parameters are, a checkpoint holds host arrays, and what is read moves back."""
    finished = []
    with minipeft.use(strict):
        for stops in ((4,), (3, 4)):
            for steps in stops:
                model, optimizer = tiny.model().to(strict), minipeft.AdamW()
                fit(model, steps, optimizer=optimizer, accumulate=2, checkpoint_every=5, clip=0.5,
                    checkpoint=tmp_path / str(stops))
                assert all(isinstance(m, strict.ndarray) for m in (*optimizer.m.values(), *optimizer.v.values()))
            model.to("numpy")
            finished.append(tiny.bits(tiny.everything(model), optimizer.to("numpy")))
    assert finished[0] == finished[1] != tiny.bits(tiny.everything(tiny.model()))
