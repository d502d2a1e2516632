"""The folder of a training, such that it can be killed at any moment and goes on as if it had not been.

    RUN/config.yaml                what was asked for
    RUN/about.json                 versions, git commit, machine, command
    RUN/metrics.csv                a row for each update
    RUN/validation.csv             a row for each checkpoint
    RUN/tensorboard/               the same, and pictures
    RUN/checkpoints/000001310720/  weights, optimizer, lanes and state: whole, or not there
    RUN/agent/                     the best agent so far (`agents.agent`)

Nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from agents.config import Config
from llmsched_env.errors import InputError
from llmsched_env.files import require_writable_folder, writing

_PARTS = ("weights", "optimizer", "lanes")
Arrays = dict[str, NDArray[Any]]
_KEPT = 2  # checkpoints: should the last be damaged, there is the one before


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a training stands between two updates.

    Attributes:
        weights, optimizer, lanes: arrays by name; lanes, of the environments, may be empty.
        state: numbers and strings: decisions and updates so far, best validation, ...
    """

    weights: Arrays
    optimizer: Arrays
    lanes: Arrays
    state: dict[str, Any]


class Run:
    """The folder of a training.

    Attributes:
        folder, config: of the run.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config

    @staticmethod
    def create(folder: str | Path, config: Config, about: dict[str, Any] | None = None) -> Run:
        """Begin a run in a new folder, or in that of one that ended before its first checkpoint.

        Raises:
            InputError: if there is a run in it, or it cannot be written.
        """
        folder = Path(folder)
        require_writable_folder(folder)
        run = Run(folder, config)
        if run.checkpoints():
            raise InputError(
                f"there is a run in {folder}; go on with it (--resume), or name another folder (--run)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with run.claimed():
            with writing(folder / "about.json") as path:
                path.write_text(json.dumps({**versions(), **(about or {})}, indent=1) + "\n")
            with writing(folder / "config.yaml") as path:
                path.write_text(config.to_yaml())
        return run

    @staticmethod
    def open(folder: str | Path) -> Run:
        """The run in a folder.

        Raises:
            InputError: if there is none, or its configuration does not fit this version.
        """
        path = Path(folder) / "config.yaml"
        if not path.is_file():
            raise InputError(f"{folder} is not the folder of a run: there is no config.yaml in it")
        return Run(Path(folder), Config.from_yaml(path))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """While this lasts, no other process trains here; the system ends it with the process.

        Raises:
            InputError: if another does, or the folder cannot be written.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process trains in {self.folder}; wait for it or end it, or name another folder"
            ) from None
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror or error}") from None
        try:
            for path in (self.folder / "checkpoints").glob(".[0-9]*"):  # of processes that were killed
                shutil.rmtree(path, ignore_errors=True)
            yield
        finally:
            lock.release()

    # ------------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[Path]:
        """Their folders, the oldest first."""
        return sorted(path for path in (self.folder / "checkpoints").glob("[0-9]*") if path.is_dir())

    @property
    def done(self) -> bool:
        """Whether its last checkpoint is of its last update."""
        last = self.checkpoints()[-1:]
        return bool(last) and int(last[0].name) >= self.config.updates * self.config.rollout

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; those before the one before are removed.

        Raises:
            InputError: if it cannot be written; what was there is as it was.
        """
        final = self.folder / "checkpoints" / f"{checkpoint.state['steps']:012d}"
        temporary = final.with_name(f".{final.name}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            digests = {}
            for name in _PARTS:
                arrays: Arrays = getattr(checkpoint, name)
                path = temporary / f"{name}.npz"
                with open(path, "wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                    file.flush()
                    os.fsync(file.fileno())
                digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            state = {**checkpoint.state, "sha256": digests}
            (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise InputError(
                f"cannot write the checkpoint {final}: {error.strerror or error}; the one before is whole"
            ) from None
        for path in self.checkpoints()[:-_KEPT]:
            shutil.rmtree(path, ignore_errors=True)

    def load(self) -> Checkpoint | None:
        """The last checkpoint that is whole; None: there is none.

        Raises:
            InputError: if there are checkpoints, and all are damaged.
        """
        wrong = ""
        for path in reversed(self.checkpoints()):
            try:
                return _read(path)
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                EOFError,
                zipfile.BadZipFile,
                zlib.error,
            ) as error:
                wrong = wrong or f"{path}: {error}"
        if wrong:
            raise InputError(f"no checkpoint of {self.folder} can be read ({wrong}); train anew")
        return None

    # ------------------------------------------------------------------ tables

    def write_row(self, table: str, row: dict[str, Any]) -> None:
        """Append a row to RUN/`table`.csv; all rows of a table have the same columns.

        Raises:
            InputError: if it cannot be written, or has other columns, as another version of this writes them.
        """
        path = self.folder / f"{table}.csv"
        try:
            if path.exists() and path.stat().st_size > 0:
                with open(path, newline="") as file:
                    if next(csv.reader(file)) != list(row):
                        raise InputError(
                            f"{path} has other columns: another version began this run; begin it anew"
                        )
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None

    def read_rows(self, table: str) -> list[dict[str, str]]:
        """The rows of RUN/`table`.csv that are whole."""
        path = self.folder / f"{table}.csv"
        if not path.exists():
            return []
        with open(path, newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def drop_rows(self, table: str, after: int) -> None:
        """Remove the rows of more `steps` than so many, which are going to be made again."""
        rows = self.read_rows(table)
        kept = [row for row in rows if int(row["steps"]) <= after]
        if kept:  # also where none goes: the last line may be half of one
            with writing(self.folder / f"{table}.csv") as path, open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(kept)
        else:  # perhaps half of a heading
            (self.folder / f"{table}.csv").unlink(missing_ok=True)


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text())
    found: list[Arrays] = []
    for name in (f"{part}.npz" for part in _PARTS):
        if hashlib.sha256((path / name).read_bytes()).hexdigest() != state["sha256"][name]:
            raise ValueError(f"{name} is not as it was written")
        with open(path / name, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            found.append({key: arrays[key] for key in arrays.files})
    weights, optimizer, lanes = found
    return Checkpoint(weights, optimizer, lanes, state)


def versions() -> dict[str, Any]:
    """What a result may depend on beside the configuration."""
    names = ("llmsched-env", "numpy", "numba", "gymnasium", "stable-baselines3", "sb3-contrib", "torch")
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.platform()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["git_commit"] = _commit()
    found["command"] = sys.argv
    return found


def _commit() -> str | None:
    """The commit of the checkout that this runs from; None: it is not one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    if not (Path(__file__).parents[1] / ".git").exists():
        return None  # installed; a repository around it is another's
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
