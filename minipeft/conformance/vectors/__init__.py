"""The published vectors: cases with their correctly rounded results, for implementations in any language.

    v1/<method>.json               the tests: params, names of tensors, k and n of each output, planted bugs it finds
    v1/<method>.safetensors        <test id>/in/<name>, <test id>/out/<name>, <test id>/mag/<name> (if it is bounded)
    v1/minipeft-vectors-v1.json    the schema of the first file, JSON Schema draft-07, everything required

Floats are stored as F64. Inputs are numbers of the test's dtype, so that casting is exact; ids are I64, masks BOOL. A
consumer needs only the first two files and one line, which is in the header of each JSON file:

    |got - want| <= kappa(k, n, dtype) mag + n tiny

Design rules for a test, each made after a bug went unnoticed: rectangular and square matrices; r that does not
divide alpha and is not a square; B != 0; no saturated softmax; width 4 and small variance for a norm; small sizes,
since at n = 1024 the bound hides errors a thousand times larger; and every test finds at least one planted bug, with a
margin.

`read.py` trusts nothing, and `run.py` checks a plug-in against the vectors; neither needs hypothesis or mpmath.
`generate.py` makes the files, and `publish.py` decides which tests may be in them.
"""
