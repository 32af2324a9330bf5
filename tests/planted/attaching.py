"""Faults that were found from outside, planted again: dropout, files that say something untrue, moves, errors."""
from tests.planted.bug import Bug

MOVES, ORDER, TRAINED_ON, LOAD, FILE = (
    f"attaching/{name}.py" for name in ("attachment", "order", "trained_on", "load", "adapter_file"))
LAW_14 = "test_laws_dropout.py::test_law_14_"
EACH_WEIGHT = LAW_14 + "dropout_of_any_one_weight_reaches_the_loss_plugged_and_routed"
LINEAGE, MOVED = "attaching/test_trained_on.py::test_", "attaching/test_attach.py::test_"
HELP = "test_errors_that_help.py::test_a_mistake_is_answered_with_what_to_do_and_changes_nothing"

BUGS = [
    # ---- dropout
    Bug("the head is not told of dropout", "models/encoder_decoder.py", "return self.logits(hidden, rng)",
        "return self.logits(hidden)", EACH_WEIGHT),
    Bug("a T5's head drops the generator", "models/t5.py", "return self.head(hidden, rng)", "return self.head(hidden)",
        EACH_WEIGHT),
    Bug("a difference above loses the dropout below", "methods/delta.py", "if rng is None or not self.base.drops:",
        "if True:", EACH_WEIGHT),
    Bug("dropout two weights below is not asked about", "nn/weight.py", "return self.base.drops", "return False",
        LAW_14 + "dropout_reaches_through_several_weights_above_it"),
    Bug("a difference above a weight with dropout is added twice", "methods/delta.py",
        "return self.base.project(x, rng) + linear(x, self.change())",
        "return self.base.project(x, rng) + linear(x, self.change() + self.change())",
        LAW_14 + "the_mean_over_many_passes_is_the_undropped_product"),
    Bug("what cannot hand a generator on is taken above a weight with dropout", "nn/weight.py",
        "if base.drops and type(self).project is Reparam.project:", "if False:",
        "test_laws_dropout.py::test_a_method_with_a_definition_alone_is_refused_above_a_weight_with_dropout_however_it_"
        "gets_there"),
    # ---- moves
    Bug("an attachment is plugged below a constant that hides it", MOVES,
        '        nothing_merged_above("plug", self.name, self._places, plugged)\n', "",
        MOVED + "below_one_that_was_merged_meanwhile_nothing_is_plugged_because_the_constant_would_hide_it"),
    # ---- which base, and what lies below
    Bug("the configuration is no part of a base", TRAINED_ON, "said = json.dumps(computes(), sort_keys=True)",
        'said = ""', LINEAGE + "a_transformer_that_computes_something_else_on_the_same_tensors_is_another_base"),
    Bug("a base that was written by hand is taken for the old one", TRAINED_ON,
        "if known is None or known[0] != sample:", "if known is None:",
        LINEAGE + "a_base_that_is_written_by_hand_before_more_training_is_seen"),
    Bug("a base that was replaced is not noticed", "nn/module.py",
        "            host.differentiated(frozenset(self.base_parameters.values()))\n", "            pass\n",
        LINEAGE + "a_base_that_is_trained_in_the_same_steps_counts_as_it_is_when_they_are_over"),
    Bug("a base that is trained in the same steps is recorded as it was before", TRAINED_ON,
        "on = TrainedOn(None) if base_too else on_base(attachment.model)", "on = on_base(attachment.model)",
        LINEAGE + "a_base_that_is_trained_in_the_same_steps_counts_as_it_is_when_they_are_over"),
    Bug("a base that is trained alone is not settled first", TRAINED_ON,
        "settle(state, frozenset(trained.values()), model if base_too else None)",
        "settle(state, frozenset(trained.values()))",
        LINEAGE + "a_base_that_is_trained_in_the_same_steps_counts_as_it_is_when_they_are_over"),
    Bug("what is plugged at saving is what it was trained on", MOVES,
        "trained = self.trained_on or on_base(self.model)",
        "order = list(self.model.host.now.plugged)\n"
        "        under = order[:order.index(self.name)] if self.name in order else []\n"
        "        trained = TrainedOn(on_base(self.model).base,\n"
        "                            tuple(self.model.attachments[n].layer for n in under))",
        LINEAGE + "what_is_plugged_when_it_is_saved_does_not_matter"),
    Bug("files compare by name", LOAD, "if layer.content not in below[at:]:",
        "below = [layer.content if n == layer.name else c for n, c in zip(model.plugged, below)]\n"
        "        if layer.content not in below[at:]:", LINEAGE + "content_counts_and_not_the_name"),
    Bug("alpha is no part of the content", TRAINED_ON, "said = json.dumps(fields, sort_keys=True)",
        "said = type(method).__name__", LINEAGE + "alpha_is_part_of_the_content"),
    Bug("the order of what lies below does not count", LOAD, "at = below.index(layer.content, at) + 1", "at = 0",
        LINEAGE + "the_order_of_what_lies_below_counts"),
    Bug("partners are not recorded", TRAINED_ON, "tuple(trained[n] for n in beside)", "()",
        LINEAGE + "adapters_that_were_trained_together_load_in_one_call_in_any_order_and_none_alone"),
    Bug("all that is trained in one step counts as together, whatever rows saw", TRAINED_ON,
        "if n != name and any(n in order for order in seen)]", "if n != name]",
        LINEAGE + "two_that_see_different_rows_are_not_trained_together"),
    Bug("a partner is remembered as it is at saving", TRAINED_ON,
        "        if attachment not in changing and record is not None:\n", "        if False:\n",
        LINEAGE + "of_a_partner_the_numbers_count_that_it_had_when_the_common_steps_were_over"),
    Bug("a partner that is removed is forgotten", MOVES, "        settle(now, changing=frozenset([self]))\n",
        "        for a in now.attached.values():\n            a.trained_on = a.trained_on and TrainedOn(a.trained_on."
        "base)\n", LINEAGE + "a_partner_that_is_removed_is_remembered"),
    Bug("a stale content is remembered", MOVES, "if now is None or self._known is None or self._known[0] != now:",
        "if self._known is None:",
        LINEAGE + "numbers_that_are_written_by_hand_into_what_lies_below_are_seen"),
    Bug("rows that chose what they see are recorded as if they saw what is plugged", "nn/routing.py",
        "when_differentiated(self.state, orders,", "when_differentiated(self.state, [tuple(state.plugged)],",
        LINEAGE + "rows_that_choose_what_they_see_record_what_they_saw"),
    Bug("of two forwards in one step the last one counts", "engine/afterwards.py",
        "calls.setdefault(key, (call, set()))[1].update(told)", "calls[key] = (call, set(told))",
        LINEAGE + "two_forwards_in_one_step_are_recorded_together"),
    Bug("scores of parameters count as training", "methods/mask.py", ", training=False", "",
        LINEAGE + "gradients_that_are_for_no_update_are_no_training"),
    Bug("a base that is trained while nothing is attached is taken for the old one", TRAINED_ON,
        "    if base_too:\n        host.remembered = None\n",
        "    if base_too and attached:\n        host.remembered = None\n",
        LINEAGE + "a_base_that_is_trained_or_put_back_while_nothing_is_attached_is_another_one"),
    # ---- files
    Bug("an adapter without a digest is believed", FILE, 'read_tensors(path, signed=version != "1")',
        "read_tensors(path)", LINEAGE + "a_file_without_its_digest_is_refused"),
    Bug("NaN is saved over a good file", MOVES, 'array.dtype.kind == "f" and not to_host(', "False and not to_host(",
        LINEAGE + "numbers_that_are_not_finite_are_not_saved"),
    Bug("a field that is missing becomes its default", "attaching/method.py", "    if missing:\n", "    if False:\n",
        "attaching/test_load.py::test_tampered_metadata_is_refused"),
    Bug("texts that were altered are taken", LOAD, "    if file.altered:\n", "    if False:\n",
        LINEAGE + "texts_that_were_altered_and_not_signed_are_refused"),
    Bug("version 1 is read as if it were version 2", LOAD,
        'found = fingerprint(model.state()) if file.version == "1" else content_of_base(model)',
        "found = content_of_base(model)", LINEAGE + "a_file_of_version_1_gives_what_it_gave_and_says_that_it_is_one"),
    Bug("of several files some are attached before another fails", LOAD,
        "    ordered = _in_order(model, read, force)\n",
        "    for i in range(len(read)):\n        put(model, [read[i][1]])\n"
        "        _in_order(model, read[i + 1:], force)\n    ordered = []\n",
        LINEAGE + "adapters_that_were_trained_together_load_in_one_call_in_any_order_and_none_alone"),
    # ---- moves
    Bug("off and on again goes on top", ORDER, "if other in above), len(order))", "if False), len(order))",
        MOVED + "off_and_on_again_is_where_it_was"),
    Bug("with off leaves it off", MOVES,
        "                self._put_back(before, off)\n        finally:\n            self._put_back(before, off)",
        "                pass\n        finally:\n            pass",
        MOVED + "with_off_computes_what_is_left_and_returns_it_to_its_place_however_the_block_ends"),
    Bug("a merged one returns to weights that are others", MOVES,
        'if self._state_in(back) == "merged" and not all(', "if False and not all(",
        MOVED + "with_off_is_refused_below_a_merged_one_and_a_merged_one_stays_off_where_its_ground_has_moved"),
    Bug("a move changes the state in place", MOVES, "        self.model.host.now = state\n",
        "        now = self.model.host.now\n        now.plugged.clear()\n        now.plugged.update(state.plugged)\n"
        "        self.model.host.now = state\n",
        MOVED + "a_move_replaces_the_state_once_and_never_changes_the_one_before"),
    Bug("a forward looks at the state at every place", "nn/routing.py",
        "return view if view is not None and view.host is host else View(host, host.now)",
        "return view if view is not None and view.rows is not None else View(host, host.now)",
        "nn/test_place.py::test_a_forward_goes_on_with_the_state_that_it_began_with"),
    # ---- errors and reports
    Bug("a bare word of a list is found anywhere", "nn/where.py",
        'if listed and re.fullmatch(r"[A-Za-z0-9_]+", pattern):', "if False:",
        "test_errors_that_help.py::test_a_bare_word_of_a_list_chooses_whole_segments_in_every_part_of_the_library"),
    Bug("a tied head is not said to be tied", "nn/where.py",
        'tied = isinstance(pattern, str) and "head" in pattern', "tied = False", HELP),
    Bug("after a merge the rest of the base counts as trained", "attaching/report.py",
        "= own if own or constants else model", "= own if own else model",
        "attaching/test_report.py::test_what_is_plugged_is_trained_and_what_is_off_or_merged_is_not"),
    Bug("a report praises a negative saving", "attaching/report.py", "if low < dense else", "if True else",
        "attaching/test_report.py::test_the_example_at_the_end_is_of_the_rank_that_is_plugged_and_never_of_a_negative_"
        "saving"),
    Bug("a bottleneck cannot be pickled", "methods/bottleneck.py",
        'reads = of_norm if self.input == "norm" else PLACEMENTS[self.placement].reads',
        "reads = (lambda f: lambda x, n, F: f(x, n, F))(\n            of_norm if self.input == \"norm\" else "
        "PLACEMENTS[self.placement].reads)",
        MOVED + "a_model_with_any_method_can_be_pickled_and_copied"),
    # ---- positions
    Bug("padding on the left takes positions", "nn/positions.py",
        "return numpy.maximum(columns - padding[:, None], 0) if padding.any() else columns", "return columns",
        "test_laws_routing.py::test_law_8_each_row_of_a_mixed_batch_is_that_row_alone"),
]
