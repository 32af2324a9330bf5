"""Bugs to plant: each a source edit that must match exactly once, and the unmodified test that must then fail.

They are mistakes that people have made with these families of methods, and the classic ones around them. The last
field says which law or test catches the bug. A test is named by file and function. All of them pass on the sources as
they are.
"""
from __future__ import annotations

from tests.planted.bug import Bug

LAWS = "test_laws.py::test_law_"
MASKING, ROUTING = "test_laws_masking.py::test_law_5_", "test_laws_routing.py::test_law_8_"
ANY_SEQUENCE = "test_laws_undo.py::test_law_4_any_sequence_of_moves_can_be_undone_and_illegal_ones_move_nothing"
OF_LORA, EXACT, BACKENDS = ("test_laws_lora.py::test_law_", "test_laws_exact.py::test_law_",
                            "test_laws_backends.py::test_")
WALK = "test_laws_undo.py::test_law_4_on_a_walk_that_makes_every_move_from_every_state_at_least_20_times"
EQUATION = OF_LORA + "1_the_dense_weight_is_the_equation_of_the_paper"
PROJECT = OF_LORA + "1_project_is_multiplication_by_the_dense_weight_in_value_and_gradient"
MERGED_SLOT = OF_LORA + "3_the_merged_weight_and_its_product_are_within_the_bound_at_every_slot"
MERGED_MODEL = LAWS + "3_a_merged_model_computes_what_the_unmerged_one_does"
LAW_9 = "engine/ops/test_fused.py::test_a_fused_op_equals_its_definition_in_value_and_all_gradients"
FEW = "engine/ops/test_fused.py::test_few_rows_and_many_are_multiplied_alike_by_a_matrix_of_any_number_of_blocks"
FUSED = LAWS + "9_a_whole_model_of_fused_ops_is_the_model_of_definitions"
ROW_ALONE = ROUTING + "each_row_of_a_mixed_batch_is_that_row_alone"
SUBSET = MASKING + "gradients_are_those_of_the_selection_and_bit_equal_to_the_full_ones"
MODELS = "models/test_encoder_decoder.py::test_"
TRANSPARENT = LAWS + "2_attaching_changes_no_output_value_at_initialization"
ROUND_TRIP = LAWS + "7_what_is_loaded_is_what_was_saved"
ADAPTER = EXACT + "1_an_adapter_is_its_equation_number_for_number"
DELTA = EXACT + "1_a_delta_is_added_to_the_base_number_for_number"
LONGER = "methods/test_prompt.py::test_prompting_is_running_the_base_on_a_vocabulary_longer_by_the_prompt"
GOLDEN = "models/test_transformer_golden.py::test_the_output_is_that_of_torch_to_1e_12"

LORA, ATTACH, FUSED_OPS, ENGINE = "methods/lora.py", "attaching/attach.py", "engine/ops/fused.py", "engine/tensor.py"
MOVES, ORDER, SLOT = "attaching/attachment.py", "attaching/order.py", "nn/slot.py"
ADAPTERS, SELECTIVE, PROMPT, SITE = "methods/bottleneck.py", "methods/selective.py", "methods/prompt.py", "nn/site.py"
TRAINED_ON, PLACE = "attaching/trained_on.py", "methods/per_place.py"
SCALE = "scale = Fraction(alpha) / Fraction(divisor)"
OF_LORA_DROPS = "    @property\n    def drops(self) -> bool:\n"

BUGS = [
    # ---- the scale
    Bug("the scale alpha / r is forgotten", PLACE, SCALE, "scale = Fraction(1)", EQUATION),
    Bug("the scale is alpha", PLACE, SCALE, "scale = Fraction(alpha)", EQUATION),
    Bug("the scale is alpha r", PLACE, SCALE, "scale = Fraction(alpha) * rank", EQUATION),
    Bug("the scale is alpha / sqrt(r)", PLACE, SCALE,
        "scale = Fraction(alpha / math.sqrt(rank))", EQUATION),
    Bug("alpha is read as an integer", PLACE, SCALE, "scale = Fraction(int(alpha)) / Fraction(divisor)", EQUATION),
    Bug("a lookup forgets the scale", LORA, "self.scale * (embedding(self.B, ids) @ self.A)",
        "(embedding(self.B, ids) @ self.A)",
        OF_LORA + "1_rows_are_rows_of_the_dense_weight_in_value_and_gradient"),
    # ---- merging, undoing, stacking
    Bug("merging adds (B A)^T where W is square", "nn/weight.py", "        return Parameter(self.dense().data)\n",
        "        w, d = self.base.dense().data, self.dense().data\n"
        "        return Parameter(w + (d - w).T if w.shape[0] == w.shape[-1] else d)\n", MERGED_SLOT),
    Bug("merging forgets the scale", LORA, OF_LORA_DROPS,
        "    def merged(self):\n        return Parameter(self.base.dense().data + self.B.data @ self.A.data)\n\n"
        + OF_LORA_DROPS, MERGED_SLOT),
    Bug("merging ignores what was merged below", ORDER, "return below[-1].merged if below else place.base",
        "return place.base", MERGED_SLOT),
    Bug("a merged forward adds the adapter again", SLOT,
        "weight = entry.merged if entry.merged is not None else entry.piece.over(weight)",
        "weight = entry.piece.over(weight if entry.merged is None else entry.merged)", MERGED_MODEL),
    Bug("the upper of two replaces the lower", SLOT,
        "else entry.piece.over(weight)", "else entry.piece.over(self.base)", MERGED_MODEL),
    Bug("a second merge is taken", MOVES, 'self._required("merge", "plugged")',
        'self._required("merge", "plugged", "merged")',
        "attaching/test_attach.py::test_an_illegal_move_names_the_state_and_the_one_expected"),
    Bug("merging above an unmerged one is taken", ORDER, "    if loose:\n",
        "    below = tuple(entry for entry in below if entry.merged is not None)\n    if False:\n", ANY_SEQUENCE),
    Bug("unmerging below a merged one is taken", MOVES,
        '        nothing_merged_above("unmerge", self.name, self._places, now)\n', "",
        "attaching/test_attach.py::test_merging_above_an_unmerged_one_is_refused_and_names_it_and_the_place"),
    Bug("unmerging subtracts from the base instead of keeping it", MOVES,
        'nothing_merged_above("unmerge", self.name, self._places, now)',
        'nothing_merged_above("unmerge", self.name, self._places, now)\n'
        "        for place, constant in now.plugged[self.name].items():\n"
        "            base = place.base\n"
        "            base.data = constant.data - (self.at[place].over(base).dense().data - base.data)", WALK),
    Bug("unplugging leaves the last place as it is: a swap leaves the old one", MOVES,
        "        return now.replace(plugged=without(now.plugged, self.name))\n",
        "        last, kept = list(self.at)[-1], now.entries\n"
        "        now = now.replace(plugged=without(now.plugged, self.name))\n"
        "        now.entries[last] = kept[last]\n        return now\n",
        ROUTING + "swapping_a_b_a_gives_the_bits_of_a_again"),
    Bug("attaching draws a number before it has checked", ATTACH,
        "    plan, before = tried(wanted(model, method)), rng.bit_generator.state\n",
        "    rng.random()\n    plan, before = tried(wanted(model, method)), rng.bit_generator.state\n",
        "attaching/test_attach.py::test_when_attach_raises_nothing_was_drawn_and_nothing_is_attached"),
    Bug("B does not start at 0", LORA, "trained((d_out // n * k, r))",
        "trained((d_out // n * k, r), lora_inits.normal(0.01))",
        LAWS + "2_attaching_changes_no_output_value_at_initialization"),
    Bug("LoRA on a tied table acts on lookups alone", SLOT,
        "lambda weight, x: weight.project(x, rng)",
        'lambda weight, x: (self.base if self.kind == "embedding" else weight).project(x, rng)',
        "test_laws_lora.py::test_lora_on_a_tied_table_acts_at_all_three_uses_merged_or_not"),
    # ---- files
    Bug("saving drops alpha", "attaching/fields.py", 'if f.name != "where" and',
        'if f.name not in ("where", "alpha") and',
        LAWS + "7_what_is_loaded_is_what_was_saved"),
    Bug("the fingerprint of a base ignores its values", "nn/fingerprint.py", "        flat = array.reshape(-1)\n",
        "        flat = array.reshape(-1)[:0]\n",
        "attaching/test_load.py::test_an_adapter_for_another_base_is_refused_unless_forced"),
    # ---- dropout
    Bug("dropout is kept in evaluation", LORA, "dropout(x, self.p, rng)",
        'dropout(x, self.p, rng or __import__("numpy").random.default_rng(0))',
        "methods/test_lora.py::test_evaluation_knows_no_dropout"),
    Bug("dropout without 1 / (1 - p)", "engine/ops/drop.py", "to_device(kept.astype(dtype) / (1 - p))",
        "to_device(kept.astype(dtype))",
        "methods/test_lora.py::test_dropout_keeps_the_expected_value_and_drops_a_share_p"),
    Bug("the base path is dropped too", LORA, "low_rank_linear(self.base.project(x, rng), dropout(x, self.p, rng)",
        "low_rank_linear(self.base.project(x := dropout(x, self.p, rng), rng), x",
        "methods/test_lora.py::test_the_base_path_is_never_dropped"),
    # ---- gradients
    Bug("the scale is missing in dA", FUSED_OPS, "lambda g: gb(g).T @ x.reshape(-1, d_in)",
        "lambda g: (g.reshape(-1, d_out) @ b).T @ x.reshape(-1, d_in)", PROJECT),
    Bug("dB is the mean over the batch, not the sum", FUSED_OPS, "lambda g: g.reshape(-1, d_out).T @ narrow)",
        "lambda g: g.reshape(-1, d_out).T @ narrow / x.shape[0])", PROJECT),
    Bug("no gradient reaches x through the adapter", FUSED_OPS, "lambda g: (gb(g) @ a).reshape(*lead, d_in)", "None",
        PROJECT),
    Bug("A is not transposed where it is square", FUSED_OPS, "narrow = x.reshape(-1, d_in) @ a.T",
        "narrow = x.reshape(-1, d_in) @ (a if a.shape[0] == a.shape[1] else a.T)", PROJECT),
    Bug("float32 becomes float64 in the adapter's gradient", FUSED_OPS, "s = scalar(scale, a)",
        'import numpy as n; s = n.float64(scale)', LAWS + "12_a_float32_training_step_computes_in_float32_alone"),
    Bug("broadcast axes are not summed out", ENGINE, "term = sum_to(vjp(g), parent.shape)", "term = vjp(g)", SUBSET),
    Bug("a sum is written into an array that a VJP returned", ENGINE,
        "gradients[parent] = gradients[parent] + term", "gradients[parent] += term",
        "engine/test_tensor.py::test_an_array_that_a_vjp_returned_is_never_written_into"),
    # ---- freezing
    Bug("frozen gradients are computed and thrown away", ENGINE, "return watched.get(id(self)) if watched else None",
        'return watched.setdefault(id(self), Node("frozen", (), self.shape, self.dtype)) if watched else None',
        MASKING + "a_gradient_is_evaluated_once_per_use_of_a_selected_parameter_and_never_otherwise"),
    Bug("what is not selected is selected all the same", "attaching/select.py",
        "return {name: params[name] for name in chosen}", "return params",
        "attaching/test_select.py::test_plugged_attachments_are_seen_and_those_that_are_off_are_not"),
    Bug("merged weights can be selected", "attaching/select.py", "        if name in frozen:\n", "        if False:\n",
        "test_laws_masking.py::test_what_is_merged_cannot_be_selected_and_says_so"),
    Bug("frozen weights decay", "train/loop.py", "        if after.micro % s.accumulate == 0:\n",
        "        for p in self.model.base_parameters.values():\n            p.data *= 1 - 1e-4\n"
        "        if after.micro % s.accumulate == 0:\n",
        "train/test_loop.py::test_what_is_not_selected_keeps_every_bit"),
    Bug("accumulation is not weighted by label tokens", "train/loop.py", "        tokens = label_tokens(batch)\n",
        "        tokens = min(1, label_tokens(batch))\n", LAWS + "13_accumulated_micro_batches_are_one_batch"),
    # ---- the rows of a batch
    Bug("the rows of a mixed batch come back off by one", "nn/routing.py",
        "to_device(numpy.argsort(numpy.concatenate([rows for _, rows in groups])))",
        "to_device(numpy.roll(numpy.argsort(numpy.concatenate([rows for _, rows in groups])), 1))", ROW_ALONE),
    Bug("None in a routing means what is plugged", "nn/routing.py",
        "entries = self._laid[asked].get(place, ())",
        "entries = (self._laid[asked] if asked else self.state.entries).get(place, ())",
        ROUTING + "a_name_means_that_attachment_on_all_rows_whatever_is_plugged"),
    Bug("a routing forgets the order of its names", "nn/routing.py",
        "row: state.laid(row) for row in set(rows or ())", "row: state.laid(sorted(row)) for row in set(rows or ())",
        "nn/test_site.py::test_a_mixed_routing_gives_each_row_of_a_sublayer_its_own_pieces_in_its_own_order"),
    # ---- the model
    Bug("attention is scaled by d_model, not d_k", "models/transformer.py", "(d // c.num_heads) ** -0.5", "d ** -0.5",
        GOLDEN),
    Bug("the scale is missing in dQ", FUSED_OPS, "            d *= s", "            pass", FUSED),
    Bug("the scale is twice in dK", FUSED_OPS, "lambda g: joined(product(d_scores(g).swapaxes(1, 2), qh))",
        "lambda g: joined(product(d_scores(g).swapaxes(1, 2), qh)) * s", FUSED),
    Bug("one query takes the scores of other heads", FUSED_OPS, "return xp.matmul(a, b).swapaxes(1, 2)",
        "return xp.matmul(a, b).reshape(len(a), a.shape[2], heads, 1)", LAW_9 + "[attention]"),
    Bug("the rows of a large matrix beyond the first block are left out", FUSED_OPS,
        "for start in range(0, len(w), BLOCK)", "for start in range(0, min(len(w), BLOCK), BLOCK)", FEW),
    Bug("what few rows give lies in columns", FUSED_OPS, "return xp.ascontiguousarray(out.T)", "return out.T", FEW),
    Bug("a bias is laid out with queries and keys exchanged", "engine/ops/layout.py",
        "laid.transpose(0, 2, 3, 1), (lambda", "laid.transpose(0, 2, 1, 3), (lambda",
        "engine/ops/test_layout.py::test_key_first_moves_numbers_in_memory_and_nowhere_else"),
    Bug("a query sees the next token", "nn/attention.py", "xp.tri(queries, keys, keys - queries",
        "xp.tri(queries, keys, keys - queries + 1", MODELS + "a_later_token_never_changes_earlier_logits"),
    Bug("masked tokens leak", "nn/attention.py", "xp.full((), -math.inf, dtype)", "xp.full((), -10.0, dtype)",
        MODELS + "what_is_masked_is_never_seen"),
    Bug("post-LN does not normalize after the residual", "nn/blocks.py", "return y if self.pre_norm else norm(y)",
        "return y", GOLDEN),
    Bug("layer norm divides by n - 1", FUSED_OPS, "variance = mean_product(z, z)",
        "variance = mean_product(z, z) * (z.shape[-1] / (z.shape[-1] - 1))", FUSED),
    # ---- bottleneck adapters
    Bug("the adapter's residual is missing", ADAPTERS, "return F + (linear(narrow, self.U)",
        "return (linear(narrow, self.U)", TRANSPARENT),
    Bug("the bias of the up projection is dropped", ADAPTERS, "(linear(narrow, self.U) + self.b_U)",
        "linear(narrow, self.U)", ADAPTER),
    Bug("the bias of the down projection is dropped", ADAPTERS, "linear(self.reads(x, n, F), self.D) + self.b_D",
        "linear(self.reads(x, n, F), self.D)", ADAPTER),
    Bug("the adapter's scale is forgotten", ADAPTERS, "+ self.b_U) * self.scale", "+ self.b_U)", ADAPTER),
    Bug("the up projection is transposed where it is square", ADAPTERS, "linear(narrow, self.U)",
        "linear(narrow, self.U if len(set(self.U.shape)) > 1 else self.U.data.T)", ADAPTER),
    Bug("the adapter has no nonlinearity", ADAPTERS, "narrow = self.f(linear(", "narrow = (lambda y: y)(linear(",
        ADAPTER),
    Bug("a parallel adapter's scale is 1", ADAPTERS, '(("ff",), of_stream, 4, reduction=2)',
        '(("ff",), of_stream, 1, 2)',
        "methods/test_bottleneck_golden.py::test_logits_plugged_and_unplugged_are_those_of_adapterhub"),
    Bug("a parallel adapter reads the norm unasked", ADAPTERS, '(("ff",), of_stream, 4),', '(("ff",), of_norm, 4),',
        "methods/test_bottleneck.py::test_parallel_reads_the_stream_and_not_its_norm_unless_it_is_asked_to"),
    Bug("a parallel adapter ignores input='norm'", ADAPTERS, 'of_norm if self.input == "norm" else', '',
        "methods/test_bottleneck.py::test_parallel_reads_the_stream_and_not_its_norm_unless_it_is_asked_to"),
    Bug("houlsby reads the residual too", ADAPTERS, '"houlsby": Placement(("attn", "ff"), of_sublayer)',
        '"houlsby": Placement(("attn", "ff"), of_residual)', ADAPTER),
    Bug("pfeiffer reads the sublayer alone", ADAPTERS, '"pfeiffer": Placement(("ff",), of_residual)',
        '"pfeiffer": Placement(("ff",), of_sublayer)', ADAPTER),
    Bug("houlsby acts after cross-attention unasked", ADAPTERS, '*(["cross"] if self.cross else [])', '"cross"',
        "methods/test_bottleneck.py::test_a_placement_and_cross_and_stacks_choose_the_sublayers_that_they_say"),
    Bug("U does not start at 0", ADAPTERS, "(uniform(d ** -0.5), zeros)", "(uniform(d ** -0.5),) * 2",
        TRANSPARENT),
    Bug("gelu is its tanh approximation", "nn/layers.py", '"gelu": gelu,', '"gelu": gelu_tanh,', GOLDEN),
    Bug("what acts on hidden states is merged as if it were a weight", "attaching/merging.py",
        "for where, place in attachment.places.items()}\n    if originals",
        "for where, place in attachment.places.items() if isinstance(place, Slot)}\n    if originals",
        LAWS + "3_what_no_weight_can_absorb_is_not_merged_and_nothing_changes"),
    # ---- selective tuning
    Bug("a lookup forgets the difference", "methods/delta.py", "self.base.rows(ids) + embedding(self.d, ids)",
        "self.base.rows(ids)", DELTA),
    Bug("the difference is subtracted", "methods/delta.py", "return self.base.dense() + self.change()",
        "return self.base.dense() - self.change()", DELTA),
    Bug("a mask is read in another memory order", "methods/mask.py", "return numpy.flatnonzero(array).astype(kind)",
        'return numpy.flatnonzero(array.reshape(-1, order="F")).astype(kind)',
        "methods/test_selective.py::test_only_what_is_masked_ever_differs_from_the_base"),
    Bug("rows are added off by one", "methods/delta.py", "(numpy.array(ids)[:, None] * d_in",
        "((numpy.array(ids)[:, None] - 1) % vocab * d_in", DELTA),
    Bug("rows are looked up off by one", "methods/delta.py", "self._row[list(ids)] = numpy.arange(len(ids))",
        "self._row[list(ids)] = numpy.roll(numpy.arange(len(ids)), 1)", DELTA),
    Bug("scatter's gradient is not gathered at the indices", "engine/ops/primitives.py",
        "lambda g: g.reshape(-1)[indices]", "lambda g: g.reshape(-1)[:indices.shape[0]]",
        "methods/test_selective.py::test_the_gradient_of_d_is_that_of_w_at_its_elements_in_their_order"),
    Bug("the last layers are one too few", "nn/parts.py", "i >= n - last", "i > n - last",
        "nn/test_parts.py::test_layers_count_in_each_stack_from_either_end"),
    Bug("layer -1 is not the last", "nn/parts.py", " or i - n in layers", "",
        "nn/test_parts.py::test_layers_count_in_each_stack_from_either_end"),
    Bug("cross-attention is no attention", "nn/parts.py", r'r"\.(attn|cross)\."', r'r"\.attn\."',
        "nn/test_parts.py::test_the_component_of_a_name"),
    Bug("the bias of a norm is frozen with the component norm", "nn/parts.py", r'(r"norm\.", "norm")',
        r'(r"norm\.weight", "norm")', "nn/test_parts.py::test_the_component_of_a_name"),
    Bug("biases and norm weights are mistaken for each other", "nn/parts.py",
        '{"bias": "bias", "norm": "norm weight"}', '{"norm": "bias", "bias": "norm weight"}',
        "methods/test_selective.py::test_bitfit_trains_the_biases_of_a_transformer_alone"),
    Bug("a loaded mask is forgotten", SELECTIVE, "mask=masks or None)", "mask=None)", ROUND_TRIP),
    Bug("what an attachment was trained on top of is not recorded", TRAINED_ON,
        "for n in order[:order.index(name)]]", "for n in order[:0]]",
        "attaching/test_trained_on.py::test_one_that_was_trained_above_another_needs_it_and_not_the_other_way_round"),
    Bug("the indices of a mask stay behind when the model moves", "nn/module.py",
        'for p in getattr(piece, "arrays", {}).values():',
        'for p in (a for a in getattr(piece, "arrays", {}).values() if isinstance(a, Parameter)):',
        BACKENDS + "constants_go_to_another_backend_with_the_model_and_come_back"),
    Bug("Fisher information is not squared", "methods/mask.py", "total[name] + g * g if name in total else g * g",
        "total[name] + abs(g) if name in total else abs(g)",
        "methods/test_mask.py::test_fisher_is_the_mean_square_of_the_gradients_of_single_examples_by_hand"),
    # ---- soft prompts
    Bug("the mask stays where it was when a prompt moves next to the text", PROMPT,
        "xp.take_along_axis(mask, order, axis=1)", "mask",
        "methods/test_prompt_padding.py::test_it_is_the_base_on_a_longer_vocabulary_with_the_prompt_between_padding_"
        "and_text"),
    Bug("a prompt next to the text reads the rows of the first sequence", PROMPT,
        "order + n * xp.arange(batch)[:, None]", "order",
        "methods/test_prompt_padding.py::test_its_gradient_is_that_of_the_longer_tables_rows_and_of_central_"
        "differences"),
    Bug("the prompt stands behind the tokens", PROMPT, "concat(embedding(self.P, ids), x, axis=1)",
        "concat(x, embedding(self.P, ids), axis=1)", LONGER),
    Bug("the prompt is masked", PROMPT, "[xp.ones(ids.shape, dtype=bool), mask]",
        "[xp.zeros(ids.shape, dtype=bool), mask]", LONGER),
    Bug("the prompt's mask is on the wrong side", PROMPT, "[xp.ones(ids.shape, dtype=bool), mask]",
        "[mask, xp.ones(ids.shape, dtype=bool)]", LONGER),
    Bug("cross-attention sees the padding", "nn/blocks.py",
        "return (dropout(x, self.p, rng) if self.drop_last else x), mask",
        "return (dropout(x, self.p, rng) if self.drop_last else x), mask | True if mask is not None else None",
        "methods/test_prompt.py::test_cross_attention_sees_the_prompt_and_not_the_padding"),
    Bug("positions are not shifted by the prompt", "nn/blocks.py",
        "self.input(x, mask)\n        start = cache[0][0].length if cache else 0\n"
        "        time, dtype = array_of(x).shape[1], array_of(x).dtype\n"
        "        position = self.position.embed(positions_of(mask, start, time))",
        "(length := array_of(x).shape[1], *self.input(x, mask))[1:]\n"
        "        start = cache[0][0].length if cache else 0\n"
        "        time, dtype = array_of(x).shape[1], array_of(x).dtype\n"
        "        shift = time - length if self.input is not None else 0\n"
        "        position = self.position.embed((positions_of(mask, start, time) - shift).clip(0))", LONGER),
    Bug("the wrong end of the prompted row is read", "nn/blocks.py",
        "            x, mask = self.input(x, mask)\n",
        "            n = x.shape[1]\n            x, mask = self.input(x, mask)\n            x = x[:, :n]\n"
        "            mask = mask if mask is None else mask[:, :n]\n", LONGER),
    Bug("what fills a row up takes positions", "nn/positions.py",
        "numpy.maximum(columns - padding[:, None], 0) if padding.any() else columns", "columns", ROW_ALONE),
    Bug("what fills a row up is seen", SITE, "xp.zeros((batch, longest - time), dtype=bool)",
        "xp.ones((batch, longest - time), dtype=bool)", ROW_ALONE),
    Bug("shorter rows are filled up on the right", SITE,
        "concat(xp.zeros((batch, longest - time, width), dtype=x.dtype), x, axis=1)",
        "concat(x, xp.zeros((batch, longest - time, width), dtype=x.dtype), axis=1)", ROW_ALONE),
    Bug("prompted rows come back in the order of their groups", SITE, "index(concat(*xs, axis=0), key=back)",
        "concat(*xs, axis=0)", ROW_ALONE),
    Bug("the first row's prompt leaks to the whole batch", SITE,
        "[self._apart(here, rows, *stream) for here, rows in groups]",
        "[self._apart(groups[0][0], rows, *stream) for here, rows in groups]", ROW_ALONE),
    Bug("generation forgets which adapter it was asked for", "models/decoding.py", "    c, tokens = model.config,",
        "    adapter = None\n    c, tokens = model.config,",
        ROUTING + "a_name_means_that_attachment_on_all_rows_whatever_is_plugged"),
    Bug("a class label of several tokens is its first", PROMPT, ".mean(axis=0)", "[0]",
        "methods/test_prompt.py::test_tokens_starts_as_these_tokens_the_mean_of_a_tuple_and_the_rest_drawn"),
    Bug("a prompt starts as special tokens too", PROMPT,
        "- _special(c))", "- set())",
        "methods/test_prompt.py::test_vocabulary_starts_as_distinct_tokens_of_the_vocabulary_without_special_ones"),
    Bug("nearest by cosine is nearest by product", "methods/neighbors.py",
        "_largest(_unit(vectors) @ _unit(table).T, k)", "_largest(_unit(vectors) @ table.T, k)",
        "methods/test_neighbors.py::test_cosine_and_distance_can_disagree"),
    # ---- the tape
    Bug("the xray counts the FLOPs of VJPs that were not kept", "engine/flops.py",
        "return product, product * len(kept)", "return product, product * 2",
        "engine/test_flops.py::test_linear_takes_2_n_d_in_d_out_for_the_output_for_dx_and_for_dw"),
]
