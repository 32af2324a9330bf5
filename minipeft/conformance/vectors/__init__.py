"""The published vectors: cases with their correctly rounded results, for implementations in any language.

    v1/<method>.json               what each test is: params, names of tensors, k and n of each output, bugs it finds
    v1/<method>.safetensors        <test id>/in/<name>, <test id>/out/<name>, <test id>/mag/<name> (where it is bounded)
    v1/minipeft-vectors-v1.json    the schema of the first, JSON Schema draft-07, everything required

Floats are stored as F64 and are numbers of the test's dtype, so that casting is exact; ids as I64, masks as BOOL. A
consumer needs these two files and one line, which stands in the header of each:

    |got - want| <= kappa(k, n, dtype) mag + n tiny

Rules of a test's design (each was a bug that survived): rectangular and square matrices; r that does not divide alpha
and is no square; B != 0; no saturated softmax; width 4 and small variance for a norm; small sizes, since at n = 1024
the bound hides a thousand times more; and every test finds at least one planted bug, with room to spare.

`read.py` trusts nothing, `run.py` holds a plug-in against what it read; both need neither hypothesis nor mpmath.
`generate.py` makes the files: `publish.py` says what may be in them.
"""
