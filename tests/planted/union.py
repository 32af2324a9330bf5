"""Bugs in unions of methods, and in what stands beside the method in a file of PEFT's."""
from __future__ import annotations

from tests.planted.bug import Bug

UNION, SELECTIVE, REPORT = "methods/union.py", "methods/selective.py", "attaching/report.py"
SAVED, ROWS, BESIDE, COPIES, NAMES, FILES = (
    f"formats/peft/{name}.py" for name in ("saved_modules", "token_rows", "beside", "copies", "names", "files"))
ROW = "formats/row.py"
OF_UNION, OF_FILES = "methods/test_union.py::test_", "formats/peft/test_beside.py::test_"
MASKS = OF_UNION + "masks_of_several_parts_come_back_to_the_parts_that_they_belong_to"
NO_FILE = OF_UNION + "parts_that_no_file_can_hold_are_refused"
NARROWED = OF_UNION + "where_narrows_all_parts_and_leaves_none_without_a_place"
GOLDEN = OF_FILES + "a_directory_of_peft_gives_its_logits_gradients_and_merged_logits_and_is_written_back"
TIED_HEAD = OF_FILES + "a_trained_head_of_a_tied_model_is_refused_there_and_acts_on_a_head_of_its_own"
WRITTEN = OF_FILES + "a_union_is_written_with_fields_by_which_peft_computes_the_same"
MALFORMED = OF_FILES + "malformed_token_indices_are_refused"
CANNOT_HOLD = OF_FILES + "parts_that_peft_cannot_hold_are_refused_before_anything_is_written"

BUGS = [
    # ---- unions
    Bug("two parts of a union choose one place, and the last one gets it", UNION,
        "                if name in found:\n", "                if False:\n",
        OF_UNION + "two_parts_at_one_place_are_refused_by_name"),
    Bug("the random projections of two parts of a union become one array", UNION,
        "if declared.shared and shared.setdefault(", "if False and shared.setdefault(",
        OF_UNION + "two_parts_with_a_shared_array_of_one_name_are_refused"),
    Bug("a union is transparent as soon as one of its parts is", UNION,
        "return all(part.transparent for part in self.parts)", "return any(part.transparent for part in self.parts)",
        OF_UNION + "kinds_and_transparency_are_those_of_the_parts"),
    Bug("the where of a union is ignored", UNION, 'chosen = matching(found, self.where, "place")',
        "chosen = list(found)", NARROWED),
    Bug("a part of a union may be left without any place", UNION, "        if idle:\n", "        if False:\n",
        NARROWED),
    Bug("a union keeps every model alive that it was attached to", UNION, "weakref.WeakKeyDictionary()", "{}",
        OF_UNION + "one_method_on_two_models_finds_the_parts_of_each_and_keeps_neither_alive"),
    Bug("a union cannot be pickled once it was attached", UNION, 'if name != "_known"}', "}",
        OF_UNION + "one_method_on_two_models_finds_the_parts_of_each_and_keeps_neither_alive"),
    Bug("a part of a union may choose its places by a function, which its file does not hold", UNION,
        "if not all(isinstance(p, str) for p in (", "if False and not all(p for p in (", NO_FILE),
    Bug("the masks in a file of a union go to every part of it", UNION,
        'if exactly([key.rpartition(".")[0]])[0] in named}', "}", MASKS),
    Bug("the file of a union does not say to which part a mask belongs", SELECTIVE,
        "return self.where if self.mask is None else exactly(sorted(matching(self.mask, self.where)))",
        "return self.where", MASKS),
    Bug("the places of a mask inside a union are in the order in which the mask was made", SELECTIVE,
        "exactly(sorted(matching(self.mask, self.where)))", "exactly(matching(self.mask, self.where))", MASKS),
    Bug("the report does not look for LoRAs inside a union", REPORT, 'getattr(method, "parts", [method])', "[method]",
        OF_UNION + "the_report_shows_the_ranks_of_the_loras_inside"),
    Bug("a checkpoint of a union does not know the settings of its parts", "train/identity.py",
        '{"kind": type(value).__name__, **_plain_fields(value)}', '{"kind": type(value).__name__}',
        OF_UNION + "a_run_can_be_stopped_and_resumed_and_knows_the_parts"),
    # ---- beside the method in a file of peft's
    Bug("D2 in a file: a table that peft itself ignores is loaded without a word",
        BESIDE, "    if ignored and not any(",
        "    if False and not any(", OF_FILES + "a_saved_table_that_peft_ignores_acts_here_with_a_warning"),
    Bug("D2 in a file: a trained table is written under a name that peft ignores",
        SAVED, " - set(uses(model).values())\n", "\n",
        WRITTEN),
    Bug("D3 in a file: the trained head of a tied model becomes its table, too", NAMES, "    if some and others:\n",
        "    if False:\n", TIED_HEAD),
    Bug("D20 in a file: a LoRA for the head of a tied model is refused without the reason", NAMES,
        '            if path.startswith(f"{use}."):\n', "            if False:\n",
        OF_FILES + "a_lora_on_the_head_of_a_tied_model_is_refused"),
    Bug("rows of a table are added to the base in place of replacing its rows", ROWS,
        "               base=to_host(slot.base.dense().data)[ids])", "               base=None)", GOLDEN),
    Bug("rows of a table are taken in the order of their ids, whatever the order in the file", ROWS,
        "lambda d: d[order].reshape(ours)", "lambda d: d.reshape(ours)", GOLDEN),
    Bug("a token may be trained twice", ROWS, " or len(set(ids)) < len(ids):", ":", MALFORMED),
    Bug("rows of a tied table are expected once for each of its uses", ROWS,
        'if "lm_head" in uses(model) and "shared" in found:', "if False:",
        OF_FILES + "on_a_tied_model_the_same_ids_for_table_and_head_are_one"),
    Bug("some elements of a row are written as the whole row", ROWS,
        "if len(slot.shape) != 2 or flat.size != ids.size * slot.shape[1]:", "if len(slot.shape) != 2:", CANNOT_HOLD),
    Bug("a module that was trained as a whole is taken for a difference", SAVED,
        "\n                base=to_host(model.slots[name].base.dense().data))", ")", GOLDEN),
    Bug("modules_to_save chooses by whole words of a path", SAVED,
        "(path[start:stop] for start in range(stop))",
        '(path[start:stop] for start in range(stop) if not start or path[start - 1] == ".")',
        OF_FILES + "a_name_chooses_modules_by_the_end_of_their_paths_and_all_that_is_inside_of_them"),
    Bug("a weight is trained by the method and saved as a whole", BESIDE,
        "            if owner.setdefault(name, what) != what:\n", "            if False:\n",
        OF_FILES + "a_weight_that_two_fields_choose_is_refused_by_name"),
    Bug("a module that is saved beside a prompt has the keys of one beside LoRA", BESIDE,
        '"base_model." if codec.peft_type in PROMPTS else PREFIX', "PREFIX",
        OF_FILES + "beside_a_prompt_the_keys_lack_a_model"),
    Bug("a union of two methods is written, and one of them is lost", BESIDE, "        elif part is not main:\n",
        "        elif False:\n", CANNOT_HOLD),
    Bug("places that a union leaves out are written", BESIDE, "part if len(kept) == len(own) else", "part if own else",
        OF_FILES + "a_union_without_some_of_the_places_of_its_parts_is_written_without_them"),
    Bug("a copy of another base is taken for the one of this model", COPIES, "        if not any(map(",
        "        if False and any(map(", OF_FILES + "a_copy_of_the_base_is_kept_if_it_is_equal_and_refused_if_not"),
    Bug("copies of the base are not written back", FILES, "tensors = {**kept, **to_theirs(", "tensors = {**to_theirs(",
        GOLDEN),
    Bug("a saved module is written back as the base and a rounded difference", ROW, "                array = read\n",
        "                array = array + row.base\n", OF_FILES + "a_saved_module_that_did_not_change_is_written_back_"
        "bit_for_bit_though_differences_round"),
    Bug("what a file says of saved modules is dropped though it still holds", SAVED,
        "        return names or None\n", "        pass\n",
        OF_FILES + "the_fields_of_the_file_are_dropped_where_the_method_says_something_else"),
    Bug("a warning that is an error comes after the adapter was attached", "formats/load.py",
        "    for p, attachment in zip(paths, attachments):\n",
        "    _together(model, paths, attachments)\n    for p, attachment in zip(paths, attachments):\n",
        OF_FILES + "a_warning_that_is_turned_into_an_error_changes_nothing")]
