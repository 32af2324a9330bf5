"""Reverse-mode differentiation: an op returns its value and one vector-Jacobian product (VJP) per input.

    y = f(a, b)         the forward, on arrays
    da = g^T df/da      the VJP of a; g is the gradient of the loss with respect to y, and has y's shape
    db = g^T df/db      the VJP of b, a function of its own

Each input has a VJP of its own, so a gradient that nobody asked for is never computed. `@op` keeps the VJPs of inputs
that lead to a *watched* parameter, and drops the others together with the arrays that they hold. A frozen weight
therefore costs no gradient, and the input of its product is not kept.

Freezing does not save everything. The gradient dx = g W is still needed at every op between a trained parameter and the
loss. LoRA keeps x even at a frozen W, because dA = s (g B)^T x needs it.

`value_and_grad` says which parameters are watched; a tensor carries no flag. Nothing is recorded outside of that call,
and the gradients come back in a dict.
"""
from __future__ import annotations

import contextvars
import functools
import heapq
import itertools
from typing import Any, Callable, Mapping, Sequence

from minipeft.backend import Array, to_host, xp
from minipeft.engine.afterwards import listening
from minipeft.engine.calling import in_order, mixed_libraries
from minipeft.engine.operators import Operators

Vjp = Callable[[Array], Array]
_clock = itertools.count()
_watched: contextvars.ContextVar[dict[int, "Node"] | None] = contextvars.ContextVar("watched", default=None)
_observer: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("observer", default=None)


class Node:
    """How a tensor was made. op: the op's name. edges: a (parent node, VJP) for each input that leads to a watched
    parameter. shape, dtype: of the tensor. `time` orders nodes by creation. Only the VJPs hold arrays."""

    __slots__ = ("op", "edges", "shape", "dtype", "time")

    def __init__(self, op: str, edges: Sequence[tuple["Node", Vjp]], shape: tuple, dtype: Any):
        self.op, self.edges, self.shape, self.dtype, self.time = op, edges, shape, dtype, next(_clock)

    def __repr__(self) -> str:
        return f"Node({self.op}, {list(self.shape)})"


class Tensor(Operators):
    """An array, `data`, and how it was made, `node` (None if it depends on nothing watched). Immutable by convention.

    `+ - * / @ ** []` and `.mT`, `.sum`, `.mean`, `.reshape`, `.transpose` are ops, set by `ops/operators.py`."""

    __slots__ = ("data", "node")

    def __init__(self, data: Array, node: Node | None = None):
        self.data = data
        self.node = node

    @property
    def shape(self) -> tuple:
        """The shape of its array."""
        return self.data.shape

    @property
    def dtype(self) -> Any:
        """The dtype of its array."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        made = f", from {self.node.op}" if self.node is not None else ""
        shown = f"{to_host(self.data).item()!r}" if self.data.size == 1 and self.data.ndim == 0 else list(self.shape)
        return f"{type(self).__name__}({shown} {self.dtype}{made})"

    def __float__(self) -> float:
        return float(self.data)

    def __format__(self, spec: str) -> str:
        return format(to_host(self.data).item(), spec) if spec and self.data.size == 1 else str(self)

    def __bool__(self) -> bool:
        raise TypeError("a Tensor has no truth value; compare its .data")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a Tensor is not converted to an array silently; use its .data")


class Leaf(Tensor):
    """A tensor that may be watched. data: its array. Models are made of `nn.weight.Parameter`, a Leaf with a place in a
    module."""

    __slots__ = ("__weakref__",)  # an optimizer remembers parameters without keeping them alive

    def __init__(self, data: Array):
        self.data = data

    @property
    def node(self) -> Node | None:  # type: ignore[override]
        """Its node, which exists only inside a `value_and_grad` that watches it."""
        watched = _watched.get()
        return watched.get(id(self)) if watched else None

    def __reduce__(self) -> tuple:
        return type(self), (self.data,)  # what a copy needs: `node` is not part of it


def array_of(x: Any) -> Array:
    """The array of a Tensor x, of any shape; anything else as it is."""
    return x.data if isinstance(x, Tensor) else x


def op(forward: Callable) -> Callable[..., Tensor]:
    """Make a differentiable function of `forward(*arrays, **options) -> (out, vjps)`.

    Positional inputs are Tensors, arrays or None. `vjps` has one entry for each of them, in order: a function of g, or
    None where no gradient exists (integer ids, masks, absent inputs). A VJP returns an array of its input's shape, or
    of the shape that this input was broadcast to: the backward pass sums the broadcast axes out, so no VJP mentions
    them. Neither `forward` nor a VJP writes into an array that it was given. Where the inputs live in different array
    libraries, the TypeError that `forward` raises says so."""
    positional, count = in_order(forward), forward.__code__.co_argcount

    @functools.wraps(forward)
    def apply(*inputs: Any, **options: Any) -> Tensor:
        if len(inputs) < count:
            inputs, options = positional(inputs, options)
        try:
            out, vjps = forward(*[x.data if isinstance(x, Tensor) else x for x in inputs], **options)
        except TypeError as error:
            raise mixed_libraries(forward.__name__, map(array_of, inputs)) or error
        edges = [(x.node, vjp) for x, vjp in zip(inputs, vjps, strict=True)
                 if vjp is not None and isinstance(x, Tensor) and x.node is not None]
        out = xp.asarray(out)  # a full reduction is a scalar in NumPy, a 0-d array in CuPy
        node = Node(forward.__name__, edges, out.shape, out.dtype) if edges else None
        observe = _observer.get()
        if observe is not None:
            observe(forward, inputs, out, vjps, node)
        return Tensor(out, node)

    return apply


def value_and_grad(step: Callable[[], Tensor], params: Mapping[str, Leaf], unused: str = "raise",
                   training: bool = True) -> tuple[Any, dict[str, Array]]:
    """The loss `step()` and its gradient with respect to `params`, {name: Parameter} -> {name: array}.

    step: a function without arguments that returns the loss, a Tensor of one number; the loss comes back as a Python
    number. Only `params` are watched while it runs. Each gradient has its parameter's shape, and its dtype unless the
    step mixes dtypes. Gradients may share memory (a + b hands one array to both), so do not write into them.
    unused: whether a parameter that the loss does not depend on is an error ("raise"), or has a gradient of zeros
    ("zeros"). training: whether the gradients are for an update. Adapters then record the weights that they are
    trained on.

    Raises ValueError for an empty selection, a parameter under two names, a loss that is not one number, unused
    parameters (see above) and another value of `unused`; TypeError for values that are not Parameters and a loss that
    is not a Tensor; RuntimeError when nested (first order only), and for a loss that uses an earlier call's tensor."""
    if unused not in ("raise", "zeros"):
        raise ValueError(f"unused is {unused!r}; expected 'raise' or 'zeros'")
    if _watched.get() is not None:
        raise RuntimeError("value_and_grad inside value_and_grad: only first-order gradients are computed")
    if not callable(step):
        raise TypeError(f"step is {type(step).__name__}; expected a function without arguments that returns the loss")
    leaves = {name: Node(name, (), p.shape, p.dtype) for name, p in leaves_of(params).items()}
    token = _watched.set({id(p): leaves[name] for name, p in params.items()})
    try:
        with listening(training) as afterwards:
            loss = step()
            node = loss.node if isinstance(loss, Tensor) else None  # a parameter has a node only while watched
    finally:
        _watched.reset(token)
    if not isinstance(loss, Tensor):
        raise TypeError(f"step() returned {type(loss).__name__}; expected a Tensor")
    if loss.data.size != 1:
        raise ValueError(f"step() returned shape {list(loss.shape)}; expected one number")
    value = to_host(loss.data).item()
    one = xp.asarray(loss.data ** 0)  # a 1 of the loss's own kind: of ints, as ones_like gives, / makes a float
    found = backward(node, one) if node is not None else {}
    del loss
    if found.keys() - set(leaves.values()):
        raise RuntimeError("the loss uses a tensor that an earlier value_and_grad recorded; use its .data, a constant")
    missing = [name for name, leaf in leaves.items() if leaf not in found]
    if missing and unused == "raise":
        raise ValueError(f"the loss does not depend on {len(missing)} of {len(leaves)} selected parameters: "
                         f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; select fewer, "
                         f"or pass unused='zeros'")
    differentiated = frozenset(params[name] for name, leaf in leaves.items() if leaf in found)
    for call, told in afterwards.values():
        call(frozenset(told), differentiated)
    return value, {name: xp.asarray(found[leaf]) if leaf in found else xp.zeros_like(params[name].data)
                   for name, leaf in leaves.items()}


def leaves_of(params: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
    """params, checked. Raises TypeError for anything but {name: Parameter}, ValueError for none at all and for one
    parameter under two names."""
    if not isinstance(params, Mapping):
        there = "its .parameters" if hasattr(params, "parameters") else "select(model, where)"
        raise TypeError(f"params is {type(params).__name__}; expected {{name: Parameter}}: pass {there}")
    if not params:
        raise ValueError("nothing is selected: params is empty")
    seen: dict[int, str] = {}
    for name, p in params.items():
        if not isinstance(p, Leaf):
            raise TypeError(f"params[{name!r}] is {type(p).__name__}; expected a Parameter (see minipeft.select)")
        if id(p) in seen:
            raise ValueError(f"{seen[id(p)]!r} and {name!r} are the same parameter")
        seen[id(p)] = name
    return params


def backward(root: Node, g: Array) -> dict[Node, Array]:
    """Gradients of <g, root> at the leaves that `root` depends on, {leaf node: array}; g [...], of root's shape. The
    graph is emptied on the way.

    Nodes are visited in reverse order of creation, from a heap and without recursion. The terms of a node's gradient
    arrive in an order that does not depend on the rest of the selection, so its bits do not either. The first term is
    taken as it is, the second makes a new array, and later ones are added to that in place: an array that a VJP
    returned may be shared with others and is never written into. Raises ValueError for a VJP that returns an array of
    another shape."""
    gradients: dict[Node, Array] = {root: g}
    ours: set[Node] = set()
    heap = [(-root.time, root)]
    leaves: dict[Node, Array] = {}
    while heap:
        node = heapq.heappop(heap)[1]
        g = gradients.pop(node)
        ours.discard(node)
        edges, node.edges = node.edges, ()
        if not edges:
            leaves[node] = g
            continue
        for parent, vjp in edges:
            term = sum_to(vjp(g), parent.shape)
            if parent not in gradients:
                gradients[parent] = term
                heapq.heappush(heap, (-parent.time, parent))
            elif parent in ours:
                gradients[parent] += term
            else:
                gradients[parent] = gradients[parent] + term
                ours.add(parent)
        del parent, vjp, term, edges, g  # closures and arrays go before the next node's work begins
    return leaves


def sum_to(term: Array, shape: tuple) -> Array:
    """`term` summed over the axes along which `shape` was broadcast: [.., n, m] -> shape. Raises ValueError where the
    two do not fit."""
    if getattr(term, "shape", None) == shape:
        return term
    term = xp.asarray(term)  # a product of 0-d arrays is a bare scalar in NumPy
    extra = term.ndim - len(shape)
    ones = tuple(i + extra for i, n in enumerate(shape) if n == 1 and term.shape[i + extra] != 1)
    term = xp.asarray(term.sum(axis=(*range(extra), *ones), keepdims=True))
    if term.shape[extra:] != shape:
        raise ValueError(f"a VJP returned shape {list(term.shape)}, which does not sum to its input's {list(shape)}")
    return term.reshape(shape)
