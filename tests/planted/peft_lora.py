"""Faults of the LoRA family in PEFT's files: targets, keys, fields, starts that change the base."""
from __future__ import annotations

from tests.planted.bug import Bug

CODEC, ROWS, START, TARGETS, NAMES, PLACES, EXPRESSION = (
    f"formats/peft/{name}.py" for name in
    ("lora", "lora_rows", "lora_start", "targets", "names", "places", "expression"))
LORA, TARGET, NAME, MATCH = (
    f"formats/peft/test_{name}.py::test_" for name in ("lora", "targets", "names", "expression"))
RECORDED = TARGET + "the_modules_ranks_and_alphas_are_those_that_peft_0_21_2_chooses"
REFUSED = LORA + "a_field_that_cannot_be_honored_is_refused_by_its_name"
WRITTEN = LORA + "what_is_attached_here_is_written_and_read_again_with_the_same_outputs"
GOLDEN = LORA + "a_directory_of_peft_gives_its_logits_gradients_and_merged_logits_and_is_written_back"
ONE_PRODUCT = LORA + "our_pissa_is_written_as_one_product_on_the_base_as_it_is"
PYTHON = MATCH + "a_match_is_there_where_python_finds_one"

BUGS = [
    Bug("an unknown method is used because its name is a text", "formats/peft/directory.py",
        'noted and not any(word in _COMPUTED for word in field.lower().split("_"))', "noted", REFUSED),
    Bug("an unknown switch is taken for a note", "formats/peft/directory.py", " and not isinstance(value, bool)\n",
        "\n", REFUSED),
    Bug("a file of very many keys takes hours, because the model is searched for each", NAMES, "for use in found:",
        "for use in uses(model):", NAME + "the_model_is_not_searched_again_for_each_of_very_many_keys"),
    # ---- which modules
    Bug("a layer is the last number in a path of PEFT's, as in its older versions", TARGETS,
        "for at in expression.ends(path))", "for at in reversed(expression.ends(path)))", RECORDED),
    Bug("a path that is listed whole is adapted in the layers of layers_to_transform alone", TARGETS,
        "(path in whole or in_layer(path))", "in_layer(path)", RECORDED),
    Bug("all-linear is a regular expression in capitals", TARGETS, 'targets.lower() == "all-linear"',
        'targets == "all-linear"', RECORDED),
    Bug("the last pattern of ranks that matches counts", TARGETS,
        "for key, expression in self._expressions.items() if expression.begins(path)), None)",
        "for key, expression in reversed(self._expressions.items()) if expression.begins(path)), None)", RECORDED),
    Bug("a target that is a regular expression need not match the whole path", TARGETS,
        "return Expression(value, steps=steps).whole", "return Expression(value, steps=steps).begins", RECORDED),
    Bug("the head is one of all linear layers", NAMES, " and path != head]", "]",
        NAME + "the_linear_modules_are_all_but_the_head"),
    Bug("without targets, q and v are adapted and other tensors are not expected", CODEC,
        "paths, r, pissa = targets(config, model, shapes=shapes)",
        'config = {"target_modules": list(USUAL), **{k: v for k, v in config.items() if v is not None}}\n'
        "        paths, r, pissa = targets(config, model, shapes=shapes)",
        LORA + "without_targets_they_are_those_of_the_tensors_and_this_is_said_where_peft_would_take_others"),
    # ---- expressions of a file
    Bug("a lookahead that must not match must", EXPRESSION, "return S & ~self._assert(value, S, flags)",
        "return self._assert(value, S, flags)", PYTHON),
    Bug("a repeat has no upper bound", EXPRESSION, "for _ in range(most - least):", "while True:", PYTHON),
    Bug("expressions may take for ever", EXPRESSION, "        if self.left < 0:\n", "        if False:\n",
        MATCH + "the_time_for_all_expressions_of_a_field_is_bounded"),
    Bug("a possessive repeat is taken for a greedy one", EXPRESSION, "        if not names <= _KNOWN:\n",
        "        if False:\n", MATCH + "what_is_no_expression_or_depends_on_the_match_is_refused"),
    # ---- keys
    Bug("the keys of an encoder are put on a decoder", NAMES, "set() if more and less else more | less", "more | less",
        NAME + "an_adapter_of_the_encoder_is_not_put_on_the_decoder"),
    Bug("the numbers of layers are left out of keys", NAMES, " if not word.isdigit()}", "}",
        NAME + "numbers_are_never_left_out"),
    Bug("two keys may have one partner", NAMES, "partner is not None and partner not in taken:",
        "partner is not None:", NAME + "two_keys_for_one_place_are_refused"),
    Bug("the prefix of torch.compile makes a file inert", NAMES, '("_orig_mod", "module", "default")',
        '("module", "default")', NAME + "a_key_is_stripped_of_what_tools_leave_behind"),
    Bug("part of a tensor is not called truncated", NAMES, "found[short[0]] > expected[short[0]]:", "True:",
        NAME + "a_shape_that_does_not_fit_is_refused_and_a_part_of_a_tensor_is_called_truncated"),
    # ---- fields
    Bug("D25 an alpha of null is PEFT's 8", CODEC, 'needed = ("r", "lora_alpha")', 'needed = ("r",)\n'
        '    neutral = {"lora_alpha": ()}', REFUSED),
    Bug("an alpha of 0 is loaded, and the adapter does nothing", PLACES, "if not is_number(value) or value == 0:",
        "if not is_number(value):", REFUSED),
    Bug("D25 DoRA without its vector is loaded as LoRA", CODEC,
        'if not any("lora_magnitude_vector" in words(key) for key in shapes):',
        'if any(field is None for field in [config]):', REFUSED),
    Bug("a text of false is true", PLACES, "    if type(value) is not bool:\n", "    if False:\n", REFUSED),
    Bug("the dropout of a file is lost", CODEC, '"dropout": _dropout(config),', '"dropout": 0 * _dropout(config),',
        LORA + "dropout_is_that_of_the_file"),
    Bug("an adapter of the shared table is loaded without a word", "formats/peft/beside.py",
        'if path.startswith("shared.")', 'if path.startswith("shared.weight")',
        LORA + "an_adapter_of_the_shared_table_acts_wherever_the_table_is_used_and_this_is_said"),
    Bug("a start that changes the base is ignored", START, "if start.startswith(CHANGES_BASE):",
        'if start.startswith("pissa_"):', REFUSED),
    # ---- starts and writing
    Bug("the principal part of a file is that of what is plugged", START, "slot.base.dense()", "slot.fold().dense()",
        LORA + "pissa_is_relative_to_the_base_whatever_is_plugged_when_it_is_loaded"),
    Bug("a base that does not determine the start of PiSSA is taken", START,
        "if sizes[-1] - rest < _CLOSE * sizes[0]:", "if False:", LORA + "pissa_needs_a_base_that_determines_its_start"),
    Bug("the start of PiSSA is added twice in a file", ROWS, 'fixed if row.ours.endswith(".A") else _minus(fixed)',
        "fixed", ONE_PRODUCT),
    Bug("an adapter of a rank beyond the sizes of its weights is refused, though PEFT has it", PLACES,
        "return dataclasses.replace(method, any_rank=True) if large else method", "return method",
        LORA + "a_rank_beyond_the_sizes_of_the_weights_is_loaded_and_written_as_peft_has_it"),
    Bug("a doubled rank halves s in a file", PLACES,
        'return value if times == 1 else value * (times if method.scaling == "alpha/r" else math.sqrt(times))',
        "return value", WRITTEN),
    Bug("a fixed s is written as alpha", PLACES, "return value * r * times", "return value", WRITTEN),
    Bug("the vector of a table is one for each of its rows", CODEC, 'norm="input" if tables else "output"',
        'norm="output"', LORA + "an_adapter_of_the_shared_table_acts_wherever_the_table_is_used_and_this_is_said"),
    Bug("rsLoRA is written as LoRA", CODEC, '"use_rslora": method.scaling == "alpha/sqrt(r)",', '"use_rslora": False,',
        WRITTEN),
    Bug("projections side by side are written as one product", CODEC, 'getattr(method, "enable", None) is not None:',
        "False:", LORA + "what_peft_cannot_hold_is_refused_before_anything_is_written"),
    Bug("the fields that decide what PEFT computes are not all written", "formats/peft/files.py",
        '"auto_mapping": None, **codec.defaults}', '"auto_mapping": None}',
        LORA + "every_field_that_peft_would_fill_in_with_something_else_is_written"),
    Bug("half of a folder stays where its writing failed", "formats/folder.py",
        "        shutil.rmtree(beside, ignore_errors=True)\n", "",
        "formats/test_folder.py::test_a_folder_whose_writing_fails_is_not_there_and_nothing_is_left_beside_it"),
    Bug("a folder is written in place, file by file", "formats/folder.py", "        yield beside\n",
        "        directory.mkdir(exist_ok=True)\n        yield directory\n        return\n",
        "formats/test_folder.py::test_a_folder_whose_writing_fails_is_not_there_and_nothing_is_left_beside_it"),
    Bug("a misspelled target is not named where tensors have no place", "formats/peft/targets.py",
        "[name for name in targets if name not in ends]", "[name for name in targets if name in ends]",
        LORA + "where_the_tensors_are_not_those_of_the_configuration_the_error_says_what_may_be_wrong"),
]
