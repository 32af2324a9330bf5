"""Bugs to plant: each a source edit that must match exactly once, and the unmodified test that must then fail.

The first part is the table of mutants of the conformance notes, as far as it concerns LoRA and freezing; the rest are
the classic mistakes around them. A test is named by file and function; all of them pass on the sources as they are.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Bug:
    """what, in words; file of the package; old text -> new text; the test that must fail."""

    what: str
    file: str
    old: str
    new: str
    test: str


LAWS = "test_laws.py::test_law_"
MASKING, ROUTING = "test_laws_masking.py::test_law_5_", "test_laws_routing.py::test_law_8_"
ANY_SEQUENCE = "test_laws_undo.py::test_law_4_any_sequence_of_moves_can_be_undone_and_illegal_ones_move_nothing"
EQUATION = LAWS + "1_the_dense_weight_is_the_equation_of_the_paper"
PROJECT = LAWS + "1_project_is_multiplication_by_the_dense_weight_in_value_and_gradient"
MERGED_SLOT = LAWS + "3_the_merged_weight_and_its_product_are_within_the_bound_at_every_slot"
MERGED_MODEL = LAWS + "3_a_merged_model_computes_what_the_unmerged_one_does"
FUSED = LAWS + "9_a_whole_model_of_fused_ops_is_the_model_of_definitions"
ROW_ALONE = ROUTING + "each_row_of_a_mixed_batch_is_that_row_alone"
SUBSET = MASKING + "gradients_are_those_of_the_selection_and_bit_equal_to_the_full_ones"
MODELS = "models/test_encoder_decoder.py::test_"
GOLDEN = "models/test_transformer_golden.py::test_the_output_is_that_of_torch_to_1e_12"

LORA, ATTACH, FUSED_OPS, ENGINE = "peft/lora.py", "peft/attach.py", "ops/fused.py", "autograd/tensor.py"
SCALE = "Fraction(self.alpha) / self.rank, self.dropout)"
CONSTANT = "constants.append(Parameter(place.attached[self.name].over(under).dense().data))"

BUGS = [
    # ---- the scale
    Bug("the scale alpha / r is forgotten", LORA, SCALE, "Fraction(1), self.dropout)", EQUATION),
    Bug("the scale is alpha", LORA, SCALE, "Fraction(self.alpha), self.dropout)", EQUATION),
    Bug("the scale is alpha r", LORA, SCALE, "Fraction(self.alpha) * self.rank, self.dropout)", EQUATION),
    Bug("the scale is alpha / sqrt(r)", LORA, SCALE,
        "Fraction(self.alpha / math.sqrt(self.rank)), self.dropout)", EQUATION),
    Bug("alpha is read as an integer", LORA, SCALE, "Fraction(int(self.alpha)) / self.rank, self.dropout)", EQUATION),
    Bug("a lookup forgets the scale", LORA, "mul(matmul(embedding(self.B, ids), self.A), scalar(self.scale, self.A))",
        "matmul(embedding(self.B, ids), self.A)",
        LAWS + "1_rows_are_rows_of_the_dense_weight_in_value_and_gradient"),
    # ---- merging, undoing, stacking
    Bug("merging adds (B A)^T where W is square", ATTACH, CONSTANT,
        "w, d = under.dense().data, place.attached[self.name].over(under).dense().data\n"
        "            constants.append(Parameter(w + (d - w).T if w.shape[0] == w.shape[1] else d))", MERGED_SLOT),
    Bug("merging forgets the scale", ATTACH, CONSTANT,
        "piece = place.attached[self.name]\n"
        "            constants.append(Parameter(under.dense().data + piece.B.data @ piece.A.data))", MERGED_SLOT),
    Bug("merging ignores what was merged below", ATTACH, "under = below[-1].merged if below else place.base",
        "under = place.base", MERGED_SLOT),
    Bug("a merged forward adds the adapter again", "nn/weight.py",
        "weight = entry.merged if entry.merged is not None else self.attached[entry.name].over(weight)",
        "weight = self.attached[entry.name].over(weight if entry.merged is None else entry.merged)", MERGED_MODEL),
    Bug("the upper of two replaces the lower", "nn/weight.py",
        "else self.attached[entry.name].over(weight)", "else self.attached[entry.name].over(self.base)", MERGED_MODEL),
    Bug("a second merge is taken", ATTACH, 'self._require("merge", "plugged")',
        'self._require("merge", "plugged", "merged")', ANY_SEQUENCE),
    Bug("merging above an unmerged one is taken", ATTACH, "            if loose:\n", "            if False:\n",
        ANY_SEQUENCE),
    Bug("unmerging below a merged one is taken", ATTACH, '        self._nothing_merged_above("unmerge")\n', "",
        "peft/test_attach.py::test_merging_above_an_unmerged_one_is_refused_and_names_it_and_the_place"),
    Bug("unmerging subtracts from the base instead of keeping it", ATTACH,
        "next(e for e in place.plugged if e.name == self.name).merged = None",
        "entry, base = next(e for e in place.plugged if e.name == self.name), place.base\n"
        "            base.data = entry.merged.data - (place.attached[self.name].dense().data - base.data)\n"
        "            entry.merged = None", ANY_SEQUENCE),
    Bug("unplugging leaves the last place as it is: a swap leaves the old one", ATTACH,
        "        for place in self.places.values():\n            place.plugged = [",
        "        for place in list(self.places.values())[:-1]:\n            place.plugged = [",
        ROUTING + "swapping_a_b_a_gives_the_bits_of_a_again"),
    Bug("attaching draws a number before it has checked", ATTACH, "    places = dict(method.places(model))\n",
        "    rng.random()\n    places = dict(method.places(model))\n",
        "peft/test_attach.py::test_when_attach_raises_nothing_was_drawn_and_nothing_is_attached"),
    Bug("B does not start at 0", LORA, "init.zeros((d_out, self.rank), dtype)",
        "init.normal((d_out, self.rank), 0.01, rng, dtype)",
        LAWS + "2_attaching_changes_no_output_value_at_initialization"),
    Bug("LoRA on a tied table acts on lookups alone", "nn/weight.py",
        "lambda names, x: self.fold(names).project(x, rng)",
        'lambda names, x: (self.base if self.kind == "embedding" else self.fold(names)).project(x, rng)',
        "test_laws.py::test_lora_on_a_tied_table_acts_at_all_three_uses_merged_or_not"),
    # ---- files
    Bug("saving drops alpha", "peft/adapter_file.py", 'if f.name != "where"}', 'if f.name not in ("where", "alpha")}',
        LAWS + "7_what_is_loaded_is_what_was_saved"),
    Bug("the fingerprint of a base ignores its values", "nn/fingerprint.py", "        flat = array.reshape(-1)\n",
        "        flat = array.reshape(-1)[:0]\n",
        "peft/test_load.py::test_an_adapter_for_another_base_is_refused_unless_forced"),
    # ---- dropout
    Bug("dropout is kept in evaluation", LORA, "dropout(x, self.p, rng)",
        "dropout(x, self.p, rng or numpy.random.default_rng(0))",
        "peft/test_lora.py::test_evaluation_knows_no_dropout"),
    Bug("dropout without 1 / (1 - p)", "ops/primitives.py", "to_device(kept.astype(dtype) / (1 - p))",
        "to_device(kept.astype(dtype))",
        "peft/test_lora.py::test_dropout_keeps_the_expected_value_and_drops_a_share_p"),
    Bug("the base path is dropped too", LORA, "low_rank_linear(self.base.project(x, rng), dropout(x, self.p, rng)",
        "low_rank_linear(self.base.project(x := dropout(x, self.p, rng), rng), x",
        "peft/test_lora.py::test_the_base_path_is_never_dropped"),
    # ---- gradients
    Bug("the scale is missing in dA", FUSED_OPS, "lambda g: gb(g).T @ x.reshape(-1, d_in)",
        "lambda g: (g.reshape(-1, d_out) @ b).T @ x.reshape(-1, d_in)", PROJECT),
    Bug("dB is the mean over the batch, not the sum", FUSED_OPS, "lambda g: g.reshape(-1, d_out).T @ h)",
        "lambda g: g.reshape(-1, d_out).T @ h / x.shape[0])", PROJECT),
    Bug("no gradient reaches x through the adapter", FUSED_OPS, "lambda g: (gb(g) @ a).reshape(*lead, d_in)", "None",
        PROJECT),
    Bug("A is not transposed where it is square", FUSED_OPS, "h = x.reshape(-1, d_in) @ a.T",
        "h = x.reshape(-1, d_in) @ (a if a.shape[0] == a.shape[1] else a.T)", PROJECT),
    Bug("float32 becomes float64 in the adapter's gradient", FUSED_OPS, "s = scalar(scale, a)",
        'import numpy as n; s = n.float64(scale)', LAWS + "12_a_float32_training_step_computes_in_float32_alone"),
    Bug("broadcast axes are not summed out", ENGINE, "term = sum_to(vjp(g), parent.shape)", "term = vjp(g)", SUBSET),
    Bug("a sum is written into an array that a VJP returned", ENGINE,
        "gradients[parent] = gradients[parent] + term", "gradients[parent] += term",
        "autograd/test_tensor.py::test_an_array_that_a_vjp_returned_is_never_written_into"),
    # ---- freezing
    Bug("frozen gradients are computed and thrown away", ENGINE, "return watched.get(id(self)) if watched else None",
        'return watched.setdefault(id(self), Node("frozen", (), self.shape, self.dtype)) if watched else None',
        MASKING + "a_gradient_is_evaluated_once_per_use_of_a_selected_parameter_and_never_otherwise"),
    Bug("what is not selected is selected all the same", "peft/select.py",
        "return {name: params[name] for name in chosen}", "return params",
        "peft/test_select.py::test_plugged_attachments_are_seen_and_those_that_are_off_are_not"),
    Bug("merged weights can be selected", "peft/select.py", "        if name in frozen:\n", "        if False:\n",
        "test_laws_masking.py::test_what_is_merged_cannot_be_selected_and_says_so"),
    Bug("frozen weights decay", "train/loop.py", "    state.micro += 1\n",
        "    state.micro += 1\n    for p in model.base_parameters.values():\n        p.data *= 1 - 1e-4\n",
        "train/test_loop.py::test_what_is_not_selected_keeps_every_bit"),
    Bug("accumulation is not weighted by label tokens", "train/loop.py", "    tokens = label_tokens(batch)\n",
        "    tokens = min(1, label_tokens(batch))\n", LAWS + "13_accumulated_micro_batches_are_one_batch"),
    # ---- the rows of a batch
    Bug("the rows of a mixed batch come back off by one", "nn/place.py",
        "to_device(numpy.argsort(numpy.concatenate([rows for _, rows in groups])))",
        "to_device(numpy.roll(numpy.argsort(numpy.concatenate([rows for _, rows in groups])), 1))", ROW_ALONE),
    Bug("None in a routing means what is plugged", "nn/place.py",
        "return [(names, numpy.array(rows)) for names, rows in groups.items()]",
        "return [(names or None, numpy.array(rows)) for names, rows in groups.items()]",
        ROUTING + "a_name_means_that_attachment_on_all_rows_whatever_is_plugged"),
    Bug("a routing forgets the order of its names", "nn/place.py",
        "tuple(n for n in names if n in self.attached)", "tuple(n for n in self.attached if n in names)",
        "nn/test_site.py::test_a_mixed_routing_gives_each_row_of_a_sublayer_its_own_pieces_in_its_own_order"),
    # ---- the model
    Bug("attention is scaled by d_model, not d_k", "models/transformer.py", "(d // c.num_heads) ** -0.5", "d ** -0.5",
        GOLDEN),
    Bug("the scale is missing in dQ", FUSED_OPS, "joined(d_scores(g).swapaxes(-1, -2) @ kh) * scale",
        "joined(d_scores(g).swapaxes(-1, -2) @ kh)", FUSED),
    Bug("a query sees the next token", "nn/attention.py", "xp.tri(queries, keys, keys - queries",
        "xp.tri(queries, keys, keys - queries + 1", MODELS + "a_later_token_never_changes_earlier_logits"),
    Bug("masked tokens leak", "nn/attention.py", "float(xp.finfo(dtype).min)", "-10.0",
        MODELS + "what_is_masked_is_never_seen"),
    Bug("post-LN does not normalize after the residual", "nn/blocks.py", "return y if self.pre_norm else norm(y)",
        "return y", GOLDEN),
    Bug("layer norm divides by n - 1", FUSED_OPS, "(z * z).mean(axis=-1, keepdims=True)",
        "(z * z).sum(axis=-1, keepdims=True) / (z.shape[-1] - 1)", FUSED),
]


def plant(package: Path, bug: Bug) -> None:
    """Edit a copy of the package. Raises ValueError unless the old text is there exactly once."""
    path = package / bug.file
    text = path.read_text("utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.what}: {bug.old!r} is {text.count(bug.old)} times in {bug.file}; expected once")
    path.write_text(text.replace(bug.old, bug.new), "utf-8")
