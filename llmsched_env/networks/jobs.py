"""Jobs: what arrives at a network, hop by hop, as arrays; all random choices are made."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsched_env.core.requests import Requests
from llmsched_env.errors import InputError


@dataclasses.dataclass(frozen=True)
class Jobs:
    """J jobs in order of arrival, with N hops and E edges between hops of the same job.

    The hops of a job lie together, and each has a greater number than those it waits for.

    Attributes:
        arrival_s: (J,) float64, seconds, finite, >= 0, non-decreasing.
        workflow: (J,) int32, >= 0: the workflow that the job is a run of.
        first_hop: (J + 1,) int64: job j has the hops first_hop[j] to first_hop[j + 1] - 1, at least one.
        node: (N,) int32: the class of each hop, a number of a node of the network.
        prompt_tokens, output_tokens: (N,) int32, >= 1.
        delay_s: (N,) float64, >= 0: from when the last of the hops before it ends (from the job's arrival, if
            there is none) until it is released, such as the time that a tool takes.
        before, after: (E,) int32: hop after[i] waits for hop before[i].
    """

    arrival_s: NDArray[np.float64]
    workflow: NDArray[np.int32]
    first_hop: NDArray[np.int64]
    node: NDArray[np.int32]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    delay_s: NDArray[np.float64]
    before: NDArray[np.int32]
    after: NDArray[np.int32]

    @staticmethod
    def of(
        arrival_s: ArrayLike,
        hops: ArrayLike,
        node: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        *,
        before: ArrayLike = (),
        after: ArrayLike = (),
        delay_s: ArrayLike = 0.0,
        workflow: ArrayLike = 0,
    ) -> Jobs:
        """Jobs from array-likes; scalars are repeated. `hops`: (J,) how many hops each job has.

        Raises:
            InputError: names the first bad job or hop and what is wrong with it.
        """
        arrival = np.atleast_1d(np.asarray(arrival_s, dtype=np.float64))
        counts = np.broadcast_to(np.asarray(hops, dtype=np.int64), arrival.shape)
        n = int(counts.sum())

        def column(values: ArrayLike, dtype: Any, length: int = n) -> Any:
            return np.ascontiguousarray(np.broadcast_to(np.asarray(values, dtype=dtype), (length,)))

        return Jobs(
            arrival,
            column(workflow, np.int32, len(arrival)),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            column(node, np.int32),
            column(prompt_tokens, np.int32),
            column(output_tokens, np.int32),
            column(delay_s, np.float64),
            np.ascontiguousarray(before, np.int32),
            np.ascontiguousarray(after, np.int32),
        )

    @staticmethod
    def from_requests(requests: Requests) -> Jobs:
        """A job of one hop, of class 0, for each request."""
        return Jobs.of(
            requests.arrival_s, 1, 0, requests.prompt_tokens, requests.output_tokens, workflow=requests.client
        )

    def take(self, index: ArrayLike) -> Jobs:
        """The jobs at `index`, in this order, which must be one of arrival."""
        index = np.asarray(index, dtype=np.int64)
        counts = np.diff(self.first_hop)[index]
        starts = np.cumsum(counts) - counts
        hops = np.repeat(self.first_hop[index] - starts, counts) + np.arange(int(counts.sum()))
        number = np.full(self.num_hops, -1, np.int64)
        number[hops] = np.arange(len(hops))
        before, after = number[self.before], number[self.after]
        kept = before >= 0
        return Jobs.of(
            self.arrival_s[index],
            counts,
            self.node[hops],
            self.prompt_tokens[hops],
            self.output_tokens[hops],
            before=before[kept],
            after=after[kept],
            delay_s=self.delay_s[hops],
            workflow=self.workflow[index],
        )

    def arriving(self, arrival_s: ArrayLike) -> Jobs:
        """The same jobs, arriving at these times, seconds: (J,) in order, or one for all."""
        times = np.broadcast_to(np.asarray(arrival_s, dtype=np.float64), self.arrival_s.shape)
        return dataclasses.replace(self, arrival_s=np.ascontiguousarray(times))

    @staticmethod
    def merged(*parts: Jobs) -> Jobs:
        """The jobs of all parts, in order of arrival; of two at once, that of the first part first."""
        offsets = np.cumsum([0, *(part.num_hops for part in parts)])
        arrival = np.concatenate([part.arrival_s for part in parts])
        order = np.argsort(arrival, kind="stable")
        together = Jobs.of(
            np.zeros(len(arrival)),
            np.concatenate([np.diff(part.first_hop) for part in parts]),
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("node", "prompt_tokens", "output_tokens")
            ),
            before=np.concatenate([p.before + n for p, n in zip(parts, offsets, strict=False)]),
            after=np.concatenate([p.after + n for p, n in zip(parts, offsets, strict=False)]),
            delay_s=np.concatenate([part.delay_s for part in parts]),
            workflow=np.concatenate([part.workflow for part in parts]),
        )
        return together.take(order).arriving(arrival[order])

    def __post_init__(self) -> None:
        jobs, hops = len(self.arrival_s), self.num_hops
        if jobs == 0:
            raise InputError("no jobs: nothing arrives; give at least one job, or a longer horizon")
        self._require(np.isfinite(self.arrival_s) & (self.arrival_s >= 0), "job", "arrival_s must be >= 0")
        order = np.diff(self.arrival_s, prepend=self.arrival_s[:1]) >= 0
        self._require(order, "job", "arrives before the one above; sort by arrival")
        self._require(np.diff(self.first_hop) >= 1, "job", "has no hop; give it at least one")
        for name in ("prompt_tokens", "output_tokens"):
            values = getattr(self, name)
            self._require((values >= 1) & (values <= 2**30), "hop", f"{name} must be from 1 to {2**30}")
        self._require((self.delay_s >= 0) & np.isfinite(self.delay_s), "hop", "delay_s must be >= 0")
        self._require(self.node >= 0, "hop", "node must not be negative")
        if len(self.before) != len(self.after):
            raise InputError(f"{len(self.before)} hops before and {len(self.after)} after; give pairs")
        inside = (self.before >= 0) & (self.before < self.after) & (self.after < hops)
        self._require(inside, "edge", "must go from a hop to a later one; number hops in order")
        job = self.job_of_hop
        self._require(job[self.before] == job[self.after], "edge", "joins hops of two jobs")

    def _require(self, good: NDArray[np.bool_], what: str, problem: str) -> None:
        if not good.all():
            raise InputError(f"{what} {int(np.argmin(good))}: {problem}")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def num_hops(self) -> int:
        """N."""
        return len(self.node)

    @property
    def job_of_hop(self) -> NDArray[np.int64]:
        """(N,) int64: the job of each hop."""
        return np.repeat(np.arange(len(self)), np.diff(self.first_hop))
