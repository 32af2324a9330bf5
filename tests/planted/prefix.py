"""Bugs of prefixes, and of rows that differ at keys and values. Those that begin with an ID are defects of peers."""
from tests.planted.bug import Bug

PREFIX, PROMPT, SITE, TRIAL = "methods/prefix.py", "methods/prompt.py", "nn/site.py", "attaching/trial.py"
DEFECT, PAGE, AT_SITE = "defects/test_prefix.py::test_", "methods/test_prefix.py::test_", "nn/test_site.py::test_"
PADDED = AT_SITE + "a_keys_values_site_pads_rows_with_fewer_keys_on_the_left_and_hides_that"
TOKENS = PAGE + "a_decoder_prefix_made_of_real_tokens_gives_what_these_tokens_give"
D13 = DEFECT + "D13_it_fits_a_model_whose_attention_is_not_d_model_wide_and_whose_stacks_are_not_equally_deep"
D14 = DEFECT + "D14_padding_on_the_left_changes_nothing"

BUGS = [
    # ---- defects of peers
    Bug("D1: all layers of a kind share their keys and values", PREFIX,
        'return {leaf: trained((self.length, width), init, pair) for leaf in "KV"}',
        'return {leaf: trained((self.length, width), init, _kind(name)) for leaf in "KV"}',
        DEFECT + "D1_every_layer_of_every_kind_has_keys_and_values_of_its_own_and_all_that_is_trained_has_a_gradient"),
    Bug("D8: generation does not know what is switched off", "models/decoding.py", "    c, tokens = model.config,",
        "    adapter = tuple(model.attachments) if adapter is None else adapter\n    c, tokens = model.config,",
        DEFECT + "D8_switched_off_it_leaves_the_bits_of_the_base_in_a_forward_and_in_generation"),
    Bug("D9: half of a prompt's rows are never read", PROMPT, "xp.arange(self.P.shape[0])",
        "xp.arange((self.P.shape[0] + 1) // 2)",
        DEFECT + "D9_a_prompt_of_p_vectors_has_p_rows_and_each_gets_a_gradient"),
    Bug("D13: keys and values are d_model wide", PREFIX, "width, m, pair = site.width, self.mlp",
        "width, m, pair = model.config.d_model, self.mlp", D13),
    Bug("D13: a decoder has as many prefixes as the encoder has layers", PREFIX,
        "        return dataclasses.replace(self, where=tuple(SITES[kind] for kind in kinds)).places(model)",
        "        found = dataclasses.replace(self, where=tuple(SITES[kind] for kind in kinds)).places(model)\n"
        '        return {n: s for n, s in found.items() if int(n.split(".")[1]) < model.config.num_layers}', D13),
    Bug("D14: the distance of a prefix to the text grows with the padding", PREFIX,
        "seen = array_of(bias)[:, 0, -1] != -math.inf", "seen = None", D14),
    Bug("D14: a prompt next to the text stands in front of the padding", PROMPT,
        "if not self.next_to_text or not padding.any():", "if True:", D14),
    Bug("D15: the network that makes a prefix is not saved", "attaching/attachment.py",
        "list(self._places), self.tensors, trained.settled(self.model))",
        "list(self._places),\n            {key: a * (key.count(\".\") > 1) for key, a in self.tensors.items()}, "
        "trained.settled(self.model))",
        DEFECT + "D15_a_saved_prefix_goes_on_in_training_to_the_bits_of_one_that_was_never_saved"),
    Bug("A1: keys move by the length of the prefix, and queries do not", PREFIX,
        "            bias = _beside(earlier_bias(self.position, K.shape[0], bias), bias)\n",
        "            p, (queries, keys) = K.shape[0], bias.shape[-2:]\n"
        "            moved = None if self.position is None else self.position.bias(queries, p + keys, keys - queries)\n"
        "            bias = _beside(earlier_bias(self.position, p, bias), bias) if moved is None else moved + concat(\n"
        "                xp.zeros((queries, p)), xp.where(xp.isfinite(array_of(bias)[0, 0]), 0, -math.inf), axis=1)\n",
        DEFECT + "A1_real_tokens_keep_their_distances_under_a_prefix"),
    Bug("A6: each attention saves the input of the network again", PREFIX, "normal(1.0), shared=kind)", "normal(1.0))",
        DEFECT + "A6_each_array_is_in_the_file_once"),
    # ---- prefixes
    Bug("the keys of a prefix are its values", PREFIX, "return self.K, self.V", "return self.V, self.K",
        PAGE + "a_prefix_computes_what_the_equation_of_the_paper_says"),
    Bug("the network of a prefix is linear", PREFIX, "h = tanh(linear(self.P, self.W) + self.b)",
        "h = linear(self.P, self.W) + self.b", PAGE + "a_prefix_computes_what_the_equation_of_the_paper_says"),
    Bug("the keys of a prefix stand behind the others, its bias in front", PREFIX, "concat(keys, k, axis=1)",
        "concat(k, keys, axis=1)", TOKENS),
    Bug("the tokens do not stand behind the prefix", PREFIX, "position.bias(keys, p + keys, p)",
        "position.bias(keys, p + keys, 0)", TOKENS),
    Bug("in decoding the prefix is as near to the newest token as to the first", PREFIX,
        "positions_of(seen, keys - queries, queries)", "positions_of(seen, 0, queries)",
        PAGE + "the_bias_of_the_prefix_is_that_of_the_distance_to_each_token_in_a_cache_too"),
    Bug("all rows get the first row's bias of the prefix", PREFIX, "at + keys * xp.arange(n)[:, None]",
        "at + 0 * xp.arange(n)[:, None]",
        PAGE + "a_changed_position_table_is_the_tables_of_the_prefix_too_for_all_rows_and_for_each"),
    Bug("a self-attention does not know its positions", "nn/blocks.py",
        "            block.attn.keys_values.position = position\n", "            pass\n", TOKENS),
    Bug("without its network a prefix is plugged at once, beside the other", PREFIX,
        "replace(attached={**model.attachments, name: new})",
        "replace(\n        {**model.attachments, name: new}, {**model.host.now.plugged, name: None})",
        PAGE + "without_the_network_the_outputs_have_the_same_bits_and_the_file_holds_k_and_v_alone"),
    # ---- the trial
    Bug("what a piece refers to in its model counts as its own", TRIAL, "isinstance(value, Place) and value in model:",
        "False:", PAGE + "a_piece_may_refer_to_places_of_its_model_and_an_array_in_a_place_of_its_own_is_found"),
    Bug("an array may hide in a place of the piece's own", TRIAL, "isinstance(value, Place) and value in model:",
        "isinstance(value, Place):",
        PAGE + "a_piece_may_refer_to_places_of_its_model_and_an_array_in_a_place_of_its_own_is_found"),
    # ---- rows of one batch at keys and values
    Bug("rows with fewer keys are padded on the right", SITE,
        "ks.append(concat(xp.zeros((batch, most - keys, width), dtype=dtype), k, axis=1))",
        "ks.append(concat(k, xp.zeros((batch, most - keys, width), dtype=dtype), axis=1))", PADDED),
    Bug("the padding of rows with fewer keys is seen", SITE, "-math.inf, dtype=dtype)", "0.0, dtype=dtype)", PADDED),
    Bug("keys and values come back in the order of the groups", SITE,
        "(index(concat(*each, axis=0), key=back) for each", "(concat(*each, axis=0) for each", PADDED),
    Bug("without a bias the padding is not hidden", SITE, "needed = bool(given) or any(",
        "needed = bool(given) or not any(", PADDED),
    Bug("a query that sees nothing averages the padding, too", SITE,
        "vs.append(concat(add(mean(v, axis=1, keepdims=True), padding), v, axis=1))",
        "vs.append(concat(xp.zeros((batch, most - keys, v.shape[2]), dtype=dtype), v, axis=1))",
        AT_SITE + "a_query_that_sees_nothing_averages_the_values_of_its_own_row_however_many_keys_others_have"),
    Bug("a piece of some rows reads the model's places for all rows", SITE,
        "[(view.rows or [])[row] for row in rows]", "view.rows",
        PAGE + "a_changed_position_table_is_the_tables_of_the_prefix_too_for_all_rows_and_for_each"),
    Bug("after a piece that fails the rows of its group are seen alone", SITE,
        "            return self._apply(self.compose(here), *(_rows(x, to_device(rows)) for x in stream))\n"
        "        finally:\n            _view.reset(token)\n",
        "            out = self._apply(self.compose(here), *(_rows(x, to_device(rows)) for x in stream))\n"
        "            _view.reset(token)\n            return out\n        finally:\n            pass\n",
        AT_SITE + "places_that_a_piece_reads_see_the_rows_of_its_group_and_the_old_view_is_back_when_it_fails"),
]
