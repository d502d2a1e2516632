"""Traces read from files, every row checked.

The columns are found by their names, so that the common formats need no option:

    this package's     arrival_s, prompt_tokens, output_tokens in seconds and tokens; optionally
                       declared_tokens, predicted_tokens, priority, client, class_id, ttft_target_s,
                       tpot_target_s, request_id
    plain              timestamp, input_tokens, output_tokens
    Azure 2023, 2024   TIMESTAMP, ContextTokens, GeneratedTokens; dates
    BurstGPT           Timestamp, Request tokens, Response tokens; rows without a response are failed calls,
                       left out
    Vidur              arrived_at, num_prefill_tokens, num_decode_tokens
    Mooncake           JSON lines with timestamp in milliseconds, input_length, output_length

Times under another name than `arrival_s` are counted from the first row. Files may be gzip'd.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import gzip
import json
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.requests import Requests
from llmsched_env.errors import InputError
from llmsched_env.workloads.lengths import Clip
from llmsched_env.workloads.workload import at_rate

_REQUIRED = {
    "arrival_s": ("arrival_s", "timestamp", "arrived_at"),
    "prompt_tokens": (
        "prompt_tokens",
        "input_tokens",
        "contexttokens",
        "request tokens",
        "num_prefill_tokens",
        "input_length",
    ),
    "output_tokens": (
        "output_tokens",
        "generatedtokens",
        "response tokens",
        "num_decode_tokens",
        "output_length",
    ),
}
_COUNTS = ("prompt_tokens", "output_tokens", "declared_tokens")
_MAY_MISS = (
    "predicted_tokens",
    "ttft_target_s",
    "tpot_target_s",
)  # positive numbers; an empty field means none
_LABELS = ("client", "class_id")  # whole numbers from 0, or any names, numbered as they appear
_OPTIONAL = ("declared_tokens", "priority", *_MAY_MISS, *_LABELS, "request_id")
_LARGEST = 2**30  # tokens
_LATEST = 1e10  # seconds, 300 years: beyond it a float does not hold microseconds


class TraceWarning(UserWarning):
    """Rows of a trace were left out."""


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where a file has what.

    Attributes:
        names: field -> the file's own name of it.
        position: field -> index of the column (JSON lines: in the order of `names`).
        width: number of columns.
        dates: arrivals are dates.
        time_unit: seconds of one unit of the arrivals.
    """

    names: dict[str, str]
    position: dict[str, int]
    width: int
    delimiter: str = ","
    dates: bool = False
    time_unit: float = 1.0

    @property
    def has_failures(self) -> bool:
        return self.names["output_tokens"].lower() == "response tokens"


def read(
    path: str | Path,
    *,
    drop_bad: bool = False,
    sort: bool = False,
    jitter_s: float = 0.0,
    window: tuple[float, float] | None = None,
    limit: int | None = None,
    max_prompt: int | None = None,
    max_output: int | None = None,
    max_total: int | None = None,
    time_scale: float | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> Requests:
    """The requests of a trace file. What the options ask for is done in the order in which they stand here.

    Args:
        path: CSV or JSON lines, plain or gzip'd; the module's text lists the columns.
        drop_bad: leave out rows that cannot be used (a `TraceWarning` says how many), in place of an error;
            `--drop-bad` on the command line.
        sort: sort by arrival, in place of an error; `--sort` on the command line.
        jitter_s: add to each arrival a uniform time in [0, jitter_s) and sort again; for rounded time stamps
            (Mooncake's: 3 seconds).
        window: keep the arrivals in [start, end) seconds, and count from its start.
        limit: keep the first so many.
        max_prompt, max_output, max_total: cut lengths (a total is cut at the prompt's side); declared maxima
            too.
        time_scale: multiply all times; 0.5 doubles the rate.
        rate: stretch to this mean rate in requests/s, the first arrival at 0.
        seed: of the jitter.

    Raises:
        InputError: one line that names the file, the line and the column of the first bad row; or the missing
            column and its nearest match; or why the file cannot be read.
    """
    path = Path(path)
    clip = Clip(max_prompt, max_output, max_total)
    _check(jitter_s, window, limit, time_scale, rate)
    try:
        columns = _columns(path, drop_bad, sort)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file; give CSV or JSON lines, plain or gzip'd") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is damaged: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    order: NDArray[np.int64] | slice = slice(None)
    arrival = columns["arrival_s"]
    if jitter_s > 0:
        arrival = arrival + np.random.default_rng(seed).uniform(0.0, jitter_s, len(arrival))
    if jitter_s > 0 or sort:
        order = np.argsort(arrival, kind="stable")
        arrival = arrival[order]
    if window is not None:
        first, last = np.searchsorted(arrival, window)
        if first == last:
            raise InputError(
                f"{path}: no request arrives between {window[0]:g} and {window[1]:g} s; arrivals run from "
                f"{arrival[0]:g} to {arrival[-1]:g} s"
            )
        arrival = arrival[first:last] - window[0]
        order = np.arange(first, last) if isinstance(order, slice) else order[first:last]
    columns = {name: column[order][:limit].copy() for name, column in columns.items()}
    columns["arrival_s"] = arrival[:limit] * (1.0 if time_scale is None else time_scale)
    latest = columns["arrival_s"][-1]
    if latest > _LATEST:
        raise InputError(
            f"{path}: arrivals run to {latest:g} s, more than {_LATEST:g} s; if they are in another unit, "
            "give time_scale, such as 1e-9 for nanoseconds (--workload-set time_scale=1e-9)"
        )
    columns["prompt_tokens"], columns["output_tokens"] = clip(
        columns["prompt_tokens"], columns["output_tokens"]
    )
    if "declared_tokens" in columns:
        columns["declared_tokens"] = np.minimum(columns["declared_tokens"], clip.longest(_LARGEST))
    for name in ("ttft_target_s", "tpot_target_s"):
        if name in columns:
            columns[name] = np.where(np.isnan(columns[name]), np.inf, columns[name])
    names = columns.pop("request_id", None)
    requests = Requests.of(names=None if names is None else names.tolist(), **columns)
    return requests if rate is None else at_rate(requests, rate)


def _check(
    jitter_s: float,
    window: tuple[float, float] | None,
    limit: int | None,
    time_scale: float | None,
    rate: float | None,
) -> None:
    """Complain of options that fit no file."""
    if not 0 <= jitter_s < math.inf:
        raise InputError(f"jitter_s must be 0 or more seconds, not {jitter_s!r}")
    if window is not None and not (
        isinstance(window, Sequence) and len(window) == 2 and 0 <= window[0] < window[1]
    ):
        raise InputError(f"window must be (start, end) in seconds with 0 <= start < end, not {window!r}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"the number of requests must be a whole number from 1, not {limit!r}")
    for name, value in (("time_scale", time_scale), ("rate", rate)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be a positive number, not {value!r}")
    if time_scale is not None and rate is not None:
        raise InputError(f"time_scale {time_scale:g} and rate {rate:g} exclude each other; give one")


# -- from the file to columns
# ------------------------------------------------------------------------------------------------------


def _columns(path: Path, drop_bad: bool, sort: bool) -> dict[str, NDArray[Any]]:
    """The checked columns, by field; arrivals in seconds, perhaps unsorted if `sort`; nan for none."""
    compressed = _is_gzip(path)
    with _opened(path, compressed) as text:
        head = [line for line in (text.readline() for _ in range(64)) if line.strip()][:2]
    if not head:
        raise InputError(f"{path}: the file is empty; a trace has a header and then a row for each request")
    is_json = head[0].lstrip().startswith("{")
    layout = _json_layout(path, head[0]) if is_json else _csv_layout(path, head)
    columns = None if is_json else _fast(path, layout, compressed, sort)
    if columns is None:  # something is wrong, or unusual: row by row
        with _opened(path, compressed) as text:
            rows = _json_rows(path, text, layout) if is_json else _csv_rows(path, text, layout)
            columns = _slow(path, rows, layout, drop_bad, sort)
    if len(columns["arrival_s"]) == 0:
        raise InputError(f"{path}: no usable rows below the header; a trace has a row for each request")
    if layout.has_failures:
        kept = columns["output_tokens"] > 0
        if not kept.all():
            columns = {name: column[kept] for name, column in columns.items()}
            _warn(
                f"{path}: left out {np.count_nonzero(~kept)} of {len(kept)} rows "
                "without response tokens (failed calls)"
            )
        if not kept.any():
            raise InputError(f"{path}: no row has response tokens")
    if layout.names["arrival_s"] != "arrival_s":
        arrival = columns["arrival_s"]
        columns["arrival_s"] = (arrival - arrival.min()) * layout.time_unit
    return columns


def _warn(message: str) -> None:
    warnings.warn(message, TraceWarning, stacklevel=5)


def _is_gzip(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
    except FileNotFoundError:
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        raise InputError(
            f"{path}: there is no such file" + (f"; did you mean {near[0]!r}?" if near else "")
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a trace file") from None
    if path.suffix == ".gz" and not compressed:
        raise InputError(f"{path}: is not a gzip file, though its name ends in .gz; compress it or rename it")
    return compressed


def _opened(path: Path, compressed: bool) -> TextIO:
    if compressed:
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return open(path, encoding="utf-8-sig", newline="")


def _csv_layout(path: Path, head: list[str]) -> _Layout:
    delimiter = max(",;\t", key=head[0].count)
    try:
        header, *rest = [[cell.strip() for cell in row] for row in csv.reader(head, delimiter=delimiter)]
    except csv.Error as error:  # before Python 3.11 also for a NUL
        raise InputError(f"{path}: line 1 is not CSV: {error}; is it a trace?") from None
    names = _names(path, header)
    position = {field: header.index(name) for field, name in names.items()}
    first = rest[0][position["arrival_s"]] if rest and len(rest[0]) > position["arrival_s"] else ""
    return _Layout(names, position, len(header), delimiter, dates=":" in first)


def _json_layout(path: Path, line: str) -> _Layout:
    try:
        names = _names(path, list(json.loads(line)))
    except (json.JSONDecodeError, RecursionError) as error:
        what = getattr(error, "msg", error)
        raise InputError(
            f"{path}: line 1 is not JSON: {what}; JSON lines have an object on each line"
        ) from None
    position = {field: i for i, field in enumerate(names)}
    milliseconds = names["prompt_tokens"] == "input_length"
    return _Layout(names, position, len(names), time_unit=1e-3 if milliseconds else 1.0)


def _names(path: Path, header: list[str]) -> dict[str, str]:
    """Field -> the name in the header, whatever its case."""
    lower: dict[str, str] = {}
    for column in header:
        if column and column.lower() in lower:
            raise InputError(f"{path}: line 1 names column {column!r} twice; rename one, or leave it out")
        lower[column.lower()] = column
    found = {}
    for field, known in _REQUIRED.items():
        name = next((lower[k] for k in known if k in lower), None)
        if name is None:
            near = [n for k in known for n in difflib.get_close_matches(k, lower, n=1, cutoff=0.6)]
            hint = f"; is it {lower[near[0]]!r}? rename that" if near else ""
            raise InputError(
                f"{path}: no column {field}{hint}; the header has {', '.join(header) or 'nothing'}"
            )
        found[field] = name
    return found | {field: lower[field] for field in _OPTIONAL if field in lower}


# -- all rows at once, by pandas
# ------------------------------------------------------------------------------------------------------


def _fast(path: Path, layout: _Layout, compressed: bool, sort: bool) -> dict[str, NDArray[Any]] | None:
    """The columns if the file is as it should be, or None."""
    import pandas as pd

    dtypes: dict[
        int, Any
    ] = {}  # other columns are read, too: only so does pandas notice rows with more fields
    for field, i in layout.position.items():
        if field in _COUNTS or field == "priority":
            dtypes[i] = np.int64
        elif field == "request_id" or (field == "arrival_s" and layout.dates):
            dtypes[i] = str
        elif field not in _LABELS:
            dtypes[i] = np.float64
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frame = pd.read_csv(
                path,
                engine="c",
                sep=layout.delimiter,
                header=0,
                names=list(range(layout.width)),
                index_col=False,
                dtype=dtypes,
                keep_default_na=False,
                na_values=[""],
                compression="gzip" if compressed else None,
                encoding="utf-8-sig",
            )
            columns = {field: frame[i].to_numpy() for field, i in layout.position.items()}
            if layout.dates:
                when = pd.to_datetime(frame[layout.position["arrival_s"]], format="ISO8601", utc=True)
                columns["arrival_s"] = (when - when.iloc[0]).dt.total_seconds().to_numpy()
    except (ValueError, OverflowError, IndexError, Warning):  # pandas' parser errors are ValueErrors
        return None
    if _holds_nul(path, compressed):  # pandas ends a cell there
        return None
    arrival, prompt, output = (columns[field] for field in _REQUIRED)
    least = 0 if layout.has_failures else 1
    good = bool(np.isfinite(arrival).all())
    good = good and (layout.dates or bool((arrival >= 0).all()))
    good = good and (sort or bool((arrival[1:] >= arrival[:-1]).all()))
    for tokens in (prompt, output):
        good = good and bool(((tokens >= least) & (tokens <= _LARGEST)).all())
    if layout.has_failures:
        good = good and bool(((prompt >= 1) | (output == 0)).all())
    if "declared_tokens" in columns:
        declared = columns["declared_tokens"]
        good = good and bool(((declared >= output) & (declared <= _LARGEST)).all())
    if "priority" in columns:
        good = good and bool((np.abs(columns["priority"]) <= _LARGEST).all())
    for field in _MAY_MISS:
        if field in columns:
            good = good and not bool((columns[field] <= 0).any())
    for field in _LABELS:
        if field in columns and good:
            labels = columns[field]
            good = not bool(frame[layout.position[field]].isna().any())
            if good and not (
                labels.dtype.kind == "i" and labels.min(initial=0) >= 0 and labels.max(initial=0) <= _LARGEST
            ):
                columns[field] = pd.factorize(labels.astype(str))[0]
    return columns if good else None


def _holds_nul(path: Path, compressed: bool) -> bool:
    with gzip.open(path) if compressed else open(path, "rb") as file:
        return any(b"\0" in block for block in iter(lambda: file.read(1 << 20), b""))


# -- row by row
# ------------------------------------------------------------------------------------------------------


class _Bad(Exception):
    """A row that cannot be used: the field, what is wrong with it, and how to mend it."""

    def __init__(self, field: str, problem: str, remedy: str = "mend it") -> None:
        super().__init__(field, problem, remedy)

    def where(self, line: int, layout: _Layout) -> str:
        """The line, the column, the problem and the remedy, in words."""
        field, problem, remedy = self.args
        return f"line {line}{f', column {layout.names[field]!r}:' if field else ''} {problem}; {remedy}"


def _csv_rows(path: Path, text: TextIO, layout: _Layout) -> Iterator[tuple[int, list[str] | _Bad]]:
    """Line number and the cells of each row below the header, in the order of `layout.position`."""
    reader = csv.reader(text, delimiter=layout.delimiter)
    header = True
    try:
        for row in reader:
            if not any(cell.strip() for cell in row) and len(row) <= 1:
                continue
            if header:
                header = False
            elif len(row) != layout.width:
                yield reader.line_num, _Bad("", f"has {len(row)} fields, and the header has {layout.width}")
            else:
                yield reader.line_num, [row[i].strip() for i in layout.position.values()]
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not CSV: {error}") from None


def _json_rows(path: Path, text: TextIO, layout: _Layout) -> Iterator[tuple[int, list[str] | _Bad]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
            if not isinstance(row, dict):
                raise ValueError
            cells = [row.get(name) for name in layout.names.values()]
            yield number, ["" if cell is None else str(cell) for cell in cells]
        except (ValueError, RecursionError):
            yield number, _Bad("", "is not a JSON object")
        except _Bad as bad:
            yield number, bad


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each name once."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Bad("", f"names {name!r} twice")
        found[name] = value
    return found


def _slow(
    path: Path, rows: Iterator[tuple[int, list[str] | _Bad]], layout: _Layout, drop_bad: bool, sort: bool
) -> dict[str, NDArray[Any]]:
    """The columns from the rows that can be used; the first one that cannot is an error unless `drop_bad`."""
    kept: list[list[Any]] = []
    dropped, first = 0, ""
    for line, cells in rows:
        try:
            if isinstance(cells, _Bad):
                raise cells
            row = _row(dict(zip(layout.position, cells, strict=True)), layout)
            if kept and not sort and row[0] < kept[-1][0]:
                problem = f"{cells[0]} is before the row above"
                raise _Bad("arrival_s", problem, "sort the file, read it with sort=True (--sort)")
            kept.append(row)
        except _Bad as bad:
            dropped += 1
            first = first or bad.where(line, layout)
            if not drop_bad:
                raise InputError(
                    f"{path}: {first}, or drop such rows with drop_bad=True (--drop-bad)"
                ) from None
    if dropped and not kept:
        raise InputError(f"{path}: none of its {dropped} rows can be used; the first: {first}")
    if dropped:
        _warn(f"{path}: left out {dropped} of {dropped + len(kept)} rows that cannot be used")
    columns = {field: np.array([row[i] for row in kept]) for i, field in enumerate(layout.position)}
    if layout.dates and kept:
        columns["arrival_s"] = (columns["arrival_s"] - columns["arrival_s"][0]) / 1e9
    for field in _LABELS:
        if field in columns:
            columns[field] = _numbered(columns[field])
    return columns


def _row(cells: dict[str, str], layout: _Layout) -> list[Any]:
    """The values of a row, checked, in the order of its cells."""
    values: dict[str, Any] = {}
    for field, cell in cells.items():
        if "\0" in cell:
            raise _Bad(field, f"{cell!r} holds a NUL character")
        if field in _LABELS or field == "request_id":
            values[field] = cell
            if not cell and field in _LABELS:
                raise _Bad(field, "is empty", "name the client or class, leave the column out")
        elif field == "arrival_s" and layout.dates:
            values[field] = _nanoseconds(cell)
        else:
            values[field] = _number(field, cell)
    failed = layout.has_failures and values["output_tokens"] == 0
    for field in _COUNTS:
        if field in values and not failed and not 1 <= values[field] <= _LARGEST:
            raise _Bad(field, f"{cells[field]} is not a count from 1 to {_LARGEST}")
    if values.get("declared_tokens", _LARGEST) < values["output_tokens"]:
        raise _Bad(
            "declared_tokens",
            f"{cells['declared_tokens']} is below the output of {cells['output_tokens']} tokens",
        )
    return list(values.values())


def _number(field: str, cell: str) -> float | int:
    if not cell and field in _MAY_MISS:
        return math.nan
    if not cell:
        raise _Bad(field, "is empty", "fill it in")
    try:
        value = float(cell)
    except ValueError:
        raise _Bad(field, f"{cell!r} is not a number") from None
    if field in _COUNTS or field == "priority":
        if not math.isfinite(value) or value != int(value) or abs(value) > 2**62:
            raise _Bad(field, f"{cell} is not a whole number")
        return int(value)
    if field in _MAY_MISS:
        if value <= 0:
            raise _Bad(field, f"{cell} is not positive", "leave it empty for none")
    elif not math.isfinite(value) or value < 0:
        raise _Bad(field, f"{cell} is not a time from 0")
    return value


def _nanoseconds(cell: str) -> int:
    """A date as nanoseconds since 1970; without a time zone, or in UTC."""
    try:
        when = np.datetime64(cell.removesuffix("Z").removesuffix("+00:00"), "ns")
    except ValueError:
        raise _Bad("arrival_s", f"{cell!r} is not a date like 2023-11-16 18:15:46.68") from None
    if np.isnat(when):
        raise _Bad("arrival_s", "is empty", "fill it in")
    return int(when.astype(np.int64))


def _numbered(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Whole numbers from 0 as they are; else numbers in the order in which names first appear."""
    if all(label.isdecimal() and int(label) <= _LARGEST for label in labels):
        return labels.astype(np.int64)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
