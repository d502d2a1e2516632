"""`njit`: numba's, with an on-disk cache that follows every source file of the package."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, overload

import numba

F = TypeVar("F", bound=Callable[..., Any])

_numba: Any = numba.config
_PACKAGE = Path(__file__).resolve().parents[1]
_CORE = (_PACKAGE / "core", _PACKAGE / "scheduling")
_NETWORKS = _PACKAGE / "networks" / "core"
_ENVS = _PACKAGE / "envs"
_KEPT = 8  # caches of as many versions of such folders stay on disk


@overload
def njit(function: F) -> F: ...
@overload
def njit(**options: Any) -> Callable[[F], F]: ...
def njit(function: F | None = None, **options: Any) -> F | Callable[[F], F]:
    """`numba.njit` with the package's settings: nogil, IEEE division, no fastmath (results are the same bit
    for bit), and a cache on disk. Takes the options of `numba.njit`; `cache=False` leaves the disk alone.

    numba stamps a cached function with its own file only and so misses a change in a callee of another file.
    Hence the cache lies in a folder named by a hash of the sources that it may call: see `cache_dir`.
    """
    options = {"nogil": True, "error_model": "numpy", "cache": True, **options}

    def decorate(f: F) -> F:
        configured = _numba.CACHE_DIR
        _numba.CACHE_DIR = str(cache_dir(_sources(f)))  # read once by numba, while it decorates
        try:
            return numba.njit(**options)(f)
        finally:
            _numba.CACHE_DIR = configured

    return decorate if function is None else decorate(function)


def _sources(f: Callable[..., Any]) -> tuple[Path, ...]:
    """The folders whose compiled functions `f` may call: within the package imports point one way; others may
    call all of it and what lies beside them."""
    if f.__module__.startswith("llmsched_env.envs"):
        return (*_CORE, _NETWORKS, _ENVS)
    if f.__module__.startswith("llmsched_env.networks"):
        return (*_CORE, _NETWORKS)
    if f.__module__.startswith("llmsched_env."):
        return _CORE
    return (*_CORE, _NETWORKS, _ENVS, Path(f.__code__.co_filename).resolve().parent)


@cache
def cache_dir(sources: tuple[Path, ...] = _CORE) -> Path:
    """The folder of the compiled functions of this version of these folders.

    Below $NUMBA_CACHE_DIR if that is set, else below the user's cache folder, else (not writable) below the
    folder for temporary files. The installed package itself may be read-only.
    """
    root = Path(_numba.CACHE_DIR, "llmsched_env") if _numba.CACHE_DIR else _user_root()
    if not _writable(root):
        root = _temporary_root()
    folder = root / _fingerprint(sources)
    if not folder.is_dir():
        _writable(folder)
        _prune(root)
    try:
        os.utime(folder)
    except OSError:
        pass
    return folder


def _fingerprint(sources: tuple[Path, ...]) -> str:
    """Names the compiled sources and the compiler."""
    digest = hashlib.sha256()
    for part in (numba.__version__, platform.python_implementation(), sys.version, platform.machine()):
        digest.update(part.encode() + b"\0")
    for path in (path for folder in sources for path in sorted(folder.glob("*.py"))):
        digest.update(f"{path.parent.name}/{path.name}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _user_root() -> Path:
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("llmsched_env", appauthor=False), "compiled")


def _temporary_root() -> Path:
    """Kept between runs, but only if it is ours: numba unpickles what it finds there."""
    uid = getattr(os, "getuid", lambda: 0)()
    root = Path(tempfile.gettempdir(), f"llmsched_env-{uid}")
    if _writable(root) and (os.name == "nt" or (not root.is_symlink() and root.stat().st_uid == uid)):
        return root
    return Path(tempfile.mkdtemp(prefix="llmsched_env-"))


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _prune(root: Path) -> None:
    """Removes the least recently used caches of other versions."""
    try:
        folders = sorted(
            (p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True
        )
    except OSError:
        return
    for folder in folders[_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
