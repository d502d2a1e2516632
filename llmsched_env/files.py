"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmsched_env.errors import InputError


def require_writable_file(path: str | Path) -> None:
    """Check, before a long computation, that the file `path` can be written. Leaves no trace.

    Raises:
        InputError: one line that names the path and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is not a regular file")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    _require_writable(path.parent, path)


def require_writable_folder(path: str | Path) -> None:
    """Check, before a long computation, that the folder `path` can be written, or made. Leaves no trace.

    Raises:
        InputError: one line that names the path and what is wrong with it.
    """
    path = existing = Path(path)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write {path}: {existing} is not a folder")
    _require_writable(existing, path)


def _require_writable(folder: Path, path: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


_unfinished: set[Path] = set()


def discard_unfinished() -> None:
    """Remove what `writing` has begun and not ended, for a process that is about to exit at once."""
    for path in tuple(_unfinished):
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A path to write to: it takes the place of `path` when the block ends well, else it goes.

    Raises:
        InputError: the system refuses to write, such as on a full disk; names the path.
    """
    named = path
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    _unfinished.add(temporary)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {named}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)
