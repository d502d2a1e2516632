"""The command line `llmsched`. Each subcommand imports what it needs when it is called."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import typer

from agents.cli.common import app

# isort: off
# They add their commands, in the order in which the help has them.
from agents.cli import listing, measure, simulate, bench, stability, network, optimum, train, evaluate, tune  # noqa: F401
# isort: on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 1 (some runs of a benchmark failed), 2 (bad input:
    one line on the standard error stream), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    warnings.showwarning = lambda message, *_: print("warning:", message, file=sys.stderr)
    try:
        code = app(arguments, prog_name="llmsched", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        code = 1
    except OSError as error:
        what = error.strerror or str(error)
        return _complain(f"{error.filename}: {what}" if error.filename else what)
    except Exception as error:
        from llmsched_env.errors import InputError

        if isinstance(error, InputError):
            return _complain(str(error))
        # What click raises for wrong usage; some versions of typer have a copy of click.
        if hasattr(error, "format_message"):
            return _complain(error.format_message())
        raise
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code


def _complain(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2
