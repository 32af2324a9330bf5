"""Reverse-mode differentiation: `tensor.py` is the engine, `check.py` holds it against finite differences."""
