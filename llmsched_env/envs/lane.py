"""The memory of environments: each is a lane, an engine with what the environment itself keeps.

A table of addresses finds them all, so that a step of one or of hundreds passes one array to compiled code.
"""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit
from llmsched_env.core.histogram import BINS
from llmsched_env.core.run import ITERATION, Log
from llmsched_env.core.span import span_at
from llmsched_env.core.state import REQUEST, Engine, padded
from llmsched_env.scheduling import ENGINE

MOST_SLOTS = 64  # visible waiting, or running, requests
MOST_LEVELS = 8
MOST_CLASSES = 16
MOST_CLIENTS = 64
TERMS = 7


class Phase(enum.IntEnum):
    """What the next action is about."""

    FORCED = 0  # decodes lack KV blocks: somebody must be preempted
    BUILDING = 1  # the plan of the next iteration
    OVER = 2  # the episode has ended


# A request of an episode that is still to come.
DRAWN = np.dtype(
    [
        ("arrival", "f8"),
        ("predicted", "f8"),
        ("ttft_target", "f8"),
        ("tpot_target", "f8"),
        ("prompt", "i4"),
        ("stop", "i4"),
        ("limit", "i4"),
        ("priority", "i4"),
        ("client", "i4"),
        ("class_id", "i4"),
    ],
    align=True,
)

# What the mask and the observation ask of a visible request, a cache line each, see `observation`.
BRIEF = np.dtype(
    [
        ("rest", "i4"),  # tokens left of its prefill; 0 if it decodes or is in the plan
        (
            "hold",
            "i4",
        ),  # KV blocks that an admission reserves in any case; or `decision.CLOSED`
        ("room", "i4"),  # tokens for which a running request holds KV blocks already
        ("fixed", "i4"),  # 1: a running request has a chunk in the plan, and may not be preempted
        # what does not change while the request keeps its place
        ("arrival", "f8"),
        ("tpot", "f8"),
        ("length", "f8"),  # of its answer, as far as the length regime tells; 0: nothing
        ("due", "f8"),  # when the next token of a waiting request is due, the first of a running one
        ("generated", "f4"),  # of a waiting request
        ("class_id", "f4"),
        ("preemptions", "f4"),
    ],
    align=True,
)
_BRIEFS = 2 * MOST_SLOTS + 1  # odd, as `padded` has it: else the first of all share a few sets of the cache

# What the environment keeps beside its engine.
LANE = padded(
    np.dtype(
        [
            # -- options --
            ("levels", "i8", (MOST_LEVELS,)),  # tokens; 0: all that fits
            ("waiting_slots", "i8"),
            ("running_slots", "i8"),
            ("running_order", "i8"),
            ("length_info", "i8"),
            ("num_levels", "i8"),
            ("skip_forced", "i8"),
            ("work_conserving", "i8"),
            ("voluntary", "i8"),  # whether requests may be preempted that need not be
            ("readmit", "i8"),  # whether who is preempted in a plan may be admitted again in it
            ("idle", "i8"),  # whether the engine may wait although somebody could be served
            ("autoreset", "i8"),
            ("horizon", "f8"),  # seconds at which the episode is cut
            ("next_horizon", "f8"),  # likewise the one that `pool` holds
            ("time_scale", "f8"),
            ("rate_window", "f8"),
            ("discount_rate", "f8"),
            ("weights", "f8", (TERMS,)),
            ("unit_time", "f8"),  # seconds that make one unit of reward: requests times the time scale
            ("unit_tokens", "f8"),  # likewise output tokens: those expected of an episode
            # -- the plan --
            ("phase", "i8"),
            ("held", "i8"),  # decodes are kept out of this plan
            # the visible requests, see `wait` and `run`
            ("stale_wait", "i8"),  # they have to be found anew
            ("stale_run", "i8"),
            ("num_wait", "i8"),
            ("num_run", "i8"),
            # rows of the observation that have to be written anew, all of a kind
            ("see_wait", "i8"),
            ("see_run", "i8"),
            ("last_action", "i8"),
            # -- the step --
            ("reward", "f8"),
            ("terminated", "i8"),
            ("truncated", "i8"),
            ("dt", "f8"),
            ("factor", "f8"),  # of the continuous discount at this point of the step
            ("mean_factor", "f8"),  # over the time that passed last
            ("terms", "f8", (TERMS,)),  # the reward by objective, unweighted
            # -- the episode --
            ("drawn", "i8"),  # whether `pool` holds the next episode
            ("was_reset", "i8"),  # whether this step began an episode
            ("begun", "i8"),  # episodes begun so far
            ("episodes", "i8"),
            ("steps", "i8"),
            ("illegal", "i8"),
            ("total", "f8"),
            ("iteration_time", "f8"),  # of the last iteration
            ("arrival_rate", "f8"),
            ("departure_rate", "f8"),
            ("request_seconds", "f8"),  # the integral of requests in the system
            ("met", "i8"),  # finished requests that met their targets
            ("ttft_seconds", "f8"),  # to the first token, summed over finished requests
            ("tpot_seconds", "f8"),  # per output token after that, of those with more than one
            ("with_tpot", "i8"),  # how many these are
            ("fairness", "f8"),  # Jain's index of what the clients have got
            ("num_clients", "i8"),
            # -- arrays of which little is used, and what is used seldom --
            ("wait", "i4", (MOST_SLOTS,)),  # the visible requests
            ("run", "i4", (MOST_SLOTS,)),
            ("class_means", "f8", (MOST_CLASSES,)),
            ("service", "f8", (MOST_CLIENTS,)),
            # the episode before, for statistics
            ("done_return", "f8"),
            ("done_steps", "i8"),
            ("done_latency", "f8"),
            ("done_goodput", "f8"),
            ("done_ttft", "f8"),
            ("done_tpot", "f8"),
            ("done_finished", "i8"),
            ("done_clock", "f8"),
            ("done_busy", "f8"),
            ("done_iterations", "i8"),
            ("done_preemptions", "i8"),
            ("done_illegal", "i8"),
            ("done_fairness", "f8"),
            ("done_tokens", "i8"),
        ],
        align=True,
    )
)

# The columns of the table of addresses.
_COLUMNS = (
    "engine",
    "template",
    "requests",
    "num_requests",
    "lists",
    "work",
    "work_size",
    "cost",
    "num_cost",
    "itl",
    "bits",
    "num_words",
    "lane",
    "pool",
    "brief",
    "observation",
    "observation_size",
    "scales",
    "final",
    "mask",
    "mask_size",
    "rows",
    "num_rows",
    "logged",
    "tokens",
    "num_logged",
    "used",
)
COLUMNS = len(_COLUMNS)
(
    _ENGINE,
    _TEMPLATE,
    _REQUESTS,
    _NUM_REQUESTS,
    _LISTS,
    _WORK,
    _WORK_SIZE,
    _COST,
    _NUM_COST,
    _ITL,
    _BITS,
    _NUM_WORDS,
    _LANE,
    _POOL,
    _BRIEF,
    _OBSERVATION,
    _OBSERVATION_SIZE,
    _SCALES,
    _FINAL,
    _MASK,
    _MASK_SIZE,
    _ROWS,
    _NUM_ROWS,
    _LOGGED,
    _TOKENS,
    _NUM_LOGGED,
    _USED,
) = range(COLUMNS)

_engine_span = span_at(ENGINE)
_request_span = span_at(REQUEST)
_lane_span = span_at(LANE)
_drawn_span = span_at(DRAWN)
_brief_span = span_at(BRIEF)
_row_span = span_at(ITERATION)
_i4_span = span_at(np.int32)
_i8_span = span_at(np.int64)
_f8_span = span_at(np.float64)
_f4_span = span_at(np.float32)
_i1_span = span_at(np.int8)


class Env(NamedTuple):
    """One environment, as compiled code sees it.

    Attributes:
        e: its engine.
        v: its `LANE` record.
        template: the engine's record as it is when an episode begins.
        pool: (N,) DRAWN: the next episode.
        brief: BRIEF of each visible request, those waiting first.
        observation, final: (D,) float32: what is seen now, and what was seen when the last episode ended.
        scales: (2 D,) float32: how the features are normalised, see `observation`.
        mask: (A,) int8: which actions are legal.
        log: what happened, for pictures; of length 0 if nobody looks.
    """

    e: Engine
    v: Any
    template: Any
    pool: Any
    brief: Any
    observation: Any
    final: Any
    scales: Any
    mask: Any
    log: Log


@njit(inline="always")  # numba cannot return a record from a function
def env_at(table, lane: int) -> Env:  # type: ignore[no-untyped-def]
    """The environment of one row of the table of addresses, a span of int64."""
    at = lane * COLUMNS
    n = table[at + _NUM_REQUESTS]
    lists = table[at + _LISTS]
    return Env(
        Engine(
            _engine_span(table[at + _ENGINE], 1)[0],
            _request_span(table[at + _REQUESTS], n),
            _i4_span(lists, n),
            _i4_span(lists + 4 * n, n),
            _i4_span(lists + 8 * n, n),
            _i4_span(lists + 12 * n, n),
            _i4_span(lists + 16 * n, n),
            _i4_span(lists + 20 * n, n),
            _f8_span(table[at + _WORK], table[at + _WORK_SIZE]),
            _f8_span(table[at + _COST], table[at + _NUM_COST]),
            _i8_span(table[at + _ITL], 0),
            _i8_span(table[at + _BITS], table[at + _NUM_WORDS]),
        ),
        _lane_span(table[at + _LANE], 1)[0],
        _engine_span(table[at + _TEMPLATE], 1)[0],
        _drawn_span(table[at + _POOL], n),
        _brief_span(table[at + _BRIEF], _BRIEFS),
        _f4_span(table[at + _OBSERVATION], table[at + _OBSERVATION_SIZE]),
        _f4_span(table[at + _FINAL], table[at + _OBSERVATION_SIZE]),
        _f4_span(table[at + _SCALES], 2 * table[at + _OBSERVATION_SIZE]),
        _i1_span(table[at + _MASK], table[at + _MASK_SIZE]),
        Log(
            _row_span(table[at + _ROWS], table[at + _NUM_ROWS]),
            _i4_span(table[at + _LOGGED], table[at + _NUM_LOGGED]),
            _i4_span(table[at + _TOKENS], table[at + _NUM_LOGGED]),
            _i8_span(table[at + _USED], 2),
        ),
    )


def _arena(sizes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> dict[str, NDArray[Any]]:
    """Zeroed arrays in one piece of memory, which the system backs with large pages if it is large itself."""
    length = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in sizes.items()}
    raw = np.empty(sum(-(-size // 64) * 64 for size in length.values()) + 64, np.uint8)
    raw.fill(0)
    at = -raw.ctypes.data % 64
    arrays: dict[str, NDArray[Any]] = {}
    for name, (shape, dtype) in sizes.items():
        arrays[name] = raw[at : at + length[name]].view(dtype).reshape(shape)
        at += -(-length[name] // 64) * 64
    return arrays


class Bank:
    """The memory of `num_envs` environments with `num_requests` requests an episode, and its addresses.

    Attributes:
        s, lane: (E,) engine and LANE records. req: (E, N) REQUEST records. lists: (E, 6, N) int32.
        bits: (E, N / 64) int64.
        template: (1,) engine record. cost: the packed cost model. scales: (2, D) float32.
        pool: (E, N) DRAWN records.
        brief: (E, 2 MOST_SLOTS and one to spare) BRIEF records.
        observation, final: (E, D) float32. mask: (E, A) int8.
        table: (E, COLUMNS) int64, to be passed to compiled code.
    """

    s: NDArray[Any]
    lane: NDArray[Any]
    req: NDArray[Any]
    lists: NDArray[Any]
    bits: NDArray[Any]
    work: NDArray[Any]
    pool: NDArray[Any]
    brief: NDArray[Any]
    observation: NDArray[Any]
    final: NDArray[Any]
    mask: NDArray[Any]

    def __init__(
        self,
        num_envs: int,
        num_requests: int,
        template: NDArray[Any],
        cost: NDArray[np.float64],
        scales: NDArray[np.float32],
        mask_size: int,
        log_rows: int = 0,
        work_size: int = 0,
    ) -> None:
        n = num_requests
        self.num_requests = n
        self.template = template
        self.cost = cost
        self.scales = scales
        observation_size = scales.shape[1]
        sizes = {
            "s": ((num_envs,), ENGINE),
            "lane": ((num_envs,), LANE),
            "req": ((num_envs, n), REQUEST),
            "observation": ((num_envs, observation_size), np.dtype(np.float32)),
            "mask": ((num_envs, mask_size), np.dtype(np.int8)),
            "brief": ((num_envs, _BRIEFS), BRIEF),
            "bits": ((num_envs, -(-n // 64)), np.dtype(np.int64)),
            "lists": ((num_envs, 6, n), np.dtype(np.int32)),
            "pool": ((num_envs, n), DRAWN),
            "final": ((num_envs, observation_size), np.dtype(np.float32)),
            "work": ((num_envs, max(1, work_size)), np.dtype(np.float64)),
        }
        for name, array in _arena(sizes).items():
            setattr(self, name, array)
        self.log = Log(
            np.zeros(log_rows, ITERATION),
            np.zeros(8 * n if log_rows else 0, np.int32),
            np.zeros(8 * n if log_rows else 0, np.int32),
            np.zeros(2, np.int64),
        )
        self._itl = np.zeros(BINS, np.int64)  # not counted
        self.table = np.zeros((num_envs, COLUMNS), np.int64)
        self.address()

    def address(self) -> None:
        """Fill the table; needed again whenever an array is replaced."""

        def put(column: int, array: NDArray[Any], shared: bool = False) -> None:
            step = 0 if shared else array.strides[0]
            self.table[:, column] = array.ctypes.data + step * np.arange(len(self.table))

        for column, array in (
            (_ENGINE, self.s),
            (_REQUESTS, self.req),
            (_LISTS, self.lists),
            (_BITS, self.bits),
            (_WORK, self.work),
            (_LANE, self.lane),
            (_POOL, self.pool),
            (_BRIEF, self.brief),
            (_OBSERVATION, self.observation),
            (_FINAL, self.final),
            (_MASK, self.mask),
        ):
            put(column, array)
        for column, array in (
            (_TEMPLATE, self.template),
            (_COST, self.cost),
            (_SCALES, self.scales),
            (_ITL, self._itl),
            (_ROWS, self.log.rows),
            (_LOGGED, self.log.requests),
            (_TOKENS, self.log.tokens),
            (_USED, self.log.used),
        ):
            put(column, array, shared=True)
        for column, value in (
            (_NUM_REQUESTS, self.num_requests),
            (_WORK_SIZE, self.work.shape[1]),
            (_NUM_WORDS, self.bits.shape[1]),
            (_NUM_COST, len(self.cost)),
            (_OBSERVATION_SIZE, self.observation.shape[1]),
            (_MASK_SIZE, self.mask.shape[1]),
            (_NUM_ROWS, len(self.log.rows)),
            (_NUM_LOGGED, len(self.log.requests)),
        ):
            self.table[:, column] = value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "table": np.zeros_like(self.table)}  # addresses mean nothing elsewhere

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.address()
