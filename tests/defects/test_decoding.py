"""Defects of other libraries in generation."""
from __future__ import annotations

import numpy as np
import pytest

import minipeft
from tests.models.test_beam_search import trained_on
from tests.models.test_decode import IDS_OF, every_model, sources


@every_model
@pytest.mark.parametrize("search", ["greedy", "beams", "sampling"])
def test_D8_a_prompt_that_is_switched_off_is_not_there_in_generation_either(build, search):
    """Unplugged, or left out of `adapter`: every search gives the ids of the base, and plugged, other ones."""
    model, (ids, mask) = build(**IDS_OF), sources()

    def said(**options):
        if search == "beams":
            options["num_beams"] = 3
        if search == "sampling":
            options.update(rng=np.random.default_rng(0), temperature=2.0)
        return model.generate(ids, mask, 6, **options).tolist()

    base = said()
    trained_on(model, minipeft.PromptTuning(3), "prompt", 1)
    prompt = model.attachments["prompt"]
    assert prompt.state == "off" and said() == base
    prompt.plug()
    assert said() != base and said(adapter=()) == said(adapter=[None] * 3) == base
    prompt.unplug()
    assert said() == base and said(adapter="prompt") != base
    prompt.remove()
    assert said() == base
