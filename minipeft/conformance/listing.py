"""What `--list` prints: of every method its equation, the function that a plug-in has for it, every call of the object
that the function returns, and the properties. Signatures are those of the plain NumPy implementation, which is run.
"""
from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any, Iterator, Sequence

from minipeft.conformance.method import Method
from minipeft.conformance.methods import all_methods

_WIDTH, _COLUMN = 118, 54
_KEPT = "\N{NO-BREAK SPACE}"

# Calls that no property asks for by name, but that are made where they are offered.
ALSO = {"lora_linear": ("is_merged", "remove", "state_keys"), "lora_embedding": ("is_merged", "state_keys")}

# What a call does or returns, where its name and the equation do not say it; {method: ...} before {"": ...}.
WORDS: dict[str, dict[str, str]] = {
    "": {
        "forward": "y, as the equation has it; dropout is off",
        "vjp": "{name: gradient} of sum(g * y), by the names of the equation; what is frozen is None, or left out",
        "trainable": "the names of what is trained",
        "merge": "puts the update into the weight; a second time it raises, or changes nothing",
        "unmerge": "takes it out again",
        "weight": "the weight as it is now: with the update once it is merged, without it before",
        "is_merged": "whether it is",
        "step": "one step of plain gradient descent, p - lr dp, on what is trained",
        "save": "the adapter as a file's bytes, the base not among them",
        "load": "takes what save() gave, in a new object on the same base; raises if it does not fit",
        "state_keys": "the names of the arrays that save() writes"},
    "lora_linear": {
        "forward_train": "forward in training: keep has x's shape, 1 where dropout keeps and 0 where it drops",
        "add": "one more adapter on the same W, not active yet; the first is called 'default'",
        "activate": "from now on these adapters, and no others; [] is the base alone; raises for an unknown name",
        "remove": "takes an adapter away",
        "forward_rows": "row i with the adapter rows[i], None for the base alone",
        "merge_safe": "as merge, in the way that checks its result first"},
    "lora_embedding": {
        "forward_decoder": "the same, where the table is looked up by the decoder",
        "head": "logits [N, V] of the tied head",
        "vjp_tied": "{name: gradient} of sum(g * forward(ids)) + sum(q * head(h))"},
    "bottleneck_adapter": {"merge": "raises: no weight of the model computes what it does"},
    "selective": {
        "step": "one step; the decay is decoupled, times lr, and acts on what is trained alone",
        "weights": "{name: array}, all six, as forward uses them",
        "select": "from now on the weights whose name the regular expression is found in are trained, and no others",
        "train_elements": "from now on these elements ({name: booleans}); gradients keep the shape, 0 elsewhere",
        "train_rows": "from now on these rows ({name: integers}); likewise",
        "off": "forward without what was trained, until on()", "on": "with it again"},
    "soft_prompt": {
        "embed": "X [b, p + t, d], mask' and positions [b, p + t]: what the layer sees",
        "base_forward": "y of the layer without a prompt",
        "disabled": "y with the prompt switched off for this call"},
    "lora_training": {
        "step": "one step over its micro-batches (x [n, in], t [n, out], w [n]): the loss, before the update",
        "weights": "{\"A\", \"B\", \"W\", \"b\": array}", "moments": "{\"m.A\", \"m.B\", \"v.A\", \"v.B\": array}",
        "grad_norm": "of the last step, before clipping", "lr": "of the last step",
        "state": "all that a later run needs to go on, as bytes", "load_state": "goes on from there"}}

# What the function is given beside arrays that `where` names.
GIVEN = {
    "selective": "weights: {\"norm.weight\", \"norm.bias\", \"fc1.weight\", \"fc1.bias\", \"fc2.weight\", "
                 "\"fc2.bias\": array}; train: those of the names that are trained, whole",
    "soft_prompt": "base: {\"E\", \"q\", \"k\", \"v\", \"o\": array}, in some cases \"position\" or \"relative\" too",
    "lora_training": "optimizer: {\"name\": \"sgd\" or \"adamw\", \"lr\", \"weight_decay\", \"clip\": a norm or None, "
                     "\"schedule\": {\"kind\": \"constant\", \"linear\" or \"cosine\", \"warmup\", \"steps\"}}, with "
                     "\"betas\" and \"eps\" for adamw"}


def listing(names: Sequence[str] | None = None) -> Iterator[str]:
    """The lines, of these methods or of all. Raises ValueError for a name that does not exist."""
    for name in names or ():
        if name not in all_methods():
            raise ValueError(f"--method {name}: expected some of {', '.join(all_methods())}")
    for name, method in all_methods().items():
        if names is None or name in names:
            yield from _method(method)


def calls(method: Method) -> list[str]:
    """The names of all calls of the object that the kit makes, in the order in which properties ask for them."""
    needed = [*(call for prop in method.properties for call in prop.needs),
              *(call for needs, _ in method.outputs.values() for call in needs), *ALSO.get(method.name, ())]
    return list(dict.fromkeys(needed))


def words(method: Method, call: str) -> str:
    """What it does or returns."""
    return WORDS.get(method.name, {}).get(call) or WORDS[""].get(call, "")


def signature(name: str, function: Any) -> str:
    """`forward(x: array) -> array`, of a function, or of a class the arguments alone."""
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
    yield from _wrapped("  ", f"{signature(method.name, method.plain)} -> an object with {calls(method)[0]}, and of "
                              f"the rest what you have")
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
