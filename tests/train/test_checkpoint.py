"""A checkpoint gives back every bit; a damaged or foreign one is refused before anything changes."""
import json
from pathlib import Path
from typing import Any, Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.files import read_tensors, write_tensors
from minipeft.train import checkpoint as checkpoints
from minipeft.train.saved import checked
from minipeft.train.state import State
from tests.train import hostile, tiny

LORA = dict(rank=2, alpha=4, dropout=0.1)


class Run:
    """A training run in a folder. Without a change, any two of them are the same run."""

    def __init__(self, folder: Path, *, dtype: str = "float32", base: int = 0, dropout_rate: float = 0.1,
                 lora: dict | None = None, below: int | None = None, where: str = ".*", batches: Any = None,
                 optimizer: dict = {}, **settings: Any):
        self.path = folder / "run.safetensors"
        self.model = tiny.model(base, dtype, dropout_rate)
        if below is not None:  # an adapter that stays frozen, of which `below` is the seed
            attachment = minipeft.attach(self.model, minipeft.LoRA(2), numpy.random.default_rng(below), "below")
            for p in attachment.parameters.values():
                p.data += 0.5
        if lora is not None:
            where = "@lora"
            minipeft.attach(self.model, minipeft.LoRA(**lora), numpy.random.default_rng(0))
        self.params = minipeft.select(self.model, where)
        self.optimizer = minipeft.AdamW(**optimizer)
        self.batches = tiny.batches() if batches is None else batches
        self.settings: dict[str, Any] = {"accumulate": 2, "checkpoint": self.path, "checkpoint_every": 5,
                                         "log": folder / "log.jsonl", **settings}

    def fit(self, steps: int = 4) -> Any:
        return minipeft.fit(self.model, self.params, self.batches, steps=steps, optimizer=self.optimizer,
                            **self.settings)

    def killed(self) -> "Run":
        """Trained until the sixth micro-batch: the checkpoint is one of 2 steps and half a third."""
        calls, next_batch = iter(range(5)), self.batches.next

        def stopping() -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return next_batch()

        self.batches.next = stopping
        with pytest.raises(KeyboardInterrupt):
            self.fit()
        return self

    def bits(self) -> Any:
        return tiny.bits(self.params, self.optimizer), self.batches.state(), tiny.files(self.path.parent)

    def refused(self, message: str, steps: int = 4) -> None:
        """fit raises ValueError, and neither parameters, moments, cursor nor any file has changed."""
        before = self.bits()
        with pytest.raises(ValueError, match=message):
            self.fit(steps)
        assert self.bits() == before


# ---- what was written is read

numbers = st.floats(allow_nan=False, allow_infinity=False)


def any_finite(rng: numpy.random.Generator, shape: tuple, dtype: str) -> numpy.ndarray:
    """Any bits that are a finite number; -0 for the others."""
    size = numpy.dtype(dtype).itemsize
    array = numpy.frombuffer(rng.bytes(size * int(numpy.prod(shape))), dtype).reshape(shape)
    return numpy.where(numpy.isfinite(array), array, -numpy.zeros_like(array))


@given(seed=st.integers(0, 2 ** 32 - 1), dtype=st.sampled_from(["float32", "float64"]), state=st.dictionaries(
    st.text(), numbers | st.integers() | st.none() | st.lists(numbers)))
def test_arrays_and_numbers_come_back_to_the_bit(tmp_path_factory: Any, seed: int, dtype: str, state: dict) -> None:
    rng = numpy.random.default_rng(seed)
    shapes = [(2, 3), (), (0, 4), (5,)]
    arrays = {group: {f"{group}.{i}/x": any_finite(rng, shape, dtype) for i, shape in enumerate(shapes)}
              for group in checkpoints.GROUPS}
    arrays["m"]["turned"] = numpy.asarray(rng.normal(size=(3, 2)), dtype=dtype).T
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    checkpoints.write(path, arrays, state, {"seed": seed})
    found = checkpoints.read(path)
    assert found.state == state and found.run == {"seed": seed} and str(found.state) == str(state)
    for group, members in arrays.items():
        assert set(found.arrays[group]) == set(members)
        for name, array in members.items():
            back = found.arrays[group][name]
            assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_a_restored_run_has_the_parameters_moments_random_state_cursor_and_sums_of_the_killed_one(
        tmp_path: Path, dtype: str, lora: dict | None) -> None:
    killed, other = Run(tmp_path, dtype=dtype, lora=lora).killed(), Run(tmp_path, dtype=dtype, lora=lora)
    saved = checkpoints.read(killed.path)
    state = State(other.params, other.optimizer, other.batches, numpy.random.default_rng(0))
    arrays = {name: p.data for name, p in other.params.items()}
    state.restore(checked(saved, saved.run["start"], state.params, state.optimizer, state.batches, state.rng, 2))
    assert tiny.bits(other.params, other.optimizer) == tiny.bits(killed.params, killed.optimizer)
    assert all(other.params[name].data is array for name, array in arrays.items())
    assert other.batches.state() == killed.batches.state() != tiny.batches().state()
    record = state.record
    assert set(record.partial) == set(killed.params) and record.tokens > 0 and record.loss_sum > 0
    assert (record.micro, record.step) == (5, 2)
    assert saved.state["log"] == len((tmp_path / "log.jsonl").read_bytes()) > 0 and saved.state["seconds"] > 0
    assert state.counters() == saved.state and state.rng.bit_generator.state == saved.state["rng"]


def test_moments_of_parameters_that_are_not_trained_here_stay_with_the_optimizer(tmp_path: Path) -> None:
    Run(tmp_path).killed()
    run = Run(tmp_path)
    stray = minipeft.Parameter(numpy.ones(3))
    run.optimizer.step({"stray": stray}, {"stray": numpy.ones(3)})
    run.fit()
    assert run.optimizer.steps["stray"] == 1 and set(run.optimizer.m) == {*run.params, "stray"}
    assert "m/stray" not in read_tensors(run.path)[0]


def test_a_checkpoint_never_holds_nan_and_the_one_before_stays(tmp_path: Path) -> None:
    path, good = tmp_path / "c.safetensors", {"param": {"w": numpy.ones(2)}}
    checkpoints.write(path, good, {}, {})
    before = path.read_bytes()
    for bad in (numpy.nan, numpy.inf):
        with pytest.raises(FloatingPointError, match="v/w holds NaN or infinity"):
            checkpoints.write(path, {**good, "v": {"w": numpy.array([1.0, bad])}}, {}, {})
    assert path.read_bytes() == before


# ---- what is damaged is refused

def test_a_checkpoint_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    Run(tmp_path).killed()
    run = Run(tmp_path)
    whole = run.path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in sorted({*range(0, 40), *range(header - 3, header + 3), *range(0, len(whole), len(whole) // 60),
                          len(whole) - 1}):
        run.path.write_bytes(whole[:length])
        run.refused("run.safetensors")
    run.path.write_bytes(whole + b"\0")
    run.refused("run.safetensors")
    run.path.write_bytes(whole)
    assert run.fit().step == 4


def rewrite(path: Path, change: Callable[[dict, dict], Any]) -> None:
    """Write the file again after change(tensors, metadata)."""
    tensors, metadata = read_tensors(path)
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)


@pytest.mark.parametrize("change", [
    lambda state: state.update(step=3), lambda state: state.pop("step"), lambda state: state.update(step="two"),
    lambda state: state.pop("rng"), lambda state: state["rng"]["state"].update(state=1), lambda state: state.clear(),
    lambda state: state.update(tokens=-1), lambda state: state["batches"].update(position=4),
    lambda state: state.update(log=10 ** 9), lambda state: state.update(scores=None),
    lambda state: state["steps"].popitem()])
def test_altered_counters_are_refused(tmp_path: Path, change: Callable) -> None:
    def alter(_: dict, metadata: dict) -> None:
        state = json.loads(metadata["state"])
        change(state)
        metadata["state"] = json.dumps(state)

    Run(tmp_path).killed()
    rewrite(tmp_path / "run.safetensors", alter)
    Run(tmp_path).refused("sha256 does not match")


@pytest.mark.parametrize("key", ["state", "run", "sha256"])
@pytest.mark.parametrize("text", [None, "", "[]", "{", "null"])
def test_metadata_that_is_missing_or_not_what_it_was_is_refused(tmp_path: Path, key: str, text: str | None) -> None:
    Run(tmp_path).killed()
    rewrite(tmp_path / "run.safetensors",
            lambda _, metadata: metadata.pop(key) if text is None else metadata.update({key: text}))
    Run(tmp_path).refused("sha256 does not match")


NAME = "embedding.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(f"param/{NAME}"), f"param/{NAME} is missing"), (lambda t: t.pop(f"m/{NAME}"), "m/.* is missing"),
    (lambda t: t.pop(f"partial/{NAME}"), f"partial/{NAME} is missing"),
    (lambda t: t.update({"v/stray": t[f"v/{NAME}"]}), "v/stray is not a selected parameter"),
    (lambda t: t.update({"stray": t[f"v/{NAME}"]}), "'stray' is not a tensor of a checkpoint"),
    (lambda t: t.update({f"v/{NAME}": t[f"v/{NAME}"][1:]}), r"v/.* is float32 \[11, 8\]; expected float32 \[12, 8\]"),
    (lambda t: t.update({f"param/{NAME}": t[f"param/{NAME}"].astype("float64")}), "is float64 .*; expected float32")])
def test_tensors_that_are_not_those_of_the_parameters_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    Run(tmp_path).killed()
    rewrite(tmp_path / "run.safetensors", lambda tensors, _: change(tensors))
    Run(tmp_path).refused(message)


def test_an_adapter_file_or_a_model_in_its_place_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, lora=LORA)
    run.model.attachments["lora"].save(run.path)
    run.refused("not a checkpoint of minipeft .*'minipeft-adapter'")
    run.model.save_pretrained(tmp_path, merged=False)
    (tmp_path / "model.safetensors").replace(run.path)
    run.refused("not a checkpoint of minipeft .*'minipeft'")


def test_a_checkpoint_of_version_1_is_refused_in_one_sentence(tmp_path: Path) -> None:
    Run(tmp_path).killed()
    rewrite(tmp_path / "run.safetensors", lambda _, metadata: metadata.update(format="minipeft-checkpoint-1"))
    Run(tmp_path).refused(r"run.safetensors is a checkpoint of an earlier version of minipeft .*resume=False")


# ---- what was altered by somebody who can compute digests

def test_altered_and_signed_checkpoints_are_refused_with_nothing_changed_or_make_a_run(tmp_path: Path) -> None:
    """(`python -m tests.train.hostile` tries more.)"""
    ends, wrong = hostile.attack(tmp_path, 150, seed=1)
    assert not wrong, "\n".join(wrong)
    assert ends["refused"] > 100


def resigned(folder: Path, change: Callable[[dict, dict, dict], Any]) -> "hostile.Victim":
    """A stopped run whose checkpoint was rewritten after change(state, run, tensors), and signed again."""
    path = hostile.Victim(folder).stopped().path
    tensors, metadata = read_tensors(path)
    state, run = json.loads(metadata["state"]), json.loads(metadata["run"])
    change(state, run, tensors)
    hostile.signed(path, tensors, {"state": json.dumps(state), "run": json.dumps(run)})
    return hostile.Victim(folder)


@pytest.mark.parametrize("change, message", [
    (lambda s, r, t: None, None), (lambda s, r, t: s.update(seconds=5), None),
    (lambda s, r, t: s.update(step=10 ** 18, micro=2 * 10 ** 18 + 1), "step is 10{18}; expected"),
    (lambda s, r, t: s.update(step=3, micro=7), "batches is .*; expected the cursor after 7 micro-batches"),
    (lambda s, r, t: s.update(micro=6), "micro is 6; expected the count after 2 steps of 2 micro-batches each"),
    (lambda s, r, t: s.update(micro=5.0), "micro is 5.0; expected an integer >= 0"),
    (lambda s, r, t: s.update(tokens=True), "tokens is True; expected an integer >= 0"),
    (lambda s, r, t: s.update(tokens=0), "loss_sum is .*; expected 0"),
    (lambda s, r, t: s.update(tokens=0, loss_sum=0), "partial/.* is not a selected parameter"),
    (lambda s, r, t: s.update(loss_sum="1"), "loss_sum is '1'; expected a finite number"),
    (lambda s, r, t: s.update(seconds=-1), "seconds is -1; expected a number >= 0"),
    (lambda s, r, t: s.update(seconds=10 ** 400), "seconds is 10+.*; expected a finite number"),
    (lambda s, r, t: s.update(due=True), "due is True; expected false, except right after a step"),
    (lambda s, r, t: s.update(due=0), "due is 0; expected true or false"),
    (lambda s, r, t: s["scores"].append([3, 0.1]), "scores is .*; expected a list of .* to at most 2"),
    (lambda s, r, t: s["scores"].reverse(), "scores is .*; expected a list of .* rising"),
    (lambda s, r, t: s.update(best=[2, 0.5]), r"best is \[2, 0.5\]; expected the first of the .*, \(1, 0.5\)"),
    (lambda s, r, t: s.update(best=None), "best is None; expected the first"),
    (lambda s, r, t: s.update(log=-1), "log is -1; expected an integer >= 0"),
    (lambda s, r, t: s.update(log=s["log"] - 1), "log.jsonl: no line of the log ends at byte"),
    (lambda s, r, t: s.update(log=10 ** 12), "log.jsonl: the log has"),
    (lambda s, r, t: s["batches"].update(epoch=10 ** 15), "batches is .*; expected the cursor after 5"),
    (lambda s, r, t: s["batches"].update(position=1), "the cursor .* is never reached by 10 pairs"),
    (lambda s, r, t: s["batches"].update(more=1), "the cursor .* is never reached by 10 pairs"),
    (lambda s, r, t: s.update(batches=None), "the cursor None is never reached by 10 pairs"),
    (lambda s, r, t: s.update(rng=None), "rng is None; expected a state of PCG64"),
    (lambda s, r, t: s["rng"].update(bit_generator="MT19937"), "rng is .*; expected a state of PCG64"),
    (lambda s, r, t: s["rng"].update(has_uint32=7), "rng is .*; expected a state of PCG64"),
    (lambda s, r, t: s["rng"]["state"].update(inc=2), "rng is .*; expected a state of PCG64 that the run's seed"),
    (lambda s, r, t: s["rng"]["state"].update(state=2 ** 128), "rng is .*; expected a state of PCG64"),
    (lambda s, r, t: s["rng"]["state"].update(state=1.0), "rng is .*; expected a state of PCG64"),
    (lambda s, r, t: s["steps"].popitem(), "steps is .*; expected the count of every parameter, 2 more"),
    (lambda s, r, t: s["steps"].update(dict.fromkeys(s["steps"], 0)), "steps is .*; expected the count of every"),
    (lambda s, r, t: s["steps"].update(dict.fromkeys(s["steps"], 10 ** 15)), "steps is .*; expected the count"),
    (lambda s, r, t: s.pop("log"), "state lacks 'log'"), (lambda s, r, t: s.update(x=1), "unknown entry 'x'"),
    (lambda s, r, t: r.pop("start"), "the checkpoint's run lacks 'start'"),
    (lambda s, r, t: r.update(start=5), "start is 5; expected a fingerprint"),
    (lambda s, r, t: r["start"].update(steps={"x": 1}), "steps is .*; expected the count of every"),
    (lambda s, r, t: r["start"].update(batches={"epoch": 0, "position": 4}), "batches is .*; expected the cursor"),
    (lambda s, r, t: r["start"].update(parameters=["x"]), "start is .*; expected a fingerprint"),
    (lambda s, r, t: r.update(seed=True), "belongs to another run|seed"),
    (lambda s, r, t: r.update({"y" * 3000: "z" * 3000}), "belongs to another run: y+.* exists only there"),
    (lambda s, r, t: t.update({key: a * numpy.float32("nan") for key, a in t.items() if key.startswith("m/")}),
     "m/.* holds NaN or infinity"),
    (lambda s, r, t: t.update({key: a + numpy.float32("inf") for key, a in t.items() if key.startswith("param/")}),
     "param/.* holds NaN or infinity"),
    (lambda s, r, t: t.update({key: a - 1 for key, a in t.items() if key.startswith("v/")}),
     "v/.* holds -.*; expected a mean of squares"),
    (lambda s, r, t: t.update({"w" * 5000 + "/x": numpy.ones(1)}), "is not a tensor of a checkpoint")])
def test_each_number_is_checked_although_the_digest_fits(tmp_path: Path, change: Any, message: str | None) -> None:
    run = resigned(tmp_path, change)
    if message is None:
        assert run.fit().step == 4
        return
    before = run.bits()
    with pytest.raises(ValueError, match=message) as found:
        run.fit()
    assert run.bits() == before and len(str(found.value)) < 1000
    assert "run.safetensors" in str(found.value) or "log.jsonl" in str(found.value)


# ---- what belongs to another run is refused

def other_data() -> minipeft.Batches:
    pairs = tiny.pairs()
    pairs[9] = (pairs[9][0], [4, *pairs[9][1][1:]])
    return minipeft.Batches(pairs, tiny.BATCH)


@pytest.mark.parametrize("change, message", [
    ({"seed": 1}, "seed is 0 there and 1 here"), ({"clip": 0.5}, "clip is 1.0 there and 0.5 here"),
    ({"clip": None}, "clip is 1.0 there and None here"), ({"accumulate": 3}, "accumulate is 2 there and 3 here"),
    ({"dropout": False}, "dropout is True there and False here"),
    ({"log": None}, "log is 'kept' there and 'not kept' here"),
    ({"batches": other_data()}, "batches / sha256 is"), ({"batches": tiny.batches(9)}, "batches / pairs is 10 there"),
    ({"batches": tiny.batches(size=5)}, "batches / batch_size is 4 there and 5 here"),
    ({"batches": tiny.batches(seed=3)}, "batches / seed is 0 there and 3 here"),
    ({"optimizer": {"lr": 2e-3}}, "optimizer / lr is 0.001 there and 0.002 here"),
    ({"optimizer": {"betas": (0.9, 0.99)}}, "optimizer / betas is"),
    ({"optimizer": {"weight_decay": 0.1}}, "optimizer / weight_decay is 0.01 there and 0.1 here"),
    ({"optimizer": {"decay": r"weight$"}}, r"params / .*bias / decayed is True there and False here"),
    ({"schedule": minipeft.linear_decay(5)}, "schedule, summed over the steps made is 2.0 there and 1.8 here"),
    ({"dtype": "float64"}, "params / .* / dtype is 'float32' there and 'float64' here"),
    ({"dropout_rate": 0.2}, "config / dropout_rate is 0.1 there and 0.2 here"),
    ({"where": "encoder"}, "frozen weights is")])
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path: Path, change: dict, message: str) -> None:
    Run(tmp_path).killed()
    Run(tmp_path, **change).refused(f"belongs to another run: {message}.*resume=False")


@pytest.mark.parametrize("change, message", [
    ({"base": 1}, "frozen weights is"), ({"below": 8}, "frozen weights is"), ({"below": None}, "attachments / below"),
    ({"lora": {**LORA, "alpha": 8}}, "attachments / lora / alpha is 4 there and 8 here"),
    ({"lora": {**LORA, "dropout": 0.2}}, "attachments / lora / dropout is 0.1 there and 0.2 here"),
    ({"lora": {**LORA, "rank": 3}}, "attachments / lora / rank is 2 there and 3 here"),
    ({"lora": {**LORA, "where": r"\.q\.weight$"}}, "params / .*v.weight@lora.A exists only there")])
def test_a_checkpoint_over_another_base_or_method_is_refused_with_the_difference(
        tmp_path: Path, change: dict, message: str) -> None:
    Run(tmp_path, lora=LORA, below=7).killed()
    Run(tmp_path, **{"lora": LORA, "below": 7, **change}).refused(f"belongs to another run: {message}")


def two_adapters(order: str, folder: Path, steps: int, first: str = "ab") -> Any:
    """Two prompts, plugged in this order and trained together; the parameters after so many steps."""
    model = tiny.model()
    attachments = {name: minipeft.attach(model, minipeft.PromptTuning(2), numpy.random.default_rng(ord(name)), name)
                   for name in order}
    params = {name: p for letter in first for name, p in attachments[letter].parameters.items()}
    minipeft.fit(model, params, tiny.batches(), steps=steps, checkpoint=folder / "run.safetensors")
    return tiny.bits(params)


def test_a_checkpoint_of_another_order_of_plugging_is_refused(tmp_path: Path) -> None:
    """The parameters are the same in both, and so is everything else."""
    (tmp_path / "whole").mkdir()
    whole = two_adapters("ab", tmp_path / "whole", 4)
    two_adapters("ab", tmp_path, 2)
    with pytest.raises(ValueError, match="belongs to another run: attachments are 'a, b' there and 'b, a' here"):
        two_adapters("ba", tmp_path, 4)
    assert two_adapters("ab", tmp_path, 4) == whole


class Started:
    """Full fine-tuning of a base of some seed, under one checkpoint path."""

    def __init__(self, folder: Path, seed: int = 0):
        self.model, self.path = tiny.model(seed), folder / "run.safetensors"
        self.params = tiny.everything(self.model)

    def fit(self, steps: int, **settings: Any) -> Any:
        return minipeft.fit(self.model, self.params, tiny.batches(), steps=steps, checkpoint=self.path, **settings)


def test_a_checkpoint_of_another_start_is_refused_and_that_of_this_start_or_of_these_parameters_is_not(
        tmp_path: Path) -> None:
    first = Started(tmp_path)
    first.fit(2)
    other = Started(tmp_path, seed=1)
    before, file = tiny.bits(other.params), (tmp_path / "run.safetensors").read_bytes()
    with pytest.raises(ValueError, match="run.safetensors belongs to another run, of another start: .*resume=False"):
        other.fit(3)
    assert tiny.bits(other.params) == before and (tmp_path / "run.safetensors").read_bytes() == file
    assert len(first.fit(3).losses) == 1              # the checkpoint's parameters
    again = Started(tmp_path)
    assert len(again.fit(4).losses) == 1              # the start's parameters
    assert len(Started(tmp_path).fit(5).losses) == 1  # also after a resumed run wrote the checkpoint
    name = next(iter(first.params))
    first.params[name].data.flat[0] = -first.params[name].data.flat[0]
    with pytest.raises(ValueError, match="of another start"):
        first.fit(5)
    assert other.fit(1, resume=False).step == 1 and other.fit(2).step == 2
    with pytest.raises(ValueError, match="of another start"):
        Started(tmp_path).fit(5)


def test_a_run_may_begin_with_a_used_optimizer_and_in_the_middle_of_the_data_and_resumes_all_the_same(
        tmp_path: Path) -> None:
    def run(folder: Path, steps: list[int]) -> Any:
        model, optimizer, stream = tiny.model(), minipeft.AdamW(1e-2), tiny.batches()
        params = tiny.everything(model)
        minipeft.fit(model, params, stream, steps=2, optimizer=optimizer)
        stream.next()
        for n in steps:
            minipeft.fit(model, params, stream, steps=n, optimizer=optimizer, checkpoint=folder / "run")
        return tiny.bits(params, optimizer), stream.state()

    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", [4])
    assert run(tmp_path, [1, 3, 4]) == whole and set(whole[0]["steps"].values()) == {6}


def test_the_same_run_described_twice_is_accepted_whatever_is_watched(tmp_path: Path) -> None:
    Run(tmp_path, lora=LORA, below=7).killed()
    assert Run(tmp_path, lora=LORA, below=7, checkpoint_every=3, evaluate=lambda: 0.0, label="x").fit().step == 4


def test_fewer_steps_than_the_checkpoint_has_made_are_refused(tmp_path: Path) -> None:
    Run(tmp_path).killed()
    Run(tmp_path).refused("is at step 2, past the 1 steps asked for", steps=1)


@pytest.mark.parametrize("cut", [0, 10, None])
def test_a_log_shorter_than_its_checkpoint_says_is_refused(tmp_path: Path, cut: int | None) -> None:
    Run(tmp_path).killed()
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.unlink() if cut is None else log.write_bytes(whole[:cut])
    Run(tmp_path).refused(f"the log {'is missing' if cut is None else f'has {cut} bytes'}, but the checkpoint was "
                          f"written when it had {len(whole)}")
