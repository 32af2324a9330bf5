"""Beam search against exhaustive search, against a plain writing of the rules of transformers, and on models."""
from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minipeft
from minipeft.engine import tensor
from minipeft.engine.tensor import Tensor
from minipeft.models.decoding import Steps, beam_search, decode, greedy
from tests.models.test_decode import IDS_OF, VOCAB, any_model, every_model, pre_ln, sources, t5_v11

EOS, START, INF = 0, 99, math.inf
Answer = tuple[float, tuple[int, ...]]


class Language:
    """A step function that draws the logits of each prefix from `values`, once and for all.

    As the decoder with its caches it knows a prefix by its parent alone. It fails if a parent is told wrongly."""

    def __init__(self, seed: int, vocab: int, values: Any = None):
        self.seed, self.vocab, self.values, self.calls = seed, vocab, values, 0
        self.seen: list[tuple[int, ...]] = []

    def logits(self, row: int, tokens: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, row, len(tokens), *tokens])
        if self.values is None:
            return 2 * rng.standard_normal(self.vocab)
        drawn = rng.choice(self.values, self.vocab)
        drawn[rng.integers(self.vocab)] = 0.0  # something is possible
        return drawn

    def __call__(self, prefixes: np.ndarray, parents: np.ndarray | None = None) -> np.ndarray:
        parents = np.arange(len(prefixes)) if parents is None else parents
        if not self.calls:
            self.seen = [(row,) for row in range(len(prefixes))]
        else:
            self.seen = [(*self.seen[parent], int(prefix[-1])) for parent, prefix in zip(parents, prefixes)]
        self.calls += 1
        assert [seen[1:] for seen in self.seen] == [tuple(prefix[1:]) for prefix in prefixes.tolist()]
        return np.stack([self.logits(row, tuple(tokens)) for row, *tokens in self.seen])


LANGUAGES = st.builds(Language, st.integers(0, 2**32), st.integers(2, 6),
                      st.sampled_from([None, (0.0, 1.0), (0.0, -1.0, 2.0, -INF)]))
PENALTIES, STOPPING = st.sampled_from([1.0, 0.0, 0.5, 2.0, -1.0]), st.sampled_from([False, True, "never"])


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def by_the_rules(logits: Callable[[tuple[int, ...]], np.ndarray], tokens: int, beams: int, penalty: float,
                 stopping: Any, eos: int = EOS, start: int = START) -> Answer:
    """Beam search of one row as transformers 4.57 computes it, with slots: `beams` running ones and `beams` finished
    ones, filled with impossible ones of score -inf at first, and flags in place of lists that shrink."""
    running, running_totals = [()] * beams, np.array([0.0] + [-INF] * (beams - 1))
    answers, scores, is_finished = [()] * beams, np.full(beams, -INF), np.zeros(beams, dtype=bool)
    can_improve = True
    for t in range(1, tokens + 1):
        log_p = np.stack([log_softmax(logits(prefix)) for prefix in running])
        totals = (log_p + running_totals[:, None]).ravel()
        vocab = log_p.shape[1]
        top = sorted(range(len(totals)), key=lambda i: (-totals[i], i))[:2 * beams]
        ids, top_totals = [(*running[i // vocab], i % vocab) for i in top], totals[top]
        hits = np.array([i[-1] == eos or t == tokens for i in ids])
        just_finished = hits & (np.arange(len(top)) < beams) & (top_totals > -INF)
        new_scores = np.where(just_finished, top_totals / t ** penalty, -INF)
        if is_finished.all() and stopping is True or not can_improve:
            new_scores[:] = -INF
        merged, merged_ids = np.concatenate([scores, new_scores]), [*answers, *ids]
        merged_flags = np.concatenate([is_finished, just_finished])
        keep = sorted(range(len(merged)), key=lambda i: (-merged[i], i))[:beams]
        answers, scores, is_finished = [merged_ids[i] for i in keep], merged[keep], merged_flags[keep]
        left = np.where(hits, -INF, top_totals)
        order = sorted(range(len(left)), key=lambda i: (-left[i], i))[:beams]
        running, running_totals = [ids[i] for i in order], left[order]
        running += [()] * (beams - len(running))
        running_totals = np.append(running_totals, [-INF] * (beams - len(running_totals)))
        horizon = tokens if stopping == "never" and penalty > 0 else t
        worst = np.where(is_finished, scores.min(), -INF)
        can_improve = can_improve and bool((running_totals[0] / horizon ** penalty > worst).any())
        if not can_improve or stopping is True and is_finished.all():
            break
    return scores[0], (start, *answers[0])


@settings(max_examples=300)
@given(LANGUAGES, st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), PENALTIES, STOPPING)
def test_every_row_is_searched_by_the_rules_of_transformers(language, rows, tokens, beams, penalty, stopping):
    """With ties, impossible tokens, eos at once, and more beams than tokens."""
    found = beam_search(language, rows, START, EOS, tokens, beams, penalty, stopping)
    assert found == [by_the_rules(lambda prefix: language.logits(row, prefix), tokens, beams, penalty, stopping)
                     for row in range(rows)]


@given(LANGUAGES, st.integers(1, 4), PENALTIES, STOPPING)
def test_with_enough_beams_it_is_exhaustive_search(language, tokens, penalty, stopping):
    vocab = language.vocab = min(language.vocab, 3)
    (score, ids), = beam_search(language, 1, START, EOS, tokens, vocab ** tokens + 1, penalty, stopping)
    scores = {}
    for answer in itertools.product(range(vocab), repeat=tokens):
        answer = answer[:answer.index(EOS) + 1] if EOS in answer else answer
        total = sum(log_softmax(language.logits(0, answer[:i]))[token] for i, token in enumerate(answer))
        scores[answer] = total / len(answer) ** penalty
    assert math.isclose(score, max(scores.values()), rel_tol=1e-12, abs_tol=1e-12)
    assert math.isclose(score, scores[ids[1:]], rel_tol=1e-12, abs_tol=1e-12), "the score is that of the ids"


@given(LANGUAGES, st.integers(1, 4), st.integers(0, 6), st.sampled_from([1.0, 0.0, 3.0]), st.booleans())
def test_one_beam_is_greedy_search(language, rows, tokens, penalty, stopping):
    found = beam_search(language, rows, START, EOS, tokens, 1, penalty, stopping)
    language.calls, out = 0, np.full((rows, 1 + tokens), 77)  # pad
    out[:, 0] = START
    said = greedy(language, out, EOS).tolist()
    assert [list(ids) for _, ids in found] == [[i for i in row if i != 77] for row in said]


@given(LANGUAGES, st.integers(2, 4), st.integers(1, 5), st.integers(1, 3), PENALTIES, STOPPING)
def test_rows_that_have_ended_leave_the_batch(language, rows, tokens, beams, penalty, stopping):
    """So the last step has the beams of those rows that go on alone."""
    beam_search(language, rows, START, EOS, tokens, beams, penalty, stopping)
    calls, last = language.calls, {seen[0] for seen in language.seen}
    for row in range(rows):
        alone = Language(language.seed, language.vocab, language.values)
        alone.logits = lambda _, tokens: language.logits(row, tokens)  # type: ignore[method-assign]
        beam_search(alone, 1, START, EOS, tokens, beams, penalty, stopping)
        assert alone.calls <= calls and (alone.calls == calls) == (row in last)


def told(script: dict[tuple[int, ...], dict[int, float]], others: float = 1e-30) -> Language:
    """A language of three tokens with these probabilities after each prefix, and eos (0) everywhere else. others: the
    probability of tokens that the script does not name."""
    language = Language(0, 3)
    language.logits = lambda row, tokens: np.array(  # type: ignore[method-assign]
        [math.log(p) if (p := script.get(tokens, {0: 1.0}).get(token, others)) else -INF for token in range(3)])
    return language


def test_length_penalty_divides_by_a_power_of_the_number_of_new_tokens_eos_included():
    """p("0") = 0.5 with 1 token; p("1 1 0") = 0.4 with 3. log 0.5 = -0.693, log 0.4 / 3 = -0.305."""
    language = told({(): {0: 0.5, 1: 0.4, 2: 0.1}, (1,): {1: 1.0}, (1, 1): {0: 1.0}})
    for penalty, ids, score in ((0.0, (99, 0), math.log(0.5)), (1.0, (99, 1, 1, 0), math.log(0.4) / 3),
                                (2.0, (99, 1, 1, 0), math.log(0.4) / 9), (-1.0, (99, 0), math.log(0.5))):
        language.calls = 0
        (found, said), = beam_search(language, 1, START, EOS, 5, 2, penalty)
        assert said == ids and math.isclose(found, score), penalty


def test_early_stopping_says_how_long_beams_that_are_worse_now_go_on():
    """With 1 beam: "1 0" (p 0.36) is finished at step 2, when "1 2" (p 0.24) runs. In six tokens it scores better."""
    script = {(): {1: 0.6, 2: 0.4}, (1,): {0: 0.6, 2: 0.4}, **{(1, 2) + (2,) * i: {2: 1.0} for i in range(9)}}
    for stopping, ids in ((True, (99, 1, 0)), (False, (99, 1, 0)), ("never", (99, 1) + (2,) * 7)):
        (_, said), = beam_search(told(script), 1, START, EOS, 8, 1, 1.0, stopping)
        assert said == ids, stopping
    # with 2 beams False goes on where True stops: the best running beam is better than the worst of the finished ones
    script = {(): {0: 0.3, 1: 0.7}, (1,): {0: 0.05, 2: 0.95}, (1, 2): {0: 1.0}}
    calls = {}
    for stopping in (True, False):
        language = told(script)
        assert beam_search(language, 1, START, EOS, 8, 2, 0.0, stopping)[0][1] == (
            (99, 0) if stopping is True else (99, 1, 2, 0))
        calls[stopping] = language.calls
    assert calls == {True: 2, False: 3}
    # "0" and "2 0" are finished at step 2, when "1 2" runs: 2 log 0.285 > 2 log 0.08 > 8 log 0.285
    language = told({(): {0: 0.6, 1: 0.3, 2: 0.1}, (1,): {2: 0.95, 0: 0.05}, (2,): {0: 0.8, 1: 0.1, 2: 0.1}})
    assert beam_search(language, 1, START, EOS, 8, 2, -1.0, "never")[0][1] == (99, 0)
    assert language.calls == 3, "where length costs, a beam is best as it is"


def test_an_impossible_continuation_is_no_candidate():
    """Else "0", of probability 0, would count as the first of two finished answers, and "1 0" end the search."""
    language = told({(): {1: 1.0}, (1,): {0: 0.5, 1: 0.5}, (1, 1): {0: 1.0}}, others=0.0)
    (score, said), = beam_search(language, 1, START, EOS, 6, 2, 2.0, True)
    assert said == (99, 1, 1, 0) and math.isclose(score, math.log(0.5) / 9)


def test_an_eos_behind_the_first_candidates_is_not_kept():
    """With 1 beam, eos is second at the first step, and no other answer of one token competes later."""
    (_, said), = beam_search(told({(): {1: 0.5, 0: 0.4, 2: 0.1}, (1,): {2: 0.5, 1: 0.5}, (1, 1): {0: 0.01, 2: 0.99}}),
                             1, START, EOS, 3, 1, 0.0)
    assert said == (99, 1, 1, 2)


# ------------------------------------------------------------------------------------------------------------ on models

def trained_on(model: Any, method: Any, name: str, seed: int) -> Any:
    attachment = minipeft.attach(model, method, np.random.default_rng(seed), name)
    for p in attachment.parameters.values():
        p.data = p.data + 0.5 * np.random.default_rng(seed).standard_normal(p.shape)
    attachment.unplug()


def searched(model: Any, ids: Any, mask: Any, tokens: int, beams: int, penalty: float = 1.0, stopping: Any = False,
             adapter: Any = None) -> tuple[list, np.ndarray]:
    """`by_the_rules` on each row alone, every prefix run from its beginning, without a cache."""
    c, found = model.config, []
    for row in range(len(ids)):
        def logits(prefix: tuple[int, ...]) -> np.ndarray:
            entry = [adapter[row]] if isinstance(adapter, list) else adapter
            return model(ids[row:row + 1], [[c.decoder_start_token_id, *prefix]], mask[row:row + 1],
                         adapter=entry).data[0, -1]
        found.append(by_the_rules(logits, tokens, beams, penalty, stopping, c.eos_token_id, c.decoder_start_token_id))
    return [list(answer) for _, answer in found], np.array([score for score, _ in found])


def unpadded(ids: np.ndarray, model: Any) -> list[list[int]]:
    """The rows up to their eos; what follows is pad."""
    c, rows = model.config, []
    for row in ids.tolist():
        end = row.index(c.eos_token_id, 1) + 1 if c.eos_token_id in row[1:] else len(row)
        assert set(row[end:]) <= {c.pad_token_id}
        rows.append(row[:end])
    return rows


def often_ending(model: Any, ids: Any, mask: Any, adapter: Any = None) -> None:
    """Make the third token of the first answer the eos, so that answers have several
    lengths."""
    eos = int(model.generate(ids, mask, 3, adapter)[0, -1])
    model.config = dataclasses.replace(model.config, eos_token_id=2 if eos in (3, 5) else eos)


@settings(max_examples=15)
@given(any_model, st.integers(0, 2**32), st.integers(2, 4), PENALTIES, STOPPING)
def test_a_model_with_and_without_a_cache_searches_each_row_by_the_rules(build, seed, beams, penalty, stopping):
    model, (ids, mask) = build(seed, **IDS_OF), sources(seed)
    often_ending(model, ids, mask)
    wanted, scores = searched(model, ids, mask, 5, beams, penalty, stopping)
    for use_cache in (True, False):
        found, own = decode(model, ids, mask, 5, None, use_cache, beams, penalty, stopping)
        assert unpadded(found, model) == wanted and found.shape[1] == max(map(len, wanted))
        assert np.allclose(own, scores, rtol=1e-9, atol=0)
        assert np.array_equal(model.generate(ids, mask, 5, None, use_cache, beams, penalty, stopping), found)


ROUTING = ["lora", None, {"lora": -0.5}, ("lora", "prompt"), ("prefix", "bottleneck"), "prefix"]


def with_adapters(seed: int = 0) -> Any:
    model = t5_v11(seed, **IDS_OF)
    for i, (name, method) in enumerate({"lora": minipeft.LoRA(3), "prompt": minipeft.PromptTuning(2),
                                        "bottleneck": minipeft.Bottleneck(size=4),
                                        "prefix": minipeft.PrefixTuning(3)}.items()):
        trained_on(model, method, name, i + 10 * seed)
    return model


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_row_of_a_mixed_batch_with_prompts_is_searched_as_it_is_alone(use_cache):
    model, (ids, mask) = with_adapters(), sources(rows=6)
    often_ending(model, ids, mask, ROUTING)
    wanted, scores = searched(model, ids, mask, 6, 3, adapter=ROUTING)
    found, own = decode(model, ids, mask, 6, ROUTING, use_cache, 3)
    assert unpadded(found, model) == wanted and np.allclose(own, scores, rtol=1e-9, atol=0)
    assert len({tuple(row) for row in wanted}) > 3 and len(set(map(len, wanted))) > 1, "they differ"
    for i, entry in enumerate(ROUTING):
        alone, score = decode(model, ids[i:i + 1], mask[i:i + 1], 6, [entry], use_cache, 3)
        assert unpadded(alone, model) == [wanted[i]] and np.allclose(score, scores[i], rtol=1e-9, atol=0)


def test_a_move_during_a_generation_changes_nothing_of_it():
    model, (ids, mask) = with_adapters(), sources()
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "adapter": ["lora", "prompt", None]}):
        model.attachments["lora"].plug()
        wanted, real = model.generate(ids, mask, 6, **options), model.logits

        def logits(hidden: Tensor) -> Tensor:
            if model.attachments["lora"].state == "plugged":
                model.attachments["lora"].unplug()
            return real(hidden)

        model.logits = logits
        assert np.array_equal(model.generate(ids, mask, 6, **options), wanted)
        model.logits = real
        assert model.attachments["lora"].state == "off"


def test_the_encoder_runs_once_for_each_row_and_its_output_is_projected_once_for_each_row():
    model, (ids, mask) = t5_v11(**{**IDS_OF, "eos_token_id": VOCAB - 1}), sources()
    names = {id(p): name for name, p in model.base_parameters.items()}
    rows: dict[str, list[int]] = {}

    def observe(forward: Any, inputs: tuple, *_: Any) -> None:
        if forward.__name__ == "linear" and id(inputs[1]) in names:
            rows.setdefault(names[id(inputs[1])], []).append(tensor.array_of(inputs[0]).shape[0])

    token = tensor._observer.set(observe)
    try:
        assert model.generate(ids, mask, 4, num_beams=5, early_stopping="never").shape == (3, 5)
    finally:
        tensor._observer.reset(token)
    assert rows["encoder.0.attn.q.weight"] == rows["decoder.0.cross.k.weight"] == [3]
    assert rows["decoder.2.attn.k.weight"] == [3, 15, 15, 15], "the beams of a row are one prefix at the first step"


@every_model
def test_no_token_gives_the_start_and_a_score_of_0(build):
    model, (ids, mask) = build(**IDS_OF), sources()
    found, scores = decode(model, ids, mask, 0, num_beams=3)
    assert found.tolist() == [[5], [5], [5]] and scores.tolist() == [0, 0, 0]
    assert decode(model, ids, mask, 2)[1] is None, "greedy search has none"


def test_more_beams_than_tokens_are_as_many_as_there_can_be():
    model, (ids, mask) = t5_v11(**IDS_OF), sources(rows=2)
    found, scores = decode(model, ids, mask, 2, num_beams=VOCAB ** 2)
    first = model(ids, [[5], [5]], mask).data[:, 0]
    for row in range(2):
        best = max((log_softmax(first[row])[a] + log_softmax(
            model(ids[row:row + 1], [[5, a]], mask[row:row + 1]).data[0, 1]).max()) / 2 for a in range(VOCAB) if a != 2)
        assert math.isclose(scores[row], max(best, log_softmax(first[row])[2]), rel_tol=1e-9)


@pytest.mark.parametrize("options, message", [
    *(({"num_beams": value}, f"num_beams is {value!r}; expected an integer >= 1") for value in (0, -1, 2.0, True, "3")),
    *(({"num_beams": 2, "length_penalty": value}, f"length_penalty is {value!r}; expected a finite number")
      for value in (math.nan, INF, "1", True)),
    ({"num_beams": 2, "length_penalty": 500}, "length_penalty is 500.0; expected a number for which max_new_tokens .*"),
    *(({"num_beams": 2, "early_stopping": value}, f"early_stopping is {value!r}; expected True, False or 'never'")
      for value in (1, None, "always", [])),
    ({"length_penalty": 2.0}, "length_penalty is 2.0 and early_stopping False with num_beams 1; .* beam search alone"),
    ({"early_stopping": True}, "length_penalty is 1.0 and early_stopping True with num_beams 1; .*"),
    ({"num_beams": 2, "rng": np.random.default_rng(0)}, "rng is given with num_beams 2; expected num_beams 1.*")])
def test_an_option_of_beam_search_out_of_range_is_refused_before_anything_runs(options, message):
    model, (ids, mask) = pre_ln(), sources()
    model.encoder = None
    with pytest.raises(ValueError, match=f"^{message.replace('[]', '.*')}"):
        model.generate(ids, mask, 8, **options)


def test_logits_that_are_not_numbers_end_the_search_with_an_error():
    model, (ids, mask) = t5_v11(), sources()
    for gone in (np.nan, INF, -INF):
        model.logits = lambda hidden: Tensor(np.full((hidden.shape[0], 1, VOCAB), gone))
        with pytest.raises(ValueError, match="the largest logit of the next token is NaN or infinite"):
            model.generate(ids, mask, 3, num_beams=2)


def test_prefixes_may_go_back_and_forth_between_rows():
    """What a cache gives after any choice of parents is what the decoder gives for the prefixes alone."""
    model, (ids, mask) = with_adapters(), sources(rows=4)
    routing = ["lora", "prompt", None, ("prompt", "bottleneck")]
    with minipeft.nn.routing.routed(model.host, routing, 4):
        encoded, seen = model.encoder(model.embed(ids), mask.astype(bool))
        step = Steps(model, encoded.data, seen, routing, model.new_cache(5, encoded.shape[1]))
        rows, prefixes = np.arange(4), np.full((4, 1), 5)
        for parents, tokens in (([0, 1, 2, 3], []), ([3, 3, 0, 1, 2, 1], [7, 8, 9, 7, 8, 9]), ([5, 0, 1], [6, 6, 9]),
                                ([0, 1, 2], [10, 11, 12]), ([2, 0, 0], [13, 7, 8])):
            if tokens:
                rows, prefixes = rows[parents], np.concatenate([prefixes[parents], np.array(tokens)[:, None]], axis=1)
            found = step(prefixes, np.array(parents))
            for i, row in enumerate(rows):
                alone = model(ids[row:row + 1], prefixes[i:i + 1], mask[row:row + 1], adapter=[routing[row]])
                assert np.allclose(found[i], alone.data[0, -1], rtol=0, atol=1e-11 * np.abs(found).max())
