"""Selective tuning of a feed-forward block in plain NumPy, written as anybody would write a plug-in; the mutants are
planted in it."""
from __future__ import annotations

import re
from typing import Mapping, Sequence

import numpy

from minipeft.conformance.emulated import Emulated

Array = numpy.ndarray
SHAPES = {"norm.weight": "d", "norm.bias": "d", "fc1.weight": "hd", "fc1.bias": "h", "fc2.weight": "dh",
          "fc2.bias": "d"}


class Selective:
    """A block with these weights {name: array}, of which the names `train` are trained. eps: of the norm.

    The package's docstring describes the calls of the kit. Every part that a mutant changes is a method of its own.
    chosen: {name: which of its elements are trained}; weights that are not in it are frozen. Raises ValueError for
    weights that do not fit, an unknown name, and an empty choice."""

    def __init__(self, weights: Mapping[str, Array], train: Sequence[str], dtype: str, *, eps: float = 1e-5):
        self.e, self.eps = Emulated(dtype), eps
        hidden, d = weights["fc1.weight"].shape
        for name, axes in SHAPES.items():
            expected = tuple({"d": d, "h": hidden}[axis] for axis in axes)
            if weights[name].shape != expected:
                raise ValueError(f"{name} has shape {list(weights[name].shape)}; expected {list(expected)}")
        self.base = {name: weights[name].copy() for name in SHAPES}
        self.w = self.base
        self.kept: dict[str, Array] | None = None       # the trained weights, while they are off
        self.chosen: dict[str, Array] = {}
        self.choose({name: numpy.ones(self.shape(name), bool) for name in self.known(train)})

    def shape(self, name: str) -> tuple:
        """Of a weight."""
        return self.base[name].shape

    def known(self, names: Sequence[str]) -> list[str]:
        """The names. Raises ValueError for one that does not exist."""
        unknown = [name for name in names if name not in self.base]
        if unknown:
            raise ValueError(f"no weight {unknown[0]!r}; there are {', '.join(self.base)}")
        return list(names)

    def choose(self, chosen: Mapping[str, Array]) -> None:
        """Trains these elements {name: booleans} from now on. Raises ValueError if there are none."""
        if not chosen:
            raise ValueError("nothing is selected")
        self.chosen = {name: chosen[name] for name in self.base if name in chosen}

    def select(self, pattern: str) -> None:
        """Trains the weights in whose names the pattern is found. Raises ValueError if there are none."""
        found = [name for name in self.base if re.search(pattern, name)]
        if not found:
            raise ValueError(f"{pattern!r} matches nothing; there are {', '.join(self.base)}")
        self.choose({name: numpy.ones(self.shape(name), bool) for name in found})

    def train_elements(self, masks: Mapping[str, Array]) -> None:
        """Trains these elements {name: booleans}. Raises ValueError for a mask that does not fit."""
        for name in self.known(list(masks)):
            if masks[name].dtype != bool or masks[name].shape != self.shape(name) or not masks[name].any():
                raise ValueError(f"the mask of {name} is {masks[name].dtype} {list(masks[name].shape)}; expected "
                                 f"booleans {list(self.shape(name))}, some of them True")
        self.choose(masks)

    def train_rows(self, rows: Mapping[str, Array]) -> None:
        """Trains these rows {name: integers}. Raises ValueError for rows that do not exist, and for none."""
        masks = {}
        for name in self.known(list(rows)):
            count = self.shape(name)[0]
            if not len(rows[name]) or min(rows[name]) < 0 or max(rows[name]) >= count:
                raise ValueError(f"rows of {name} are {list(rows[name])}; expected some of 0 to {count - 1}")
            masks[name] = self.mask_of_rows(rows[name], self.shape(name))
        self.choose(masks)

    def mask_of_rows(self, rows: Array, shape: tuple) -> Array:
        """Booleans of this shape, True in the rows."""
        mask = numpy.zeros(shape, bool)
        mask[rows] = True
        return mask

    def trainable(self) -> set[str]:
        """The names of the trained arrays."""
        return set(self.chosen)

    def weights(self) -> dict[str, Array]:
        """{name: weight}, all six, as `forward` uses them."""
        return dict(self.w)

    def variance(self, centred: Array) -> Array:
        """[N, 1], of each row."""
        return (centred * centred).mean(axis=-1, keepdims=True)

    def root(self, variance: Array) -> Array:
        """sqrt(variance + eps)."""
        return numpy.sqrt(variance + variance.dtype.type(self.eps))

    def centred(self, x: Array) -> Array:
        """x [N, d] without the mean of each row."""
        return x - x.mean(axis=-1, keepdims=True)

    def normalized(self, x: Array) -> tuple[Array, Array]:
        """z [N, d], rounded to storage, and 1 / sqrt(variance + eps) [N, 1] in the accumulator's dtype."""
        centred = self.centred(numpy.asarray(x, self.e.wide))
        root = self.root(self.variance(centred))
        return self.e.r(centred / root), 1 / root

    def parts(self, x: Array) -> dict[str, Array]:
        """The intermediate results z, 1 / sqrt(variance + eps), n, h and relu(h)."""
        r, mm, w = self.e.r, self.e.mm, self.w
        if x.shape[-1:] != self.shape("norm.weight"):
            raise ValueError(f"x has shape {list(x.shape)}; expected rows of {len(w['norm.weight'])}")
        z, inverse = self.normalized(x)
        n = r(r(z * w["norm.weight"]) + w["norm.bias"])
        h = r(mm(n, w["fc1.weight"].T) + w["fc1.bias"])
        return {"z": z, "inverse": inverse, "n": n, "h": h, "a": numpy.maximum(h, 0)}

    def forward(self, x: Array) -> Array:
        """x [N, d] -> y [N, d]. Raises ValueError for another width."""
        a = self.parts(x)["a"]
        return self.e.r(x + self.e.r(self.e.mm(a, self.w["fc2.weight"].T) + self.w["fc2.bias"]))

    def all_gradients(self, x: Array, g: Array) -> dict[str, Array]:
        """{name: gradient} of all six weights and of x."""
        r, mm, w, p = self.e.r, self.e.mm, self.w, self.parts(x)
        gh = mm(g, w["fc2.weight"]) * (p["h"] > 0)
        gn = mm(gh, w["fc1.weight"])
        return {"norm.weight": self.scale_gradient(gn, p, x), "norm.bias": self.e.sum(gn, axis=0),
                "fc1.weight": mm(gh.T, p["n"]), "fc1.bias": self.e.sum(gh, axis=0),
                "fc2.weight": mm(g.T, p["a"]), "fc2.bias": self.e.sum(g, axis=0),
                "x": r(g + self.through_norm(gn, p))}

    def scale_gradient(self, gn: Array, p: dict, x: Array) -> Array:
        """d norm.weight [d]. p: of `parts`."""
        return self.e.sum(self.e.r(gn * p["z"]), axis=0)

    def through_norm(self, gn: Array, p: dict) -> Array:
        """The gradient [N, d] of the norm's input. p: of `parts`."""
        q = numpy.asarray(self.e.r(gn * self.w["norm.weight"]), self.e.wide)
        z = numpy.asarray(p["z"], self.e.wide)
        inner = q - q.mean(axis=-1, keepdims=True) - z * (q * z).mean(axis=-1, keepdims=True)
        return self.e.r(p["inverse"] * inner)

    def vjp(self, x: Array, g: Array) -> dict[str, Array | None]:
        """{name: gradient} of sum(g * y), and of x, for g [N, d]; None for frozen weights."""
        full = self.all_gradients(x, g)
        return {"x": full.pop("x"), **{name: self.restricted(name, full[name]) for name in self.w}}

    def restricted(self, name: str, gradient: Array) -> Array | None:
        """The gradient, 0 outside the chosen elements; None for a frozen weight."""
        return numpy.where(self.chosen[name], gradient, 0) if name in self.chosen else None

    def step(self, x: Array, g: Array, lr: float, weight_decay: float = 0.0) -> None:
        """One step of gradient descent with decoupled decay on the trained weights."""
        found, after = self.vjp(x, g), {}
        for name, w in self.w.items():
            gradient = found[name]
            after[name] = w if gradient is None else self.stepped(name, w, gradient, lr, weight_decay)
        self.w = after

    def stepped(self, name: str, w: Array, gradient: Array, lr: float, decay: float) -> Array:
        """A chosen weight after a step, which moves only its chosen elements."""
        return numpy.where(self.chosen[name], self.update(w, gradient, lr, decay), w)

    def update(self, w: Array, gradient: Array, lr: float, decay: float) -> Array:
        """(1 - lr decay) w - lr gradient."""
        return self.e.r(self.e.r(w * (1 - lr * decay)) - self.e.r(lr * gradient))

    def off(self) -> None:
        """Restores the weights before training, until `on`."""
        if self.kept is None:
            self.kept, self.w = self.w, self.restored()

    def restored(self) -> dict[str, Array]:
        """The weights while training is off."""
        return self.base

    def on(self) -> None:
        """Brings the trained weights back."""
        if self.kept is not None:
            self.w, self.kept = self.kept, None
