"""The purposes of memory: the lines of a plan.

    weights        of the base, as they are in the step: quantized, where they are
    adapter        the method's own arrays, trained or not
    master copies  of trained numbers, in float32, where they are in half precision
    optimizer      its states
    gradients      of what is trained, once they are complete
    activations    what the forward keeps for the backward pass, and its outputs while they are alive
    scores         of attention: the probabilities, and their dropout
    logits         before and after the softmax
    casts          to float32
    temporaries    everything else: inside an op, and gradients on their way
"""
from minipeft.tools.hollow.ledger import TEMPORARY

PURPOSES = WEIGHTS, ADAPTER, MASTER, STATE, GRADIENTS, ACTIVATIONS, SCORES, LOGITS, CASTS, _ = (
    "weights", "adapter", "master copies", "optimizer", "gradients", "activations", "scores", "logits", "casts",
    TEMPORARY)
