"""Bugs of prompts and prefixes in PEFT's files. Those that begin with an ID are defects of peers."""
from __future__ import annotations

from tests.planted.bug import Bug

PROMPTS, PREFIX, FILES, ROW, METHOD = ("formats/peft/prompts.py", "formats/peft/prefix.py", "formats/peft/files.py",
                                       "formats/row.py", "methods/prefix.py")
PROMPT, OF_PREFIX, PAGE = (f"{path}::test_" for path in (
    "formats/peft/test_prompts.py", "formats/peft/test_prefix.py", "methods/test_prefix.py"))
READ = PROMPT + ("a_directory_of_peft_gives_its_logits_and_gradients_and_is_written_back_with_the_rows_that_it_never_"
                 "reads")
READ_PREFIX = OF_PREFIX + ("a_directory_of_peft_gives_its_logits_and_gradients_and_is_written_back_with_the_slices_"
                           "that_it_never_reads")
FILLED = PROMPT + "fields_that_peft_fills_in_may_be_missing_or_null_and_those_of_the_start_are_kept"
REFUSED = PROMPT + "what_does_not_fit_is_refused_by_name_and_nothing_is_attached"
D13 = OF_PREFIX + "D13_what_peft_cannot_run_and_what_does_not_fit_is_refused_by_name"
SHARED = OF_PREFIX + "layers_that_share_a_slice_have_one_array_and_the_sum_of_their_gradients"
WRITTEN = OF_PREFIX + ("a_prefix_made_here_is_written_with_as_many_slices_as_it_needs_and_every_field_that_peft_has")
CANNOT = OF_PREFIX + "what_peft_cannot_hold_is_refused_with_the_reason_and_nothing_is_written"

BUGS = [
    # ---- defects of peers
    Bug("D1 in a file: a file whose layers share their slices is loaded as if it were the paper's prefix", FILES,
        "if departure and not as_peft:", "if False:",
        OF_PREFIX + "D1_layers_that_share_slices_are_loaded_when_it_is_asked_for_and_never_otherwise"),
    Bug("D1 in a file: layers that share a slice of a file are trained apart", METHOD,
        'return {leaf: trained((self.length, width), init, pair) for leaf in "KV"}',
        'return {leaf: trained((self.length, width), init, pair and pair + name[8]) for leaf in "KV"}', SHARED),
    Bug("D1 in a file: a prefix with a K and a V for each layer is written where layers share slices", PREFIX,
        "else depth + 1 - depth % 2", "else max(encoder, depth)", WRITTEN),
    Bug("D9 in a file: the rows that are never read get a gradient",
        ROW, "start = kept.get(row.theirs) if values else None",
        "start = kept.get(row.theirs)",
        PROMPT + "D9_the_rows_that_are_never_read_are_not_trained_and_not_counted"),
    Bug("D13 in a file: a prefix for fewer layers than the decoder has is no error of its own", PREFIX,
        "if layers < c.num_decoder_layers:", "if False:", D13),
    Bug("D13 in a file: heads of another width than d_kv are no error of their own", PREFIX,
        "if (heads, d) != (c.num_heads, c.num_heads * c.d_kv):", "if False:", D13),
    Bug("D14 in a file: a prompt next to the text is written as one in front of the padding",
        PROMPTS, "if method.next_to_text:",
        "if False:", PROMPT + "what_peft_computes_otherwise_is_not_written"),
    Bug("D15 in a file: a P-tuning that was trained further is written as another type", FILES,
        "return next((codec for codec in found if codec.peft_type == said), found[0])", "return found[0]",
        PROMPT + "D15_a_loaded_prompt_is_trained_further_and_written_back_under_its_own_type"),
    Bug("D25 in a file: a prompt of another task_type is loaded, though PEFT ignores it or fails", PROMPTS,
        '    if config["task_type"] != TASK:', '    if False:', REFUSED),
    # ---- read
    Bug("layer i has the slices 2 i and 2 i + 1", METHOD, "return 4 * layer % (2 * layers)",
        "return 2 * layer % (2 * layers)", READ_PREFIX),
    Bug("the keys of a slice are the values of the next one", PREFIX, 'zip("KV", (key_slice', 'zip("VK", (key_slice',
        READ_PREFIX),
    Bug("the last rows of a file are the prompt", PROMPTS, "slice(method.length))]", "slice(-method.length, None))]",
        READ),
    Bug("a file that does not say how many submodules there are has one", PROMPTS,
        'defaults = {"num_transformer_submodules": 2}', 'defaults = {"num_transformer_submodules": 1}', FILLED),
    Bug("a prompt of another width is read up to the error of its model", PROMPTS,
        "if size(config, field, expected) != expected:", "if False:", REFUSED),
    Bug("with an odd L layers count as sharing their slices", PREFIX,
        "return layers % 2 == 0 and depth > layers // 2", "return depth > layers // 2",
        OF_PREFIX + "where_no_layers_share_a_slice_the_file_is_a_prefix_like_any_other_and_loads_as_it_is"),
    Bug("the L of a file is that of the model", PREFIX, 'else "peft" if layers == c.num_layers else layers',
        'else "peft"', READ_PREFIX),
    # ---- written
    Bug("what is never read is written as zeros", ROW, "start = kept.get(row.theirs) if values else None",
        "start = None", READ),
    Bug("fields of the file give way to those of a prompt made here", FILES,
        "**codec.config_again(main, attachment.model, read), **_source(attachment),",
        "**_source(attachment), **codec.config_again(main, attachment.model, read),", READ),
    Bug("a prefix without the bias of earlier tokens is written", PREFIX, 'if method.bias != "earlier":', "if False:",
        CANNOT),
    Bug("a prefix in some layers of the decoder is written as one in all", PREFIX, "if places != theirs:",
        "if not set(places) <= set(theirs):", CANNOT),
    # ---- slices
    Bug("slices are taken for any kind of attention", METHOD,
        '_kind(name) == "decoder" and int(name.split(".")[1]) < layers,', 'int(name.split(".")[1]) < layers,',
        PAGE + "slices_are_refused_at_a_place_where_peft_has_none"),
    Bug("files of all prefixes hold their slices", METHOD, "\"'own', 'peft' or an integer >= 1\", optional=True)",
        "\"'own', 'peft' or an integer >= 1\")",
        PAGE + "slices_are_in_a_file_where_they_are_not_each_layers_own_and_a_loaded_prefix_shares_them_again"),
    Bug("with a network layers share its input alone", METHOD,
        '"W_V": trained((width, m), uniform(m ** -0.5), pair)', '"W_V": trained((width, m), uniform(m ** -0.5))',
        PAGE + "with_slices_the_layers_of_a_decoder_share_their_arrays_as_in_peft"),
]
