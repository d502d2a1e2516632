"""The files of a measurement, such that it can be stopped at any moment and goes on.

NAME.json        the profile, at the end
NAME.csv         a row for each batch, as it is measured; `scripts/fit_cost.py` reads it too
NAME.about.json  settings, hardware, versions, kernels, checks
NAME.fit.png     measured against fitted, at the end
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.errors import InputError
from llmsched_env.files import require_writable_file, writing
from llmsched_env.measure.grid import PARTS, Batch
from llmsched_env.profiles.fit import FEATURES

COLUMNS = ("batch", "part", *FEATURES, "seconds", "spread_s", "repeats", "launch_s")


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured batch.

    Attributes:
        part: of the measurement, see `grid`.
        seconds: median of an iteration.
        spread_s: between the 10th and the 90th percentile.
        repeats: how many were timed.
        launch_s: of those seconds, in which the processor launched its kernels one by one; 0: as one graph.
    """

    batch: Batch
    part: str
    seconds: float
    spread_s: float
    repeats: int
    launch_s: float = 0.0

    @property
    def launching(self) -> bool:
        """Whether it takes as long as to launch its kernels: that is what was timed, and not the GPU."""
        return self.launch_s > 0.9 * self.seconds

    def cells(self) -> list[str]:
        """In the order of `COLUMNS`."""
        numbers = (*self.batch.features, self.seconds, self.spread_s, self.repeats, self.launch_s)
        return [str(self.batch), self.part, *(f"{x:.9g}" for x in numbers)]


@dataclasses.dataclass(frozen=True)
class Files:
    """Of a measurement, by the path of its profile."""

    profile: Path

    @property
    def rows(self) -> Path:
        return self.profile.with_suffix(".csv")

    @property
    def about(self) -> Path:
        return self.profile.with_suffix(".about.json")

    @property
    def picture(self) -> Path:
        return self.profile.with_suffix(".fit.png")  # NAME.png is what `llmsched profiles show` draws

    def check(self, resume: bool) -> None:
        """Before anything is measured.

        Raises:
            InputError: they cannot be written; there is a measurement, or with `resume` there is none.
        """
        if self.profile.suffix != ".json":
            raise InputError(f"--output {self.profile} must end in .json; it is the profile to write")
        require_writable_file(self.profile)
        there = [path for path in (self.rows, self.about) if path.exists()]
        if resume and len(there) < 2:
            lacking = self.about if self.rows in there else self.rows
            raise InputError(f"nothing to go on with: there is no {lacking}; begin without --resume")
        if there and not resume:
            raise InputError(
                f"there is a measurement in {there[0]}; go on with it (--resume), or name another --output"
            )


class Journal:
    """The rows of a measurement on disk, whole at any moment; one process at a time writes them.

    Attributes:
        rows: by batch.
        about: what the times depend on, by "settings", "hardware", ...
    """

    def __init__(self, files: Files, about: dict[str, Any], rows: dict[Batch, Row]) -> None:
        self.about, self.rows = about, rows
        self._files = files
        self._file = open(files.rows, "ab", buffering=0)  # noqa: SIM115  # held as long as it is measured
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(f"another process measures to {files.rows}; wait for it, or stop it") from None

    @staticmethod
    def create(files: Files, about: dict[str, Any]) -> Journal:
        """A new one, without rows."""
        _write_about(files, about)
        with writing(files.rows) as path:
            path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        return Journal(files, about, {})

    @staticmethod
    def open(files: Files) -> Journal:
        """One that was begun. A last line that was cut off is left out, and its batch measured again.

        Raises:
            InputError: a file is damaged elsewhere; names the line.
        """
        about = _read_about(files.about)
        journal = Journal(files, about, {})  # holds it before the rows are looked at
        try:
            text, whole = _whole_lines(files.rows)
            journal.rows.update(_parse(files.rows, text))
            if not whole:
                os.ftruncate(journal._file.fileno(), len(text))
        except BaseException:
            journal.close()
            raise
        return journal

    def require(self, **facts: Mapping[str, Any]) -> None:
        """That what the times depend on is as it was.

        Raises:
            InputError: names what differs, and both values.
        """
        different = []
        for part, values in facts.items():
            before, now = self.about.get(part, {}), json.loads(json.dumps(values))
            different += [
                f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
                for key in {**before, **now}
                if before.get(key) != now.get(key)
            ]
        if different:
            raise InputError(
                f"{self._files.rows} was measured otherwise: {'; '.join(different)}; make it the same, or "
                "measure to another --output"
            )

    def append(self, row: Row) -> None:
        """Write a row: in one go, and on disk when this returns.

        Raises:
            InputError: the system refuses to; the rows before are whole.
        """
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row.cells())
        data = line.getvalue().encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) != len(data):
                raise OSError(0, "the disk is full")
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            raise InputError(
                f"cannot write {self._files.rows}: {error.strerror or error}; make room, then --resume"
            ) from None
        self.rows[row.batch] = _row(row.cells())  # as one that goes on reads it

    def note(self, **facts: Any) -> None:
        """Add to `about`, on disk as well."""
        self.about.update(facts)
        _write_about(self._files, self.about)

    def close(self) -> None:
        self._file.close()


def arrays(rows: Mapping[Batch, Row], part: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features (n, 6) in the order of `core.cost` and seconds (n,) of a part, in the order of the batches."""
    found = sorted((row for row in rows.values() if row.part == part), key=lambda row: str(row.batch))
    features = np.array([row.batch.features for row in found], dtype=np.float64).reshape(-1, len(FEATURES))
    return features, np.array([row.seconds for row in found], dtype=np.float64)


def _write_about(files: Files, about: dict[str, Any]) -> None:
    with writing(files.about) as path:
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; restore it, or measure anew") from None
    parts = ("settings", "hardware", "checks", "kernels")
    if not isinstance(about, dict) or not all(isinstance(about.get(part), dict) for part in parts):
        raise InputError(f"{path} says not all of {', '.join(parts)}; restore it, or measure anew")
    return about


def _whole_lines(path: Path) -> tuple[bytes, bool]:
    """What is up to the last end of a line, and whether that is all."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    end = data.rfind(b"\n") + 1
    return data[:end], end == len(data)


def _parse(path: Path, data: bytes) -> dict[Batch, Row]:
    rows: dict[Batch, Row] = {}
    try:
        lines = list(csv.reader(io.StringIO(data.decode("utf-8"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {error}; restore it, or measure anew") from None
    if not lines or lines[0] != list(COLUMNS):
        raise InputError(f"{path} is not what was measured here: its columns must be {', '.join(COLUMNS)}")
    for number, cells in enumerate(lines[1:], start=2):
        problem = f"{len(cells)} cells, but {len(COLUMNS)} columns"
        row = None
        if len(cells) == len(COLUMNS):
            try:
                row, problem = _row(cells), ""
            except ValueError as error:
                problem = str(error)
        if row is not None and row.batch in rows:
            problem = f"{row.batch} for the second time"
        if row is None or problem:
            raise InputError(
                f"{path} line {number} is damaged: {problem}; delete the line, and --resume measures it again"
            )
        rows[row.batch] = row
    return rows


def _row(cells: list[str]) -> Row:
    """The row of cells.

    Raises:
        ValueError: they are not those of one.
    """
    batch, part = Batch.parse(cells[0]), cells[1]
    if part not in PARTS:
        raise ValueError(f"part {part!r} is none of {', '.join(PARTS)}")
    numbers = [float(cell) for cell in cells[2:]]
    if not np.allclose(numbers[: len(FEATURES)], batch.features, rtol=1e-6):
        raise ValueError(f"the features are not those of {batch}")
    seconds, spread, repeats, launch = numbers[len(FEATURES) :]
    if not (0 < seconds < math.inf and 0 <= spread < math.inf and repeats >= 1 and 0 <= launch < math.inf):
        raise ValueError(
            f"seconds {seconds:g}, spread {spread:g}, repeats {repeats:g}, launch {launch:g} are no "
            "measurement"
        )
    return Row(batch, part, seconds, spread, int(repeats), launch)
