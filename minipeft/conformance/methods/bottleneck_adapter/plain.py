"""A bottleneck adapter in plain NumPy, written as anybody would write a plug-in; the mutants are planted in it."""
from __future__ import annotations

import math

import numpy
import safetensors.numpy

from minipeft.conformance.emulated import Emulated

Array = numpy.ndarray
KINDS = ("relu", "gelu", "gelu_tanh", "swish")
PLACES = ("houlsby", "pfeiffer", "parallel")
LEAVES = ("D", "b_D", "U", "b_U")


class BottleneckAdapter:
    """An adapter of D [m, d], b_D [m], U [d, m], b_U [d]. activation, placement: of KINDS and PLACES. scale: s.

    `--list --method bottleneck_adapter` describes the calls of the kit. Every part that a mutant changes is a method of
    its own. Raises ValueError for arrays that do not fit, unknown names, and a scale that is no finite number."""

    reads_norm = False                                 # a parallel adapter reads n, not x

    def __init__(self, D: Array, b_D: Array, U: Array, b_U: Array, dtype: str, *, activation: str = "relu",
                 placement: str = "houlsby", scale: float = 1.0):
        self.e = Emulated(dtype)
        self.expect(activation, placement, scale)
        self.activation, self.placement, self.s = activation, placement, float(scale)
        self.take({"D": D, "b_D": b_D, "U": U, "b_U": b_U})

    def expect(self, activation: str, placement: str, scale: float) -> None:
        """Raises ValueError for an unknown name, and for a scale that is no finite number."""
        if activation not in KINDS or placement not in PLACES:
            raise ValueError(f"activation {activation!r}, placement {placement!r}; expected one of {KINDS}, {PLACES}")
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale is {scale}; expected a finite number")

    def take(self, arrays: dict[str, Array]) -> None:
        """Checks the weights {name: array}, and puts them in the place of the old ones."""
        m, d = arrays["D"].shape
        shapes = {"D": (m, d), "b_D": (m,), "U": (d, m), "b_U": (d,)}
        for name, shape in shapes.items():
            if arrays[name].shape != shape or not m:
                raise ValueError(f"{name} has shape {arrays[name].shape}; expected {shape}, m >= 1")
        self.D, self.b_D, self.U, self.b_U = (arrays[name].copy() for name in LEAVES)

    def f(self, z: Array) -> Array:
        """The activation, elementwise."""
        r, kind = self.e.r, self.activation
        if kind == "relu":
            return numpy.maximum(z, 0)
        if kind == "gelu":
            return r(z * self.phi(z))
        if kind == "gelu_tanh":
            return r(r(z * r(1 + self.bent(z))) * 0.5)
        return r(z / r(1 + r(numpy.exp(-z))))

    def slope(self, z: Array) -> Array:
        """f'(z)."""
        r, kind = self.e.r, self.activation
        if kind == "relu":
            return (z > 0) * 1.0
        if kind == "gelu":
            return r(self.phi(z) + r(z * r(numpy.exp(r(-0.5 * r(z * z))) / math.sqrt(2 * math.pi))))
        if kind == "gelu_tanh":
            t = self.bent(z)
            inner = r(math.sqrt(2 / math.pi) * r(1 + r(3 * 0.044715 * r(z * z))))
            return r(r(0.5 * r(1 + t)) + r(0.5 * r(z * r(r(1 - r(t * t)) * inner))))
        s = r(1 / r(1 + r(numpy.exp(-z))))
        return r(s * r(1 + r(z * r(1 - s))))

    def phi(self, z: Array) -> Array:
        """Phi(z), the normal distribution function."""
        erf = numpy.vectorize(math.erf, otypes=[float])
        return self.e.r(0.5 * self.e.r(1 + self.e.r(erf(self.e.r(z / math.sqrt(2))))))

    def bent(self, z: Array) -> Array:
        """tanh(sqrt(2 / pi) (z + 0.044715 z^3))."""
        r = self.e.r
        return r(numpy.tanh(r(math.sqrt(2 / math.pi) * r(z + r(0.044715 * r(z * r(z * z)))))))

    def read(self, x: Array, n: Array, F: Array) -> Array:
        """h [N, d]."""
        if self.placement == "parallel":
            return n if self.reads_norm else x
        return F if self.placement == "houlsby" else self.e.r(x + F)

    def inner(self, h: Array) -> Array:
        """D h + b_D [N, m]."""
        return self.e.r(self.e.mm(h, self.D.T) + self.b_D)

    def adapted(self, h: Array) -> Array:
        """s A(h) [N, d]."""
        return self.e.r(self.s * self.e.r(self.e.mm(self.f(self.inner(h)), self.U.T) + self.b_U))

    def joined(self, x: Array, F: Array, a: Array) -> Array:
        """y [N, d], of the stream, the sublayer's output and a = s A(h)."""
        return self.e.r(self.e.r(x + F) + a)

    def fit(self, x: Array, n: Array, F: Array) -> None:
        """Raises ValueError for inputs that do not fit the adapter."""
        if not x.shape == n.shape == F.shape or x.shape[-1] != self.D.shape[1]:
            raise ValueError(f"x {x.shape}, n {n.shape}, F {F.shape} do not fit D {self.D.shape}")

    def forward(self, x: Array, n: Array, F: Array) -> Array:
        """x, n, F [N, d] -> y [N, d]. Raises ValueError for inputs that do not fit."""
        self.fit(x, n, F)
        return self.joined(x, F, self.adapted(self.read(x, n, F)))

    def vjp(self, x: Array, n: Array, F: Array, g: Array) -> dict:
        """{name: gradient} of sum(g * y), for g [N, d]; None for n where it is not read."""
        e, h = self.e, self.read(x, n, F)
        z = self.inner(h)
        gs = e.r(self.s * g)
        dz = e.r(e.mm(gs, self.U) * self.slope(z))
        found = {"D": e.mm(dz.T, h), "b_D": e.sum(dz, axis=0), "U": e.mm(gs.T, self.f(z)), "b_U": e.sum(gs, axis=0)}
        return {**found, **self.to_stream(g, e.mm(dz, self.D))}

    def to_stream(self, g: Array, dh: Array) -> dict:
        """{"x", "n", "F": gradient} of the inputs, of g = dL/dy and dh = dL/dh; None where n is not read."""
        if self.placement == "houlsby":
            return {"x": g.copy(), "n": None, "F": self.e.r(g + dh)}
        if self.placement == "pfeiffer":
            return {"x": self.e.r(g + dh), "n": None, "F": self.e.r(g + dh)}
        if self.reads_norm:
            return {"x": g.copy(), "n": dh, "F": g.copy()}
        return {"x": self.e.r(g + dh), "n": None, "F": g.copy()}

    def merge(self) -> None:
        """Raises ValueError: no weight of the model computes what the adapter does."""
        raise ValueError("a bottleneck adapter is no part of any weight: it cannot be merged")

    def trainable(self) -> set[str]:
        """The names of the trained arrays."""
        return set(LEAVES)

    def save(self) -> bytes:
        """The adapter as the bytes of a file."""
        arrays = {name: numpy.ascontiguousarray(getattr(self, name)) for name in LEAVES}
        return safetensors.numpy.save({**arrays, "scale": numpy.array(self.s)}, {"activation": self.activation})

    def load(self, blob: bytes) -> None:
        """Replaces weights and scale by those of a file. Raises ValueError for another width."""
        found = safetensors.numpy.load(blob)
        if found["D"].shape[1] != self.D.shape[1]:
            raise ValueError(f"an adapter for width {found['D'].shape[1]}; expected {self.D.shape[1]}")
        self.take(found)
        self.s = float(found["scale"])
