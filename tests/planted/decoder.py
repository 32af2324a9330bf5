"""Bugs in the decoder: positions, grouped heads, the loss, its files and its generation."""
from __future__ import annotations

from tests.planted.bug import Bug

CAUSAL, ROTARY, DECODER = "nn/causal.py", "nn/rotary.py", "models/decoder.py"
CONFIG, FILES, CONTINUING = "models/decoder_config.py", "models/decoder_files.py", "models/continuing.py"
ON, GOLDEN, NN, TURN = (f"{name}::test_" for name in (
    "models/test_decoder.py", "models/test_decoder_golden.py", "nn/test_causal.py", "nn/test_rotary.py"))
ALONE = ON + "rows_padded_on_either_side_are_continued_as_they_are_alone"
MIXED = ON + "rows_with_adapters_of_their_own_are_continued_as_they_are_alone"
LOGITS = GOLDEN + "logits_and_loss_agree_to_1e_12_in_rows_padded_on_either_side"
REFUSED = ON + "a_field_that_changes_the_mathematics_is_refused_by_name"
GROUPED = NN + "grouped_queries_attend_as_to_repeated_keys_and_values_in_value_and_all_gradients"

BUGS = [
    Bug("neighbors are paired, as in the paper", "engine/ops/fused.py",
        "x.reshape(*x.shape[:2], x.shape[2] // (2 * half), 2, half)[..., i, :]",
        "x.reshape(*x.shape[:2], x.shape[2] // (2 * half), half, 2)[..., i]", LOGITS),
    Bug("the gradient is turned on, and not back", "engine/ops/fused.py", "(lambda g: turned(g, -sin), None, None)",
        "(lambda g: turned(g, sin), None, None)", GOLDEN + "every_gradient_agrees_to_1e_10_of_its_largest_entry"),
    Bug("heads that share keys are interleaved", CAUSAL, "split = q.reshape(batch, queries, kv_heads, times, width",
        "split = q.reshape(batch, queries, times, kv_heads, width", GROUPED),
    Bug("the mask has the heads of a query, and not the queries of a head, behind each other", CAUSAL,
        "xp.concatenate([additive(seen, dtype)] * (times if queries > 1 else 1), axis=2)",
        "xp.repeat(additive(seen, dtype), times if queries > 1 else 1, axis=2)",
        NN + "unseen_hides_padding_and_the_future_in_every_head_and_nothing_for_one_query_without_padding"),
    Bug("the norms of heads come behind the rotation", CAUSAL,
        "        q, k = rotate(q, *rotation), rotate(k, *rotation)\n",
        "        q, k = (self._by_head(n, rotate(x, *rotation)) for n, x in ((self.q_norm, q), (self.k_norm, k))) "
        "if self.normed else (rotate(q, *rotation), rotate(k, *rotation))\n", LOGITS),
    Bug("a new token has position 0", CAUSAL, "positions_of(mask, 0, start + time)[..., start:]",
        "positions_of(None if mask is None else mask[:, start:], 0, time)",
        ON + "generation_with_a_cache_is_the_argmax_of_forwards_on_growing_rows"),
    Bug("padding on the right stays between a row and its new tokens", CAUSAL,
        "last = mask.shape[1] - to_host(mask)[:, ::-1].argmax(axis=1)", "last = numpy.zeros(len(mask), dtype=int)",
        ALONE),
    Bug("keys of a prefix are where the text begins", "methods/prefix.py", "if self.rotary is not None:",
        "if self.rotary is False:", ON + "a_prefix_is_unrotated_keys_with_every_token_p_positions_later"),
    Bug("llama3 divides the high frequencies", ROTARY, "numpy.where(wavelength > self.length / self.low,",
        "numpy.where(wavelength < self.length / self.low,", GOLDEN + "the_frequencies_are_those_of_transformers"),
    Bug("tables are computed in the dtype of the model", ROTARY, "[..., None] * self.frequencies\n",
        "[..., None].astype(self.dtype) * self.frequencies.astype(self.dtype)\n",
        TURN + "linear_divides_every_frequency_and_tables_have_the_dtype_of_the_model"),
    Bug("the labels are not shifted", DECODER, "[:, -ids.shape[1]:-1]", "[:, -ids.shape[1]:][:, 1:]", LOGITS),
    Bug("a prompt stays in the logits", DECODER, "self._hidden(ids, mask, rng)[:, -ids.shape[1]:], rng)",
        "self._hidden(ids, mask, rng), rng)", ON + "a_prompt_is_neither_in_the_logits_nor_in_the_loss"),
    Bug("a sliding window is overlooked", CONFIG, "    if in_use:\n", "    if False:\n", REFUSED),
    Bug("fields that are not known are ignored", CONFIG, "if name not in fields | _IGNORED and",
        "if name not in fields | _IGNORED and False and", REFUSED),
    Bug("a tied head of a file is dropped though it differs", FILES,
        "if not same(tensors[_HEAD], tensors[_TABLE]):", "if False:", REFUSED),
    Bug("every step reads the first new token", CONTINUING, "x = self.model.embed(new[:, -1:])",
        "x = self.model.embed(new[:, :1])", ON + "generation_with_a_cache_is_the_argmax_of_forwards_on_growing_rows"),
    Bug("the adapters of rows do not follow beams", CONTINUING,
        "self.adapter = [self.adapter[i] for i in parents] if isinstance(self.adapter, list) else self.adapter",
        "pass", MIXED),
    Bug("only the first stop token ends a row", CONTINUING, "    return ends\n", "    return ends[:1]\n",
        ON + "a_row_ends_at_any_token_of_stop_and_is_filled_with_pad"),
]
