"""Bugs in quantized bases, and in merging on them, that the example of QLoRA must notice."""
from __future__ import annotations

from tests.planted.bug import Bug

ROWS = "examples/test_qlora.py::test_"
MOVES = ROWS + "a_qa_lora_moves_the_offsets_alone_and_the_checks_see_it"
ERRORS = ROWS + "bases_of_fewer_bits_are_further_from_the_original_in_the_order_of_their_codes"
BYTES = ROWS + "a_base_takes_the_bytes_of_its_codes_and_scales_and_two_for_every_other_number"
LOST = ROWS + "a_lora_on_nf4_loses_much_of_a_small_change_when_quantized_again_and_little_in_16_bits"

BUGS = [
    Bug("example: merging a QA-LoRA makes new codes", "methods/qalora.py",
        "return shifted(self.change().data)", "return shifted(self.change().data).requantized(self.dense().data)",
        MOVES),
    Bug("example: merging a QA-LoRA into INT4 changes the scales", "quant/affine.py",
        'return {**arrays, "offset" if', 'return {**arrays, "scale": arrays["scale"] * 1.01, "offset" if', MOVES),
    Bug("example: a QA-LoRA is merged into a float weight, and its base of 4 bits is gone", "methods/qalora.py",
        'shifted = getattr(self.base, "shifted", None)', "shifted = None", MOVES),
    Bug("example: merging a QA-LoRA into Q4_1 subtracts its change", "quant/ggml.py",
        'to_host(arrays["m"]) + change', 'to_host(arrays["m"]) - change', MOVES),
    Bug("example: a base of 4 bits in groups has the error of 3 bits", "quant/affine.py",
        "return 2 ** self.bits - 1", "return 2 ** min(self.bits, 3) - 1", ERRORS),
    Bug("example: the numbers of a block are divided by half their largest, and the largest are cut off",
        "quant/blockwise.py", "numpy.multiply(blocks, (1 / numpy.maximum(full, TINY))[:, None], out=scaled)",
        "numpy.multiply(blocks, (1.5 / numpy.maximum(full, TINY))[:, None], out=scaled)", ERRORS),
    Bug("example: double quantization rounds its codes twice as coarsely", "quant/double.py",
        'numpy.where(scale > 0, y, 0))], 0).astype("uint8")',
        'numpy.where(scale > 0, y, 0))], 0).astype("uint8") // 16 * 16', ERRORS),
    Bug("example: double quantization has blocks of 16 scales", "quant/double.py", "BLOCK = 256", "BLOCK = 16", BYTES),
    Bug("example: merging over the original weights takes the quantized ones", "attaching/merging.py",
        "weight: Any = OnOriginal(piece.over(given[where]).dense().data)",
        "weight: Any = OnOriginal(piece.over(below).dense().data)", LOST),
    Bug("example: merging anew leaves a float weight", "attaching/merging.py",
        "return slot.base.requantized(matrix)", "return Parameter(slot.base.requantized(matrix).dense().data)", LOST),
]
