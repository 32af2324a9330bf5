"""`where` chooses names: a regular expression searched in the dotted name, a callable on it, or a list of these.

    r"\\.(q|v)\\.weight$"      alone: a regular expression, wherever it is found in the name
    ["q", "v"]               in a list, a bare word means a whole segment of the dotted name, as in other libraries

A name is chosen if any item of the list chooses it. A pattern that matches nothing raises, with the nearest names."""
from __future__ import annotations

import re
from typing import Callable, Iterable, Sequence, Union

from minipeft.checks import shown

Where = Union[str, Callable[[str], bool], Sequence[Union[str, Callable[[str], bool]]]]

# {a name in other libraries: our name}
_ELSEWHERE = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "query": "q", "key": "k",
    "value": "v", "to_q": "q", "to_k": "k", "to_v": "v", "c_proj": "o", "fc1": "wi", "fc2": "wo", "linear1": "wi",
    "linear2": "wo", "gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo", "lm_head": "head",
    "shared": "embedding", "embed_tokens": "embedding", "wte": "embedding", "SelfAttention": "attn",
    "self_attn": "attn", "attention": "attn", "EncDecAttention": "cross", "encoder_attn": "cross",
    "cross_attn": "cross", "DenseReluDense": "ff", "mlp": "ff", "feed_forward": "ff", "layer_norm": "attn_norm",
    "final_layer_norm": "norm", "layernorm": "norm"}


def matching(names: Iterable[str], where: Where, what: str = "parameter") -> list[str]:
    """The `names` that `where` chooses, in their own order. what: the noun for these names in errors.

    Raises ValueError for a pattern that is malformed or matches nothing, TypeError for another kind of `where`."""
    names = list(names)
    listed = isinstance(where, (list, tuple))
    patterns = list(where) if isinstance(where, (list, tuple)) else [where]
    if not patterns:
        raise ValueError(f"where is an empty list; expected at least one pattern on {what} names")
    chosen: set[str] = set()
    for pattern in patterns:
        chooses = _predicate(pattern, listed)
        hits = [name for name in names if chooses(name)]
        if not hits:
            raise ValueError(_nothing(pattern, names, what))
        chosen.update(hits)
    return [name for name in names if name in chosen]


def exactly(names: Iterable[str]) -> tuple[str, ...]:
    """The list of patterns that chooses these `names` and no others."""
    return tuple(f"^{re.escape(name)}$" for name in names)


def _predicate(pattern: object, listed: bool) -> Callable[[str], object]:
    if isinstance(pattern, str):
        if listed and re.fullmatch(r"[A-Za-z0-9_]+", pattern):
            return lambda name: pattern in re.split(r"[.@]", name)
        try:
            return re.compile(pattern).search
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"where={shown(pattern)} is not a regular expression: {error}") from None
    if callable(pattern):
        return pattern
    raise TypeError(f"where is {type(pattern).__name__}; expected a regular expression, a callable on the name, "
                    f"or a list of these")


def _nothing(pattern: object, names: list[str], what: str) -> str:
    said = shown(pattern) if isinstance(pattern, str) else "the callable"
    if not names:
        return f"where={said} matches nothing: there is no {what}"
    near = _nearest(pattern, names) if isinstance(pattern, str) else []
    tied = isinstance(pattern, str) and "head" in pattern and "embedding.weight" in names \
        and not any(name.startswith("head.") for name in names)
    return (f"where={said} matches none of the {len(names)} {what} names; nearest: {', '.join(near or names[:3])}"
            + ("; the head of this model is tied to the embedding: choose 'embedding'" if tied else ""))


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """Up to three names, those with the most segments that are similar to words of the pattern."""
    import difflib  # here, for the one error that needs it
    words = [word for word in re.split(r"[^A-Za-z0-9_]+", pattern[:1000]) if word]
    segments = dict.fromkeys(segment for name in names for segment in re.split(r"[.@]", name))
    wanted = []
    for word in words:
        ours = _ELSEWHERE.get(word)
        if ours not in segments:
            ours = word if word in segments else next(iter(difflib.get_close_matches(word, segments, 1, 0.6)), None)
        if ours is not None:
            wanted.append(ours)
    held = {name: sum(segment in wanted for segment in re.split(r"[.@]", name)) for name in names}
    best = max(held.values(), default=0)
    return [name for name in names if best and held[name] == best][:3]
