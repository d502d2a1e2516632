"""Schedules: who got how many tokens in which iteration; one type for schedulers, optimum and agents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.run import EVICTED, SWAPPED_OUT
from llmsched_env.errors import InputError
from llmsched_env.files import writing

_FORMAT = "llmsched-schedule-1"


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The decisions of one iteration: requests that get tokens, in batch order, and those preempted before,
    in order.
    """

    start_s: float
    granted: list[tuple[int, int]]
    preempted: list[int]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All decisions of a run of J iterations with E entries.

    Attributes:
        start_s: (J,) float64, seconds: when each iteration starts.
        ends: (J,) int64: iteration j's entries are `ends[j-1]:ends[j]`.
        requests: (E,) int32: indices of requests.
        tokens: (E,) int32: tokens given; EVICTED (-1) or SWAPPED_OUT (-2) for a preempted request, SWAPPED_IN
            (-3) for one that comes back from the CPU tier without getting any. Preempted ones come first.
    """

    start_s: NDArray[np.float64]
    ends: NDArray[np.int64]
    requests: NDArray[np.int32]
    tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, j: int) -> Decisions:
        """The decisions of iteration j."""
        if not -len(self) <= j < len(self):
            raise IndexError(f"iteration {j} of a schedule of {len(self)}")
        j %= len(self)
        begin = self.ends[j - 1] if j > 0 else 0
        requests = self.requests[begin : self.ends[j]].tolist()
        tokens = self.tokens[begin : self.ends[j]].tolist()
        return Decisions(
            start_s=float(self.start_s[j]),
            granted=[(r, t) for r, t in zip(requests, tokens, strict=True) if t > 0],
            preempted=[r for r, t in zip(requests, tokens, strict=True) if t in (EVICTED, SWAPPED_OUT)],
        )

    def __iter__(self) -> Iterator[Decisions]:
        return (self[j] for j in range(len(self)))

    def save(self, path: str | Path) -> None:
        """Write a compressed npz file, whole or not at all.

        Raises:
            InputError: if the file cannot be written.
        """
        with writing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                format=np.array(_FORMAT),
                start_s=self.start_s,
                ends=self.ends,
                requests=self.requests,
                tokens=self.tokens,
            )

    @staticmethod
    def load(path: str | Path) -> Schedule:
        """Read what `save` wrote.

        Raises:
            InputError: if the file is missing or is not a schedule.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                if str(data["format"]) != _FORMAT:
                    raise InputError(
                        f"{path}: format {data['format']}, not {_FORMAT}; write it again with this version"
                    )
                schedule = Schedule(data["start_s"], data["ends"], data["requests"], data["tokens"])
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: not a schedule file ({error}); give one that Schedule.save wrote"
            ) from None
        schedule.check(path)
        return schedule

    def check(self, path: str | Path) -> None:
        """Raise an `InputError` that names the file `path` if the arrays do not fit together."""
        whole = (
            all(array.ndim == 1 for array in (self.start_s, self.ends, self.requests, self.tokens))
            and self.start_s.dtype == np.float64
            and self.ends.dtype == np.int64
            and self.requests.dtype == self.tokens.dtype == np.int32
            and self.start_s.shape == self.ends.shape
            and self.requests.shape == self.tokens.shape
            and (np.diff(self.ends, prepend=0) >= 0).all()
            and (len(self.ends) == 0 or self.ends[-1] == len(self.requests))
            and np.isfinite(self.start_s).all()
        )
        if not whole:
            raise InputError(
                f"{path}: the schedule's arrays do not fit together; the file is damaged, write it again"
            )
