"""AdamW: Adam with decoupled weight decay.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    p = p - lr weight_decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Loshchilov & Hutter, 2019, arXiv:1711.05101, Algorithm 2; Kingma & Ba, 2015, arXiv:1412.6980 (m, v, bias correction).
Departure from the paper: the weight decay is multiplied by the learning rate, as in torch.

    AdamW(1e-4, lr_ratio={r"\\.B$": 16})        LoRA+: B learns 16 times faster than A

Hayou et al., 2024, arXiv:2402.12354: in wide models, a LoRA learns less well with one rate for both of its factors.

The moments belong to the Parameter, not to its name. A new adapter under the name of a removed one starts at t = 1, and
a parameter keeps its moments under another name. When a parameter is no longer referenced, its moments go with it.
"""
from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from typing import Any, Iterable, Mapping

import numpy

from minipeft.engine.tensor import Leaf, leaves_of
from minipeft.backend import Array, resolve, to_device, xp
from minipeft.checks import is_number, number, python, shown
from minipeft.nn.where import Where, matching
from minipeft.train.update import Piece, Rates, Update, piece, to_its_end


@dataclasses.dataclass
class Moments:
    """The moments m and v of one parameter after t steps, arrays of its shape. name, when: the name under which it was
    stepped last, and the optimizer's number of that step."""

    m: Array
    v: Array
    t: int
    name: str
    when: int = 0


class AdamW:
    """AdamW, by the equations at the top of this file. lr: the learning rate; betas: (b1, b2); eps: as there.
    weight_decay acts on the parameters whose names `decay` selects (as in `select`; all by default). lr_ratio is
    {pattern: ratio}. The parameters that a pattern selects are stepped with lr * ratio in place of lr, in the weight
    decay too. The first pattern that selects a name counts. (The attribute `lr_ratio` is a tuple of pairs.) Raises
    ValueError for numbers out of range, TypeError for an lr_ratio that is no mapping.

    m, v, steps: {name: first moments}, {name: second moments} and {name: t} of the parameters stepped so far, under the
    names that they had then; of two with one name, the one that was stepped last. The mappings are made anew at each
    access; the arrays in them are the optimizer's own. made: how many steps were made.

    A copy (by copy.deepcopy or pickle) does not hold the parameters. It holds the moments by name, and the first
    parameter that it steps under a name gets the moments of that name."""

    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, decay: Where = "", lr_ratio: Mapping[Any, float] | None = None):
        eps = python(eps)
        if not is_number(eps) or not eps > 0:
            raise ValueError(f"AdamW: eps is {shown(eps)}; expected a number > 0 (where every gradient was 0, the "
                             f"step would be 0 / 0)")
        self.lr, self.eps = number("AdamW: lr", lr, 0), float(eps)
        self.weight_decay, self.decay = number("AdamW: weight_decay", weight_decay, 0), decay
        found = list(map(python, betas)) if isinstance(betas, (list, tuple, numpy.ndarray)) else []
        if len(found) != 2 or not all(is_number(b) and 0 <= b < 1 for b in found):
            raise ValueError(f"AdamW: betas are {shown(betas)}; expected two numbers in [0, 1)")
        self.betas = float(found[0]), float(found[1])
        if not isinstance(lr_ratio, (Mapping, type(None))):
            raise TypeError(f"AdamW: lr_ratio is {shown(lr_ratio)}; expected {{pattern: ratio}}, such as "
                            f"{{r\"\\.B$\": 16}}")
        self.lr_ratio: tuple[tuple[Where, float], ...] = tuple(
            (where, number(f"AdamW: lr_ratio[{shown(where)}]", ratio, 0)) for where, ratio in (lr_ratio or {}).items())
        self.made = 0
        self._held: weakref.WeakKeyDictionary[Leaf, Moments] = weakref.WeakKeyDictionary()
        self._unclaimed: dict[str, Moments] = {}  # in a copy: {name: moments that no parameter has taken yet}

    @property
    def m(self) -> dict[str, Array]:
        """First moments {name: array}."""
        return {name: held.m for name, held in self._named().items()}

    @property
    def v(self) -> dict[str, Array]:
        """Second moments {name: array}."""
        return {name: held.v for name, held in self._named().items()}

    @property
    def steps(self) -> dict[str, int]:
        """{name: t}, how often each parameter was stepped."""
        return {name: held.t for name, held in self._named().items()}

    def step(self, params: Mapping[str, Leaf], grads: Mapping[str, Array], lr: float | None = None,
             scale: float = 1.0) -> None:
        """Make one step: update the arrays of `params` and this optimizer's moments in place.

        grads: {name: array of the parameter's shape}; these arrays are not changed. lr: instead of the optimizer's own.
        scale: a factor on the gradients. It is applied to a block of numbers at a time, so that clipping needs no
        second copy of all gradients.

        The step is made whole or not at all: if an interrupt (KeyboardInterrupt) arrives in the middle, the step is
        finished before it propagates. Before anything changes, raises ValueError unless params, grads and existing
        moments have the same names and shapes, and for an lr or scale out of range, no parameters, one parameter under
        two names or a read-only array; TypeError for non-float parameters, non-numeric gradients or another backend."""
        to_its_end(self._prepared(params, grads, lr, scale).run)

    def moments(self, name: str, p: Leaf) -> Moments | None:
        """The moments of the parameter `p`, which is called `name` now; None if it was never stepped."""
        held = self._held.get(p)
        return self._unclaimed.get(name) if held is None else held

    def restore(self, params: Mapping[str, Leaf], moments: Mapping[str, tuple[Array, Array, int]]) -> None:
        """Replace all that is known about `params` by {name: (m, v, t)}; a name that is missing gets no moments."""
        for name, p in params.items():
            self._unclaimed.pop(name, None)
            self._held.pop(p, None)
            if name in moments:
                self._held[p] = Moments(*moments[name], name, self.made)

    def decayed(self, names: Iterable[str]) -> list[str]:
        """The `names` that weight decay acts on. Raises ValueError if a pattern of `decay` matches none of them."""
        return matching(names, self.decay) if self.weight_decay else []

    def ratios(self, names: Iterable[str]) -> dict[str, float]:
        """{name: the factor on its learning rate} for the `names`. Raises ValueError if a pattern of `lr_ratio` matches
        none of them."""
        found = dict.fromkeys(names, 1.0)
        for where, ratio in reversed(self.lr_ratio):  # the first pattern counts
            found.update(dict.fromkeys(matching(found, where), ratio))
        return found

    def describe(self) -> dict[str, Any]:
        """The hyper-parameters, as JSON can hold them. The caller adds the names that `decay` selects, and each name's
        factor of `ratios`; here are the factors alone, if there are any."""
        return {"lr": python(self.lr), "betas": list(map(python, self.betas)), "eps": python(self.eps),
                "weight_decay": python(self.weight_decay),
                **({"lr_ratio": sorted({ratio for _, ratio in self.lr_ratio})} if self.lr_ratio else {})}

    def to(self, backend: Any) -> "AdamW":
        """Move the moments in place to `backend` ("numpy", "cupy" or an array namespace); return the optimizer."""
        target = resolve(backend)
        for held in [*self._held.values(), *self._unclaimed.values()]:
            held.m, held.v = to_device(held.m, target), to_device(held.v, target)
        return self

    def _prepared(self, params: Mapping[str, Leaf], grads: Mapping[str, Array], lr: float | None,
                  scale: float) -> Update:
        """The step, ready to run: everything is checked and allocated, and nothing has changed."""
        base, scale = number("lr", self.lr if lr is None else lr, 0), number("scale", scale)
        arrays = self._checked(params, grads)
        decayed, ratios = set(self.decayed(params)), self.ratios(params)
        (b1, b2), made, pieces, moved = self.betas, self.made + 1, list[Piece](), list[tuple]()
        for name, p in params.items():
            held = self.moments(name, p) or Moments(xp.zeros_like(p.data), xp.zeros_like(p.data), 0, name)
            t, rate = held.t + 1, number(f"lr times the ratio of {name}", base * ratios[name], 0)
            rates = Rates(b1, b2, scale, math.sqrt(1 - b2 ** t), self.eps, rate / (1 - b1 ** t),
                          1 - rate * self.weight_decay if name in decayed else None)
            pieces.append(piece(p.data, held.m, held.v, arrays[name], rates))
            moved.append((name, p, held, t))

        def after() -> None:
            for name, p, held, t in moved:
                held.t, held.name, held.when = t, name, made
                self._held[p] = held
                self._unclaimed.pop(name, None)
            self.made = made

        return Update(pieces, after)

    def _checked(self, params: Mapping[str, Leaf], grads: Mapping[str, Array]) -> dict[str, Array]:
        """The gradients as arrays, checked. (NumPy makes a scalar of an array without axes.)"""
        if set(params) != set(grads):
            odd = sorted(set(params) ^ set(grads))
            raise ValueError(f"params and grads differ in {len(odd)} names; first: {odd[0]!r}")
        arrays = {}
        for name, p in leaves_of(params).items():
            g = numpy.asarray(grads[name]) if isinstance(grads[name], (numpy.generic, float, int)) else grads[name]
            if g.shape != p.shape:
                raise ValueError(f"the gradient of {name} has shape {list(g.shape)}; expected {list(p.shape)}")
            if p.dtype.kind != "f" or g.dtype.kind not in "fiub":
                raise TypeError(f"{name} is {p.dtype} and its gradient {g.dtype}; expected floating-point numbers")
            if isinstance(g, numpy.ndarray) != isinstance(p.data, numpy.ndarray):
                raise TypeError(f"the gradient of {name} lives on another backend than the parameter")
            if not getattr(getattr(p.data, "flags", None), "writeable", True):
                raise ValueError(f"the array of {name} is read-only: p.data = p.data.copy() makes it writable")
            held = self.moments(name, p)
            if held is not None and (held.m.shape != p.shape or held.m.dtype != p.dtype):
                raise ValueError(f"the moments of {name} are {held.m.dtype} {list(held.m.shape)}, as its array was "
                                 f"before; it is {p.dtype} {list(p.shape)} now: make a new optimizer")
            if held is not None and type(held.m) is not type(p.data):
                raise TypeError(f"the moments of {name} live on another backend than the parameter: call "
                                f"optimizer.to(backend)")
            arrays[name] = g
        return arrays

    def _named(self) -> dict[str, Moments]:
        found: dict[str, Moments] = dict(self._unclaimed)
        for held in list(self._held.values()):
            if held.name not in found or held.when >= found[held.name].when:
                found[held.name] = held
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**{key: value for key, value in vars(self).items() if key != "_held"}, "_unclaimed": self._named()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _held=weakref.WeakKeyDictionary())

    def __copy__(self) -> "AdamW":
        return copy.deepcopy(self)
