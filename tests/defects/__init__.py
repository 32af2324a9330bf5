"""Defects of other libraries, each with a test that this one lacks it, named by its number in the list of defects."""
