"""The program `llmsched`, also `python -m agents`: the command line, which an interrupt ends at once.

An exception would not do: raised in the middle of an import or of a callback, it may be swallowed, or
reported as a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    """Run the command line on the program's arguments; returns the exit code (`agents.cli.main`)."""
    signal.signal(signal.SIGINT, _leave)
    from agents.cli import main as run

    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is done; while Python winds up, nobody would catch it
    return code


def _leave(*_: object) -> NoReturn:
    """Say so in one line and exit, leaving no file half written."""
    if "llmsched_env.files" in sys.modules:
        sys.modules["llmsched_env.files"].discard_unfinished()
    if os.isatty(2):
        os.write(2, b"\r\x1b[K\x1b[?25h")  # a progress bar goes, and the cursor that it hid comes back
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
