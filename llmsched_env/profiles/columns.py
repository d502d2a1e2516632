"""Columns of numbers from a CSV file, with errors that name the line."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.errors import InputError, unknown


def read(
    path: str | Path, required: Sequence[str], optional: Mapping[str, float], ignored: Sequence[str] = ()
) -> dict[str, NDArray[np.float64]]:
    """The named columns of a CSV (or CSV.gz) file of numbers; other columns are refused.

    Args:
        required: columns that have to be there.
        optional: columns that may be missing, and their value then.
        ignored: columns that may be there, of any content, and are left out.

    Raises:
        InputError: a missing or unknown column; a cell that is no finite number of at least 0, and its line.
    """
    path = Path(path)
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = [cell.strip() for cell in next(rows, [])]
            body = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        what = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {what}; name a CSV or CSV.gz file") from None
    for name in header:
        if name not in required and name not in optional and name not in ignored:
            raise unknown(f"column in {path}", name, [*required, *optional])
    for name in required:
        if name not in header:
            raise InputError(f"{path} lacks the column {name}; it needs {', '.join(required)}")
    if len(set(header)) < len(header):
        raise InputError(f"{path} names a column twice: {', '.join(header)}; leave one out")
    if not body:
        raise InputError(f"{path} has no rows below its header; add one for each measurement")
    columns: dict[str, NDArray[np.float64]] = {
        name: np.full(len(body), value) for name, value in optional.items()
    }
    columns.update({name: np.empty(len(body)) for name in header if name not in ignored})
    for i, (line, row) in enumerate(body):
        if len(row) != len(header):
            problem = f"{len(row)} cells, but {len(header)} columns"
            raise InputError(f"{path} line {line}: {problem}; mend the row, or leave it out")
        for name, cell in zip(header, row, strict=True):
            if name in ignored:
                continue
            try:
                value = float(cell)
            except ValueError:
                value = math.nan
            if not 0 <= value < math.inf:
                problem = f"{name} {cell.strip()!r} is no number of at least 0"
                raise InputError(f"{path} line {line}: {problem}; mend it, or leave the row out")
            columns[name][i] = value
    return columns
