"""The text of `--list`: for every method its equation, the function that a plug-in defines for it, every call of the
object that this function returns, and the properties. Signatures are taken from the plain NumPy implementation.
"""
from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any, Iterator, Sequence

from minipeft.conformance.method import TITLES, Method
from minipeft.conformance.methods import all_methods

_WIDTH, _COLUMN = 118, 54
_KEPT = "\N{NO-BREAK SPACE}"

# Calls that no property needs, but that properties make if they are offered.
ALSO = {"lora_linear": ("is_merged", "remove", "state_keys"), "lora_embedding": ("is_merged", "state_keys")}

# What each call does or returns; {method: ...} overrides {"": ...}.
WORDS: dict[str, dict[str, str]] = {
    "": {
        "forward": "y, by the equation; dropout is off",
        "vjp": "{name: gradient} of sum(g * y), under the names of the equation; frozen arrays are None or left out",
        "trainable": "the names of the trained arrays",
        "merge": "adds the update to the weight; a second call raises, or changes nothing",
        "unmerge": "removes the update again",
        "weight": "the current weight: with the update if it is merged, without it otherwise",
        "is_merged": "whether the update is merged",
        "step": "one step of plain gradient descent, p - lr dp, on the trained arrays",
        "save": "the bytes of an adapter file, without the base",
        "load": "loads bytes from save() into a new object on the same base; raises if they do not fit",
        "state_keys": "the names of the arrays that save() writes"},
    "lora_linear": {
        "forward_train": "forward in training: keep has x's shape, 1 where dropout keeps and 0 where it drops",
        "add": "adds an adapter on the same W, not active yet; the first one is called 'default'",
        "activate": "makes exactly these adapters active; [] leaves the base alone; raises for an unknown name",
        "remove": "removes an adapter",
        "forward_rows": "y, with row i computed by the adapter rows[i]; None means the base alone",
        "merge_safe": "like merge, but checks the result first"},
    "lora_embedding": {
        "forward_decoder": "like forward, for the decoder's lookup in the same table",
        "head": "logits [N, V] of the tied head",
        "vjp_tied": "{name: gradient} of sum(g * forward(ids)) + sum(q * head(h))"},
    "bottleneck_adapter": {"merge": "raises: no weight of the model can hold an adapter's function"},
    "selective": {
        "step": "one step; the decay is decoupled, times lr, and acts on the trained elements alone",
        "weights": "{name: array}, all six, as forward uses them",
        "select": "trains exactly the weights in whose name the regular expression is found, from now on",
        "train_elements": "trains these elements from now on ({name: booleans}); gradients keep the shape, 0 elsewhere",
        "train_rows": "trains these rows from now on ({name: integers}); gradients keep the shape, 0 elsewhere",
        "off": "switches off everything that was trained, until on()", "on": "switches it on again"},
    "soft_prompt": {
        "embed": "X [b, p + t, d], mask' and positions [b, p + t]: the inputs of the layer",
        "base_forward": "y of the layer without a prompt",
        "disabled": "y with the prompt switched off for this call"},
    "lora_training": {
        "step": "one step over its micro-batches (x [n, in], t [n, out], w [n]); returns the loss before the update",
        "weights": "{\"A\", \"B\", \"W\", \"b\": array}", "moments": "{\"m.A\", \"m.B\", \"v.A\", \"v.B\": array}",
        "grad_norm": "the gradient norm of the last step, before clipping", "lr": "the learning rate of the last step",
        "state": "everything that a later run needs to continue, as bytes",
        "load_state": "continues from bytes of state()"}}

# Arguments of the function other than the arrays whose shapes the list gives.
GIVEN = {
    "selective": "weights: {\"norm.weight\", \"norm.bias\", \"fc1.weight\", \"fc1.bias\", \"fc2.weight\", "
                 "\"fc2.bias\": array}; train: the names of the weights that are trained, each as a whole",
    "soft_prompt": "base: {\"E\", \"q\", \"k\", \"v\", \"o\": array}, in some cases \"position\" or \"relative\" too",
    "lora_training": "optimizer: {\"name\": \"sgd\" or \"adamw\", \"lr\", \"weight_decay\", \"clip\": a norm or None, "
                     "\"schedule\": {\"kind\": \"constant\", \"linear\" or \"cosine\", \"warmup\", \"steps\"}}, with "
                     "\"betas\" and \"eps\" for adamw"}


def listing(names: Sequence[str] | None = None) -> Iterator[str]:
    """The lines about the methods called `names`, or about all. Raises ValueError for a name that does not exist."""
    for name in names or ():
        if name not in all_methods():
            raise ValueError(f"--method {name}: expected some of {', '.join(all_methods())}")
    for name, method in all_methods().items():
        if names is None or name in names:
            yield from _method(method)
    yield f"  {TITLES}"


def calls(method: Method) -> list[str]:
    """The names of all calls that the kit makes of the object, in the order in which the properties need them."""
    needed = [*(call for prop in method.properties for call in prop.needs),
              *(call for needs, _ in method.outputs.values() for call in needs), *ALSO.get(method.name, ())]
    return list(dict.fromkeys(needed))


def words(method: Method, call: str) -> str:
    """The description of `call` for this method; "" if there is none."""
    return WORDS.get(method.name, {}).get(call) or WORDS[""].get(call, "")


def signature(name: str, function: Any) -> str:
    """The signature as text, such as `forward(x: array) -> array`; of a class, only its arguments."""
    found = inspect.signature(function)
    given = [p for p in found.parameters.values() if p.name != "self"]
    back = "" if inspect.isclass(function) or found.return_annotation in ("None", None) else found.return_annotation
    text = str(found.replace(parameters=given, return_annotation=inspect.Signature.empty))
    text = re.sub(r": '([^']*)'", r": \1", text) + (f" -> {back}" if back else "")
    return name + re.sub(r"\bArray\b", "array", text.replace("Micro", "tuple[Array, Array, Array]"))


def _method(method: Method) -> Iterator[str]:
    yield f"{method.name}: {method.title}. {method.source['paper']}, {method.source['where']}"
    yield from (f"    {line}" for line in method.equation)
    for convention, choices in method.conventions.items():
        yield f"    declared convention {convention}: {', '.join(choices)} (the first is the default)"
    yield from _wrapped("  ", f"{signature(method.name, method.plain)} -> an object with {calls(method)[0]} and "
                              f"any of the other calls")
    axes = (f"{name} [{', '.join(axes)}]".replace(" ", _KEPT) for name, axes in method.axes.items())
    yield from _wrapped("    where ", ", ".join(axes))
    if method.name in GIVEN:
        yield from _wrapped("    where ", GIVEN[method.name])
    for call in calls(method):
        shown = f"    .{signature(call, getattr(method.plain, call))}"
        said = words(method, call)
        if len(shown) >= _COLUMN:
            yield shown
            shown = ""
        yield from textwrap.wrap(said, _WIDTH, initial_indent=f"{shown:<{_COLUMN}}",
                                 subsequent_indent=" " * _COLUMN) or [shown]
    for prop in method.properties:
        yield f"  {prop.id:<6} {prop.title} [needs {', '.join(prop.needs) or 'nothing'}]"


def _wrapped(start: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=" " * (len(start) + 2))
    return [line.replace(_KEPT, " ") for line in lines]
