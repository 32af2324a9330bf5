"""Bugs in the methods of the zoo and in `solve`: defects of other libraries, and the mistakes that the pages list."""
from __future__ import annotations

from tests.planted.bug import Bug

VERA, LOHA, LOKR, HIRA, OFT = (f"methods/{name}.py" for name in ("vera", "loha", "lokr", "hira", "oft"))
LINALG, FLOPS = "engine/ops/linalg.py", "engine/flops.py"
OF_VERA, OF_LOHA, OF_LOKR, OF_HIRA, OF_OFT = (
    f"methods/test_{name}.py::test_" for name in ("vera", "loha", "lokr", "hira", "oft"))
ENTRY, CLASS = "every_entry_is_that_of_the_equation_number_for_number", "the_class_alone_is_the_equation_on_fractions"
DRAWN = "what_does_not_start_at_0_is_drawn_as_by_a_linear_layer_of_as_many_inputs"
GOLDEN = "methods/test_zoo_golden.py::test_"
LOGITS = GOLDEN + "logits_plugged_merged_and_unplugged_are_those_of_peft"
DEFECT = "defects/test_zoo.py::test_"
AUDIT_2 = DEFECT + "audit_2_two_active_ofts_merge_into_what_they_compute_with_the_first_one_below"
AUDIT_4 = DEFECT + "audit_4_the_direction_of_a_rotation_is_a_field_of_its_own_and_travels_in_the_file"
NOTE_3 = DEFECT + "peft_note_3_our_default_is_a_rotation_for_any_q_and_the_series_is_none"
NOTE_8 = DEFECT + "peft_note_8_the_projections_of_a_key_are_the_same_numbers_in_every_dtype"
NOTE_12 = DEFECT + "peft_note_12_the_scale_of_two_full_factors_is_1_unless_the_method_says_alpha_over_r"
DRIFT = DEFECT + "drift_a_hundred_cycles_of_merge_and_unmerge_give_every_bit_back"
FRACTIONS = OF_OFT + "on_fractions_r_is_orthogonal_number_for_number_and_project_and_rows_are_those_of_w0_r_transposed"
START = OF_OFT + "at_the_start_r_is_the_identity_and_no_product_changes_a_bit"
FORMS = OF_OFT + "r_is_the_cayley_form_of_the_paper_its_inverse_or_the_series"
ONE_PAIR = OF_VERA + "all_weights_share_one_pair_which_is_saved_once_and_never_trained"
DROPOUT = OF_HIRA + "above_a_weight_with_dropout_the_dropout_acts_on_that_weight_alone"
BLOCKS = OF_OFT + "a_block_size_that_does_not_divide_the_width_is_refused_with_those_that_do"
COUNTED = ("engine/test_flops.py::test_solve_takes_a_factorization_and_two_triangular_solves_and_shares_the_second_"
           "system")
SOLVE = "engine/ops/test_linalg.py::test_"
DERIVATIVE = SOLVE + "on_fractions_the_system_is_solved_and_the_gradient_is_the_derivative_exactly"

BUGS = [
    # ---- defects of peft
    Bug("audit 2: a rotation above another is merged below it", OFT,
        "        return turned(self.base.dense(), self.rotation().mT)\n",
        "        lower = getattr(self.base, 'base', None)\n"
        "        if isinstance(lower, Parameter):\n"
        "            return turned(turned(lower.dense(), self.rotation().mT), self.base.rotation().mT)\n"
        "        return turned(self.base.dense(), self.rotation().mT)\n", AUDIT_2),
    Bug("audit 4: the exact form turns the other way than the series", OFT,
        'if self.cayley == "transposed" else', 'if self.cayley != "neumann" else', AUDIT_4),
    Bug("audit 4: a file does not say which Cayley form it was trained with", OFT,
        'f"one of {\', \'.join(CAYLEY)}")', 'f"one of {\', \'.join(CAYLEY)}", in_file=False)', AUDIT_4),
    Bug("peft note 3: the series is the default", OFT, 'cayley: str = setting("paper",',
        'cayley: str = setting("neumann",', NOTE_3),
    Bug("peft note 8: the projections of a key are not rounded to float32", VERA, '.astype("float32").astype(dtype)',
        ".astype(dtype)", NOTE_8),
    Bug("peft note 8: a key's numbers depend on the dtype", VERA, "numpy.random.RandomState(key)",
        "numpy.random.RandomState(key + dtype.itemsize)", NOTE_8),
    Bug("peft note 12: two full factors never have the scale of peft", LOKR, ' and self.full == "1" else scale',
        " else scale", NOTE_12),
    Bug("peft note 12: two full factors are always scaled by alpha / r", LOKR,
        'Fraction(1) if {"w1", "w2"} == set(arrays) and self.full == "1" else scale', "scale", NOTE_12),
    # ---- VeRA
    Bug("VeRA: d and b change places in the product with x", VERA,
        "linear(linear(x, A) * self.d, B) * self.b", "linear(linear(x, A), B) * self.b", OF_VERA + CLASS),
    Bug("VeRA: a smaller weight takes the last rows of B", VERA, "self.B[:d_out]", "self.B[-d_out:]", OF_VERA + CLASS),
    Bug("VeRA: a lookup forgets b", VERA, "embedding(self.b.reshape(-1, 1), ids) * (", "(", OF_VERA + CLASS),
    Bug("VeRA: every weight has a pair of its own", VERA, '"A": fixed((r, d_in), A, "vera")',
        '"A": fixed((r, d_in), A, name)', ONE_PAIR),
    Bug("VeRA: the shared pair is trained", VERA, '"B": fixed((d_out, r), B, "vera")',
        '"B": trained((d_out, r), B, "vera")', ONE_PAIR),
    Bug("VeRA: B is drawn by the columns of A", VERA, "for columns in (d_in, r))", "for columns in (d_in, d_in))",
        OF_VERA + "a_b_and_d_start_as_the_paper_has_them"),
    Bug("VeRA: a key gives B the numbers of A", VERA, "by_key(self.key, r * d_in)", "by_key(self.key, 0)",
        GOLDEN + "the_projections_that_a_key_gives_are_those_in_the_file"),
    Bug("VeRA: the product is LoRA's, and keeps x", VERA,
        "return self.base.project(x, rng) + linear(linear(x, A) * self.d, B) * self.b",
        "return self.base.project(x, rng) + linear(x, (self.b.reshape(-1, 1) * B * self.d) @ A)",
        OF_VERA + "x_is_not_kept_for_the_backward_pass_because_a_is_frozen"),
    # ---- LoHa
    Bug("LoHa: the products are added", LOHA, "(self.B1 @ self.A1) * (self.B2 @ self.A2)",
        "(self.B1 @ self.A1) + (self.B2 @ self.A2)", OF_LOHA + ENTRY),
    Bug("LoHa: the scale acts on either product", LOHA, "self.scale * ((self.B1 @ self.A1) *",
        "self.scale * ((self.scale * self.B1 @ self.A1) *", OF_LOHA + ENTRY),
    Bug("LoHa: a lookup forgets the scale", LOHA, "self.scale * (left * right)", "left * right", OF_LOHA + ENTRY),
    Bug("LoHa: both products start at 0", LOHA, '"B1": trained((d_out, r), kaiming(r))', '"B1": trained((d_out, r))',
        OF_LOHA + "one_factor_starts_at_0_and_its_gradient_alone_is_not_0"),
    Bug("LoHa: B1 is drawn by the columns of A1", LOHA, '"B1": trained((d_out, r), kaiming(r))',
        '"B1": trained((d_out, r), kaiming(d_in))', OF_LOHA + DRAWN),
    Bug("HiRA: A is drawn by its rows", HIRA, "kaiming(d_in))", "kaiming(r))", OF_HIRA + DRAWN),
    Bug("LoKr: w2_a is drawn by its rows", LOKR, "trained((k, r), kaiming(r))", "trained((k, r), kaiming(k))",
        OF_LOKR + DRAWN),
    Bug("LoHa: the scale is alpha", LOHA, "scale=self.scale_at(name, slot))", "scale=Fraction(self.alpha))",
        OF_LOHA + "the_scale_is_alpha_over_r_and_1_by_default"),
    # ---- LoKr
    Bug("LoKr: the factors of the product are exchanged", LOKR,
        "w1.reshape(l, 1, m, 1) * w2.reshape(1, k, 1, n)", "w1.reshape(1, l, 1, m) * w2.reshape(k, 1, n, 1)",
        OF_LOKR + ENTRY),
    Bug("LoKr: a factor that does not divide is no bound", LOKR,
        "math.isqrt(d) if factor is None else min(factor, math.isqrt(d))", "math.isqrt(d)",
        OF_LOKR + "a_size_is_split_near_its_square_root_or_by_the_given_factor"),
    Bug("LoKr: x is cut the other way round", LOKR, "linear(linear(X, w2).mT, w1).mT", "linear(linear(X, w2).mT, w1)",
        OF_LOKR + ENTRY),
    Bug("LoKr: a lookup exchanges quotient and remainder", LOKR,
        "embedding(w1, ids // w2.shape[0]), embedding(w2, ids % w2.shape[0])",
        "embedding(w1, ids % w1.shape[0]), embedding(w2, ids // w1.shape[0])", OF_LOKR + ENTRY),
    Bug("LoKr: the scale is alpha", LOKR, "        scale = self.scale_at(name, slot)\n        return Kronecker",
        "        scale = Fraction(self.alpha)\n        return Kronecker", LOGITS),
    Bug("LoKr: a product of rank r also where it saves nothing", LOKR, "if 2 * r < max(k, n):",
        "if 2 * r <= max(k, n):", OF_LOKR + "factors_are_products_where_this_is_smaller_as_in_files_of_peft"),
    Bug("LoKr: w1 is always a product where it saves something", LOKR, "if self.decompose_both and 2 * r", "if 2 * r",
        OF_LOKR + "factors_are_products_where_this_is_smaller_as_in_files_of_peft"),
    Bug("LoKr: the larger divisor comes first", LOKR, "    return first, d // first", "    return d // first, first",
        OF_LOKR + "a_size_is_split_near_its_square_root_or_by_the_given_factor"),
    Bug("LoKr: kron is formed for every product", LOKR,
        "return self.base.project(x, rng) + self.scale * Y.reshape(*lead, self.shape[0])",
        "return linear(x, self.dense())", OF_LOKR + "kron_is_not_formed_for_a_product_with_x"),
    # ---- HiRA
    Bug("HiRA: the 1 is forgotten", HIRA, "self.base.dense() * (1 + self.B @ self.A)",
        "self.base.dense() * (0 + self.B @ self.A)", OF_HIRA + ENTRY),
    Bug("HiRA: the product is added to the weight", HIRA, "self.base.dense() * (1 + self.B @ self.A)",
        "self.base.dense() + self.B @ self.A", LOGITS),
    Bug("HiRA: a lookup forgets the 1", HIRA, "self.base.rows(ids) * (1 + embedding(self.B, ids) @ self.A)",
        "self.base.rows(ids) * (embedding(self.B, ids) @ self.A)", OF_HIRA + ENTRY),
    Bug("HiRA: above a weight with dropout it adds B A and forgets W0", HIRA,
        "return self.base.dense() * (self.B @ self.A)", "return self.B @ self.A", DROPOUT),
    Bug("HiRA: merging writes into the base", HIRA, "    def change(self) -> Tensor:",
        "    def merged(self):\n        self.base.data *= 1 + self.B.data @ self.A.data\n"
        "        return Parameter(self.base.data)\n\n    def change(self) -> Tensor:", DRIFT),
    # ---- OFT
    Bug("OFT: the weight is rotated the other way than x", OFT, "return turned(self.base.dense(), self.rotation().mT)",
        "return turned(self.base.dense(), self.rotation())", FRACTIONS),
    Bug("OFT: a lookup is rotated the other way", OFT, "return turned(self.base.rows(ids), self.rotation().mT)",
        "return turned(self.base.rows(ids), self.rotation())", FRACTIONS),
    Bug("OFT: Q is symmetric", OFT, "else above - above.mT", "else above + above.mT", FRACTIONS),
    Bug("OFT: the inverse alone is taken for R", OFT, "return solve(I - Q, I + Q)", "return solve(I - Q, I + 0 * Q)",
        FRACTIONS),
    Bug("OFT: the half of Q turns, as in other books", OFT, "return solve(I - Q, I + Q)",
        "return solve(I - 0.5 * Q, I + 0.5 * Q)", FORMS),
    Bug("OFT: the start is the identity but for rounding", OFT, "return solve(I - Q, I + Q)",
        "return solve(3 * I - Q - 2.9 * I, 0.1 * I + Q)", START),
    Bug("OFT: the series has one term less", OFT, "range(self.terms - 2)", "range(self.terms - 3)", FORMS),
    Bug("OFT: Q does not start at 0", OFT, "size * (size - 1) // 2))}",
        "size * (size - 1) // 2), lambda shape, dtype, rng: xp.full(shape, 1e-3, dtype))}",
        "test_laws.py::test_law_2_attaching_changes_no_output_value_at_initialization"),
    Bug("OFT: a width that the blocks do not fill is accepted", OFT, "        if d_in % size:\n",
        "        if d_in < size:\n", BLOCKS),
    # ---- solve
    Bug("solve: the gradient of a has the wrong sign", LINALG, "lambda g: -h(g) @", "lambda g: h(g) @", DERIVATIVE),
    Bug("solve: the gradient uses a and not its transpose", LINALG, "_solution(a.swapaxes(-1, -2), g)",
        "_solution(a, g)", DERIVATIVE),
    Bug("solve: the gradient of a is transposed", LINALG, "-h(g) @ x.swapaxes(-1, -2)", "-x @ h(g).swapaxes(-1, -2)",
        DERIVATIVE),
    Bug("solve: elimination takes the pivot where it stands", LINALG,
        "next((i for i in range(k, n) if rows[i][k]), None)", "k if rows[k][k] else None", DERIVATIVE),
    Bug("solve: leading axes are left to the library", LINALG,
        "    a, b = (xp.broadcast_to(side, (*lead, *side.shape[-2:])) for side in (a, b))\n", "",
        SOLVE + "the_strict_namespace_gives_the_same_bits"),
    Bug("solve: what is singular on a GPU gives infinities", LINALG, "    if not xp.isfinite(x).all() and",
        "    if False and", SOLVE + "a_singular_matrix_among_others_is_refused_with_the_shape"),
    Bug("solve: numbers that are not finite are called singular", LINALG,
        " and xp.isfinite(a).all() and xp.isfinite(b).all():", ":",
        SOLVE + "numbers_that_are_not_finite_are_not_called_a_singular_matrix"),
    Bug("solve: the system for g is solved for each gradient", LINALG,
        "h = once(lambda g: _solution(a.swapaxes(-1, -2), g))", "h = lambda g: _solution(a.swapaxes(-1, -2), g)",
        SOLVE + "the_system_for_g_is_solved_once_for_both_gradients_and_never_where_nothing_is_watched"),
    Bug("solve: its FLOPs leave out the second system", FLOPS, "return once, once * bool(kept) + product * (0 in kept)",
        "return once, product * (0 in kept)",
        COUNTED),
]
