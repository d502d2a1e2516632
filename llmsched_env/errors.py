"""Errors that a user can cause, each one line: what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class InputError(ValueError):
    """Bad input: a malformed trace, a contradictory setting, an unknown name. The message is one line."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not among `known`, with the nearest match.

    >>> str(unknown("scheduler", "orka", ["orca", "sarathi"]))
    "unknown scheduler 'orka'; did you mean 'orca'? known: orca, sarathi"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return InputError(f"unknown {kind} {str(name)!r}{hint} known: {', '.join(names)}")


def exit_with(main: Callable[[], int]) -> NoReturn:
    """End the process with what a program's main function returns; an `InputError` is one line, and 2."""
    try:
        sys.exit(main())
    except InputError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
