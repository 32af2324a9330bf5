"""Planted bugs of LoRA on a linear layer, their effects, and where such bugs were reported: {flag: Note}.

11 of the 52 have a public report, in their `links`; the others are plausible mistakes.
"""
from __future__ import annotations

from minipeft.conformance.method import Note

NOTES = {
    "ScaleForgotten": Note("s = 1: alpha and r are ignored", "the update is r / alpha times what it should be",
                           ("surogate #173",)),
    "ScaleNotDivided": Note("s = alpha, not alpha / r", "the update is r times too strong",
                            ("Blaizzy/mlx-vlm #841", "Blaizzy/mlx-vlm #845", "rasbt/LLMs-from-scratch #821")),
    "ScaleTimesRank": Note("s = alpha r, not alpha / r", "the update is r^2 times too strong"),
    "RankStabilized": Note("s = alpha / sqrt(r), not alpha / r", "the update is sqrt(r) times too strong; if it is "
                           "meant, declare conventions={'lora_linear': {'scaling': 'alpha/sqrt(r)'}}",
                           ("huggingface/peft #3449", "huggingface/peft PR #3473")),
    "ScaleTwice": Note("s is applied twice", "the update is alpha / r times too strong"),
    "ScaleSlightlyOff": Note("s is 2 % too large", "half precision hides it from every check but an exact one"),
    "AlphaTruncated": Note("alpha is read as an integer", "alpha 0.5 switches the adapter off"),
    "NoEffect": Note("the adapter has no effect until it is merged", "training does nothing, and merging changes the "
                     "model", ("huggingface/peft #2777", "huggingface/peft #2864")),
    "MergeTransposed": Note("merging adds (B A)^T", "silent where W is square"),
    "MergeRenormalizes": Note("merging gives rows their old length back"),
    "MergeForgetsScale": Note("merging adds B A without s"),
    "UnmergeForgetsScale": Note("unmerging subtracts B A without s"),
    "UnmergeDrifts": Note("unmerging subtracts a rounded update, where merging added one that was not",
                          "every cycle moves the weight", ("huggingface/trl #6688",)),
    "MergesTwice": Note("merging twice adds the update twice", "", ("EricLBuehler/candle-lora #26",)),
    "MergedForwardAddsAgain": Note("the merged layer adds the adapter once more"),
    "SwapLeavesMerged": Note("the old adapter stays in the weight after a swap"),
    "SaveDropsAlpha": Note("alpha is not in the file", "the loaded adapter has another scale", ("surogate #173",)),
    "DropoutInEvaluation": Note("dropout acts in evaluation"),
    "DropoutUnscaled": Note("dropout without the factor 1 / (1 - p)"),
    "DropoutOnBase": Note("dropout acts on the base's input too"),
    "GradientForgetsScale": Note("dA without s"),
    "GradientIsMean": Note("dA is a mean over the batch, not a sum"),
    "GradientMoves": Note("asking for a gradient changes the layer"),
    "GradientStopped": Note("dx without what comes through the adapter"),
    "GradientOfB": Note("rows of dB are in the wrong places"),
    "BiasTrained": Note("the bias is trained", "", ("huggingface/peft #2759",)),
    "FrozenGradient": Note("a frozen array has a gradient", "an optimizer that is given it moves the array"),
    "FrozenZeros": Note("frozen arrays have gradients of zeros", "memory for them, and weight decay acts"),
    "BaseTrained": Note("a step changes the frozen weight", "", ("huggingface/peft #3580",)),
    "DeltaNormalized": Note("the update is divided by |B|"),
    "AdapterBias": Note("the adapter adds a constant"),
    "RowsMixed": Note("row 0 leaks into the other rows"),
    "ATransposed": Note("A is used transposed", "silent where in = r"),
    "RowIndexOffByOne": Note("each row gets the adapter of the next row"),
    "MergedFlagLost": Note("the file does not say that the weight is merged", "loading and merging adds the update "
                           "twice", ("microsoft/LoRA #34", "microsoft/LoRA #61")),
    "SavesBase": Note("the file holds the frozen base"),
    "LoadUnchecked": Note("a file of another shape is loaded all the same", "", ("surogate #173",)),
    "MergesDiffer": Note("the checked merge rounds otherwise than the plain one"),
    "UnknownNameIgnored": Note("unknown adapter names are ignored"),
    "DropoutByP": Note("what is kept is divided by p, not by 1 - p", "silent at p = 0.5"),
    "StepInTurns": Note("a step takes dB at the A that it has just moved"),
    "ForwardStale": Note("what the first forward prepared outlives a load", "the file that was loaded has no effect"),
    "LastInput": Note("gradients are taken at the x of the last forward", "silent as long as that was the same batch"),
    "StateShared": Note("the scale belongs to the class", "two layers with other alpha: the last one made sets both"),
    "RankOfFirst": Note("every adapter is scaled by the rank of the first", "silent where all have one rank"),
    "FirstAlways": Note("gradients, steps, merge and save act on the first adapter, whichever is active"),
    "DeltaStale": Note("merging adds the update as it was before training", "training is lost in the merged model"),
    "UnmergesCurrent": Note("unmerging subtracts the update as it is now", "what was trained in between stays in W"),
    "UnmergesUnmerged": Note("unmerging what is not merged subtracts the update"),
    "RemoveLeavesMerged": Note("a removed adapter stays in the weight that it was merged into"),
    "AlphaZeroIsDefault": Note("alpha = 0 is taken for the default"),
    "GradientsAccumulate": Note("gradients are added to those of the call before", "steps after the first are wrong"),
}
