"""Faults in the codecs of (IA)^3, selective tuning and the zoo: files that are read as something else, or written so
that PEFT reads something else."""
from __future__ import annotations

from tests.planted.bug import Bug

IA3, SELECTIVE, VERA, PRODUCTS, OFT, PLACES, OTHERS = (
    f"formats/peft/{name}.py" for name in ("ia3", "selective", "vera", "products", "oft", "places", "others"))
HERE = "formats/peft/test_zoo.py::test_"
GOLDEN = HERE + "a_directory_of_peft_gives_its_logits_gradients_and_merged_logits_and_is_written_back"
ENDINGS = HERE + "ia3_is_written_with_endings_that_mean_exactly_its_inputs"
ROWS = HERE + "rows_are_written_in_their_order_at_every_use_of_a_tied_table"
ELEMENTS = HERE + "elements_in_any_order_are_read_and_written_back_in_it"
SIGN = HERE + "a_rotation_that_turns_the_other_way_in_peft_is_written_with_the_other_sign"
DIVISOR = HERE + "the_block_size_is_the_nearest_divisor_of_the_width_as_in_peft"
SIZES = HERE + "block_sizes_are_written_as_one_field_that_gives_them_all"
FIELDS = HERE + "a_field_that_does_not_fit_is_refused_by_name"
HOLDS = HERE + "a_method_that_peft_cannot_hold_is_not_written"

BUGS = [
    # ---- (IA)^3
    Bug("an ending in feedforward_modules needs a dot before it", IA3, "path.endswith(tuple(value))",
        "path.endswith(tuple(f'.{end}' for end in value))",
        HERE + "an_ending_in_feedforward_modules_counts_without_a_dot_before_it"),
    Bug("feedforward_modules is ignored: what is called wo is scaled at its input", IA3,
        "return IA3(where=where(paths, model), inputs=inputs)", "return IA3(where=where(paths, model))",
        f"{GOLDEN}[adapters/ia3_inputs]"),
    Bug("feedforward_modules is written as a word that means other layers, too", IA3,
        "if set(feedforward(inputs, paths)) != scaled:", "if False:", ENDINGS),
    # ---- selective tuning
    Bug("D25 in a file: copies of the same rows may differ without a word", "formats/row.py",
        "elif not numpy.array_equal(found[row.ours], array):", "elif False:",
        HERE + "a_copy_of_the_rows_that_differs_is_refused_with_both_keys"),
    Bug("trained rows are read as increments, as in vllm", SELECTIVE, "lambda d: d[to_ours], base(slot)[ids])",
        "lambda d: d[to_ours])", f"{GOLDEN}[adapters/trainable_tokens]"),
    Bug("trained rows are read in ascending order, whatever token_indices says", SELECTIVE,
        "to_file, to_ours = orders(numpy.array(ids))", "to_file, to_ours = orders(numpy.array(sorted(ids)))",
        f"{GOLDEN}[adapters/trainable_tokens]"),
    Bug("trained rows of a tied table are written for shared alone", SELECTIVE, "if tied(model) else (\"shared\",)",
        "if False else (\"shared\",)", ROWS),
    Bug("LN_TUNING is read as a difference", SELECTIVE, "slot.shape, base=base(slot))", "slot.shape)",
        f"{GOLDEN}[adapters/ln_tuning]"),
    Bug("rows and columns of SHIRA are exchanged", SELECTIVE, "flat = rows * slot.shape[1] + columns",
        "flat = columns * slot.shape[0] + rows", ELEMENTS),
    Bug("elements of SHIRA in any order keep their numbers and lose their places", SELECTIVE,
        "(n,), lambda d: d[to_file()], lambda d: d[to_ours()])", "(n,))", ELEMENTS),
    Bug("an element twice is read once", SELECTIVE, "if len(numpy.unique(flat)) < len(flat):", "if False:",
        HERE + "elements_that_are_not_there_or_there_twice_are_refused"),
    Bug("any number of elements is written as SHIRA", SELECTIVE, "if ranks[name] != (r, 0) or not r:", "if not r:",
        HERE + "a_mask_is_written_where_all_weights_have_as_many_elements_as_one_r_gives"),
    # ---- VeRA
    Bug("projections that are not in the file are those of key 0", VERA,
        "return VeRA(r, start, where(paths, model), key)", "return VeRA(r, start, where(paths, model), 0)",
        f"{GOLDEN}[zoo/vera_no_projection_t5]"),
    Bug("projections of any size are drawn for a file that has none", VERA,
        'if drawn > whole and not flag(config, "save_projection", True):', "if False:", FIELDS),
    # ---- LoHa, LoKr, HiRA
    Bug("alpha_pattern is ignored", PRODUCTS, '"alpha_pattern": by_place(config, "alpha_pattern", paths, model, a)}',
        '"alpha_pattern": ()}', f"{GOLDEN}[zoo/loha_patterns_t5]"),
    Bug("peft note 12: two full factors are read without a scale", PRODUCTS,
        'decompose_both=flag(config, "decompose_both", False), full="alpha / r")',
        'decompose_both=flag(config, "decompose_both", False))', f"{GOLDEN}[zoo/lokr_full_t5]"),
    Bug("peft note 12: two full factors without a scale are written with alpha / r", PRODUCTS,
        'if method.full == "1":', "if False:",
        HERE + "two_full_factors_without_a_scale_are_written_with_alpha_equal_to_r"),
    Bug("a rank_pattern that PEFT ignored makes a file of HiRA unreadable", PRODUCTS,
        '"rank_pattern": ()} if found == {fields["rank"]} else fields)', '"rank_pattern": ()} if False else fields)',
        HERE + "a_rank_pattern_of_hira_counts_where_the_tensors_have_its_ranks_alone"),
    Bug("a rank_pattern that PEFT ignores is written for HiRA", PRODUCTS, 'if found["rank_pattern"]:', "if False:",
        HOLDS),
    Bug("a scale that PEFT does not have is written as alpha / r", PRODUCTS,
        'if getattr(method, "scaling", "alpha/r") != "alpha/r":', "if False:", HOLDS),
    # ---- OFT
    Bug("peft note 3: use_cayley_neumann is ignored, and the series turns the other way", OFT,
        '"neumann" if series else "transposed"', '"neumann"', f"{GOLDEN}[zoo/oft_blocks_t5]"),
    Bug("peft note 3: the paper's rotation is written as its inverse", OFT,
        'turn = same if (method.cayley == "paper") == table else numpy.negative',
        "turn = numpy.negative if table else same", SIGN),
    Bug("a table is turned the same way as the weight of a linear layer", OFT,
        'turn = same if (method.cayley == "paper") == table else numpy.negative',
        'turn = numpy.negative if method.cayley == "paper" else same', SIGN),
    Bug("r is read as the size of a block", OFT, "width // _divisor(width, blocks)", "_divisor(width, blocks)",
        DIVISOR),
    Bug("of two divisors that are as near the larger one is taken", OFT, "key=lambda n: (abs(n - wanted), n))",
        "key=lambda n: (abs(n - wanted), -n))", DIVISOR),
    Bug("block sizes that one field gives, where it is adjusted, are not written", OFT,
        "for size, blocks in (*exact, *((b, 0) for b in found), *((n, 0) for n in every), *((0, n) for n in every)):",
        "for size, blocks in exact:", SIZES),
    Bug("the series of an older PEFT is read as that of now", OFT,
        'if series and _older(config.get("peft_version"), (0, 18)):', "if False:", FIELDS),
    Bug("a file can ask for a series of any length", OFT, "is_integer(terms, 3) and terms <= MOST_TERMS",
        "is_integer(terms, 3)", FIELDS),
    Bug("coft is ignored", OFT, 'neutral = {"coft": (False,),', 'neutral = {"coft": (False, True),', FIELDS),
    # ---- all of them
    Bug("a module that PEFT does not have the method for is chosen", PLACES, "for path in found if kinds else ():",
        "for path in ():", FIELDS),
    Bug("a table is written for a method that PEFT has for linear layers alone", PLACES,
        "        if slot.kind not in kinds:\n", "        if False:\n", HOLDS),
    Bug("a method of PEFT that is not here is called unknown", OTHERS, "isinstance(kind, str) and kind in OTHERS",
        "False", HERE + "a_method_of_peft_that_is_not_here_is_refused_by_name"),
]
