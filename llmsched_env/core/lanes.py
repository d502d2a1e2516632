"""Lanes: the packed arrays of one or many engines, made from requests, settings and costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.config import EngineConfig
from llmsched_env.core.histogram import BINS
from llmsched_env.core.requests import Requests
from llmsched_env.core.state import REQUEST, Engine, Lanes, Status, aligned_zeros


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
        lists=np.zeros(5 * first[-1], np.int32),
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
    work: Any
    cost: Any
    itl: Any
    compiled: Engine


def engine_view(lanes: Lanes, lane: int) -> EngineView:
    """The view of one lane for plain Python; see `engine_at` for compiled code."""
    lo, hi = lanes.first[lane], lanes.first[lane + 1]
    lists = lanes.lists[5 * lo : 5 * hi].reshape(5, hi - lo)
    rest: tuple[Any, ...] = (
        *lists,
        lanes.work[lanes.first_work[lane] : lanes.first_work[lane + 1]],
        lanes.cost[lanes.first_cost[lane] : lanes.first_cost[lane + 1]],
        lanes.itl[lanes.first_itl[lane] : lanes.first_itl[lane + 1]],
    )
    compiled = Engine(lanes.s[lane], lanes.req[lo:hi], *rest)
    view = (lanes.s.view(np.recarray)[lane], lanes.req[lo:hi].view(np.recarray), *rest, compiled)
    return EngineView(*view)


def _offsets(sizes: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _fill_requests(req: NDArray[Any], spec: LaneSpec) -> None:
    requests = spec.requests
    req["status"] = np.where(spec.dropped, int(Status.DROPPED), int(Status.FUTURE))
    req["prompt"] = requests.prompt_tokens
    req["stop"] = spec.stop_tokens
    req["limit"] = spec.limit_tokens
    req["rank"] = np.arange(len(requests))
    req["arrival"] = requests.arrival_s
    req["predicted"] = requests.predicted_tokens
    req["ttft_target"] = requests.ttft_target_s
    req["tpot_target"] = requests.tpot_target_s
    req["declared"] = requests.declared_tokens
    req["priority"] = requests.priority
    req["client"] = requests.client
    req["class_id"] = requests.class_id
    for name in ("last_token", "first_token", "first_scheduled", "finish"):
        req[name] = np.nan
    for name in ("up", "left", "right", "evicted_at"):
        req[name] = -1


def _fill_engine(s: Any, spec: LaneSpec) -> None:
    config = spec.config
    assert config.kv_blocks is not None and config.watermark is not None
    spec.pack(s)
    s["kv_blocks"] = s["free"] = config.kv_blocks
    s["block_size"] = config.block_size
    s["token_budget"] = config.token_budget
    s["max_num_seqs"] = config.max_num_seqs
    s["max_model_len"] = config.max_model_len
    s["watermark_blocks"] = int(config.watermark * config.kv_blocks)
    s["swap"] = config.preemption == "swap"
    s["cpu_blocks"] = s["cpu_free"] = 2**31 - 1 if config.cpu_blocks is None else config.cpu_blocks
    s["swap_s_per_token"] = spec.kv_bytes_per_token / config.swap_bandwidth
    s["swap_overlap"] = config.swap_overlap
    s["asynchronous"] = bool(config.async_scheduling)
    s["random"] = spec.seed & (2**64 - 1)
    s["root"] = -1
    s["num_dropped"] = int(spec.dropped.sum())
    s["last_prefill"] = -1
    s["patient"] = spec.patient
