"""Bugs in quantized bases: how they are made, what a file says of them, and what is merged into them."""
from __future__ import annotations

from tests.planted.bug import Bug

QUANTIZE, WEIGHT = "quant/quantize.py", "quant/weight.py"
MERGING, ORIGIN = "attaching/merging.py", "attaching/origin.py"
OF_QUANTIZE, OF_WEIGHT = "quant/test_quantize.py::test_", "quant/test_weight.py::test_"
OF_MERGING, OF_ORIGIN = "attaching/test_merging.py::test_", "attaching/test_origin.py::test_"

BUGS = [
    # ---- quantize
    Bug("a quantized weight keeps the float weight beside its codes", WEIGHT,
        "return cls(scheme, matrix.shape, matrix.dtype, arrays, keep)",
        "made = cls(scheme, matrix.shape, matrix.dtype, arrays, keep)\n        made.first = matrix\n"
        "        return made",
        OF_QUANTIZE + "the_float_weights_are_gone_from_memory"),
    Bug("weights are replaced one by one, and stay so when a later one is refused", QUANTIZE,
        "made[name] = _quantized(name, slot, chosen, keep)",
        "made[name] = _quantized(name, slot, chosen, keep)\n        slot.base = made[name]",
        OF_QUANTIZE + "a_shape_that_the_kind_cannot_hold_is_refused_by_name_and_nothing_is_replaced"),
    Bug("an interrupt leaves a model half quantized", QUANTIZE,
        "    except BaseException:\n", "    except ValueError:\n",
        OF_QUANTIZE + "an_interrupt_leaves_all_weights_as_they_were"),
    Bug("the head is quantized by default", QUANTIZE, ' and slot is not head]', "]",
        OF_QUANTIZE + "by_default_all_linear_weights_but_the_head_are_quantized"),
    Bug("a weight is quantized under a merged attachment, whose constant stays", QUANTIZE,
        "for entry in slot.merged:", "for entry in ():",
        OF_QUANTIZE + "a_weight_under_a_merged_attachment_is_refused_and_one_beside_it_is_not"),
    Bug("what was trained together with the base is recorded as trained on the quantized one", QUANTIZE,
        "    model.host.differentiated(frozenset(model.base_parameters.values()))  # the base is about to change\n", "",
        OF_QUANTIZE + "a_record_of_a_base_that_was_trained_too_is_settled_before_the_base_is_quantized"),
    Bug("codes of a wider integer wrap when they are loaded", "nn/module.py",
        'if p.dtype.kind in "iub" and found != p.dtype:', 'if False:',
        OF_QUANTIZE + "tampered_arrays_are_refused_by_name_and_nothing_is_replaced"),
    Bug("the report counts the bytes of codes as numbers", "attaching/report.py", "found[name] = math.prod(slot.shape)",
        "found[name] = sum(p.data.size for p in slot.base.arrays.values())",
        OF_QUANTIZE + "the_report_counts_a_quantized_weight_by_its_shape_and_its_bytes_as_they_are"),
    # ---- the weight
    Bug("numbers that are kept outlive the codes that they were decoded from", WEIGHT,
        "if kept is None or any(a is not b for a, b in zip(kept[0], now)):", "if kept is None:",
        OF_QUANTIZE + "kept_numbers_follow_every_state_that_is_loaded"),
    Bug("a copy of a weight takes the kept numbers along", WEIGHT, '{**vars(self), "_kept": None}', "{**vars(self)}",
        OF_WEIGHT + "a_copy_keeps_no_numbers_of_the_first"),
    Bug("NaN is quantized to some code", WEIGHT, "if not to_host(xp.isfinite(matrix).all()):", "if False:",
        OF_WEIGHT + "what_it_cannot_be_is_refused"),
    # ---- origins
    Bug("an origin stays when the base is trained", "attaching/trained_on.py",
        "return None if known is None or known[0] != content_of_base(model) else known[1]",
        "return None if known is None else known[1]",
        OF_ORIGIN + "a_base_that_changed_after_it_was_quantized_has_no_origin_and_no_relatives"),
    Bug("all quantized bases are relatives", ORIGIN, "return there.base is not None and _root(there) == _root(here)",
        "return there.origin is not None or here.origin is not None",
        OF_ORIGIN + "a_load_on_a_base_of_other_weights_is_refused"),
    Bug("a base that is quantized in two steps has the half quantized one as its original", QUANTIZE,
        "origin = origin_of(model)\n", "origin = None\n",
        OF_ORIGIN + "a_base_that_is_quantized_in_two_steps_has_the_origin_of_the_first"),
    Bug("the origin in a file is not signed", "attaching/adapter_file.py", "for key in (*SIGNED, _ORIGIN) if",
        "for key in SIGNED if", OF_ORIGIN + "the_origin_in_a_file_is_signed"),
    Bug("a sum of attachments forgets the origin of their base", "operations/combine.py",
        "TrainedOn(said.base, origin=said.origin)", "TrainedOn(said.base)",
        OF_ORIGIN + "combined_and_extracted_ones_have_the_origin_of_their_base"),
    # ---- merging
    Bug("the error of a merge is that of the weight, not of the change", MERGING,
        "return relative_error(to_host(wide_dense(constant).data - W.data), to_host(d))",
        "return relative_error(to_host(wide_dense(constant).data), to_host(W.data + d))",
        OF_MERGING + "requantized_the_sum_has_codes_and_scales_of_its_own"),
    Bug("the original weights take up the change of the quantized ones without themselves", MERGING,
        "OnOriginal(piece.over(given[where]).dense().data)", "OnOriginal(piece.over(below).dense().data)",
        OF_MERGING + "over_the_originals_the_sum_is_that_of_the_float_model_and_the_error_is_the_gap_of_the_bases"),
    Bug("a file holds the sum with the dequantized weight, whatever was merged", MERGING,
        "weight: Any = OnOriginal(", "weight: Any = Parameter(",
        OF_MERGING + "the_constant_that_was_chosen_is_what_is_saved_and_the_error_is_that_of_the_change"),
    Bug("the report of a saved model does not count what a merge lost before", "models/merged.py",
        "wide_weight(base, slot.entries, as_merged=False)", "wide_weight(base, slot.entries)",
        OF_MERGING + "the_constant_that_was_chosen_is_what_is_saved_and_the_error_is_that_of_the_change"),
    Bug("original weights that hold infinity are merged over", MERGING,
        "if not to_host(xp.isfinite(to_device(array)).all()):", "if False:",
        OF_MERGING + "originals_that_do_not_fit_are_refused_by_name"),
]
