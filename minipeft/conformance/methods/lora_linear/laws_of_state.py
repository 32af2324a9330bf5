"""Laws of a LoRA layer after other calls, or beside another layer: another batch, a step, a merge."""
from __future__ import annotations

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_linear.equations import unmerge_bound, values
from minipeft.conformance.methods.lora_linear.laws import Seen, gradients_of, out, refusal
from minipeft.conformance.methods.lora_linear.laws_of_moves import second
from minipeft.conformance.methods.lora_linear.steps import rate_of, sizes_after, values_after
from minipeft.conformance.observe import Observation, near, same

LAWS = Laws()
law = LAWS.law


@law("L2f", "V: gradients are taken at the given x, not at the x of the last forward", "vjp", "forward")
def at_what_is_given(case: Case, make: Make) -> Seen:
    layer, ref = make(case), values(case)
    out(layer, case, -case["x"])
    found = gradients_of(layer, case)
    for leaf in "ABx":
        yield near(case, f"d{leaf} after the forward of another batch", found[leaf], ref[f"d{leaf}"])


@law("L4u", "M: unmerging without a merge is refused or changes nothing", "unmerge", "weight", "forward")
def never_merged(case: Case, make: Make) -> Seen:
    layer = make(case)
    y = out(layer, case)
    yield from refusal("unmerge() of what is not merged", layer.unmerge)
    yield same("W after that", layer.array("weight", case["W"].shape), case["W"])
    yield same("y after that", out(layer, case), y)


@law("L5s", "M: after merge, a step and unmerge, W is as before, unless a step while merged is refused", "merge",
     "step", "unmerge", "weight")
def unmerged_after_a_step(case: Case, make: Make) -> Seen:
    """The bound has room for two updates: an implementation may put the new one into W at once, and so adds and
    subtracts both, the old and the new."""
    layer, ref = make(case), values(case)
    layer.merge()
    yield from refusal("a step while merged", lambda: layer.step(case["x"], case["g"], rate_of(ref)))
    layer.unmerge()
    bound = unmerge_bound(case) + unmerge_bound(case, **sizes_after(case, ref))
    yield Observation("W after merge, step and unmerge", "B", layer.array("weight", case["W"].shape), case["W"], bound)


@law("L7v", "V: a step takes lr dA off A and lr dB off B, both at the old A and B; y and the merged W follow", "step",
     "forward")
def follows_a_step(case: Case, make: Make) -> Seen:
    layer, ref, bounded = make(case), values_after(case), case.but(exact=False)
    out(layer, case)                                          # what it may keep of this is stale after the step
    layer.step(case["x"], case["g"], rate_of(values(case)))
    yield near(bounded, "y after a step", out(layer, case), ref["y"])
    if layer.offers("merge", "weight"):
        layer.merge()
        yield near(bounded, "W merged after a step", layer.array("weight", case["W"].shape), ref["W_merged"])


@law("L11z", "M: with alpha = 0 nothing is added, or it is refused", "forward")
def no_scale(case: Case, make: Make) -> Seen:
    zero, seen = case.but(params={"alpha": 0.0}), []
    no = refusal("alpha = 0", lambda: seen.append(out(make(zero), zero)))
    yield from no or [near(case, "y with alpha = 0", seen[0], values(zero)["y"])]


@law("L15", "M: two layers do not affect each other", "forward")
def two_layers(case: Case, make: Make) -> Seen:
    first, ref = make(case), values(case)
    y = out(first, case)
    other = second(case).but({"W": -case["W"], "b": -case["b"]})
    out(make(other), other)
    yield same("y of the first, after another was made and used", out(first, case), y)
    if first.offers("vjp"):
        found = gradients_of(first, case)
        for leaf in "ABx":
            yield near(case, f"d{leaf} of the first", found[leaf], ref[f"d{leaf}"])
