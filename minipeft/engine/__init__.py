"""Reverse-mode differentiation: `tensor.py` is the engine, `check.py` compares it with finite differences."""
