"""Planted bugs of bottleneck adapters, their effects, and where such bugs were reported: {flag: Note}.

1 of the 49 has a public report, in its `links`; the others are plausible mistakes.
"""
from __future__ import annotations

from minipeft.conformance.method import Note

NOTES = {
    "ResidualMissing": Note("the sublayer's output is replaced, not added to", "the skip around A is missing: with U = "
                            "0 the sublayer is gone"),
    "StreamMissing": Note("the residual stream is not added"),
    "StreamTwice": Note("x counts twice: the skip around A takes all that it read, and the block adds x once more",
                        "if it is meant, declare conventions={'bottleneck_adapter': {'residual': 'adapter_input'}}",
                        ("adapter-hub/adapters #95",)),
    "ResidualScaled": Note("the scale multiplies the sublayer's output too"),
    "BiasDropped": Note("a bias is dropped"),
    "GeluByTanh": Note("gelu by tanh, where gelu by erf is asked for", "outputs move by 5e-4 at most"),
    "TanhByGelu": Note("gelu by erf, where gelu by tanh is asked for", "outputs move by 5e-4 at most"),
    "GeluBySigmoid": Note("gelu is z sigmoid(1.702 z)", "outputs move by 2e-2 at most"),
    "SwishIsSigmoid": Note("swish without its factor z"),
    "ActivationIgnored": Note("relu, whatever activation is asked for"),
    "ActivationMissing": Note("there is no activation", "the adapter is a matrix of rank m"),
    "ActivationAfter": Note("the activation acts after U, not before it"),
    "BiasAfter": Note("b_D is added after the activation"),
    "ScaleForgotten": Note("the scale is ignored"),
    "ScaleBeforeBias": Note("the scale multiplies U f(D h + b_D), not b_U"),
    "ScaleOnInput": Note("the scale multiplies what A reads"),
    "ScaleSlightlyOff": Note("the scale is 2 % too large", "half precision hides it from every check but an exact one"),
    "Transposed": Note("a matrix is used transposed", "silent where m = d"),
    "ReadsSum": Note("houlsby reads x + F, as pfeiffer does"),
    "ReadsSublayer": Note("pfeiffer reads F alone, as houlsby does"),
    "ParallelIsSerial": Note("a parallel adapter reads the sublayer's output"),
    "ParallelReadsNorm": Note("a parallel adapter reads the sublayer's input n, not the stream x", "if it is meant, "
                              "declare conventions={'bottleneck_adapter': {'parallel_input': 'norm'}}"),
    "GradientIsMean": Note("gradients are means over the batch, not sums"),
    "GradientOfOneRow": Note("db_U is that of one row"),
    "GradientForgetsScale": Note("dU and db_U without the scale"),
    "GradientWithoutSlope": Note("gradients without f'"),
    "GradientOfGelu": Note("gelu' is Phi(z), without z phi(z)"),
    "GradientStopped": Note("no gradient comes through the adapter to what it reads"),
    "GradientWithoutSkip": Note("no gradient goes past the adapter"),
    "GradientToOneReader": Note("pfeiffer passes its gradient to F and not to x", "x and F are read alike"),
    "UnreadZeros": Note("what is not read has a gradient of zeros"),
    "RowsMixed": Note("row 0 leaks into the other rows"),
    "UnitLost": Note("the last unit of the bottleneck is left out"),
    "Normalized": Note("what A adds is divided by |U|"),
    "ConstantAdded": Note("the adapter adds a constant"),
    "BiasesFrozen": Note("a bias is not trained"),
    "MergeIgnored": Note("merging is accepted and does nothing", "whoever drops the adapter after it loses it"),
    "SaveDropsScale": Note("the scale is not in the file"),
    "SaveDropsBiases": Note("the biases are not in the file"),
    "LoadUnchecked": Note("a file for another width is loaded all the same"),
    "SaveScaleInHalf": Note("the scale is rounded to float16 in the file"),
    "LoadHalf": Note("a file that is refused has been taken in part"),
    "LoadMissesGradient": Note("gradients keep the scale from before a file was loaded"),
    "ForwardStale": Note("the forward keeps what it prepared at its first call", "a file that is loaded later does not "
                         "reach it"),
    "LastInput": Note("gradients are taken at the inputs of the last forward, not at those given",
                      "silent as long as each backward follows its own forward"),
    "SharedByAll": Note("the activation is kept in the class, not in the object",
                        "silent as long as one adapter lives at a time"),
    "UnknownNames": Note("an unknown activation or placement is taken for another one", "a name with a typing error "
                         "trains another model"),
    "Broadcasts": Note("arrays of a wrong shape are broadcast"),
    "GradientsAccumulate": Note("gradients are added to those of the call before", "steps after the first are wrong"),
}
