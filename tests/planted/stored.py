"""Bugs in the storing of quantized weights."""
from tests.planted.bug import Bug

_HERE = "models/test_quantized.py::"
_BNB, _OWN, _FOLDER = "quant/bitsandbytes.py", "quant/described.py", "models/quantized.py"
_AGAIN = _HERE + "test_what_is_read_is_written_again_byte_for_byte"
_STATE = _HERE + "test_the_state_names_the_dtype_in_which_the_other_weights_are_stored"
_CONTRADICTS = _HERE + "test_a_folder_that_contradicts_itself_is_refused_by_the_name_of_the_tensor"
_DESCRIPTION = _HERE + "test_a_description_that_does_not_fit_is_refused_by_the_key_of_the_weight"
_MAP = _HERE + "test_a_map_that_differs_from_ours_is_honored_and_written_again"
_KINDS = _HERE + "test_every_kind_keeps_its_codes_its_scales_and_its_outputs"
_DIGEST = _HERE + "test_another_kind_in_the_configuration_is_noticed_by_the_digest"
_MERGED = _HERE + "test_a_change_is_merged_into_numbers_unless_it_was_requantized"
_QALORA = _HERE + "test_qalora_is_saved_as_codes_whether_it_is_merged_before_or_by_saving"
_ORIGIN = _HERE + "test_the_origin_of_a_base_is_saved_and_read_unless_the_base_is_another_one_in_the_file"

BUGS = [
    Bug("stored maps are made again instead of read", _BNB, "double=nested, **maps)", "double=nested)", _MAP),
    Bug("maps are written as the library's own", _BNB, 'numpy.array(way.levels, "float32")',
        'numpy.array(scheme(way.kind).levels, "float32")', _MAP),
    Bug("4-bit codes are written flat", _BNB, 'arrays["packed"].reshape(-1, 1)', 'arrays["packed"].reshape(-1)',
        _AGAIN),
    Bug("the JSON of a quant_state has no spaces", _BNB, "json.dumps(state).encode()",
        'json.dumps(state, separators=(",", ":")).encode()', _AGAIN),
    Bug("the dtype of a quant_state is forgotten when it is read", _BNB, '    weight.source = state["dtype"]\n', "",
        _AGAIN),
    Bug("a quant_state says float64", _BNB, '"float32" if said == "float64" else said', "said", _STATE),
    Bug("the shape in a quant_state is not compared", _BNB,
        'state["shape"] == list(shape) and all(type(n) is int for n in state["shape"])',
        'all(type(n) is int for n in state["shape"])', _CONTRADICTS),
    Bug("a quant_state may call itself another type than its tensor", _BNB, 'state["quant_type"] == kind,',
        'state["quant_type"] in KINDS,', _CONTRADICTS),
    Bug("a quant_state may be as long as it likes", _BNB, '(states[0], "uint8", 1, _LONGEST)',
        '(states[0], "uint8", 1, 2 ** 60)', _CONTRADICTS),
    Bug("absmax below 0 are taken", _BNB, "((array >= 0) | (leaf == \"offset\"))", "(array == array)", _CONTRADICTS),
    Bug("4-bit weights that overflow are taken", _BNB, "    check_finite(key, weight)\n    return weight",
        "    return weight", _CONTRADICTS),
    Bug("half-precision bit views of codes are widened", "models/t5_files.py", ", raw=stored.raw)", ")",
        _HERE + "test_the_codes_may_be_stored_as_another_dtype_and_keep_every_bit"),
    Bug("scales are rounded to the dtype of the file", "models/folder.py", "said, dtype, exact=exact)", "said, dtype)",
        _STATE),
    Bug("the digest leaves out the quantization", "models/folder.py",
        "[config.resolved(), quantization, origin]", "[config.resolved(), quantization is None, origin]", _DIGEST),
    Bug("the origin of a quantized base is not signed", "models/folder.py",
        "[config.resolved(), quantization, origin]", "[config.resolved(), quantization]", _ORIGIN),
    Bug("a base that something was merged into keeps its origin", "quant/origin.py",
        "if exact and not is_merged else None", "if exact else None", _ORIGIN),
    Bug("the shape in a description is not compared", _OWN, 'if said["shape"] != list(shape) or any(', "if any(",
        _DESCRIPTION),
    Bug("NaN in the scales of a description are taken", _OWN, 'array.dtype.kind == "f" and not',
        'array.dtype.kind == "F" and not', _DESCRIPTION),
    Bug("leaves beyond those of the scheme are ignored", _OWN,
        "    if dict(found) not in ways:\n", "    if {leaf: found[leaf] for leaf in ways[0]} not in ways:\n",
        _DESCRIPTION),
    Bug("only float32 scales are read", _OWN, 'for dtype in ("float32", "float64")]', 'for dtype in ("float32",)]',
        _KINDS),
    Bug("the modules that were left alone are not listed", _FOLDER,
        "return None if left == by_itself else sorted(left | head)", "return None",
        _HERE + "test_the_configuration_tells_transformers_which_modules_are_not_quantized"),
    Bug("an embedding in 4 bits is left to transformers", _FOLDER,
        "if not descriptions and quantized.keys() <= set(modules):", "if not descriptions:",
        _HERE + "test_the_configuration_tells_transformers_which_modules_are_not_quantized"),
    Bug("8 bits of bitsandbytes are taken for 4", _FOLDER, 'if config.get("load_in_4bit") is not True:',
        "if not config:", _HERE + "test_another_quantization_than_four_bits_of_bitsandbytes_is_refused"),
    Bug("requantized weights are saved as numbers", "models/merged.py",
        "return top.merged if isinstance(top.merged, QuantizedWeight) else None", "return None", _MERGED),
    Bug("QA-LoRA is saved as numbers where saving merges it", "models/merged.py",
        "return found if isinstance(found, QuantizedWeight) else None", "return None", _QALORA),
    Bug("weights that nothing is plugged on are saved as numbers", "models/folder.py",
        "return slot.base if isinstance(slot.base, QuantizedWeight) else slot.base.dense().data",
        "return slot.base.dense().data", _KINDS),
]
