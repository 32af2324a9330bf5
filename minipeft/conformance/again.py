"""Runs a saved failure once more."""
from __future__ import annotations

from minipeft.conformance.aftermath import Failed
from minipeft.conformance.case import Case
from minipeft.conformance.fault import Fault, Skip
from minipeft.conformance.look import fails, look
from minipeft.conformance.method import Method, Property
from minipeft.conformance.methods import all_methods
from minipeft.conformance.outputs import property_named
from minipeft.conformance.plugin import Plugin, load
from minipeft.conformance.replay import read


def again(impl: str, path: str, limit: float) -> int:
    """Run the property of a saved failure on its case, and print the outcome.

    impl: dotted name of the plug-in. path: the .safetensors file of the failure. limit: seconds for one call. Returns 0
    if the property holds now, 1 if not, 3 if it cannot be tested on this implementation. Raises ValueError for a file
    that is damaged or was not written by the kit, and if the plug-in cannot be imported."""
    id, case = read(path)
    method, plugin = all_methods()[case.method], load(impl, limit)
    prop = property_named(method, id)
    case = plugin.settle(case, method)
    print(f"{case.method} {prop.id}, {case.dtype}: {prop.title}")
    try:
        _ask(plugin, method, prop, case)
        seen, made = look(prop, case, plugin, plugin.make(method))
    except Skip as reason:
        print(f"  skipped: {reason}")
        return 3
    if not fails(seen):
        print(f"  holds now; rho {max((o.rho for o in seen), default=0):.3g}")  # type: ignore[union-attr]
        return 0
    print(f"  {Failed(prop, case, seen, made).words}")
    return 1


def _ask(plugin: Plugin, method: Method, prop: Property, case: Case) -> None:
    """Raises Skip where a run would not test this property on the implementation."""
    if not plugin.offers(method):
        raise Skip(f"the plug-in has no function {method.name}()")
    if case.dtype not in plugin.dtypes:
        raise Skip(f"{case.dtype} is not declared")
    if not prop.applies(case):
        raise Skip("under the declared conventions the property does not apply to this case")
    if not prop.needs:
        return
    try:
        handle = plugin.make(method)(case)
    except Fault:
        return  # the property will report it
    if absent := [name for name in prop.needs if not handle.offers(name)]:
        raise Skip(f"not offered: {', '.join(absent)}")
