"""Lanes: the packed arrays of one or many engines, made from requests, settings and costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.histogram import BINS
from llmsched_env.core.requests import Requests
from llmsched_env.core.state import REQUEST, Engine, Lanes, Status, aligned_zeros

_FUTURE, _DROPPED = int(Status.FUTURE), int(Status.DROPPED)


@dataclasses.dataclass(frozen=True)
class LaneSpec:
    """What one engine starts from.

    Attributes:
        requests: what arrives.
        config: resolved engine settings: none of them None, except `cpu_blocks`.
        pack: writes the scheduler's settings into the engine's record.
        cost: packed cost model.
        kv_bytes_per_token: of all GPUs together, for swaps; 0 makes them free.
        stop_tokens, limit_tokens: (N,) int32: length of each answer, and the length at which the engine would
            stop it.
        dropped: (N,) bool: requests that are never admitted.
        seed: of the engine's own generator, 64 bits.
        workspace: float64 numbers that the scheduler needs.
        histogram: whether inter-token latencies are counted.
        patient: whether requests that can never be scheduled may wait for ever.
    """

    requests: Requests
    config: EngineConfig
    pack: Callable[[Any], None]
    cost: NDArray[np.float64]
    kv_bytes_per_token: float
    stop_tokens: NDArray[np.int32]
    limit_tokens: NDArray[np.int32]
    dropped: NDArray[np.bool_]
    seed: int = 0
    workspace: int = 0
    histogram: bool = True
    patient: bool = False


def make_lanes(specs: Sequence[LaneSpec], engine_dtype: np.dtype[Any]) -> Lanes:
    """Engines at time 0 with all their requests still to arrive."""
    first = _offsets([len(spec.requests) for spec in specs])
    first_work = _offsets([spec.workspace for spec in specs])
    first_cost = _offsets([len(spec.cost) for spec in specs])
    first_itl = _offsets([BINS if spec.histogram else 0 for spec in specs])
    lanes = Lanes(
        s=np.zeros(len(specs), engine_dtype),
        req=aligned_zeros(int(first[-1]), REQUEST),
        lists=np.zeros(6 * first[-1], np.int32),
        work=np.zeros(first_work[-1]),
        cost=np.concatenate([spec.cost for spec in specs]),
        itl=np.zeros(first_itl[-1], np.int64),
        first=first,
        first_work=first_work,
        first_cost=first_cost,
        first_itl=first_itl,
    )
    for i, spec in enumerate(specs):
        _fill_requests(lanes.req[first[i] : first[i + 1]], spec)
        _fill_engine(lanes.s[i], spec)
    return lanes


class EngineView(NamedTuple):
    """An `Engine` for plain Python: the same fields, whose records have attributes, and the arrays that
    compiled functions take.
    """

    s: Any
    req: Any
    running: Any
    plan: Any
    victims: Any
    swapped: Any
    pending: Any
    due: Any
    work: Any
    cost: Any
    itl: Any
    bits: Any
    compiled: Engine


def engine_view(lanes: Lanes, lane: int) -> EngineView:
    """The view of one lane for plain Python; see `engine_at` for compiled code."""
    lo, hi = lanes.first[lane], lanes.first[lane + 1]
    lists = lanes.lists[6 * lo : 6 * hi].reshape(6, hi - lo)
    rest: tuple[Any, ...] = (
        *lists,
        lanes.work[lanes.first_work[lane] : lanes.first_work[lane + 1]],
        lanes.cost[lanes.first_cost[lane] : lanes.first_cost[lane + 1]],
        lanes.itl[lanes.first_itl[lane] : lanes.first_itl[lane + 1]],
        lanes.itl[:0],
    )
    compiled = Engine(lanes.s[lane], lanes.req[lo:hi], *rest)
    view = (lanes.s.view(np.recarray)[lane], lanes.req[lo:hi].view(np.recarray), *rest, compiled)
    return EngineView(*view)


def _offsets(sizes: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _fill_requests(req: NDArray[Any], spec: LaneSpec) -> None:
    r = spec.requests
    numbers = (r.prompt_tokens, spec.stop_tokens, spec.limit_tokens, r.priority, r.client, r.class_id)
    measures = (r.arrival_s, r.predicted_tokens, r.ttft_target_s, r.tpot_target_s)
    write_requests(
        req,
        np.ascontiguousarray(spec.dropped),
        *(np.ascontiguousarray(column, np.int32) for column in numbers),
        *(np.ascontiguousarray(column, np.float64) for column in measures),
    )


@njit
def write_requests(  # type: ignore[no-untyped-def]
    req, dropped, prompt, stop, limit, priority, client, class_id, arrival, predicted, ttft, tpot
) -> None:
    """All fields of zeroed records that do not begin as 0; in one pass over the memory."""
    for r in range(len(req)):
        q = req[r]
        q.status = _DROPPED if dropped[r] else _FUTURE
        q.prompt, q.stop, q.limit = prompt[r], stop[r], limit[r]
        q.rank = r
        q.arrival = arrival[r]
        q.predicted = predicted[r]
        q.ttft_target, q.tpot_target = ttft[r], tpot[r]
        q.priority, q.client, q.class_id = priority[r], client[r], class_id[r]
        q.last_token = q.first_token = q.first_scheduled = q.finish = np.nan
        q.up = q.left = q.right = -1
        q.evicted_at = -1


class Served(NamedTuple):
    """What became of N requests: arrays of shape (N,); seconds, nan where it did not come to that."""

    first_scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    last_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    generated_tokens: NDArray[np.int64]
    preemptions: NDArray[np.int32]
    recomputed_tokens: NDArray[np.int64]


def served(req: NDArray[Any]) -> Served:
    """What the records of requests say of how they were served."""
    n = len(req)
    result = Served(
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n, np.int64),
        np.empty(n, np.int32),
        np.empty(n, np.int64),
    )
    _read_requests(req, result)
    return result


@njit
def _read_requests(req, to: Served) -> None:  # type: ignore[no-untyped-def]
    """In one pass over the memory."""
    for r in range(len(req)):
        q = req[r]
        to.first_scheduled_s[r] = q.first_scheduled
        to.first_token_s[r] = q.first_token
        to.last_token_s[r] = q.last_token
        to.finish_s[r] = q.finish
        to.generated_tokens[r] = q.generated
        to.preemptions[r] = q.preemptions
        to.recomputed_tokens[r] = q.recomputed


def _fill_engine(s: Any, spec: LaneSpec) -> None:
    spec.pack(s)
    fill_engine(s, spec.config, spec.kv_bytes_per_token, spec.seed)
    s["num_dropped"] = int(spec.dropped.sum())
    s["patient"] = spec.patient


def fill_engine(s: Any, config: EngineConfig, kv_bytes_per_token: float, seed: int) -> None:
    """Write resolved settings into the zeroed record of an engine at time 0."""
    assert config.kv_blocks is not None and config.watermark is not None
    s["kv_blocks"] = s["free"] = config.kv_blocks
    s["block_size"] = config.block_size
    s["token_budget"] = config.token_budget
    s["max_num_seqs"] = config.max_num_seqs
    s["max_model_len"] = config.max_model_len
    s["watermark_blocks"] = int(config.watermark * config.kv_blocks)
    s["swap"] = config.preemption == "swap"
    s["cpu_blocks"] = s["cpu_free"] = 2**31 - 1 if config.cpu_blocks is None else config.cpu_blocks
    s["swap_s_per_token"] = kv_bytes_per_token / config.swap_bandwidth
    s["swap_overlap"] = config.swap_overlap
    s["asynchronous"] = bool(config.async_scheduling)
    s["random"] = seed & (2**64 - 1)
    s["root"] = -1
    s["last_prefill"] = -1
