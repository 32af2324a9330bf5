"""Faults of NF4 and FP4: levels, thresholds, packing, blocks, double quantization, decoding parts of a matrix."""
from __future__ import annotations

from tests.planted.bug import Bug

CODEBOOKS, BLOCKWISE, DOUBLE, FOURBIT, MAP, NORMAL, PUBLIC = (
    f"quant/{name}.py" for name in ("codebooks", "blockwise", "double", "fourbit", "dynamic_map", "normal_float",
                                    "quantize_4bit"))
TEST = "quant/test_{}.py::test_"
LEVEL, BLOCK, NESTED, SCHEME, GOLDEN = (TEST.format(name) for name in (
    "codebooks", "blockwise", "double", "fourbit", "quantize_4bit"))
RECIPROCAL = BLOCK + ("full_blocks_are_multiplied_by_a_reciprocal_and_a_partial_block_is_divided_where_this_"
                      "changes_codes")
ROWS = SCHEME + "rows_begin_anywhere_inside_bytes_and_blocks"
ERROR = BLOCK + "the_error_is_at_most_half_the_widest_gap_times_absmax_always"
BYTES = GOLDEN + "codes_scales_and_numbers_are_those_of_bitsandbytes"

BUGS = [
    # ---- levels
    Bug("FP4 is that of the OCP", CODEBOOKS, "_TWELFTHS = (0, 0.0625, 8,", "_TWELFTHS = (0, 1, 8,",
        LEVEL + "the_levels_are_those_of_bitsandbytes_bit_for_bit"),
    Bug("a number at a threshold gets the upper level", CODEBOOKS, "numpy.greater(y, bound,",
        "numpy.greater_equal(y, bound,",
        LEVEL + "a_number_gets_the_code_of_the_nearest_level_and_at_a_threshold_the_lower_one"),
    Bug("FP4 codes are ranks", CODEBOOKS, "if (order[:-1] < order[1:]).all():", "if True:", BYTES),
    Bug("the first element is in the low nibble", CODEBOOKS, "two << 4 | two >> 8", "two | two >> 4",
        GOLDEN + "the_first_test_vector"),
    Bug("NF4 is made of a probability that is not cut", NORMAL, "OUTERMOST = 0.9677083",
        "OUTERMOST = 1 - (1 / 32 + 1 / 30) / 2",
        LEVEL + "nf4_is_the_quantiles_of_the_normal_distribution_computed_in_float32_bit_for_bit"),
    Bug("the dynamic map rounds the product of step and i", MAP, "numpy.float64(_F32(start)) + step * i",
        "_F32(start) + (step * i).astype('float32')", LEVEL + "the_dynamic_map_is_that_of_bitsandbytes_bit_for_bit"),
    # ---- blocks
    Bug("a partial block is multiplied by a reciprocal", BLOCKWISE, "numpy.divide(rest, absmax[-1], out=y[whole:n])",
        "numpy.multiply(rest, 1 / absmax[-1], out=y[whole:n])", RECIPROCAL),
    Bug("a full block is divided", BLOCKWISE, "numpy.multiply(blocks, (1 / numpy.maximum(full, TINY))[:, None],",
        "numpy.divide(blocks, numpy.maximum(full, TINY)[:, None],", RECIPROCAL),
    Bug("absmax is the largest number, sign and all", BLOCKWISE, "(blocks.view(\"int32\") & 0x7FFFFFFF).max(axis=1)",
        "blocks.view(\"int32\").max(axis=1)", BYTES),
    Bug("a block of subnormal numbers becomes zeros", BLOCKWISE, "if small.any():", "if False:", ERROR),
    Bug("a block of zeros is divided by zero", BLOCKWISE, "(1 / numpy.maximum(full, TINY))", "(1 / full)",
        BLOCK + "zeros_come_back_as_zeros_beside_others_and_alone"),
    Bug("NaN is quantized", BLOCKWISE, "if not numpy.isfinite(absmax).all():", "if numpy.isinf(absmax).any():",
        GOLDEN + "wrong_input_is_refused_in_words"),
    Bug("pieces of a long array cut a block", BLOCKWISE, "step = 2 * blocksize * max(1, CHUNK // (2 * blocksize))",
        "step = max(CHUNK, 2 * blocksize)", BLOCK + "long_arrays_are_cut_where_no_block_and_no_byte_is_cut"),
    Bug("rows that begin inside a block have the scale of the next", BLOCKWISE,
        "head = min(-skipped % blocksize, len(values))", "head = 0", ROWS),
    # ---- parts of a matrix
    Bug("rows that begin inside a byte are shifted by one", FOURBIT, "values[head:head + n]", "values[:n]", ROWS),
    Bug("the scale of a block is found by row and column", FOURBIT, "if d_in % 2 or d_in % self.blocksize:",
        "if d_in % 2:", ROWS),
    Bug("levels of a checkpoint are ignored", FOURBIT, '_levels("levels", self.levels, 16) or LEVELS[self.kind]',
        "LEVELS[self.kind]", SCHEME + "levels_of_a_checkpoint_are_used_for_both_ways"),
    Bug("a nested map of a checkpoint is ignored", FOURBIT,
        '_levels("absmax_levels", self.absmax_levels, 256) or dynamic_map()', "dynamic_map()",
        SCHEME + "a_nested_map_of_a_checkpoint_is_used"),
    Bug("numbers beyond float32 are infinity", PUBLIC, "scheme.encode(values.reshape(1, -1))",
        "scheme.encode(numpy.nan_to_num(values.astype('float32')).reshape(1, -1))",
        GOLDEN + "a_float16_infinity_and_a_float64_number_beyond_float32_are_refused"),
    # ---- double quantization
    Bug("the byte is that of the nearest level", DOUBLE,
        "_binned(levels)[_bin(numpy.where(scale > 0, y, 0))]",
        "numpy.searchsorted(thresholds(levels), numpy.where(scale > 0, y, 0))",
        NESTED + "codes_are_those_of_the_nearest_of_65536_bins_and_not_of_the_nearest_level"),
    Bug("the offset is added before the scale", DOUBLE, "return scaled + offset",
        "return to_device(_float32(levels))[qabsmax[at]] * (nested_absmax[at // BLOCK] + offset)",
        NESTED + "absmax_comes_back_within_half_a_gap_of_the_map_a_bin_and_the_roundings"),
    Bug("nested blocks are of 64", DOUBLE, "BLOCK = 256", "BLOCK = 64", BYTES),
    Bug("the offset is NumPy's mean", DOUBLE, "found = numpy.float32(_sum(x) / numpy.float32(len(x)))",
        "found = x.mean()", BYTES),
    Bug("a sum that overflows has an infinite offset", DOUBLE, "return found if numpy.isfinite(found) else",
        "return found if True else", NESTED + "scales_at_the_ends_of_float32_come_back_finite_and_close"),
]
