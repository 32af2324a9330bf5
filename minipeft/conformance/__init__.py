"""The conformance kit: hold any PEFT implementation against the reference.

    from minipeft.conformance import check
    check("mypkg.adapter").raise_for_failures()                    # in anybody's tests

    python -m minipeft.conformance --impl mypkg.adapter            # a table of rho, failures in words

A plug-in is a module of plain functions over NumPy arrays: see `plugin.py`, and `methods/` for what each is given.
"""
from minipeft.conformance.hold import check
from minipeft.conformance.report import Report

__all__ = ["check", "Report"]
