"""Laws of a table after other calls, or beside another table: another batch, a step, a merge, a file."""
from __future__ import annotations

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_embedding.equations import unmerge_bound, values, values_after
from minipeft.conformance.methods.lora_embedding.laws import Seen, gradients_of, out
from minipeft.conformance.methods.lora_embedding.laws_of_ties import logits
from minipeft.conformance.methods.lora_linear.laws import refusal
from minipeft.conformance.methods.lora_linear.laws_of_moves import second, untrained
from minipeft.conformance.methods.lora_linear.steps import rate_of, sizes_after
from minipeft.conformance.observe import Observation, fact, near, raised, same

LAWS = Laws()
law = LAWS.law


@law("L2f", "V: gradients are taken at the given ids, not at those of the last forward", "vjp", "forward",
     where=lambda case: len(case["E"]) > 1)
def at_what_is_given(case: Case, make: Make) -> Seen:
    table, ref = make(case), values(case)
    out(table, case, len(case["E"]) - 1 - case["ids"])
    found = gradients_of(table, case)
    for leaf in "AB":
        yield near(case, f"d{leaf} after the forward of another batch", found[leaf], ref[f"d{leaf}"])


@law("L4u", "M: unmerging without a merge is refused or changes nothing", "unmerge", "weight", "forward")
def never_merged(case: Case, make: Make) -> Seen:
    table = make(case)
    y = out(table, case)
    yield from refusal("unmerge() of what is not merged", table.unmerge)
    yield same("E after that", table.array("weight", case["E"].shape), case["E"])
    yield same("y after that", out(table, case), y)


@law("L5s", "M: after merge, a step and unmerge, E is as before, unless a step while merged is refused", "merge",
     "step", "unmerge", "weight")
def unmerged_after_a_step(case: Case, make: Make) -> Seen:
    """The bound has room for two updates: an implementation may put the new one into E at once, and so adds and
    subtracts both, the old and the new."""
    table, ref = make(case), values(case)
    table.merge()
    yield from refusal("a step while merged", lambda: table.step(case["ids"], case["g"], rate_of(ref)))
    table.unmerge()
    bound = unmerge_bound(case) + unmerge_bound(case, **sizes_after(case, ref))
    yield Observation("E after merge, step and unmerge", "B", table.array("weight", case["E"].shape), case["E"], bound)


@law("L7v", "V: a step takes lr dA off A and lr dB off B, both at the old A and B; y, the head and the merged E follow",
     "step", "forward")
def follows_a_step(case: Case, make: Make) -> Seen:
    table, ref, bounded = make(case), values_after(case), case.but(exact=False)
    out(table, case)                                          # what it may keep of this is stale after the step
    table.step(case["ids"], case["g"], rate_of(values(case)))
    yield near(bounded, "y after a step", out(table, case), ref["y"])
    if table.offers("head"):
        yield near(bounded, "logits after a step", logits(table, case), ref["logits"])
    if table.offers("merge", "weight"):
        table.merge()
        yield near(bounded, "E merged after a step", table.array("weight", case["E"].shape), ref["E_merged"])


@law("L11z", "M: with alpha = 0 nothing is added, or it is refused", "forward")
def no_scale(case: Case, make: Make) -> Seen:
    zero, seen = case.but(params={"alpha": 0.0}), []
    no = refusal("alpha = 0", lambda: seen.append(out(make(zero), zero)))
    yield from no or [near(case, "y with alpha = 0", seen[0], values(zero)["y"])]


@law("L13", "M: saved and loaded, it is the same, bit for bit", "save", "load", "forward")
def round_trip(case: Case, make: Make) -> Seen:
    table, ref = make(case), values(case)
    y = out(table, case)
    fresh = make(untrained(case))
    out(fresh, case)                                          # what it may keep of this is stale after the load
    fresh.load(table.save())
    yield same("y after save and load", out(fresh, case), y)
    if fresh.offers("head"):
        yield near(case, "logits after save and load", logits(fresh, case), ref["logits"])
    if fresh.offers("vjp"):
        found = gradients_of(fresh, case)
        for leaf in "AB":
            yield near(case, f"d{leaf} after save and load", found[leaf], ref[f"d{leaf}"])
    if table.offers("state_keys"):
        yield fact("the base in the saved state", sorted({"E", "weight"} & set(table.state_keys())), [])


@law("L13r", "M: a file of another rank is loaded with that rank, or refused", "save", "load", "forward")
def other_rank(case: Case, make: Make) -> Seen:
    other = second(case)
    blob, table = make(other).save(), make(case)
    y = out(table, case)
    no = refusal("load() of a file of another rank", lambda: table.load(blob))
    yield from no or [near(case, "y after the load", out(table, case), values(other)["y"])]
    if no:
        yield same("y after the refusal", out(table, case), y)


@law("L13x", "S: a saved adapter for another vocabulary is refused", "save", "load",
     where=lambda case: len(case["E"]) > 1 and len(case["E"]) - 1 >= len(case["A"]))
def wrong_file(case: Case, make: Make) -> Seen:
    blob = make(case).save()
    small = case.but({"E": case["E"][:-1], "A": case["A"][:, :-1], "ids": 0 * case["ids"]},
                     {"alpha": 2 * case.params["alpha"]})
    table = make(small)
    y = out(table, small)
    yield raised("load() of an adapter for a larger vocabulary", lambda: table.load(blob))
    yield same("y after the refusal", out(table, small), y)


@law("L15", "M: two tables do not affect each other", "forward")
def two_tables(case: Case, make: Make) -> Seen:
    first, ref = make(case), values(case)
    y = out(first, case)
    other = second(case).but({"E": -case["E"]})
    out(make(other), other)
    yield same("y of the first, after another was made and used", out(first, case), y)
    if first.offers("vjp"):
        found = gradients_of(first, case)
        for leaf in "AB":
            yield near(case, f"d{leaf} of the first", found[leaf], ref[f"d{leaf}"])
