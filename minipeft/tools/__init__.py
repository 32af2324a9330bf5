"""Tools for a person at a terminal. Each is a function here and a command of `python -m minipeft`."""
from minipeft.tools.planning.plan import plan  # noqa: F401
