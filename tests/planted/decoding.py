"""Bugs in greedy search, sampling and beam search."""
from __future__ import annotations

from tests.planted.bug import Bug

DECODING = "models/decoding.py"
BEAMS, SAMPLING = "models/test_beam_search.py::test_", "models/test_sampling.py::test_"
RULES, ON_MODELS = BEAMS + "every_row_is_searched_by_the_rules_of_transformers", (
    BEAMS + "a_model_with_and_without_a_cache_searches_each_row_by_the_rules")
MIXED = BEAMS + "each_row_of_a_mixed_batch_with_prompts_is_searched_as_it_is_alone"
SETS, ORDER = SAMPLING + "the_sets_that_top_k_and_top_p_keep", (
    SAMPLING + "temperature_top_k_and_top_p_apply_in_this_order_as_in_transformers")

BUGS = [
    Bug("D8: generation prepends a prompt that is switched off", DECODING,
        "    with routed(model.host, adapter, len(ids)):",
        "    with routed(model.host, tuple(model.host.now.attached), len(ids)):",
        "defects/test_decoding.py::test_D8_a_prompt_that_is_switched_off_is_not_there_in_generation_either"),
    # ---- beam search
    Bug("beams are scored by a length that leaves out eos", DECODING,
        "(beam.total / t ** length_penalty, beam.ids)", "(beam.total / max(1, t - 1) ** length_penalty, beam.ids)",
        BEAMS + "length_penalty_divides_by_a_power_of_the_number_of_new_tokens_eos_included"),
    Bug("the length penalty multiplies", DECODING, "(beam.total / t ** length_penalty, beam.ids)",
        "(beam.total * t ** length_penalty, beam.ids)",
        BEAMS + "length_penalty_divides_by_a_power_of_the_number_of_new_tokens_eos_included"),
    Bug("a cache is not reordered when beams change places", DECODING,
        "for kept in (own,) if same_rows else (own, of_encoded):",
        "for kept in () if same_rows else (own, of_encoded):", ON_MODELS),
    Bug("the cache of the encoder's output stays when a row leaves the batch", DECODING,
        "for kept in (own,) if same_rows else (own, of_encoded):", "for kept in (own,):", ON_MODELS),
    Bug("the mask stays when a row leaves the batch", DECODING,
        "self.mask = None if self.mask is None else self.mask[order]",
        "self.mask = None if self.mask is None else self.mask[to_device(numpy.arange(len(parents)) % len(self.mask))]",
        ON_MODELS),
    Bug("the beams of a row do not have the row's adapter", DECODING,
        "[self.adapter[i] for i in parents] if isinstance(self.adapter, list) else self.adapter",
        "[self.adapter[i % len(self.adapter)] for i in range(len(parents))] "
        "if isinstance(self.adapter, list) else self.adapter", MIXED),
    Bug("as many prefixes as before are taken for those of the same rows", DECODING,
        "numpy.array_equal(self.row[parents], self.row)", "len(parents) == len(self.row)",
        BEAMS + "prefixes_may_go_back_and_forth_between_rows"),
    Bug("answers that end are not kept", DECODING, "row.finished += [", "row.finished = [", RULES),
    Bug("only as many candidates as beams are looked at", DECODING, "first, 2 * num_beams)", "first, num_beams)",
        RULES),
    Bug("an eos behind the first candidates is kept", DECODING, "zip(candidates[:num_beams], ends) if end]",
        "zip(candidates, ends) if end]", BEAMS + "an_eos_behind_the_first_candidates_is_not_kept"),
    Bug("beams that run at the last step are forgotten", DECODING,
        "ends = [t == tokens or beam.ids[-1] in stops for", "ends = [beam.ids[-1] in stops for", RULES),
    Bug("early stopping stops only where no beam can get better", DECODING, "(early_stopping is True or not any(",
        "(not any(", BEAMS + "early_stopping_says_how_long_beams_that_are_worse_now_go_on"),
    Bug("\"never\" stops as False does", DECODING, 'longest = tokens if early_stopping == "never" and',
        'longest = tokens if early_stopping == "always" and',
        BEAMS + "early_stopping_says_how_long_beams_that_are_worse_now_go_on"),
    Bug("\"never\" hopes for length where length_penalty rewards brevity", DECODING,
        'early_stopping == "never" and length_penalty > 0 else t', 'early_stopping == "never" else t',
        BEAMS + "early_stopping_says_how_long_beams_that_are_worse_now_go_on"),
    Bug("a beam is compared with the best finished answer", DECODING, "> row.finished[-1][0] for",
        "> row.finished[0][0] for", RULES),
    Bug("of equal candidates any comes first", DECODING, 'near[numpy.argsort(-totals[near], kind="stable")]',
        'near[::-1][numpy.argsort(-totals[near[::-1]], kind="stable")]', RULES),
    Bug("impossible continuations are candidates", DECODING, "(totals >= least) & (totals > -math.inf)",
        "totals >= least", BEAMS + "an_impossible_continuation_is_no_candidate"),
    Bug("beams are repeated before the encoder's output is projected", DECODING,
        "found = [Row([Beam((start,), 0.0, i)]) for i in range(rows)]",
        "found = [Row([Beam((start,), 0.0 if b == 0 else -1e9, i) for b in range(num_beams)]) for i in range(rows)]",
        BEAMS + "the_encoder_runs_once_for_each_row_and_its_output_is_projected_once_for_each_row"),
    Bug("a step of a generation reads the state anew", "nn/routing.py",
        "view.state if view is not None and view.host is host else host.now", "host.now",
        BEAMS + "a_move_during_a_generation_changes_nothing_of_it"),
    # ---- sampling
    Bug("temperature multiplies", DECODING, "keepdims=True)) / temperature", "keepdims=True)) * temperature", SETS),
    Bug("top_k drops tokens as probable as the k-th", DECODING, "z[z < numpy.partition(", "z[z <= numpy.partition(",
        SETS),
    Bug("top_p keeps less than top_p", DECODING, "enough[:, 1:] = reached[:, :-1] >= top_p",
        "enough[:] = reached > top_p", SETS),
    Bug("top_p keeps one token more", DECODING, "enough[:, 1:] = reached[:, :-1] >= top_p",
        "enough[:, 2:] = reached[:, :-2] >= top_p", SETS),
    Bug("top_p looks at probabilities from before top_k", DECODING,
        "    p = numpy.exp(z)\n    p /= p.sum(axis=-1, keepdims=True)\n",
        "    p = numpy.exp(z)\n    p /= numpy.exp((_numbers(logits) - _numbers(logits).max(axis=-1, keepdims=True)) / "
        "temperature).sum(axis=-1, keepdims=True)\n", ORDER),
    Bug("what is kept is not scaled to 1", DECODING,
        "axis=-1), axis=-1)] = 0\n        p /= p.sum(axis=-1, keepdims=True)\n", "axis=-1), axis=-1)] = 0\n", SETS),
    Bug("a number on the border draws an impossible token", DECODING, "(sums <= u[:, None])", "(sums < u[:, None])",
        SAMPLING + "no_number_draws_an_impossible_token"),
    Bug("the largest number draws no token", DECODING,
        "numpy.minimum(u * sums[:, -1], numpy.nextafter(sums[:, -1], 0))", "u",
        SAMPLING + "no_number_draws_an_impossible_token"),
    Bug("rows share their numbers step by step, so that they depend on the batch", DECODING,
        "rng.random((len(out), out.shape[1] - 1))", "rng.random((out.shape[1] - 1, len(out))).T",
        SAMPLING + "a_row_says_what_it_says_alone_with_its_own_numbers"),
    Bug("a row that has ended goes on to speak", DECODING, "        running &= numpy.isin(chosen, eos, invert=True)\n",
        "        running = numpy.isin(chosen, eos, invert=True)\n",
        SAMPLING + "rows_that_have_ended_are_filled_with_pad_and_draw_their_numbers_all_the_same"),
    Bug("options of sampling are ignored without a generator", DECODING,
        "    if rng is None and (temperature, top_k, top_p) != (1, None, 1):\n", "    if False:\n",
        SAMPLING + "options_of_sampling_without_a_generator_are_refused_with_what_to_do"),
]
