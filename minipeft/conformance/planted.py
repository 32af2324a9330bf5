"""Bugs that can be planted in any method: mixins, put in front of its plain implementation."""
from __future__ import annotations

from typing import Any


class Accumulates:
    """Gradients are added to those of the call before, as where nobody sets them to zero in between."""

    before: dict[str, Any] = {}

    def vjp(self, *args: Any) -> dict[str, Any]:
        found = super().vjp(*args)  # type: ignore[misc]
        self.before = {name: self._added(name, g) for name, g in found.items()}
        return self.before

    def _added(self, name: str, g: Any) -> Any:
        old = self.before.get(name)
        if g is None or old is None or old.shape != g.shape:
            return g
        return self.e.r(g + old)  # type: ignore[attr-defined]
