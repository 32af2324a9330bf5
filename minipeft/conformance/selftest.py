"""The test of the kit itself: correct implementations pass, and every planted bug (mutant) is found.

    clean    the plain NumPy implementation (float64, float32, bfloat16) and minipeft itself (float64, float32) fail
             nothing, on vectors and drawn cases; without this, finding a bug would mean nothing
    killed   every mutant fails one and the same property for each of 5 seeds, or a vector, or accepts invalid input;
             in bfloat16 it may be below the resolution if it states why, and then it must really go unnoticed
    useful   every property finds at least one mutant
"""
from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import multiprocessing
import os
import time
import types
import warnings
from typing import Any, Iterator, Sequence

import numpy

from minipeft.conformance import live
from minipeft.conformance.case import Case
from minipeft.conformance.hold import check
from minipeft.conformance.fault import Fault, Skip
from minipeft.conformance.look import fails, look
from minipeft.conformance.method import Method, Mutant, Property
from minipeft.conformance.methods import all_methods
from minipeft.conformance.observe import Observation
from minipeft.conformance.outputs import REFUSALS, refusal_property
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.vectors.read import read
from minipeft.conformance.vectors.run import run

DTYPES = ("float64", "float32", "bfloat16")
SEEDS, CASES = 5, 6


@dataclasses.dataclass
class Verdict:
    """The outcome for one method in one dtype. killers: {planted bug: ids of the properties that find it}. wrong:
    sentences on everything that went wrong. seconds: the time it took."""

    method: str
    dtype: str
    killers: dict[str, list[str]]
    wrong: list[str]
    seconds: float


def self_test(methods: Sequence[str] | None = None, dtypes: Sequence[str] | None = None) -> int:
    """Run the self-test: print a line per method and dtype, and everything that is wrong.

    methods, dtypes: names to which it is restricted; None takes all. Returns 0 if nothing is wrong, 1 otherwise. Raises
    ValueError if no known method or dtype is left, and if Hypothesis is missing: half of the test would not run."""
    if not live.available():
        raise ValueError(f"--self-test: {live.MISSING}")
    chosen = [name for name in all_methods() if methods is None or name in methods]
    wanted = [dtype for dtype in DTYPES if dtypes is None or dtype in dtypes]
    if not chosen or not wanted:
        raise ValueError(f"--method {methods} --dtype {dtypes}: expected some of {', '.join(all_methods())} and of "
                         f"{', '.join(DTYPES)}")
    begun, verdicts = time.monotonic(), []
    for verdict in _held([(name, dtype) for name in chosen for dtype in wanted]):
        verdicts.append(verdict)
        most = sum("V" in by for by in verdict.killers.values()), sum(by != ["V"] for by in verdict.killers.values())
        print(f"{verdict.method:<20}{verdict.dtype:<10}{sum(map(bool, verdict.killers.values())):>3} of "
              f"{len(verdict.killers):>3} planted bugs found ({most[0]} by vectors, {most[1]} by properties), "
              f"{len(verdict.wrong)} wrong, {verdict.seconds:.0f} s", flush=True)
    wrong = [f"{v.method} {v.dtype}: {sentence}" for v in verdicts for sentence in v.wrong]
    wrong += [sentence for name in chosen for sentence in _useless(name, [v for v in verdicts if v.method == name])]
    print(*(f"WRONG  {sentence}" for sentence in wrong), sep="\n", end="\n" if wrong else "")
    print(f"{'self-test failed' if wrong else 'self-test passed'}, {time.monotonic() - begun:.0f} s")
    return bool(wrong)


def _held(pairs: list[tuple[str, str]]) -> Iterator[Verdict]:
    """`held` for every pair, on all cores."""
    workers = min(len(pairs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers < 2:
        yield from (held(*pair) for pair in pairs)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(held, *zip(*pairs))


def held(name: str, dtype: str) -> Verdict:
    """The Verdict on the method `name` in this dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an infinite alpha times zero, bugs that overflow
        return _held_quietly(name, dtype)


def _held_quietly(name: str, dtype: str) -> Verdict:
    begun, method = time.monotonic(), all_methods()[name]
    wrong = [f"the plain implementation fails {sentence}" for sentence in _unclean(method, method.plain, dtype)]
    if dtype in ("float64", "float32"):
        ours = importlib.import_module(f"minipeft.conformance.methods.{name}.ours")
        wrong += [f"minipeft itself fails {s}" for s in _unclean(method, getattr(ours, name), dtype,
                                                                 getattr(ours, "CONVENTIONS", {}))]
    killers = {mutant.id: killers_of(method, mutant, dtype) for mutant in method.mutants}
    for mutant in method.mutants:
        if not killers[mutant.id] and dtype not in mutant.below:
            wrong.append(f"{mutant.id} is not found")
        if killers[mutant.id] and dtype in mutant.below:
            wrong.append(f"{mutant.id} is declared to be below the resolution ({mutant.below[dtype]}), but is found")
    return Verdict(name, dtype, killers, wrong, time.monotonic() - begun)


def plugin_of(method: Method, build: Any, dtype: str, conventions: Any = None) -> Plugin:
    """The factory `build` of a method as a plug-in for one dtype. conventions: those that it declares."""
    declared = {"name": getattr(build, "__name__", "plug-in"), "dtypes": [dtype],
                "conventions": {method.name: conventions or {}}}
    return Plugin(types.SimpleNamespace(**{"capabilities": declared, method.name: build}))


def _unclean(method: Method, build: Any, dtype: str, conventions: Any = None) -> Iterator[str]:
    plugin = plugin_of(method, build, dtype, conventions)
    report = check(plugin.module, [method.name], cases=12, folder=None)
    yield from report.troubles
    for result in report.failures:
        yield f"{result.id}: {result.failure} ({result.minimal})"
    if report.exit_code == 3:
        yield "everything: nothing ran"


def killers_of(method: Method, mutant: Mutant, dtype: str) -> list[str]:
    """The ids of the properties that the mutant fails for every seed; before them "V" if the vectors find it, and
    REFUSALS if it accepts invalid input."""
    plugin = plugin_of(method, mutant.build, dtype)
    found: list[Property] = list(method.properties)
    for seed in range(SEEDS):
        cases = [plugin.settle(case, method) for case in _drawn(method.name, dtype, seed)]
        found = [prop for prop in found if any(
            _found(plugin, method, prop, case) for case in [c for c in cases if prop.applies(c)][:prop.examples])]
    by_vectors = any(isinstance(seen.what, Fault) or isinstance(seen.what, Observation) and not seen.what.holds
                     for seen in run(method, read(method.name).vectors, plugin))
    refusal = refusal_property(method)
    unrefused = any(fails(look(refusal, plugin.settle(r.case, method), plugin, plugin.make(method))[0])
                    for r in method.refusals(dtype))
    return [*(["V"] if by_vectors else []), *([REFUSALS] if unrefused else []), *(prop.id for prop in found)]


def _found(plugin: Plugin, method: Method, prop: Property, case: Case) -> bool:
    """Whether the property fails on the case."""
    make = plugin.make(method)
    try:
        if not make(case).offers(*prop.needs):
            return False
    except (Fault, Skip):
        pass  # the property will report it
    try:
        return fails(look(prop, case, plugin, make)[0])
    except Skip:
        return False


@functools.cache
def _drawn(name: str, dtype: str, seed: int) -> list[Case]:
    return drawn(all_methods()[name], dtype, seed)


def drawn(method: Method, dtype: str, seed: int) -> list[Case]:
    """The CASES cases of one seed: bounded and exact in turn, every third with all sizes equal."""
    cases = []
    for i in range(CASES):
        rng = numpy.random.default_rng([seed, i])
        sizes = {axis: int(rng.integers(low, high + 1)) for axis, (low, high) in method.sizes.items()}
        if i % 3 == 0:
            low, high = max(a for a, _ in method.sizes.values()), min(b for _, b in method.sizes.values())
            sizes = dict.fromkeys(sizes, int(rng.integers(low, max(low, high) + 1)))
        cases.append(method.draw(rng, dtype, bool(i % 2), sizes))
    return cases


def _useless(name: str, verdicts: list[Verdict]) -> Iterator[str]:
    """A sentence for each property that finds no mutant in any dtype that was run."""
    useful = {id for v in verdicts for by in v.killers.values() for id in by}
    for prop in all_methods()[name].properties:
        if prop.id not in useful:
            yield f"{name}: {prop.id} ({prop.title}) finds no planted bug"
