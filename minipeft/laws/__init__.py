"""The laws that every method must satisfy, as functions of (method, model, seed).

    print(minipeft.laws.check(MyMethod()))                        every law, on four tiny models
    minipeft.laws.check(MyMethod(), model).raise_for_failures()   on a model of your own, in a test

 1 definition        project = x dense^T, rows = dense[ids], gradients are those of finite differences
 2 transparency      attaching changes no output at the start
 3 merge             merged = unmerged
 4 undo              every bit comes back, after any sequence of moves
 5 masking           other arrays cost no gradient and keep their bits
 6 names             no name of the base changes
 7 files             a round trip is the identity
 8 swap and mixed batches     swapping is exact; a row of a mixed batch gives what that row gives alone
 9 fused = definition, 10 rank, 11 backends agree: laws of ops, of LoRA and of backends; in the library's tests
12 dtype kept        a training step computes in the model's dtype
13 accumulation = one batch
14 dropout reaches every weight
"""
from minipeft.laws.values import definition, dtype_kept, merge, transparency  # noqa: F401  (in the laws' own order)
from minipeft.laws.moves import files, names, swap_and_mixed_batches, undo  # noqa: F401
from minipeft.laws.training import accumulation, dropout_reaches_every_weight, masking  # noqa: F401
from minipeft.laws.check import check  # noqa: F401
from minipeft.laws.law import LAWS, Broken, DoesNotApply  # noqa: F401
