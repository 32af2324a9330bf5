"""Attaching: the contract of a method, the moves of an attachment, and its file."""
