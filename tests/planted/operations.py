"""Bugs in operations on adapters: factors of a forward, combining, extracting, and merging for storage."""
from __future__ import annotations

from tests.planted.bug import Bug

DEFECTS, SCALING = "defects/test_operations.py::test_", "test_laws_scaling.py::test_"
COMBINE, EXTRACT = "operations/test_combine.py::test_", "operations/test_extract.py::test_"
MERGED = "models/test_merged.py::test_"
SUM = COMBINE + "the_change_of_the_combination_is_the_weighted_sum_on_all_places_together"
ONCE = MERGED + "a_merged_file_is_the_equation_in_float64_rounded_once"

BUGS = [
    # ---- what other libraries get wrong
    Bug("D5: what a merge loses in half precision is not told", "models/merged.py",
        "realized = stored.astype(wanted.dtype) - as_stored(name, to_host(before), dtype)",
        "realized = to_host(after) - to_host(before)",
        DEFECTS + "D5_a_merge_in_half_precision_loses_one_rounding_and_says_how_much"),
    Bug("D5: the change itself is rounded before it is added", "models/merged.py",
        "stored = as_stored(name, to_host(after), dtype)",
        "stored = as_stored(name, as_stored(name, to_host(before), dtype).astype('float64')"
        " + as_stored(name, to_host(after - before), dtype), dtype)",
        DEFECTS + "D5_a_merge_in_half_precision_loses_one_rounding_and_says_how_much"),
    Bug("D6: what was merged before is rounded by another rule than what is merged while saving", "nn/wide.py",
        "its_own = entry.merged is not None and type(entry.piece).merged is not Reparam.merged",
        "its_own = entry.merged is not None", DEFECTS + "D6_all_ways_to_a_merged_file_give_the_same_bytes"),
    Bug("D7: unmerging subtracts the rounded change from the weight", "attaching/attachment.py",
        "        self._become(now.replace(plugged={**now.plugged, self.name: None}))\n",
        "        for place in self._places.values():\n"
        "            merged = self.at[place].over(place.base).dense().data  # type: ignore\n"
        "            d = (merged - place.base.data).astype('float16')  # type: ignore\n"
        "            place.base.data = merged - d  # type: ignore\n"
        "        self._become(now.replace(plugged={**now.plugged, self.name: None}))\n",
        DEFECTS + "D7_a_hundred_cycles_of_merge_and_unmerge_on_a_half_precision_base_give_back_every_bit"),
    Bug("D10: the combination takes alpha / r for every adapter's scale", "operations/change.py",
        "Fraction(piece.scale)", "Fraction(attachment.method.alpha) / A.shape[0]",
        DEFECTS + "D10_the_combination_of_one_adapter_at_weight_1_is_that_adapter"),
    Bug("D10: one adapter at weight 1 goes through factors that it does not have", "operations/combine.py",
        '    if how == "cat" and len(inputs) == 1 and ws == [1]:\n', "    if False:\n",
        DEFECTS + "D10_the_combination_of_one_adapter_at_weight_1_is_that_adapter"),
    Bug("D10: cat is linear", "operations/combine.py", '{"cat": _cat, ', '{"cat": _linear, ',
        DEFECTS + "D10_cat_and_svd_are_the_weighted_sum_where_pefts_linear_has_cross_terms"),
    Bug("D24: rows of one adapter with different factors are one group", "nn/routing.py",
        "tuple((e.name, e.factor) for e in entries)", "tuple(e.name for e in entries)",
        DEFECTS + "D24_a_mixed_batch_with_factors_is_each_row_alone_whatever_is_plugged_or_merged"),
    Bug("D24: a mixed batch does not drop", "nn/slot.py",
        "by_row(self, lambda weight, x: weight.project(x, rng), x)",
        "by_row(self, lambda weight, x: weight.project(x), x)",
        DEFECTS + "D24_mixed_batches_train_with_dropout_and_every_row_trains_what_it_sees"),
    # ---- factors of a forward
    Bug("a factor multiplies the whole weight and not the change", "nn/scaled.py",
        "return W + self.factor * (self.piece.dense() - W)", "return self.factor * self.piece.dense()",
        SCALING + "law_8_a_weight_goes_by_the_factor_along_its_change"),
    Bug("a lookup forgets the factor", "nn/scaled.py", "return rows + self.factor * (self.piece.rows(ids) - rows)",
        "return self.piece.rows(ids)", SCALING + "law_8_a_weight_goes_by_the_factor_along_its_change"),
    Bug("a scaled sublayer loses what the sublayer gave", "nn/scaled.py",
        "return F + self.factor * (self.piece(*stream) - F)", "return self.factor * self.piece(*stream)",
        SCALING + "law_8_a_sublayer_goes_by_the_factor_along_its_change"),
    Bug("the weight below a scaled piece drops twice", "nn/scaled.py",
        "        if x is self.x:\n            return self.y\n", "        return self.weight.project(x, rng)\n",
        SCALING + "law_14_dropout_reaches_through_a_scaled_piece_and_what_lies_below_drops_the_same_for_both_terms"),
    Bug("a prompt is weakened by a factor", "nn/scaled.py", 'if place.kind in ("input", "keys_values"):', "if False:",
        SCALING + "a_prompt_takes_no_factor_but_1_and_the_error_comes_before_anything_is_computed"),
    Bug("a factor that is no number is taken", "nn/asked.py", "if not is_number(factor):", "if False:",
        SCALING + "a_bad_factor_raises_before_anything_is_computed_in_every_call"),
    Bug("the names of a dict lose their order", "nn/asked.py", "for name, factor in item.items())",
        "for name, factor in sorted(item.items()))",
        SCALING + "law_8_the_factor_1_gives_the_bits_of_the_name_and_0_the_values_of_the_base"),
    Bug("a LoRA is scaled twice", "nn/scaled.py", "getattr(piece, piece.strength) * Fraction(factor))",
        "getattr(piece, piece.strength) * Fraction(factor) ** 2)",
        SCALING + "law_8_on_fractions_the_scaled_weight_is_exact_and_both_ways_to_scale_a_lora_agree"),
    # ---- combining
    Bug("a weight's sign is lost", "operations/combine.py", "cs, fs = [w * f.s for _, w, f in terms if f]",
        "cs, fs = [abs(w) * f.s for _, w, f in terms if f]", SUM),
    Bug("the first scale stands for all", "operations/combine.py", "alike = len(set(cs)) == 1 and cs[0] != 0",
        "alike = cs[0] != 0", SUM),
    Bug("the principal part that pissa starts from is added and not subtracted", "operations/change.py",
        "-to_host(piece.B0.data)", "to_host(piece.B0.data)", SUM),
    Bug("the parts of a merged projection share their factors", "operations/change.py",
        "laid[at * m:(at + 1) * m, i * r:(i + 1) * r] = B[i * m:(i + 1) * m]",
        "laid[at * m:(at + 1) * m, :r] = B[i * m:(i + 1) * m]", SUM),
    Bug("singular values are left out", "operations/combine.py", "U[:, :rank] * S[:rank]", "U[:, :rank]",
        COMBINE + "cat_and_svd_give_pefts_logits_and_changes"),
    Bug("the smallest singular values are kept", "operations/combine.py",
        "Factors(Vt[:rank], U[:, :rank] * S[:rank], Fraction(1))",
        "Factors(Vt[-(rank or 0):], U[:, -(rank or 0):] * S[-(rank or 0):], Fraction(1))",
        COMBINE + "cat_and_svd_give_pefts_logits_and_changes"),
    Bug("the parts of a combination stay plugged beside it", "attaching/order.py",
        "{n: m for n, m in plugged.items() if n not in names}", "plugged",
        COMBINE + "the_combination_takes_the_place_of_the_lowest_plugged_one_and_the_others_go_off"),
    Bug("a copy shares its arrays", "operations/combine.py",
        "copy.deepcopy((pieces, dict(zip(a.tensors, a.arrays.values()))))",
        "pieces, dict(zip(a.tensors, a.arrays.values()))",
        COMBINE + "one_adapter_at_weight_1_is_itself_bit_for_bit"),
    Bug("a part that was trained on top of another is combined without it", "operations/combine.py",
        "if layer.content not in combined:", "if False:",
        COMBINE + "the_file_of_a_combination_names_the_base_that_its_parts_were_trained_on"),
    Bug("a pattern of one place matches others", "operations/made.py", 'return f"^{re.escape(place)}$"',
        "return re.escape(place.rpartition('.')[0].rpartition('.')[2])", SUM),
    # ---- extracting
    Bug("what a LoRA cannot hold is not told", "operations/extract.py", "        errors[where] = 1.0\n", "",
        EXTRACT + "the_errors_are_those_of_the_singular_values_that_are_left_out"),
    Bug("the difference has the wrong sign", "operations/extract.py",
        "to_host(wide_base(others[where]).data) - to_host(wide_base(slot).data)",
        "to_host(wide_base(slot).data) - to_host(wide_base(others[where]).data)",
        EXTRACT + "a_lora_that_was_merged_into_the_weights_comes_back_as_its_change"),
    Bug("tensors that are equal get a place", "operations/extract.py",
        "        if not d.any():\n            continue\n", "",
        EXTRACT + "a_lora_that_was_merged_into_the_weights_comes_back_as_its_change"),
    # ---- merging for storage
    Bug("a merged weight is computed in the model's dtype", "nn/wide.py",
        'return array.astype("float64") if array.dtype.kind == "f" else array', "return array", ONCE),
    Bug("a merged weight goes to half precision through float32", "models/merged.py",
        "stored = as_stored(name, to_host(after), dtype)",
        "stored = as_stored(name, to_host(after).astype('float32'), dtype)",
        MERGED + "there_is_no_float32_step_between_float64_and_the_file"),
    Bug("a merged model changes when it is saved", "nn/wide.py", "twin = copy.copy(piece)", "twin = piece",
        ONCE),
]
