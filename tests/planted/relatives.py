"""Faults in DoRA, (IA)^3, added biases, and in the place of an absent bias."""
from __future__ import annotations

from tests.planted.bug import Bug

DORA, IA3, BIAS = (f"methods/{name}.py" for name in ("dora", "ia3", "bias"))
DEFECTS = "defects/test_relatives.py::test_"
OF_DORA, OF_IA3, OF_BIAS = (f"methods/test_{name}.py::test_" for name in ("dora", "ia3", "bias"))
GOLDEN_DORA = "methods/test_dora_golden.py::test_"
UNRECORDED = OF_DORA + "the_norm_is_not_recorded_for_a_gradient_that_it_does_not_have"
ZEROS = OF_DORA + "a_row_of_zeros_stays_a_row_of_zeros_and_gives_no_nan_in_value_or_gradient"
WHERE = OF_IA3 + "where_chooses_matrices_and_their_biases_come_with_them"
BIASED = OF_IA3 + "the_bias_of_k_and_v_is_scaled_by_the_same_l_and_that_of_wo_is_not"
NOT_LISTED = OF_BIAS + "an_absent_bias_is_in_no_list_count_file_or_fingerprint_of_the_model"
_PRODUCT = ("        y = low_rank_linear(self.base.project(x, rng), dropout(x, self.p, rng), self.A, self.B, "
            "scale=self.scale)\n")

BUGS = [
    # ---- DoRA
    Bug("D11: a second DoRA is merged on the base, not on what lies below it", "attaching/merging.py",
        "weight = piece.over(below).merged()", "weight = piece.over(slot.base).merged()",
        DEFECTS + "D11_two_doras_have_an_order_and_merge_into_what_they_compute"),
    Bug("D11: dropout acts on the frozen path of a DoRA, too", DORA, _PRODUCT,
        "        x = dropout(x, self.p, rng)\n"
        "        y = low_rank_linear(self.base.project(x, rng), x, self.A, self.B, scale=self.scale)\n",
        DEFECTS + "D11_dropout_leaves_the_frozen_path_alone"),
    Bug("D11: merging a DoRA writes into the base", DORA, "        return self.factor() * self.V()\n",
        "        W = self.factor() * self.V()\n"
        "        self.base.dense().data[...] = W.data\n        return W\n",
        DEFECTS + "D11_a_length_of_0_is_merged_and_unmerged_without_a_trace"),
    Bug("A2: a DoRA is merged without alpha / r", DORA, "return W0 + self.scale * (B @ A)",
        "return W0 + (B @ A if not constant else self.scale * (B @ A))",
        DEFECTS + "A2_merging_a_dora_honours_alpha_over_r_and_taking_it_off_gives_back_the_weight"),
    Bug("A2: taking a merge off leaves the merged weight", "attaching/attachment.py",
        'self._become(now.replace(plugged={**now.plugged, self.name: None}))', "pass",
        DEFECTS + "A2_merging_a_dora_honours_alpha_over_r_and_taking_it_off_gives_back_the_weight"),
    Bug("DoRA's norm is not a constant for the gradient", DORA, "self.V(constant=self.detach)", "self.V()",
        GOLDEN_DORA + "loss_and_every_gradient_are_those_of_peft_whose_norm_is_detached"),
    Bug("DoRA's norm is always a constant for the gradient", DORA, "self.V(constant=self.detach)",
        "self.V(constant=True)", GOLDEN_DORA + "with_the_gradient_through_the_norm_the_outputs_are_the_same_and_the_"
        "gradients_of_a_and_b_are_not"),
    Bug("DoRA's norm is recorded for a gradient that it does not have", DORA,
        "self.m / lengths(self.V(constant=self.detach), self.axis)",
        "(lambda n: self.m / (stop_gradient(n) if self.detach else n))(lengths(self.V(), self.axis))", UNRECORDED),
    Bug("m is applied twice in DoRA's product", DORA, "        return y if self.axis == 0 else y * factor\n",
        "        return y if self.axis == 0 else y * factor * factor\n",
        GOLDEN_DORA + "logits_plugged_merged_and_unplugged_are_those_of_peft"),
    Bug("DoRA forgets m", DORA, "        return self.m / lengths(", "        return self.m ** 0 / lengths(",
        GOLDEN_DORA + "logits_plugged_merged_and_unplugged_are_those_of_peft"),
    Bug("DoRA's norm is taken without B A", DORA, "self.m / lengths(self.V(constant=self.detach), self.axis)",
        "self.m / lengths(stop_gradient(self.base.dense()), self.axis)",
        GOLDEN_DORA + "logits_plugged_merged_and_unplugged_are_those_of_peft"),
    Bug("DoRA's lengths of rows are those of columns", DORA, 'return 1 if self.norm == "output" else 0',
        'return 1 if self.norm == "input" else 0',
        OF_DORA + "m_over_the_norm_is_exactly_1_at_the_start_in_any_order_of_memory"),
    Bug("m starts at the norm of the base, whatever is plugged below", DORA, "slot.fold().dense().data)",
        "slot.base.dense().data)", OF_DORA + "m_starts_at_the_norm_of_what_lies_below_not_of_the_base"),
    Bug("m is summed in another order than the norm", DORA,
        "xp.ascontiguousarray(slot.fold().dense().data)", "xp.asfortranarray(slot.fold().dense().data)",
        OF_DORA + "m_over_the_norm_is_exactly_1_at_the_start_in_any_order_of_memory"),
    Bug("a row of zeros is divided by its norm", DORA, "return (squares + (squares.data == 0)) ** 0.5",
        "return squares ** 0.5", ZEROS),
    Bug("a row of zeros starts with a length of 1", DORA, " * W.any(axis=self._axis, keepdims=True)", "", ZEROS),
    Bug("DoRA denies the dropout below", DORA, "self.p > 0 or self.base.drops", "self.p > 0",
        "test_laws_dropout.py::test_law_14_a_method_without_dropout_hands_it_on_and_says_that_a_weight_below_has_it"),
    Bug("a DoRA of weights without a norm is attached", DORA, "if not xp.isfinite(m).all():", "if False:",
        OF_DORA + "a_weight_without_a_finite_norm_is_refused_by_name_and_nothing_is_attached"),
    Bug("DoRA's dropout acts on nothing", DORA, _PRODUCT, _PRODUCT.replace("dropout(x, self.p, rng)", "x"),
        OF_DORA + "dropout_acts_on_the_input_of_a_alone_and_not_on_a_lookup"),
    # ---- (IA)^3
    Bug("D12: merging scales the base in place, and unmerging divides by l + 1e-8", IA3,
        "        return (self.l.reshape(-1, 1) if len(self.shape) == 2 else self.l) * self.base.dense()\n",
        "        l, W = self.l.reshape(-1, 1) if len(self.shape) == 2 else self.l, self.base.dense()\n"
        "        out = l * W\n        W.data[...] = out.data / (l.data + 1e-8)\n        return out\n",
        DEFECTS + "D12_a_hundred_merges_and_a_factor_of_0_leave_every_bit_as_it_was"),
    Bug("A3: (IA)^3 scales before the activation", IA3, r'r"\.(attn|cross)\.(k|v)\.weight$|\.ff\.wo\.weight$",',
        r'r"\.(attn|cross)\.(k|v)\.weight$|\.ff\.(wi|wi_1)\.weight$",',
        DEFECTS + "A3_a_negative_factor_multiplies_after_the_activation_as_in_the_paper"),
    Bug("the product of (IA)^3 leaves the columns as they are", IA3, "self.base.project(x * self.l, rng)",
        "self.base.project(x, rng)",
        "methods/test_ia3_golden.py::test_logits_plugged_merged_and_unplugged_are_those_of_peft"),
    Bug("(IA)^3's rows are columns where the matrix is square", IA3, "if len(self.shape) == 2 else self.l)",
        "if len(self.shape) == 2 and self.shape[0] != self.shape[1] else self.l)", BIASED),
    Bug("the bias of k and v is not scaled", IA3,
        'place.kind == "linear" or place.kind == "bias" and not self.scales_input(name))',
        'place.kind == "linear")', BIASED),
    Bug("the bias of wo is scaled as well", IA3, 're.search(self.inputs, f"{_layer(name)}.weight")',
        "re.search(self.inputs, name)", BIASED),
    Bug("the bias has an l of its own", IA3, "ones, shared=_layer(name))", "ones, shared=name + \"'s\")", BIASED),
    Bug("(IA)^3's factors start at 0", IA3, "ones, shared=_layer(name))",
        "lambda *_: ones(*_) * 0, shared=_layer(name))",
        "test_laws.py::test_law_2_attaching_changes_no_output_value_at_initialization"),
    Bug("(IA)^3 scales a bias whose matrix it leaves alone", IA3, "            if _layer(name) not in layers:\n",
        "            if False:\n", OF_IA3 + "a_where_without_matrices_is_refused_and_changes_nothing"),
    Bug("the biases of (IA)^3 come only where a pattern finds them", IA3,
        "for name, place in model.named_places() if _layer(name)", "for name, place in chosen.items() if _layer(name)",
        WHERE),
    Bug("factors that layers share count for no component", "attaching/report.py",
        'where.rpartition(".")[0], f"{where}.weight")', 'where.rpartition(".")[0])',
        OF_IA3 + "there_are_as_many_factors_as_the_page_says_one_vector_for_each_layer"),
    # ---- added biases, and the place for them
    Bug("D17: a bias that is switched off is still added", "nn/layers.py",
        "        return y if is_absent(self.bias) and not self.bias.used else",
        "        for piece in self.bias.attached.values() if is_absent(self.bias) else ():\n"
        "            y = add(y, piece.b)\n        return y if is_absent(self.bias) else",
        DEFECTS + "D17_with_its_trained_biases_off_the_model_is_the_base_again_bit_for_bit"),
    Bug("D24: in a mixed batch all rows get the bias of the first", "nn/slot.py",
        "        v = per_row(self, lambda weight: weight.vector())\n",
        "        v = per_row(self, lambda weight: weight.vector())\n"
        "        v = v if v.ndim == 1 else v[0]\n",
        DEFECTS + "D24_rows_of_one_batch_may_use_different_adapters_in_evaluation_and_in_training"),
    Bug("D24: in a mixed batch all rows get the weight of the first", "nn/routing.py",
        "    parts = [run(place.compose(here), *(", "    parts = [run(place.compose(groups[0][0]), *(",
        DEFECTS + "D24_rows_of_one_batch_may_use_different_adapters_in_evaluation_and_in_training"),
    Bug("an added bias is added twice", BIAS, "return self.base.dense() + self.b",
        "return self.base.dense() + 2 * self.b", OF_BIAS + "each_layer_gives_x_w_plus_b_in_its_own_dtype"),
    Bug("the upper of two added biases replaces the lower", BIAS, "return self.base.dense() + self.b",
        "return self.base.dense() * 0.0 + self.b", OF_BIAS + "one_lies_above_another_and_each_adds_its_own"),
    Bug("zeros are added where nothing is attached", "nn/layers.py", "is_absent(self.bias) and not self.bias.used",
        "False", OF_BIAS + "without_an_added_bias_the_model_runs_no_addition_for_it"),
    Bug("an added bias is never added", "nn/layers.py", "is_absent(self.bias) and not self.bias.used",
        "is_absent(self.bias)", OF_BIAS + "each_layer_gives_x_w_plus_b_in_its_own_dtype"),
    Bug("the zeros of an absent bias are float64 whatever the model is", "nn/absent.py",
        "Tensor(xp.zeros(self.shape, dtype=self.dtype))", 'Tensor(xp.zeros(self.shape, dtype="float64"))',
        OF_BIAS + "each_layer_gives_x_w_plus_b_in_its_own_dtype"),
    Bug("a merged bias is silently left out of the model's file", "models/folder.py",
        "            if is_absent(place):\n", "            if False:\n",
        OF_BIAS + "a_merged_bias_is_not_silently_left_out_of_a_model_s_file"),
    Bug("absent biases are slots of the model", "nn/module.py",
        "if isinstance(place, Slot) and not is_absent(place)}", "if isinstance(place, Slot)}", NOT_LISTED),
    Bug("k gets a bias that no softmax sees", BIAS, r"\.(attn|cross)\.(q|v|o)\.bias$|", r"\.(attn|cross)\.\w\.bias$|",
        OF_BIAS + "by_default_it_chooses_all_layers_of_blocks_but_k_whose_bias_no_softmax_sees"),
]
