"""The report on weights into which something was merged: how each is stored, and how much of its change is lost."""
from __future__ import annotations

import dataclasses
from typing import Mapping


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The weights that were merged, by `Attachment.merge` or by `save_pretrained`. `print` it for the table.

    errors: {name of a weight: relative error of its change}, as in the formula at the top of `attaching/merging.py` or,
    for `save_pretrained`, of `models/merged.py`. A weight that was merged into floating-point numbers of its own dtype
    is not measured, and has no error here. dtypes: {name: how the weight is stored}, its dtype or its quantization."""

    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest of the errors; 0 where none was measured."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        if not self.dtypes:
            return "nothing was merged"
        width, wide = max(map(len, self.dtypes)), max(map(len, ["stored as ", *self.dtypes.values()]))
        lines = [f"{'merged weight':<{width}}  {'stored as':<{wide}}  error of its change"]
        lines += [f"{name:<{width}}  {stored:<{wide}}  "
                  f"{format(self.errors[name], '.2e') if name in self.errors else 'not measured'}"
                  for name, stored in self.dtypes.items()]
        if self.errors:
            lines.append(f"the largest error is {self.worst:.2e}; at 1, as much is lost as by dropping the change")
        if len(self.errors) < len(self.dtypes):
            lines.append("not measured: the base is not quantized, and the sum was rounded once, in the base's dtype")
        return "\n".join(lines)
