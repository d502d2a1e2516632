"""The state of one or many engines, as a few packed arrays that compiled code advances in place.

A *lane* is one engine with its requests. Lanes lie one behind the other in shared arrays, so that a batch of
them is advanced by one compiled call; `engine_at` gives the view of one lane that every compiled function,
scheduler and policy works on.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.span import span


class Status(enum.IntEnum):
    """Where a request is. `RUNNING` holds KV blocks and a place in the running list."""

    FUTURE = 0  # has not arrived
    WAITING = 1  # in the queue, holds nothing
    RUNNING = 2
    SWAPPED = 3  # its KV blocks are in the CPU tier
    EVICTED = 4  # preempted in this iteration, enters the queue when the iteration is planned
    FINISHED = 5
    DROPPED = 6  # never admitted: too large for the engine


class Hold(enum.IntEnum):
    """For how many tokens of KV cache an admission tests, or holds, room."""

    CHUNK = 0  # the tokens of this iteration only
    KNOWN = 1  # all known tokens: the prompt and, after a preemption, the answer so far
    PEAK = 2  # prompt + true output - 1: never preempted, needs an oracle
    PREDICTED = 3  # prompt + predicted output - 1
    DECLARED = 4  # prompt + declared maximum - 1
    MODEL_LEN = 5  # the longest sequence of the model


class Level(enum.IntEnum):
    """What a request did in the iteration being planned, as vLLM v0 orders its lists."""

    LEFT_OVER = 0
    SWAPPED_IN = 1
    DECODED = 2
    PREFILLED = 3
    NEW = 4


class Listing(enum.IntEnum):
    """The order in which a plan is reported."""

    PLANNED = 0
    PREFILLS_FIRST = 1
    NEW_FIRST = (
        2  # admitted, other prefills, decodes, and those swapped in after their like (vLLM v0, chunked)
    )


class Error(enum.IntEnum):
    """The rule of the engine that a plan broke."""

    NONE = 0
    UNKNOWN_REQUEST = 1
    NOT_SCHEDULABLE = 2
    TWICE = 3
    TOKENS = 4
    BUDGET = 5
    KV = 6
    SEQS = 7
    NOT_RESIDENT = 8
    STUCK = 9
    LIVELOCK = 10
    NOT_PLANNED = 11


# One request, a cache line of 64 bytes after the other (see `aligned_zeros`): what each iteration touches,
# what happens to a request once or twice, and the rest.
_REQUEST = np.dtype(
    [
        ("status", "i4"),
        ("computed", "i4"),  # tokens whose KV is computed (or being computed, asynchronously)
        # the prefill is done when computed reaches it: prompt, plus the answer so far after a preemption
        ("target", "i4"),
        ("generated", "i4"),  # tokens of the answer that came out
        ("stop", "i4"),  # tokens of the answer when it ends
        ("prompt", "i4"),
        ("blocks", "i4"),  # KV blocks held
        ("granted", "i4"),  # tokens in the plan being built
        ("in_flight", "i4"),  # tokens sampled but not yet seen (asynchronous scheduling)
        ("hold", "i4"),  # tokens of KV reserved at admission
        ("last_token", "f8"),
        ("first_token", "f8"),
        ("first_scheduled", "f8"),
        # -- the queue: a treap over (key, order) --
        ("key", "f8"),
        ("order", "i8"),
        ("up", "i4"),
        ("left", "i4"),
        ("right", "i4"),
        ("need", "i4"),  # blocks that must be free to admit it
        ("least", "i4"),  # smallest need in the subtree
        # tokens of the answer at which the engine itself stops it (declared maximum, model length)
        ("limit", "i4"),
        ("arrival", "f8"),
        ("finish", "f8"),
        ("evicted_at", "i8"),  # iteration of the last preemption, -1: never
        # -- the rest --
        ("predicted", "f8"),
        ("ttft_target", "f8"),
        ("tpot_target", "f8"),
        ("rank", "i4"),  # place in the order of arrival; ties of any other order go by it
        ("priority", "i4"),
        ("client", "i4"),
        ("class_id", "i4"),
        ("recomputed", "i8"),  # tokens whose KV was dropped and had to be computed again
        ("preemptions", "i4"),
        ("swaps", "i4"),
        ("evicted_rest", "i4"),  # prefill tokens that were left at the last preemption
        ("cpu_blocks", "i4"),  # blocks held in the CPU tier
        # -- scratch of the schedulers --
        ("level", "i4"),
        ("count", "i4"),
        ("score", "f8"),
        ("before", "i4"),  # neighbours in a list that a scheduler keeps
        ("after", "i4"),
        ("chosen", "i4"),
        ("returned_at", "i8"),  # iteration in which it last came back from the CPU tier
    ],
    align=True,
)


def padded(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The record as an odd number of cache lines, so that the first lines of neighbours fall into different
    sets of the cache.
    """
    lines = -(-dtype.itemsize // 64) | 1
    fields: Any = dtype.fields
    names = list(dtype.names or ())
    return np.dtype(
        {
            "names": names,
            "formats": [fields[name][0] for name in names],
            "offsets": [fields[name][1] for name in names],
            "itemsize": 64 * lines,
        },
        align=True,
    )


REQUEST = padded(_REQUEST)


def aligned_zeros(n: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """n zeroed records that begin on a cache line."""
    raw = np.zeros(n * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n * dtype.itemsize].view(dtype)


CROSSINGS = 128  # the largest block size with which requests can cruise


# One engine: settings, the policy's settings, counters. Filled by `simulation`, advanced by `engine` and
# `run`.
_ENGINE: list[tuple[Any, ...]] = [
    # settings
    ("kv_blocks", "i8"),
    ("block_size", "i8"),
    ("token_budget", "i8"),
    ("max_num_seqs", "i8"),
    ("max_model_len", "i8"),
    ("watermark_blocks", "i8"),
    ("swap", "i8"),
    ("cpu_blocks", "i8"),
    ("swap_s_per_token", "f8"),
    ("swap_overlap", "i8"),
    ("asynchronous", "i8"),
    # state
    ("clock", "f8"),
    ("visible", "f8"),  # arrivals up to here are seen by the scheduler
    ("arrived", "i8"),  # requests [0, arrived) have entered
    ("free", "i8"),
    ("cpu_free", "i8"),
    ("num_running", "i8"),
    ("num_waiting", "i8"),
    ("num_swapped", "i8"),
    ("num_finished", "i8"),
    ("num_dropped", "i8"),
    ("kv_tokens", "i8"),  # computed tokens of all resident requests
    ("root", "i8"),  # of the waiting queue, -1: empty
    ("head", "i8"),  # the first and the last of the waiting queue, unless that is empty
    ("tail", "i8"),
    ("by_arrival", "i8"),  # whether the queue is a set of bits, in order of arrival
    ("queue_front", "i8"),
    ("queue_back", "i8"),
    ("random", "u8"),  # state of the engine's own generator
    # the plan being built
    ("num_planned", "i8"),
    ("num_victims", "i8"),
    ("num_swapped_in", "i8"),
    ("num_pending", "i8"),
    ("budget", "i8"),  # tokens left
    ("prefill_tokens", "i8"),
    ("prefill_requests", "i8"),
    ("prefill_context", "f8"),
    ("prefill_cached", "i8"),
    ("decodes", "i8"),
    ("decode_context", "i8"),
    ("swapped_tokens", "i8"),
    # requests that decode in lock-step, see `cruise`
    ("may_cruise", "i8"),
    ("cruising", "i8"),
    ("cruised", "i8"),  # those that get a token in the plan being built
    ("steps", "i8"),
    ("next_due", "i8"),
    ("cruised_at", "f8"),
    ("cruise_context", "i8"),
    ("crossers", "i8"),
    ("rest_until", "i8"),
    ("crossings", "i4", (CROSSINGS,)),
    # totals
    ("iterations", "i8"),
    ("preemptions", "i8"),
    ("busy", "f8"),
    ("total_prefill", "i8"),
    ("total_decode", "i8"),
    ("total_generated", "i8"),
    ("total_recomputed", "i8"),  # tokens whose KV was dropped, to be computed again
    ("total_wasted", "i8"),  # decode tokens computed after an answer had ended (asynchronous scheduling)
    ("batch_sum", "f8"),  # sum over iterations of requests in the batch
    ("kv_seconds", "f8"),  # integral of resident KV tokens over busy time
    ("last_progress", "i8"),  # iteration in which a token last came out
    ("logged_kv", "i8"),  # KV tokens resident at the end of the iteration that is being logged
    # finished requests by class of prompt length, floor(log2 prompt): how many, and their prompt and output
    # tokens
    ("class_count", "f8", (32,)),
    ("class_total", "f8", (32,)),
    ("patient", "i8"),  # whether requests that can never be scheduled may wait for ever
    # what went wrong
    ("error", "i8"),
    ("error_request", "i8"),
    ("error_value", "i8"),
    ("error_limit", "i8"),
]


def engine_dtype(policy: list[tuple[Any, ...]]) -> np.dtype[Any]:
    """The record of one engine whose scheduler has the settings `policy`, a list of numpy field
    descriptions.
    """
    fields = sorted(_ENGINE + policy, key=len)  # what is an array comes last, so that the rest lies together
    return padded(np.dtype(fields, align=True))


class Engine(NamedTuple):
    """One engine, as compiled code and schedulers see it: views, so that writing to them changes the engine.

    Compiled code gets spans (`span.Span`), plain Python gets arrays; both are indexed alike.

    Attributes:
        s: the engine's record (settings, counters, the plan's totals).
        req: (N,) records, one a request, in order of arrival.
        running: (N,) int32; the first `s.num_running` are the running requests, in order.
        plan: (N,) int32; the first `s.num_planned` get tokens in this iteration, `req[r].granted` each.
        victims: (N,) int32; the first `s.num_victims` were preempted in this iteration, in order.
        swapped: (N,) int32; the first `s.num_swapped` are in the CPU tier, oldest first.
        pending: (N,) int32; requests whose sampled token the scheduler has not seen yet (asynchronous
            scheduling).
        due: (N,) int32; of the first `s.cruising` running requests, when each is looked at (`cruise`).
        work: float64 workspace of the scheduler (tables, counters), its size as the scheduler asked.
        cost: float64 vector of the cost model.
        itl: (10240,) int64 histogram of inter-token latencies, or of length 0.
        bits: int64, one bit a request, where the queue is a set of bits (`queue`); or of length 0.
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


class Lanes(NamedTuple):
    """Engines one behind the other. Lane i owns requests `first[i]:first[i+1]`, and so on for the other
    offsets.
    """

    s: Any  # (L,) engine records
    req: Any  # all requests
    lists: Any  # int32, 6 for each request: running, plan, victims, swapped, pending, due
    work: Any
    cost: Any
    itl: Any
    first: Any  # (L + 1,) int64 offsets into req
    first_work: Any
    first_cost: Any
    first_itl: Any


@njit(inline="always")  # numba cannot return a record from a function
def engine_at(lanes: Lanes, lane: int) -> Engine:
    """The view of one lane."""
    lo, hi = lanes.first[lane], lanes.first[lane + 1]
    n = hi - lo
    at = 6 * lo
    lists = lanes.lists
    return Engine(
        lanes.s[lane],
        span(lanes.req[lo:hi]),
        span(lists[at : at + n]),
        span(lists[at + n : at + 2 * n]),
        span(lists[at + 2 * n : at + 3 * n]),
        span(lists[at + 3 * n : at + 4 * n]),
        span(lists[at + 4 * n : at + 5 * n]),
        span(lists[at + 5 * n : at + 6 * n]),
        span(lanes.work[lanes.first_work[lane] : lanes.first_work[lane + 1]]),
        span(lanes.cost[lanes.first_cost[lane] : lanes.first_cost[lane + 1]]),
        span(lanes.itl[lanes.first_itl[lane] : lanes.first_itl[lane + 1]]),
        span(lanes.itl[:0]),
    )
