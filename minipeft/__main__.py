"""`python -m minipeft COMMAND`: the tools of the library at a terminal.

Each command explains itself: python -m minipeft plan --help
"""
from __future__ import annotations

import importlib
import os
import sys

# {command: the module with its `main` and its SUMMARY}; a new command is a line here
COMMANDS = {"plan": "minipeft.tools.planning.command"}


def main(argv: list[str] | None = None) -> int:
    """The command line with the arguments `argv`, by default those of this process. Returns the exit status: that of
    the command, or 2 for an unknown one. A command may raise SystemExit for wrong usage."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] and given[0] in COMMANDS:
        return int(importlib.import_module(COMMANDS[given[0]]).main(given[1:]))
    asked = given[:1] in ([], ["-h"], ["--help"])
    out = sys.stdout if asked and given else sys.stderr
    if not asked:
        print(f"error: {given[0]!r} is not a command; expected one of {', '.join(COMMANDS)}\n", file=out)
    print(f"usage: python -m minipeft COMMAND [OPTIONS]\n\n{__doc__}", file=out)
    for name, module in COMMANDS.items():
        print(f"  {name:<12}{importlib.import_module(module).SUMMARY}", file=out)
    return 0 if asked and given else 2


def run() -> int:
    """`main`, ending quietly if the reader of the output has gone, as `head` does."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # the status of a program ended by SIGPIPE


if __name__ == "__main__":
    sys.exit(run())
