"""Bugs in QA-LoRA: wrong factors, wrong layouts, wrong merges, and files read as something else."""
from __future__ import annotations

from tests.planted.bug import Bug

QALORA, CHANGE, FILES = "methods/qalora.py", "operations/change.py", "formats/peft/qalora.py"
OF, DEFECT, FILE = (f"{name}::test_" for name in (
    "methods/test_qalora.py", "defects/test_qalora.py", "formats/peft/test_qalora.py"))
ENTRY = OF + "every_entry_is_that_of_the_equation_number_for_number"
EXACT = OF + "the_merge_is_exact_bit_for_bit_on_dyadic_data_and_codes_and_scales_keep_every_bit"
FACTOR = OF + "the_factor_k_is_the_one_of_the_table_exactly"
D22 = DEFECT + "D22_the_default_is_the_sum_of_the_paper_and_the_factor_of_peft_has_a_name_of_its_own"
REFUSED = FILE + "a_folder_that_means_nothing_is_refused_in_words"
NOT_WRITTEN = FILE + "what_peft_cannot_hold_is_not_written"

BUGS = [
    # ---- defects of peft
    Bug("D22: the default multiplies the mean of a group by the number of groups", QALORA,
        'pooling: str = setting("sum", ', 'pooling: str = setting("mean * groups", ', D22),
    Bug("D22: merging is not implemented", QALORA,
        '        shifted = getattr(self.base, "shifted", None)\n', '        raise NotImplementedError("merged")\n'
        '        shifted = getattr(self.base, "shifted", None)\n',
        DEFECT + "D22_it_can_be_merged_under_every_pooling"),
    Bug("D22: a file does not say which pooling it is for", QALORA,
        "f\"one of {', '.join(map(repr, POOLINGS))}\")", "f\"one of {', '.join(map(repr, POOLINGS))}\", in_file=False)",
        DEFECT + "D22_a_file_says_which_pooling_it_is_for"),
    # ---- factors and layouts
    Bug("QA-LoRA: the sum is divided by the group as the mean is", QALORA, '"sum": Fraction(1),',
        '"sum": Fraction(1, self.group),', FACTOR),
    Bug("QA-LoRA: PEFT's factor is the number of groups, without the mean", QALORA,
        '"mean * groups": Fraction(groups, self.group)', '"mean * groups": Fraction(groups)', FACTOR),
    Bug("QA-LoRA: the inputs are pooled across the groups", QALORA,
        "groups, x.shape[-1] // groups).sum(axis=-1)", "x.shape[-1] // groups, groups).sum(axis=-2)", ENTRY),
    Bug("QA-LoRA: the input is pooled to a mean, and k divides again", QALORA, ".sum(axis=-1)\n",
        ".mean(axis=-1)\n", ENTRY),
    Bug("QA-LoRA: the change is tiled and not repeated", QALORA,
        "(change.reshape(*lead, groups, 1) * ones)", "(change.reshape(*lead, 1, groups) * ones.reshape(-1, 1))", ENTRY),
    Bug("QA-LoRA: dropout acts on the inputs before they are pooled", QALORA,
        "        p = x.reshape(", "        x = dropout(x, self.p, rng)\n        p = x.reshape(",
        OF + "dropout_acts_on_what_was_pooled_and_on_nothing_else"),
    Bug("QA-LoRA: A of summed groups starts as large as that of means", QALORA,
        'kaiming(d_in if self.pooling == "sum" else groups)', "kaiming(groups)",
        OF + "a_starts_with_the_entries_of_loras_and_for_means_as_a_linear_layer_of_l_inputs"),
    Bug("QA-LoRA: a group that does not divide d_in drops the inputs that are left over", QALORA,
        "if d_in % self.group:", "if d_in < self.group:",
        OF + "what_does_not_fit_a_model_is_refused_and_changes_nothing"),
    # ---- merging
    Bug("QA-LoRA: merging subtracts the change, as from a zero point", QALORA,
        "return shifted(self.change().data)", "return shifted(-self.change().data)", EXACT),
    Bug("QA-LoRA: merging applies the scale twice", QALORA,
        "return shifted(self.change().data)", "return shifted((self.scale * self.change()).data)", EXACT),
    Bug("QA-LoRA: merging quantizes again, and scales are rounded again", QALORA,
        "return shifted(self.change().data)", "return self.base.requantized(self.dense().data)",
        OF + "the_merge_of_any_numbers_is_exact_up_to_two_roundings_on_either_side"),
    Bug("QA-LoRA: merging a weight with offsets gives the dense weight", QALORA,
        "if shifted is not None:", "if shifted is None:", EXACT),
    Bug("QA-LoRA: a weight without offsets cannot be merged", QALORA, "except ValueError:", "except KeyError:",
        OF + "a_weight_without_an_offset_for_each_group_gives_the_dense_weight"),
    Bug("QA-LoRA: combining forgets that a column stands for a group", CHANGE,
        "numpy.repeat(A, slot.shape[1] // A.shape[1], axis=1)", "numpy.tile(A, (1, slot.shape[1] // A.shape[1]))",
        "operations/test_combine.py::test_qa_loras_are_combined_as_loras_with_repeated_columns"),
    # ---- files of peft
    Bug("QA-LoRA of PEFT's is read as the sum of the paper", FILES, 'POOLING = "mean * groups"', 'POOLING = "sum"',
        FILE + "a_folder_gives_what_the_source_of_peft_computes_and_is_written_back"),
    Bug("use_qalora is believed where A has a column for each input", FILES,
        "if len(plain) == len(slots):", "if False:",
        FILE + "use_qalora_on_layers_that_are_not_gptq_made_an_ordinary_lora_and_is_read_as_one"),
    Bug("groups of one are read, though LoRA's files look the same", FILES, "if not is_integer(g, 2):",
        "if not is_integer(g, 1):", REFUSED),
    Bug("another pooling is written for PEFT as if it were its own", FILES, "if method.pooling != POOLING:",
        "if False:", NOT_WRITTEN),
]
