"""Faults in AdapterHub's folders, in what is recognized, and in loading files and folders."""
from __future__ import annotations

from tests.planted.bug import Bug

BOTTLENECK, LORA, PREFIX, NAMES, DIRECTORY, HEAD, FILES = (f"formats/adapterhub/{name}.py" for name in (
    "bottleneck", "lora", "prefix", "names", "directory", "head", "files"))
RECOGNIZED, LOAD = "formats/recognized.py", "formats/load.py"
HUB = "formats/adapterhub/test_"
GOLDEN = HUB + "golden.py::test_a_folder_of_adapterhub_gives_its_logits_and_gradients_and_is_written_back"
FIELDS = HUB + "fields.py::test_a_field_that_cannot_be_honored_is_refused_by_its_name_and_value"
PREFIXES = (HUB + "fields.py::test_a_prefix_is_loaded_as_in_adapterhub_if_that_is_asked_for_and_if_its_numbers_can_be_"
            "had")
OLD = HUB + "fields.py::test_before_version_1_1_the_alpha_of_a_lora_did_nothing"
WRITTEN = HUB + "save.py::test_what_is_written_says_and_means_the_same"
REFUSED = HUB + "save.py::test_what_adapterhub_cannot_hold_is_refused_and_nothing_is_written"
HEADS = HUB + "head.py::test_"
KINDS = "formats/test_recognized.py::test_a_path_is_recognized_and_refused_by_name_unless_it_is_read"
LOADING = "formats/test_load.py::test_"
SHIFTED = "methods/test_prefix.py::test_adapterhubs_bias_is_that_of_keys_in_one_line_with_the_prefix_and_of_queries"

BUGS = [
    # ---- AdapterHub's prefixes
    Bug("A1 in a file: a prefix of AdapterHub's is loaded with the distances of PEFT's", PREFIX,
        'return PrefixTuning(length, sites, "adapterhub", m)', 'return PrefixTuning(length, sites, "earlier", m)',
        GOLDEN),
    Bug("A1 in a file: a prefix of AdapterHub's, which moves the tokens, is loaded without being asked for", FILES,
        "if not as_adapterhub and any(", "if False and any(", PREFIXES),
    Bug("A1 in a file: a prefix inside a union of AdapterHub's is loaded without being asked for", FILES,
        'part.get("architecture") == "prefix_tuning" for part in parts(config))',
        'part.get("architecture") == "prefix_tuning" for part in [config])', FIELDS),
    Bug("a union that acts at some places of its parts is written for AdapterHub at all of them",
        "formats/adapterhub/codecs.py", "        if chosen != set(method.places(model)):\n", "        if False:\n",
        REFUSED),
    Bug("A1 in a file: a prefix that keeps the distances is written for AdapterHub, which does not", PREFIX,
        'if method.bias != "adapterhub" or set(found)', "if set(found)", REFUSED),
    Bug("A1 in a file: with AdapterHub's bias of a prefix the queries move with their keys", "methods/prefix.py",
        "position.bias(queries, p + keys, keys - queries)", "position.bias(queries, p + keys, p + keys - queries)",
        SHIFTED + "_without_it"),
    Bug("with AdapterHub's bias of a prefix hidden keys are seen", "methods/prefix.py",
        "return hidden if table is None else add(table, hidden)", "return hidden if table is None else table",
        SHIFTED + "_without_it"),
    Bug("A6 in a file: copies of AdapterHub's prefix that differ are loaded as the first", "formats/row.py",
        "        elif not numpy.array_equal(found[row.ours], array):\n", "        elif row.ours == row.theirs:\n",
        HUB + "fields.py::test_copies_of_one_prefix_that_differ_are_refused"),
    Bug("keys and values of AdapterHub's prefix are mixed up", PREFIX, 'zip((2 * number, 2 * number + 1), "KV")',
        'zip((2 * number, 2 * number + 1), "VK")', GOLDEN),
    # ---- its LoRA, DoRA and (IA)^3
    Bug("A2 in a file: a DoRA of AdapterHub's whose norm lacks the scale is loaded", LORA, "        if a != r:\n",
        "        if False:\n", FIELDS),
    Bug("the gradient of AdapterHub's DoRA does not pass through the norm", LORA,
        "self._where(config, model), detach=False)", "self._where(config, model))", GOLDEN),
    Bug("A3 in a file: (IA)^3 after the activation is written for AdapterHub, which has it before", LORA,
        'if isinstance(method.make(name, slot, {"l": None}), ScaledInput):', "if False:", REFUSED),
    Bug("AdapterHub's intermediate LoRA of a gated model is put on the activated matrix", LORA,
        r'r"\.ff\.(wi|wi_1)\.weight$"', r'r"\.ff\.(wi|wi_0)\.weight$"', GOLDEN),
    Bug("a LoRA without a scale, of an old AdapterHub, gets one", DIRECTORY, "return release < bound or",
        "return False or", OLD),
    Bug("ranks that differ from place to place are written for AdapterHub as the first", LORA,
        "    if len(found) > 1:\n", "    if False:\n", REFUSED),
    # ---- its bottlenecks
    Bug("a bottleneck of AdapterHub's that loses x is loaded", BOTTLENECK,
        "if not parallel and before and residual == after:", "if not parallel and before:", FIELDS),
    Bug("the scale of AdapterHub's bottleneck is taken from its placement", BOTTLENECK, "scale=_scale(config),",
        "scale=None,", WRITTEN),
    Bug("a reduction factor is written that AdapterHub rounds to another size", BOTTLENECK,
        "next(factor for factor in (d / m, float(numpy.nextafter(d / m, 0))) if int(d // factor) == m)", "d / m",
        HUB + "save.py::test_the_factor_that_is_written_gives_the_size_by_adapterhubs_rounding"),
    Bug("AdapterHub's leave_out counts the decoder's layers from 0", NAMES,
        '(model.config.num_layers if stack == "decoder" else 0)', "0", WRITTEN),
    Bug("an adapter that stands at some places of a layer is written for AdapterHub at all of them", NAMES,
        "    if odd:\n", "    if False:\n", REFUSED),
    Bug("fields that AdapterHub's folder has and nothing here decides are lost", FILES,
        "config, outer = {**config, **source.config}, {**outer, **source.outer}", "outer = {**outer, **source.outer}",
        HUB + "fields.py::test_fields_that_change_no_output_are_left_alone_and_written_back"),
    # ---- the head beside it
    Bug("another head beside AdapterHub's adapter is passed over", HEAD, "if not numpy.array_equal(array.astype", "if "
        "False and (array.astype", HEADS + "another_head_than_that_of_the_model_is_refused_and_can_be_left_alone"),
    Bug("a pickled head beside AdapterHub's adapter is passed over", HEAD, "if (directory / PICKLE).exists():",
        "if False:", HEADS + "a_head_in_a_pickle_is_not_passed_over_in_silence"),
    Bug("a head of another shape is compared with the model's", HEAD, "        if shape != expected:\n",
        "        if expected is None:\n",
        HEADS + "another_head_than_that_of_the_model_is_refused_and_can_be_left_alone"),
    # ---- what is recognized, and lists
    Bug("tensors of kohya's under PEFT's file name are taken for PEFT's", RECOGNIZED,
        "return found if found is not None and found in odd else _WEIGHTS[weights]", "return _WEIGHTS[weights]", KINDS),
    Bug("a pickle is recognized by its name alone", RECOGNIZED,
        ' or first[:2] in (b"\\x80\\x02", b"\\x80\\x04", b"\\x80\\x05") and first[8:9] != b"{":', ":", KINDS),
    Bug("a safetensors file is a pickle where its length says so", RECOGNIZED, ' and first[8:9] != b"{":', ":",
        "formats/test_recognized.py::test_a_safetensors_file_whose_length_begins_like_a_pickle_is_none"),
    Bug("mlx-lm's configuration is taken for PEFT's", RECOGNIZED,
        'if "fine_tune_type" in config or "lora_parameters" in config:', "if False:", KINDS),
    Bug("two folders of one name replace each other in a list", LOAD, "    if twice:\n", "    if False:\n",
        LOADING + "a_list_is_loaded_whole_or_not_at_all"),
    Bug("folders in a list are plugged in another order", LOAD, "put(model, attachments)",
        "put(model, attachments[::-1])", LOADING + "a_list_of_folders_is_plugged_in_its_order"),
    Bug("what was changed in order to read a folder is not said by load", LOAD,
        "for note in attachment.source.notes:", "for note in ():",
        LOADING + "what_was_changed_in_order_to_read_a_folder_is_said_where_load_was_called"),
    Bug("a folder with a link to nothing is called a folder that is no file", RECOGNIZED,
        "        return by_keys(read_shapes(path))\n    except (OSError, ValueError):",
        "        return by_keys(read_shapes(path))\n    except ValueError:",
        "formats/test_recognized.py::test_a_link_to_nothing_in_a_folder_is_a_file_that_is_missing"),
    Bug("a link to an empty folder cannot be written to", "formats/folder.py", "if directory.is_symlink():",
        "if False:", HUB + "save.py::test_a_link_to_an_empty_folder_stays_and_the_folder_is_filled"),
]
