"""Bugs in the placements and inits of bottleneck adapters, and what other libraries get wrong about them."""
from __future__ import annotations

from tests.planted.bug import Bug

BOTTLENECK = "methods/bottleneck.py"
DEFECTS, PAGE = "defects/test_bottleneck.py::test_", "methods/test_bottleneck.py::test_"
NAMES = PAGE + "an_adapterhub_name_is_a_placement_with_the_defaults_of_adapterhub"
DRAWN = PAGE + "other_inits_draw_D_and_U_and_leave_the_biases_at_0"

BUGS = [
    Bug("A4: attaching is not the identity by default", BOTTLENECK, 'init: str = setting("zeros",',
        'init: str = setting("bert",', DEFECTS + "A4_attaching_is_the_identity_by_default"),
    Bug("A4: no adapter stands after cross-attention, asked for or not", BOTTLENECK,
        '*(["cross"] if self.cross else [])', "",
        DEFECTS + "A4_cross_puts_an_adapter_after_every_cross_attention_and_trains_it"),
    Bug("A5: beside a LoRA a parallel adapter reads another number of rows than it writes", "nn/routing.py",
        "*(None if s is None else index(s, key=to_device(rows)) for s in streams))",
        "*(s if s is None or i + 3 == len(streams) else index(s, key=to_device(rows))\n"
        "                                         for i, s in enumerate(streams)))",
        DEFECTS + "A5_a_parallel_adapter_works_beside_a_lora_on_t5_in_every_shape_and_for_every_row"),
    Bug("double_seq_bn has relu", BOTTLENECK, ', of_sublayer, activation="swish")', ", of_sublayer)",
        "methods/test_bottleneck_golden.py::test_logits_plugged_and_unplugged_are_those_of_adapterhub"),
    Bug("par_bn is as narrow as the others", BOTTLENECK, "of_stream, 4, reduction=2)", "of_stream, 4)", NAMES),
    Bug("the placement's default replaces an activation that was given", BOTTLENECK,
        "            if getattr(self, name) is None:\n", "            if True:\n", NAMES),
    Bug("houlsby's init is not truncated", "nn/init.py", "(beyond := abs(x) > 2).any()", "(beyond := abs(x) > 9).any()",
        DRAWN),
    Bug("bert's deviation is a variance", BOTTLENECK, "normal(0.02)", "normal(0.02 ** 0.5)", DRAWN),
    Bug("an adapter that changes the outputs says that it does not", BOTTLENECK, 'return self.init == "zeros"',
        "return True", PAGE + "an_attachment_is_transparent_if_and_only_if_it_says_so"),
    Bug("files of all adapters hold the new field", BOTTLENECK, ", optional=True)", ")",
        PAGE + "the_other_placements_keep_their_defaults_and_files_say_what_they_said"),
]
