"""Faults of numbers: overflow on the way, positions and padding, the position bias, gradient checks at kinks."""
from __future__ import annotations

from tests.planted.bug import Bug

OVERFLOW, FUSED, ACTIVATIONS = (f"engine/ops/{name}.py" for name in ("overflow", "fused", "activations"))
CHECK = "engine/check.py"
POSITIONS, BLOCKS, ATTENTION = "nn/positions.py", "nn/blocks.py", "nn/attention.py"
HUGE, PADDING = "engine/ops/test_overflow.py::test_", "test_laws_padding.py::test_"
DISTANCES = "nn/test_positions.py::test_"
OURS, PROMPT = "conformance/methods/soft_prompt/ours.py", "conformance/test_soft_prompt.py::test_"
KINKS, LAW_9 = "engine/test_check.py::test_", "engine/ops/test_fused.py::test_"
NORM = HUGE + "a_norm_of_numbers_whose_squares_overflow_is_that_of_longer_floats_in_value_and_all_gradients"
SCORES = HUGE + "attention_whose_scores_overflow_is_that_of_longer_floats_and_sees_no_hidden_key"
ENTROPY = HUGE + "cross_entropy_of_logits_whose_sums_overflow_is_finite_and_right"
MODELS = HUGE + "a_float32_model_with_huge_embeddings_computes_what_the_float64_one_does"
ALONE = PADDING + "a_row_gives_the_logits_that_it_gives_alone_wherever_it_stands_in_encoder_and_decoder"
NOWHERE = LAW_9 + "a_query_that_may_look_nowhere_averages_all_values_and_stays_finite"
EQUAL = LAW_9 + "a_fused_op_equals_its_definition_in_value_and_all_gradients"
TABLE = DISTANCES + "the_bias_of_a_query_and_a_key_is_the_tables_row_of_the_bucket_of_their_distance"
PEAK = DISTANCES + "a_forward_over_2000_tokens_holds_at_most_two_and_a_half_arrays_of_scores"

BUGS = [
    # ---- overflow
    Bug("an rms norm whose squares overflow is 0", FUSED, "if not xp.isfinite(square).all():", "if False:",
        MODELS),
    Bug("a layer norm whose squares overflow is 0 or NaN", FUSED, "if not xp.isfinite(variance).all():", "if False:",
        MODELS),
    Bug("the mean of a row that overflowed is not taken off", FUSED, "eps, centered=True)", "eps, centered=False)",
        NORM),
    Bug("1 / sqrt of a row that overflowed is that of the scaled row", OVERFLOW, "xp.ldexp(deviation, n)", "deviation",
        NORM),
    Bug("epsilon grows with the scale of a row that overflowed", OVERFLOW,
        "least = xp.ldexp(xp.full_like(deviation, math.sqrt(eps)), -n)",
        "least = xp.ldexp(xp.full_like(deviation, math.sqrt(eps)), n)", NORM),
    Bug("one row that overflows has all rows scaled", FUSED,
        "normalize_again(x, z, r, ~xp.isfinite(square[..., 0]), eps",
        "normalize_again(x, z, r, xp.isfinite(square[..., 0]) | True, eps",
        HUGE + "rows_that_do_not_overflow_keep_their_bits_beside_rows_that_do"),
    Bug("an infinity has a norm", OVERFLOW, "xp.where(xp.isfinite(deviation), deviation, math.nan)", "deviation",
        HUGE + "a_row_with_nan_or_an_infinity_has_no_norm_and_other_rows_do_not_hear_of_it"),
    Bug("a constant row of huge numbers is NaN", OVERFLOW,
        "xp.where(deviation == 0, y, y / xp.hypot(deviation, least))",
        "y / xp.hypot(deviation, least * 0)", HUGE + "a_constant_row_of_huge_numbers_has_a_layer_norm_of_0"),
    Bug("scores that overflow are NaN", FUSED, "blind = None if xp.isfinite(top).all() else",
        "blind = None if True else", SCORES),
    Bug("the bias of scores that overflowed is not scaled with them", OVERFLOW, "s += xp.ldexp(bias, -n)", "s += bias",
        HUGE + "scores_that_overflow_are_told_apart_by_a_bias_of_their_own_size"),
    Bug("scores that overflowed come back unscaled", OVERFLOW, "xp.copyto(p, xp.ldexp(s - largest, n), where=lost)",
        "xp.copyto(p, s - largest, where=lost)", SCORES),
    Bug("one query whose scores overflow changes the others", OVERFLOW,
        "xp.copyto(p, xp.ldexp(s - largest, n), where=lost)",
        "p[...] = xp.ldexp(s - largest, n)",
        HUGE + "queries_whose_scores_do_not_overflow_keep_their_bits_beside_those_whose_do"),
    Bug("a query that may look nowhere gives NaN", OVERFLOW,
        "blind = blind | (bias.max(axis=1, keepdims=True) == -math.inf)", "pass", NOWHERE),
    Bug("a gradient goes through scores that do not matter", FUSED, "dp *= ~blind", "pass",
        "engine/ops/test_fused.py::test_a_query_that_may_look_nowhere_averages_all_values_and_stays_finite"),
    Bug("the mask is the smallest number, which a score below it beats", ATTENTION, "xp.full((), -math.inf, dtype)",
        "xp.full((), float(xp.finfo(dtype).min), dtype)", MODELS),
    Bug("the derivative of gelu_tanh is 0 times infinity far out", ACTIVATIONS, "xp.asarray(xp.clip(x, -FAR, FAR))",
        "x + 0", HUGE + "activations_and_their_derivatives_hold_to_the_end_of_the_range"),
    Bug("gelu_tanh doubles before it halves", ACTIVATIONS, "    out *= 0.5\n    out *= x\n",
        "    out *= x\n    out *= 0.5\n", HUGE + "activations_and_their_derivatives_hold_to_the_end_of_the_range"),
    Bug("a loss that nobody asked for makes NaN of the mean", FUSED,
        "loss = xp.where(counted, loss, xp.zeros((), loss.dtype))", "loss = loss * counted", ENTROPY),
    Bug("losses that fit have a sum that does not", FUSED,
        "return total / count if xp.isfinite(total) else (loss / count).sum(), (vjp, None)",
        "return total / count, (vjp, None)", ENTROPY),
    Bug("the logits of a row have a sum that does not fit", FUSED,
        "(mean if xp.isfinite(mean).all() else (z / vocab).sum(axis=-1))", "mean", ENTROPY),
    # ---- positions and padding
    Bug("padding on the left takes positions in the decoder alone", BLOCKS,
        "positions_of(mask, start, time)", "positions_of(mask if encoded is None else None, start, time)", ALONE),
    Bug("all padding is taken out, holes and all", POSITIONS,
        "return numpy.maximum(columns - padding[:, None], 0) if padding.any() else columns",
        "return numpy.maximum(to_host(mask).cumsum(axis=1) - 1, 0) if not mask.all() else columns",
        PADDING + "a_hole_in_the_mask_keeps_its_place_with_padding_in_front_and_without"),
    Bug("all rows start where the first row does", POSITIONS, "columns - padding[:, None]",
        "columns - 0 * padding[:, None] - padding[0]", ALONE),
    Bug("positions go on below 0 on the left of a row", POSITIONS,
        "numpy.maximum(columns - padding[:, None], 0)", "columns - padding[:, None]",
        DISTANCES + "positions_start_at_the_first_true_of_each_row_and_a_hole_keeps_its_place"),
    Bug("a decoder sees its padding", BLOCKS, "seen & causal(*decoding)", "causal(*decoding)", ALONE),
    Bug("the kit's own minipeft counts columns and says tokens", OURS, "positions_of(seen, 0, n)", "numpy.arange(n)",
        PROMPT + "minipeft_fails_nothing_in_either_place"),
    Bug("a case that says nothing of a convention gets another id when one is added", "conformance/plugin.py",
        "if name not in method.later or value != method.conventions[name][0]:", "if True:",
        PROMPT + "declaring_the_default_of_a_convention_that_came_later_is_declaring_nothing"),
    Bug("who counts tokens is held against vectors that count columns", "conformance/vectors/run.py",
        "in method.meant(case.conventions).items()", "in case.conventions.items()",
        PROMPT + "the_vectors_of_v2_are_for_who_counts_tokens_and_those_of_v1_for_both_where_nobody_can_tell"),
    Bug("the vectors that came later are not read", "conformance/vectors/read.py",
        'if not (LATER / f"{method}.json").is_file():', "if True:",
        PROMPT + "the_vectors_of_v2_are_for_who_counts_tokens_and_those_of_v1_for_both_where_nobody_can_tell"),
    # ---- the position bias
    Bug("distances are those of query - key", POSITIONS, "numpy.arange(keys - 1 - start, -queries - start, -1)",
        "numpy.arange(1 - keys + start, queries + start)", TABLE),
    Bug("distances forget where decoding goes on", POSITIONS, "numpy.arange(keys - 1 - start, -queries - start, -1)",
        "numpy.arange(keys - 1, -queries, -1)", TABLE),
    Bug("a bucket is looked up for each pair of a query and a key", POSITIONS,
        "        return toeplitz(self.weight.table(to_device(ids)), queries=queries)\n",
        "        pairs = numpy.arange(queries)[:, None] - numpy.arange(keys) + keys - 1\n"
        "        b = self.weight.table(to_device(ids[pairs]))\n"
        "        b = b if b.ndim == 4 else b.reshape(1, *b.shape)\n"
        "        return b.transpose(0, 3, 1, 2)\n",
        DISTANCES + "the_bias_is_looked_up_for_each_distance_and_not_for_each_pair"),
    Bug("diagonals are laid the wrong way", FUSED, "return view[..., ::-1], (vjp,)", "return view, (vjp,)",
        EQUAL + "[toeplitz]"),
    Bug("the sum of a diagonal leaves the last key out", FUSED, "for k in range(keys):", "for k in range(keys - 1):",
        EQUAL + "[toeplitz]"),
    Bug("bias and mask are added into one array as large as the scores", ATTENTION, "if self.keys_values.used:",
        "if True:", PEAK),
    Bug("a keys_values site does not see what is masked", ATTENTION, "self.keys_values(k, v, _sum(bias, mask))",
        "self.keys_values(k, v, bias)",
        "nn/test_site.py::test_an_input_site_can_lengthen_the_source_and_its_mask_goes_to_both_stacks"),
    # ---- gradient checks
    Bug("a gradient is judged at the first step, whatever lies within it", CHECK,
        "agreed = agreed + 1 if truncation <= rounding else 0", "agreed += 1",
        KINKS + "wrong_gradients_of_models_are_refused_from_a_millionth_on"),
    Bug("two extrapolations that agree by chance let a wrong gradient pass", CHECK, "_SURE = 3", "_SURE = 1",
        KINKS + "a_wrong_gradient_does_not_hide_behind_a_kink_at_any_distance"),
    Bug("a kink at the very point is called a wrong gradient", CHECK, "if differences.kinked(first):", "if False:",
        KINKS + "a_kink_at_the_very_point_is_called_one_and_says_what_to_do"),
    Bug("a wrong gradient is called a kink", CHECK, "if differences.kinked(first):", "if True:",
        KINKS + "a_wrong_vjp_is_caught_and_its_parameter_named"),
    Bug("where nothing agrees all gradients pass", CHECK,
        "            raise ValueError(_NOWHERE.format(names=names, least=_LEAST))\n", "            return 1.0\n",
        KINKS + "a_kink_that_differences_cannot_get_past_is_no_wrong_gradient"),
]
