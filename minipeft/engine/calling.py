"""How an op is called: inputs by position or by name, and one array library for all of them."""
from __future__ import annotations

from typing import Any, Callable, Iterable

from minipeft.backend import Array


def in_order(forward: Callable) -> Callable[[tuple, dict], tuple[tuple, dict]]:
    """A function (inputs, options) -> (inputs, options) that puts each named input of a call at its position.

    A call may name inputs of `forward`, and leave out those for which `forward` has a default. If any other is missing,
    the TypeError that `forward` then raises names it."""
    names = forward.__code__.co_varnames[:forward.__code__.co_argcount]
    defaults = dict(zip(names[::-1], (forward.__defaults__ or ())[::-1]))

    def positional(inputs: tuple, options: dict) -> tuple[tuple, dict]:
        for name in names[len(inputs):]:
            if name not in options and name not in defaults:
                break
            inputs += (options.pop(name, defaults.get(name)),)
        return inputs, options

    return positional


def mixed_libraries(name: str, arrays: Iterable[Array]) -> TypeError | None:
    """The error to raise in op `name` if its inputs `arrays` [...] belong to more than one library; else None. It says
    which library holds each of them."""
    kinds = [type(array).__module__.split(".")[0] for array in arrays if hasattr(array, "dtype")]
    if len(set(kinds)) < 2:
        return None
    return TypeError(f"{name}: inputs live in different array libraries ({', '.join(kinds)}, in order); "
                     f"move the model with model.to(backend) and run inside `with minipeft.use(backend)`")


def once(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`function`, with a memory for the last g: work that several VJPs of one op share is done once.

    The remembered result is freed with the op's closures, when the backward pass is done with the node."""
    last: list[Any] = [None, None]

    def remembered(g: Array) -> Array:
        if last[0] is not g:
            last[0], last[1] = g, function(g)
        return last[1]

    return remembered
