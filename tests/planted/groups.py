"""Bugs in affine groups, in llama.cpp's blocks, and in the packing of their codes."""
from __future__ import annotations

from tests.planted.bug import Bug

AFFINE, GGML, BYTES, PACKING, GROUPS = (
    f"quant/{name}.py" for name in ("affine", "ggml", "ggml_bytes", "packing", "groups"))
OF_AFFINE, OF_GGML, OF_BYTES, OF_PACKING = (
    f"quant/test_{name}.py::test_" for name in ("affine", "ggml", "ggml_bytes", "packing"))
EQUATION = OF_AFFINE + "scale_offset_and_codes_are_those_of_the_equation_on_fractions"
STORED = OF_AFFINE + "codes_are_those_nearest_to_the_weights_under_the_scale_and_offset_that_are_stored"
SUBNORMAL = OF_AFFINE + "subnormal_weights_keep_the_bound_and_few_of_them_are_exact"
ROUNDED = OF_AFFINE + "a_rounded_zero_point_loses_at_most_half_a_step_of_a_change_and_all_of_one_below_that"
REFUSED = OF_AFFINE + "a_change_that_cannot_be_kept_is_refused_and_the_arrays_stay_as_they_were"
GGUF = OF_GGML + "any_matrix_has_the_bytes_that_gguf_gives_it_and_decodes_to_the_same_bits"
SHIFTED_M = OF_GGML + "a_shifted_m_is_m_plus_delta_rounded_once_to_float16_and_codes_and_d_are_not_touched"
PLACES = OF_BYTES + "a_block_begins_with_d_and_m_and_each_code_lies_where_the_page_says"

BUGS = [
    # ---- affine groups
    Bug("the steps are counted as 2^N", AFFINE, "return 2 ** self.bits - 1", "return 2 ** self.bits",
        EQUATION),
    Bug("codes are cut off instead of rounded", AFFINE, "self._codes(numpy.rint(w, out=w))",
        "self._codes(numpy.floor(w, out=w))", EQUATION),
    Bug("a constant group divides by 0", AFFINE, "scale[span <= 0] = 1", "pass",
        OF_AFFINE + "groups_of_equal_weights_are_exact"),
    Bug("a subnormal scale is rounded down, and the top of its group is out of reach", AFFINE,
        "scale[short] = numpy.nextafter(scale[short], kept.type(1))", "pass", SUBNORMAL),
    Bug("codes are rounded with the scale before it is stored in float16", AFFINE,
        "w /= scale.astype(w.dtype)[..., None]",
        "w /= numpy.maximum((matrix.reshape(w.shape).max(axis=2) - low) / self._last, 1e-30)[..., None]", STORED),
    Bug("codes are rounded with the offset before it is stored in float16", AFFINE, "w -= low[..., None]",
        "w -= matrix.reshape(w.shape).min(axis=2)[..., None]",
        STORED),
    Bug("the range of a group with a rounded zero point leaves 0 out", AFFINE,
        "low = numpy.minimum(w.min(axis=2), 0)", "low = w.min(axis=2)",
        OF_AFFINE + "with_rounded_zero_points_0_is_exact_and_z_is_a_code"),
    Bug("zero points are taken off modulo 256", AFFINE,
        "grouped -= arrays[\"zero\"][rows].astype(dtype)[..., None]",
        "grouped -= arrays[\"zero\"][rows].astype(\"uint8\").astype(dtype)[..., None]",
        OF_AFFINE + "a_merge_into_zero_points_below_0_and_above_the_codes_is_decoded"),
    Bug("a merge into rounded zero points adds", AFFINE, "host[\"zero\"] - change / host[\"scale\"]",
        "host[\"zero\"] + change / host[\"scale\"]", ROUNDED),
    Bug("a merge into rounded zero points cuts the rest off", AFFINE, "numpy.rint(host[\"zero\"]",
        "numpy.trunc(host[\"zero\"]", ROUNDED),
    Bug("a zero point that 16 bits cannot hold wraps", AFFINE, "if not abs(found).max() <= _FARTHEST:", "if False:",
        REFUSED),
    Bug("the zero point of the other form has the wrong sign", AFFINE,
        "return -arrays[\"offset\"]", "return arrays[\"offset\"]",
        OF_AFFINE + "zero_points_give_the_other_form_of_the_equation"),
    Bug("an offset that overflows becomes infinite", GROUPS, "if not numpy.isfinite(found).all():", "if False:",
        REFUSED),
    Bug("a change with wider groups is spread in the wrong order", GROUPS,
        "numpy.repeat(delta.astype(\"float64\"), groups // delta.shape[1], axis=1)",
        "numpy.tile(delta.astype(\"float64\"), (1, groups // delta.shape[1]))",
        OF_AFFINE + "a_change_may_have_wider_groups_than_the_weight"),
    Bug("rows that are encoded together lose the last chunk's place", GROUPS,
        "out[leaf][start:start + step] = found", "out[leaf][:len(found)] = found",
        OF_AFFINE + "a_matrix_that_is_encoded_a_few_rows_at_a_time_is_the_one_that_is_encoded_at_once"),
    # ---- llama.cpp's blocks
    Bug("codes are rounded with d in float16", GGML, "inverse, lost = _inverse(d)\n        w *= inverse[..., None]\n"
        "        w += more", "inverse, lost = _inverse(d.astype(\"float16\").astype(\"float32\"))\n"
        "        w *= inverse[..., None]\n        w += more", GGUF),
    Bug("ties of q8_0 go to the even neighbor", GGML, "whole += numpy.trunc(w + w)", "whole += numpy.rint(w)", GGUF),
    Bug("d of q4_0 has the sign of no weight", GGML,
        "numpy.take_along_axis(w, at, axis=2)[..., 0] / -self.center",
        "abs(numpy.take_along_axis(w, at, axis=2)[..., 0]) / -self.center", GGUF),
    Bug("codes of q4_0 run over their four bits", GGML, "numpy.minimum(q, 2 ** self.bits - 1, out=q)", "pass", GGUF),
    Bug("m moves, and the sum is rounded in float16 first", GGML,
        "to_host(arrays[\"m\"]) + change, \"float16\")",
        "to_host(arrays[\"m\"]) + change.astype(\"float16\"), \"float16\")", SHIFTED_M),
    Bug("a d that float16 cannot hold becomes infinite", GGML,
        "stored = stored_as(self, \"the scale d\", d, \"float16\")\n        return {\"codes\": self._codes(w, d, self",
        "stored = d\n        return {\"codes\": self._codes(w, d, self",
        OF_GGML + "a_scale_or_an_offset_that_is_too_large_for_float16_is_refused"),
    Bug("nibbles of neighbors share a byte of the file", BYTES, "low[..., :_HALF] | (low[..., _HALF:] << 4)",
        "low[..., ::2] | (low[..., 1::2] << 4)", PLACES),
    Bug("the fifth bits stand after the nibbles", BYTES,
        "rest.append(low[..., :_HALF] | (low[..., _HALF:] << 4))",
        "rest.insert(0, low[..., :_HALF] | (low[..., _HALF:] << 4))", PLACES),
    Bug("the fifth bits begin with the highest", BYTES, "numpy.packbits(q >> 4, axis=2, bitorder=\"little\")",
        "numpy.packbits(q >> 4, axis=2)", PLACES),
    Bug("a file may hold an infinite scale", BYTES, "if not numpy.isfinite(found).all():", "if False:",
        OF_BYTES + "a_scale_or_an_offset_that_is_not_finite_is_refused_with_its_place"),
    # ---- packing
    Bug("a word that spans two bytes loses its upper bits", PACKING,
        "((wide[..., first] >> skip) | (wide[..., first + 1] << (8 - skip)))", "(wide[..., first] >> skip)",
        OF_PACKING + "unpacking_undoes_packing_for_every_width_and_length"),
    Bug("the first code lies in the highest bits", PACKING, "numpy.uint64(bits * i)", "numpy.uint64(bits * (7 - i))",
        OF_PACKING + "the_bits_of_a_row_follow_each_other_from_the_lowest_on_and_the_rest_of_its_last_byte_is_0"),
    Bug("a row that does not fill its last word is cut", PACKING, "return codes if codes.shape[1] == d else",
        "return codes if codes.shape[1] >= d else",
        OF_PACKING + "unpacking_undoes_packing_for_every_width_and_length"),
]
