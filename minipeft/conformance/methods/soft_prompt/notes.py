"""Planted bugs of soft prompts, their effects, and where such bugs were reported: {flag: Note}.

4 of the 49 have a public report, in their `links`; the others are plausible mistakes.
"""
from __future__ import annotations

from minipeft.conformance.method import Note

NOTES = {
    "PromptAfterTokens": Note("the prompt stands behind the tokens"),
    "PromptMasked": Note("the mask hides the prompt", "it has no effect and no gradient"),
    "MaskExtendedBehind": Note("the mask is lengthened behind the tokens, not before them", "padding on the left hides "
                               "the prompt, and as many padded tokens on the right are seen"),
    "MaskRolled": Note("the mask is off by one column"),
    "MaskOfFirstRow": Note("all rows see what the first row's mask shows"),
    "MaskOnQueries": Note("the mask hides queries, not keys", "masked tokens are seen by all others"),
    "MaskIgnored": Note("the mask is ignored", "the output depends on what a row is padded with",
                        ("huggingface/peft #54",)),
    "MaskWeak": Note("what is masked gets a small weight, not 0"),
    "PromptMaskedWherePadded": Note("rows with padding do not see the prompt"),
    "PositionsNotShifted": Note("tokens keep their positions behind the prompt", "if it is meant, declare "
                                "conventions={'soft_prompt': {'positions': 'restart'}}"),
    "DistancesWithoutPrompt": Note("relative distances are those of positions that start again behind the prompt"),
    "PromptWithoutPositions": Note("all vectors of the prompt stand at position 0"),
    "PositionsSkipPadding": Note("positions are counted from the first token that is seen"),
    "LeftPaddingShift": Note("left-padding shift: the distance from prompt to text grows with the padding",
                             "outputs depend on the side of the padding; if it is meant, declare "
                             "conventions={'soft_prompt': {'left_padding': 'outside the padding'}}",
                             ("huggingface/peft #1093", "DePT #8")),
    "WrongEndStripped": Note("the output is cut at the wrong end", "it is that of the prompt and the first tokens"),
    "NotStripped": Note("the output has p positions more than the input"),
    "RowsMixed": Note("row 0 leaks into the other rows"),
    "PromptAdded": Note("the prompt is added to the first tokens, not put before them"),
    "FirstRowOnly": Note("the first row of the batch alone has the prompt"),
    "PromptBackwards": Note("the prompt stands there backwards"),
    "PromptScaled": Note("the prompt is scaled by sqrt(d), as embeddings of tokens are"),
    "PromptNarrow": Note("the prompt is kept in fewer digits than the model has", "noise in every gradient check"),
    "ScoresUnscaled": Note("scores are not divided by sqrt(d)"),
    "ScoresOverWidth": Note("scores are divided by d, not sqrt(d)"),
    "EmptyPromptIsZero": Note("a prompt of length 0 is a vector of zeros, which is seen"),
    "NotSwitchedOff": Note("switched off, the prompt is still there", "",
                           ("huggingface/peft #1501", "huggingface/peft #683")),
    "StaysOff": Note("switched off once, the prompt is gone"),
    "DeadRows": Note("dead prompt rows: the parameter has 2 p rows, of which p never reach the output",
                     "twice the count of trained numbers; num_transformer_submodules=1 avoids it",
                     ("huggingface/peft #386", "huggingface/peft PR #519")),
    "DeadFirstRow": Note("the first row of the prompt has no gradient"),
    "GradientIsMean": Note("dP is a mean over the batch, not a sum"),
    "GradientOfFirstRow": Note("dP is that of the first row of the batch"),
    "GradientSkipsPadded": Note("dP leaves out rows with padding"),
    "GradientUnscaled": Note("dP without 1 / sqrt(d) in what comes through the scores"),
    "GradientRolled": Note("dP is taken one column too far right"),
    "TableTrained": Note("the table of embeddings is trained"),
    "FrozenGradient": Note("a frozen array has a gradient", "an optimizer that is given it moves the array"),
    "FrozenZeros": Note("frozen arrays have gradients of zeros", "memory for them, and weight decay acts"),
    "SavedBackwards": Note("the loaded prompt is another one than was saved"),
    "SavesTable": Note("the file holds the frozen table of embeddings"),
    "LoadUnchecked": Note("a prompt of another width is loaded all the same"),
    "GradientOfLastForward": Note("dP is that of the ids of the last forward, not of those it is asked for",
                                  "wrong wherever two batches are forwarded before one goes backward"),
    "GradientOff": Note("switched off for one call, the prompt has no gradient from then on"),
    "ForwardStale": Note("a loaded prompt does not reach the forward of a layer that was run before"),
    "ExpandedOnce": Note("the prompt of the first call is kept", "neither load nor training reaches the output"),
    "GradientStale": Note("after load, dP is that of the prompt that was there before"),
    "LoadedIntoBase": Note("after load, the layer without a prompt has one"),
    "LoadKeepsLength": Note("a loaded prompt of another length is cut, or filled with zeros"),
    "PromptShared": Note("two layers share their prompt"),
    "GradientsAccumulate": Note("gradients are added to those of the call before", "steps after the first are wrong"),
}
