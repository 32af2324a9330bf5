"""Mistakes of planners of memory: the public ones of other calculators, and those that are easy to make here."""
from __future__ import annotations

from tests.planted.bug import Bug

ARRAY, LAYOUT, LEDGER = (f"tools/hollow/{name}.py" for name in ("array", "layout", "ledger"))
STEP, DECODER, QUANTIZED, LOADING, BUDGET = (
    f"tools/planning/{name}.py" for name in ("step", "decoder", "quantized", "loading", "budget"))
OF_HOLLOW, OF_STEP, OF_COUNTS, OF_DECODER = "tools/hollow/test_", *(
    f"tools/planning/test_{name}.py::test_" for name in ("step", "counts", "decoder"))

BUGS = [
    Bug("a plan counts a view of an array as an array of its own", ARRAY,
        "return self.view(new, in_order(new, self.itemsize))", "return self.new(new)",
        OF_HOLLOW + "array.py::test_a_result_is_numpys_without_the_numbers"),
    Bug("a plan takes a copy that NumPy makes for a view", LAYOUT,
        "if any(old[k][1] != old[k + 1][0] * old[k + 1][1] for k in range(i, j - 1)):", "if False:",
        OF_HOLLOW + "layout.py::test_a_reshape_is_a_view_exactly_where_numpys_is_and_has_its_strides"),
    Bug("a plan adds up all that is ever allocated, and nothing is freed", LEDGER,
        "else -self.sizes[number]", "else 0",
        OF_HOLLOW + "ledger.py::test_the_peak_is_the_most_that_lives_at_once_by_purpose"),
    Bug("a plan gives every query head keys and values of its own", DECODER,
        "c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim", "c.num_heads * c.head_dim, c.num_heads * c.head_dim",
        OF_COUNTS + "llama_3_8b_shares_its_keys_and_values_among_four_heads"),
    Bug("a plan ignores the head_dim of a config", DECODER,
        'size("head_dim", head_dim)', "max(1, d // heads)",
        OF_DECODER + "the_weights_of_qwen_3_have_the_names_and_shapes_of_hugging_face"),
    Bug("a plan counts a tied head twice", DECODER,
        "self.embedding.weight if c.tied else", "self.embedding.weight if 0 else",
        OF_DECODER + "a_tied_head_is_the_table_and_counts_once"),
    Bug("a plan gives nf4 scales of 16 bits", QUANTIZED, "Kind(4, 64, 4, rows=False", "Kind(4, 64, 2, rows=False",
        "tools/planning/test_quantized.py::test_a_number_takes_its_bits_and_its_share_of_a_block"),
    Bug("a plan quantizes the head, too", LOADING, 'else r"^(?!head\\.)"', 'else r""',
        OF_COUNTS + "llama_in_nf4_with_double_quantization_and_the_rest_in_16_bits"),
    Bug("accelerate, DeepSpeed #5304: a plan has optimizer states of frozen parameters", STEP,
        "STATES[s.optimizer] * trained", "STATES[s.optimizer] * ready.numbers",
        OF_STEP + "the_optimizer_and_the_master_copies_count_for_what_is_trained_alone"),
    Bug("a plan leaves out the masks of dropout", STEP, "rng = NoNumbers()", "rng = None",
        OF_STEP + "dropout_takes_its_masks"),
    Bug("a plan of loading forgets the file", LOADING, "copies = weights if", "copies = 0 if",
        OF_STEP + "loading_holds_the_file_beside_the_model"),
    Bug("a plan takes the peak of the backward pass for that of all phases", STEP,
        "return max(self.totals.values())", 'return self.totals["backward"]',
        OF_STEP + "the_peak_is_the_largest_of_the_phases_and_each_phase_the_sum_of_its_purposes"),
    Bug("a budget in GB is read as GiB", BUDGET, '"GB": 10 ** 9', '"GB": 2 ** 30',
        "tools/planning/test_budget.py::test_a_budget_is_read_as_it_is_written"),
]
