"""Laws as equalities: a small module of the library's own slots and sites, computed in `fractions.Fraction`. No
tolerance at all.

    x = input(E[ids]);   x = x + mean over what is not masked of x;   x = x + site(W_down relu(W_up x + b) + b');
    x = W_mix x;   logits = E x, of the tokens of the row     (E tied, W_mix square)
"""
from __future__ import annotations

import contextlib
import dataclasses
from fractions import Fraction
from typing import Any, Callable, Iterator

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine.tensor import Tensor
from minipeft.nn.layers import Embedding, Linear
from minipeft.nn.module import Model
from minipeft.nn.routing import routed
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter, Reparam
from minipeft.engine.ops import definitions
from minipeft.methods.lora import LowRank
from minipeft.train.data import batch_of, label_tokens
from tests.methods_under_test import HALF

VOCAB, D, HIDDEN, TIME = 6, 4, 5, 3
PATTERNS = ("embedding", "up", "down", "mix", ".", ["embedding", "mix"], ["up", "down"])


def fractions(rng: numpy.random.Generator, *shape: int) -> numpy.ndarray:
    """n / m, n in -3 .. 3, m in 1 .. 2."""
    n, m = rng.integers(-3, 4, shape).reshape(-1), rng.integers(1, 3, shape).reshape(-1)
    flat = numpy.empty(n.size, dtype=object)
    flat[:] = [Fraction(int(a), int(b)) for a, b in zip(n, m)]
    return flat.reshape(shape)


def exact(*arrays: Any) -> bool:
    """Whether these are rational numbers still: one float would make the others floats."""
    return all(isinstance(x, (int, Fraction)) for a in arrays for x in numpy.asarray(a, dtype=object).reshape(-1))


def equal(a: Any, b: Any) -> bool:
    """Equal as rational numbers, in shape and value; for dicts of arrays, by name."""
    if isinstance(a, dict):
        return set(a) == set(b) and all(equal(a[name], b[name]) for name in a)
    a, b = getattr(a, "data", a) if isinstance(a, Tensor) else a, b.data if isinstance(b, Tensor) else b
    return exact(a, b) and numpy.array_equal(a, b)


class Small(Model):
    def __init__(self, rng: numpy.random.Generator):
        self.embedding = Embedding(fractions(rng, VOCAB, D))
        self.input = Site("input", D, object)
        self.up = Linear(fractions(rng, HIDDEN, D), fractions(rng, HIDDEN))
        self.down = Linear(fractions(rng, D, HIDDEN), fractions(rng, D))
        self.out = Site("sublayer", D, object)
        self.mix = Linear(fractions(rng, D, D))
        self.head = Linear(self.embedding.weight)

    def __call__(self, ids: numpy.ndarray, adapter: Any = None) -> Tensor:
        """ids [batch, time] -> logits [batch, time, vocab]."""
        with routed(self.host, adapter, len(ids)):
            x, mask = self.input(self.embedding(ids), None)
            if mask is None:
                mask = numpy.ones(x.shape[:2], dtype=bool)
            seen = mask[..., None].astype(int).astype(object)
            count = seen.sum(axis=1, keepdims=True)
            x = ops.add(x, ops.mul(ops.sum(ops.mul(x, seen), axis=1, keepdims=True), Fraction(1) / count))
            x = ops.add(x, self.out(x, x, self.down(ops.relu(self.up(x)))))
            return self.head(self.mix(x[:, x.shape[1] - ids.shape[1]:]))

    def loss(self, input_ids: numpy.ndarray, labels: numpy.ndarray, adapter: Any = None, **_: Any) -> Tensor:
        """Mean over the label tokens of |logits - one_hot(label)|^2."""
        z = self(input_ids, adapter)[:, :labels.shape[1]]
        wanted = numpy.zeros(z.shape, dtype=object)
        wanted[:] = (labels[..., None] == numpy.arange(VOCAB)).astype(int)
        counted = (labels != -100)[..., None].astype(object)
        difference = ops.mul(ops.sub(z, wanted), counted)
        return ops.div(ops.sum(ops.mul(difference, difference)), int(counted.sum()))


def some(seed: int, *shape: int) -> numpy.ndarray:
    """A mask of about a third of the elements, at least one."""
    mask = numpy.random.default_rng(seed).random(shape) < 0.3
    mask[0] = True
    return mask


OTHERS: dict[str, Callable[["Exact"], Any]] = {
    **{placement: lambda case, placement=placement: minipeft.Bottleneck(
        placement, size=D if case.seed % 3 == 0 else case.rank, scale=case.alpha / 2, where="^out$")  # and square
       for placement in ("houlsby", "pfeiffer", "parallel")},
    "Selective": lambda case: minipeft.Selective(where=case.where),
    "mask": lambda case: minipeft.Selective(mask={"embedding.weight": some(case.seed, VOCAB, D),
                                                  "up.bias": some(case.seed, HIDDEN)}),
    "rows": lambda case: minipeft.Selective(rows=(1, 4)),
    "PromptTuning": lambda case: minipeft.PromptTuning(case.rank, "random", where="^input$")}
FAMILIES = ("LoRA", *OTHERS)


@dataclasses.dataclass(frozen=True)
class Exact:
    where: Any
    rank: int
    alpha: int
    seed: int
    kind: str = "LoRA"

    def model(self) -> Small:
        return Small(numpy.random.default_rng([self.seed, 0]))

    def attach(self, model: Small, name: str = "lora", at: int = 1, zero: bool = False, **changes: Any) -> Any:
        """zero: as it starts, but for floats, which become Fractions. `changes` of LoRA's fields."""
        rng = numpy.random.default_rng([self.seed, at])
        method = (OTHERS[self.kind](self) if self.kind in OTHERS
                  else dataclasses.replace(minipeft.LoRA(self.rank, self.alpha, where=self.where), **changes))
        attachment = minipeft.attach(model, method, rng, name)
        for own, p in attachment.parameters.items():
            if own.endswith((".A", ".D", ".P")) or not zero:
                p.data = fractions(rng, *p.shape)
        return attachment

    def ids(self, rows: int = 3) -> numpy.ndarray:
        return numpy.random.default_rng([self.seed, 9]).integers(0, VOCAB, (rows, TIME))

    def batch(self, rows: int = 3) -> dict[str, numpy.ndarray]:
        labels = numpy.random.default_rng([self.seed, 8]).integers(0, VOCAB, (rows, TIME))
        labels[0, 1:] = -100  # the first row has fewer labels
        return {"input_ids": self.ids(rows), "labels": labels}


def exacts(kinds: tuple[str, ...] = ("LoRA",)) -> st.SearchStrategy[Exact]:
    return st.builds(Exact, st.sampled_from(PATTERNS), st.integers(1, 3), st.sampled_from([1, 2, -5, 7]),
                     st.integers(0, 999), st.sampled_from(kinds))


def each(*kinds: str) -> Any:
    """Parametrize over families; half of the usual examples for each."""
    return lambda test: pytest.mark.parametrize("kind", kinds or FAMILIES)(HALF(test))


def result(model: Small, batch: dict, where: Any = ".", **options: Any) -> tuple[Any, dict]:
    """Loss and gradients of everything that `where` selects."""
    return minipeft.value_and_grad(lambda: model.loss(**batch, **options), minipeft.select(model, where), "zeros")


@contextlib.contextmanager
def through_dense() -> Iterator[None]:
    """LoRA's products and lookups by the general rule, through dense()."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRank, "project", Reparam.project)
        patch.setattr(LowRank, "rows", Reparam.rows)
        yield


@given(exacts())
def test_law_1_the_product_is_that_of_the_paper_number_for_number(case):
    """h = W x + (alpha / r) B A x, written out with loops over Fractions."""
    model = case.model()
    rng = numpy.random.default_rng(case.seed)
    for slot in case.attach(model).places.values():
        d_out, d_in = slot.base.shape
        w, x = slot.base.data, fractions(rng, 1, 2, d_in)
        a, b = slot.attached["lora"].A.data, slot.attached["lora"].B.data
        s = Fraction(case.alpha, case.rank)

        def h(t: int, o: int) -> Fraction:
            inner = [sum((a[k, i] * x[0, t, i] for i in range(d_in)), Fraction(0)) for k in range(case.rank)]
            return (sum((w[o, i] * x[0, t, i] for i in range(d_in)), Fraction(0))
                    + s * sum((b[o, k] * inner[k] for k in range(case.rank)), Fraction(0)))

        y = slot.project(x).data
        assert exact(y) and all(y[0, t, o] == h(t, o) for t in range(2) for o in range(d_out))


@given(exacts(), st.booleans())
def test_law_1_the_factored_model_is_the_dense_one_in_value_and_all_gradients(case, stacked):
    model, batch = case.model(), case.batch()
    case.attach(model)
    if stacked:
        case.attach(model, "upper", 2)
    found, grads = result(model, batch)
    with through_dense():
        wanted, wanted_grads = result(model, batch)
    assert found == wanted and equal(grads, wanted_grads) and isinstance(found, Fraction)


@each("Selective", "mask", "rows")
@given(st.data())
def test_law_1_a_delta_is_added_to_the_base_number_for_number(kind, data):
    """W0 + d, element by element; lookups and products are those of that matrix."""
    case = data.draw(exacts((kind,)))
    model = case.model()
    rng = numpy.random.default_rng(case.seed)
    for slot in case.attach(model).places.values():
        piece, wanted = slot.attached["lora"], slot.base.data.copy()
        at = numpy.arange(wanted.size) if kind == "Selective" else (
            piece.indices.data if kind == "mask" else numpy.arange(wanted.size).reshape(VOCAB, D)[[1, 4]].reshape(-1))
        for i, d in zip(at, piece.d.data.reshape(-1)):
            wanted[numpy.unravel_index(i, wanted.shape)] += d
        assert equal(slot.fold().dense(), wanted) and equal(slot.base, wanted) == (not piece.d.data.any())
        if slot.kind in ("linear", "embedding"):
            x, ids = fractions(rng, 1, 2, wanted.shape[1]), rng.integers(0, wanted.shape[0], (2, 3))
            assert equal(slot.project(x), x @ wanted.T) and equal(slot.rows(ids), wanted[ids])


@each("houlsby", "pfeiffer", "parallel")
@given(st.data())
def test_law_1_an_adapter_is_its_equation_number_for_number(kind, data):
    """F + s (U relu(D h + b_D) + b_U), written out for every token; where D and U are square too."""
    case = data.draw(exacts((kind,)))
    model, rng = case.model(), numpy.random.default_rng(case.seed)
    piece = case.attach(model).places["out"].attached["lora"]
    x, n, f = (fractions(rng, 2, 3, D) for _ in range(3))
    down, b_down, up, b_up = (piece.D.data, piece.b_D.data, piece.U.data, piece.b_U.data)
    out = model.out(x, n, f)
    for at in numpy.ndindex(2, 3):
        h = {"houlsby": f[at], "pfeiffer": x[at] + f[at], "parallel": x[at]}[kind]
        hidden = [max(Fraction(0), sum(down[i] * h) + b_down[i]) for i in range(len(b_down))]
        wanted = [f[at][o] + Fraction(case.alpha, 2) * (sum(up[o] * hidden) + b_up[o]) for o in range(D)]
        assert equal(out.data[at], wanted)


@each("PromptTuning")
@given(st.data())
def test_law_1_a_prompt_is_tokens_of_a_longer_vocabulary_in_front_gradients_included(kind, data):
    """E extended by P, the ids of P in front: the same logits of the row, the same gradient of P and of E."""
    case = data.draw(exacts((kind,)))
    model, longer, batch = case.model(), case.model(), case.batch()
    attachment = case.attach(model)
    (name, p), = attachment.parameters.items()
    table = longer.embedding.weight.base
    table.data = numpy.concatenate([table.data, p.data])
    ids = numpy.concatenate([numpy.tile(VOCAB + numpy.arange(case.rank), (3, 1)), batch["input_ids"]], axis=1)
    wanted = longer(ids).data[:, case.rank:, :VOCAB]
    assert equal(model(batch["input_ids"]), wanted)
    cotangent = fractions(numpy.random.default_rng(case.seed), *wanted.shape)
    _, grads = minipeft.value_and_grad(lambda: ops.sum(ops.mul(model(batch["input_ids"]), cotangent)),
                                       {"P": p, "E": model.embedding.weight.base})
    _, whole = minipeft.value_and_grad(
        lambda: ops.sum(ops.mul(longer(ids)[:, case.rank:, :VOCAB], cotangent)), {"E": table})
    assert equal(numpy.concatenate([grads["E"], grads["P"]]), whole["E"])


@each(*(kind for kind in FAMILIES if kind != "PromptTuning"))
@given(st.data())
def test_law_2_attaching_changes_no_output_at_initialization(kind, data):
    case = data.draw(exacts((kind,)))
    model = case.model()
    before = model(case.ids())
    case.attach(model, zero=True)
    assert equal(model(case.ids()), before)


@each("Selective", "mask", "rows")
@given(st.data())
def test_law_3_a_merged_delta_equals_the_unmerged_one_and_what_lies_on_top_of_it(kind, data):
    case = data.draw(exacts((kind,)))
    model = case.model()
    below, above = case.attach(model, "below"), dataclasses.replace(case, kind="LoRA").attach(model, "above", 2)
    before = model(case.ids())
    for attachment in (below, above):
        attachment.merge()
        assert equal(model(case.ids()), before)


@given(exacts(), st.booleans())
def test_law_3_the_merged_model_equals_the_unmerged_one(case, stacked):
    """And so do the gradients of every parameter that may still be trained."""
    model, batch = case.model(), case.batch()
    attachments = [case.attach(model)] + ([case.attach(model, "upper", 2)] if stacked else [])
    free = [rf"^{name}$" for name in model.base_parameters if name not in attachments[0].places]
    before, (loss, grads) = model(case.ids()), result(model, batch, free)
    for attachment in attachments:
        attachment.merge()
    for slot in attachments[0].places.values():
        wanted = slot.base.data
        for piece in slot.attached.values():
            wanted = wanted + Fraction(case.alpha, case.rank) * (piece.B.data @ piece.A.data)
        assert equal(slot.fold().dense(), wanted)
    merged_loss, merged_grads = result(model, batch, free)
    assert equal(model(case.ids()), before) and merged_loss == loss and equal(merged_grads, grads)


@each()
@given(st.data())
def test_law_5_each_gradient_of_a_selection_equals_the_full_one_restricted_to_it(kind, data):
    case = data.draw(exacts((kind,)))
    model, batch = case.model(), case.batch()
    case.attach(model)
    loss, full = result(model, batch)
    names = data.draw(st.lists(st.sampled_from(list(full)), min_size=1, unique=True))
    found, grads = result(model, batch, lambda name: name in names)
    assert found == loss and set(grads) == set(names) and equal(grads, {n: full[n] for n in names})


@each()
@given(st.data(), st.lists(st.sampled_from([None, "a", "b", ("a", "b"), ("b", "a")]), min_size=1, max_size=4))
def test_law_8_a_mixed_task_batch_equals_each_row_alone_gradients_included(kind, data, routing):
    """b is of another family; where a is a prompt, b is one of another length."""
    case = data.draw(exacts((kind,)))
    model, batch = case.model(), case.batch(len(routing))
    case.attach(model, "a")
    other = {"LoRA": "PromptTuning", "PromptTuning": "PromptTuning"}.get(kind, "LoRA")
    dataclasses.replace(case, kind=other, rank=4 - case.rank, where=".").attach(model, "b", 2)
    case.attach(model, "c", 3)  # plugged, and to be overridden
    z = model(batch["input_ids"], adapter=routing).data
    loss, grads = result(model, batch, adapter=routing)
    tokens, alone, summed = 0, Fraction(0), {name: 0 for name in grads}
    for i, entry in enumerate(routing):
        row = {key: value[i:i + 1] for key, value in batch.items()}
        assert equal(z[i:i + 1], model(row["input_ids"], adapter=[entry]))
        n = int((row["labels"] != -100).sum())
        row_loss, row_grads = result(model, row, adapter=[entry])
        tokens, alone = tokens + n, alone + n * row_loss
        summed = {name: total + n * row_grads[name] for name, total in summed.items()}
    assert loss == alone / tokens
    assert equal(grads, {name: total / Fraction(tokens) for name, total in summed.items()})
    assert not any(g.any() for name, g in grads.items() if "@c." in name)


@given(st.integers(1, 3), st.integers(0, 999))
def test_law_9_the_fused_linear_ops_equal_their_definitions_in_value_and_gradient(rank, seed):
    rng = numpy.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (2, 5))
    x, w, a, b, e = (Parameter(fractions(rng, *shape))
                     for shape in ((2, 5, 4), (6, 4), (rank, 4), (6, rank), (VOCAB, 4)))
    for space in (ops, definitions):
        def step() -> Tensor:
            h = space.low_rank_linear(space.linear(x, w), x, a, b, scale=Fraction(7, rank))
            return ops.add(ops.sum(ops.mul(h, h)), ops.sum(ops.mul(space.embedding(e, ids), x)))
        outcome = minipeft.value_and_grad(step, {"x": x, "w": w, "a": a, "b": b, "e": e})
        if space is ops:
            value, grads = outcome
    assert value == outcome[0] and equal(grads, outcome[1])


def rank_of(matrix: numpy.ndarray) -> int:
    """By elimination: exact on Fractions."""
    rows, rank = [list(row) for row in matrix], 0
    for column in range(matrix.shape[1]):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / Fraction(rows[rank][column])
            rows[i] = [u - factor * v for u, v in zip(rows[i], rows[rank])]
        rank += 1
    return rank


@given(exacts())
def test_law_10_the_update_has_rank_at_most_r_and_two_of_them_at_most_their_sum(case):
    model = case.model()
    slots = case.attach(model).places.values()
    for slot in slots:
        assert rank_of(slot.fold().dense().data - slot.base.data) <= case.rank
    case.attach(model, "upper", 2, rank=1)
    for slot in slots:
        assert rank_of(slot.fold().dense().data - slot.base.data) <= case.rank + 1


def token_lists() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=TIME)


@each()
@given(st.data(), st.lists(st.tuples(token_lists(), token_lists()), min_size=2, max_size=5), st.integers(1, 3))
def test_law_13_micro_batches_weighted_by_their_label_tokens_equal_one_batch(kind, data, pairs, size):
    case = data.draw(exacts((kind,)))
    model = case.model()
    case.attach(model)
    pairs = [((source * TIME)[:TIME], target) for source, target in pairs]  # all as long as the longest
    loss, grads = result(model, batch_of(pairs))
    tokens, total, summed = 0, Fraction(0), {name: 0 for name in grads}
    for start in range(0, len(pairs), size):
        batch = batch_of(pairs[start:start + size])
        n, (part, part_grads) = label_tokens(batch), result(model, batch)
        tokens, total = tokens + n, total + n * part
        summed = {name: s + n * part_grads[name] for name, s in summed.items()}
    assert loss == total / tokens and equal(grads, {name: s / Fraction(tokens) for name, s in summed.items()})


# ---- how the update depends on A, B, r and alpha


@given(exacts(), st.sampled_from([2, -3, Fraction(1, 5)]))
def test_a_times_c_and_b_over_c_is_the_same_function(case, c):
    model = case.model()
    attachment = case.attach(model)
    before = model(case.ids())
    for name, p in attachment.parameters.items():
        p.data = p.data * c if name.endswith("A") else p.data / Fraction(c)
    assert equal(model(case.ids()), before)


@given(exacts())
def test_twice_the_rank_padded_with_zeros_and_twice_the_alpha_is_the_same_function(case):
    case = dataclasses.replace(case, rank=min(case.rank, D // 2))
    model, padded = case.model(), case.model()
    small = case.attach(model).parameters
    for name, p in case.attach(padded, rank=2 * case.rank, alpha=2 * case.alpha).parameters.items():
        p.data = numpy.concatenate([small[name].data, 0 * small[name].data], axis=0 if name.endswith("A") else 1)
    assert equal(padded(case.ids()), model(case.ids()))


@given(exacts())
def test_the_opposite_alpha_is_the_opposite_update(case):
    model, opposite = case.model(), case.model()
    case.attach(model)
    case.attach(opposite, alpha=-case.alpha)
    for slot, other in zip(model.slots.values(), opposite.slots.values()):
        assert equal(slot.fold().dense().data - slot.base.data, other.base.data - other.fold().dense().data)


@given(exacts())
def test_the_update_is_linear_in_b(case):
    model = case.model()
    for slot in case.attach(model).places.values():
        piece, base, updates = slot.attached["lora"], slot.base.data, []
        first, second = piece.B.data, fractions(numpy.random.default_rng(case.seed), *piece.B.shape)
        for b in (first, second, 3 * first - second):
            piece.B.data = b
            updates.append(slot.fold().dense().data - base)
        assert equal(updates[2], 3 * updates[0] - updates[1])


@given(exacts())
def test_euler_the_gradients_of_a_and_b_agree_along_them(case):
    """The function depends on B A alone, so <dA, A> = <dB, B> at every place."""
    model = case.model()
    attachment = case.attach(model)
    _, grads = result(model, case.batch())
    for place in attachment.places:
        a, b = ((grads[f"{place}@lora.{leaf}"] * attachment.parameters[f"{place}@lora.{leaf}"].data).sum()
                for leaf in "AB")
        assert a == b
