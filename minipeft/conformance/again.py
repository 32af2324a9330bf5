"""A saved failure, run once more."""
from __future__ import annotations

from minipeft.conformance.aftermath import Failed
from minipeft.conformance.look import fails, look
from minipeft.conformance.methods import all_methods
from minipeft.conformance.outputs import property_named
from minipeft.conformance.plugin import load
from minipeft.conformance.replay import read


def again(impl: str, path: str, limit: float) -> int:
    """Prints what the property sees on the saved case. 0 if it holds now, 1 if not.

    Raises ValueError for a file that is damaged or not one of ours."""
    id, case = read(path)
    method, plugin = all_methods()[case.method], load(impl, limit)
    prop = property_named(method, id)
    case = plugin.settle(case, method)
    seen, made = look(prop, case, plugin, plugin.make(method))
    print(f"{case.method} {prop.id}, {case.dtype}: {prop.title}")
    if not fails(seen):
        print(f"  holds now; rho {max((o.rho for o in seen), default=0):.3g}")  # type: ignore[union-attr]
        return 0
    print(f"  {Failed(prop, case, seen, made).words}")
    return 1
