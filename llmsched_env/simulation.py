"""`simulate`: a workload, a scheduler and a GPU, run to the end; and `Result`, what came of it.

`watch` runs likewise and only looks, now and then, at how much work is left.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

from llmsched_env import profiles
from llmsched_env.core.compile import njit
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.lanes import LaneSpec, engine_view, make_lanes, served
from llmsched_env.core.requests import Requests
from llmsched_env.core.run import ITERATION, Log, Outcome, Skip
from llmsched_env.core.schedule import Schedule
from llmsched_env.core.state import Error, Lanes, Status
from llmsched_env.errors import InputError, unknown
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import (
    ENGINE,
    Routine,
    Scheduler,
    run_compiled,
    run_lane,
    run_python,
    run_schedule,
    run_unified,
)
from llmsched_env.theory.capacity import Capacity, capacity
from llmsched_env.workloads import Workload

if TYPE_CHECKING:
    import pandas as pd

_RUNNING, _SWAPPED = int(Status.RUNNING), int(Status.SWAPPED)
_FINISHED, _DROPPED = int(Status.FINISHED), int(Status.DROPPED)
_FOREVER = 2**62
_OFTEN = 2_000_000  # iterations between two looks at the keyboard


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run of N requests gave. Arrays per request have shape (N,), times are seconds from the start of
    the run.

    Attributes:
        requests: what arrived.
        scheduler, profile: names.
        engine: the settings that held, none of them None but `cpu_blocks`.
        gpus: GPUs that the engine occupies.
        capacity: requests/s that the engine could sustain of this workload, if it was asked for by a load.
        first_scheduled_s, first_token_s, finish_s: float64; nan where it did not come to that.
        generated_tokens: int64; preemptions: int32; recomputed_tokens: int64, dropped from the KV cache and
            computed again.
        iterations_total, preemptions_total: of the whole run.
        busy_s: seconds in which an iteration ran. makespan_s: the end of the last iteration.
        prefill_tokens, decode_tokens: computed. wasted_tokens: computed for answers that had ended
            (asynchronous scheduling).
        batch_mean: requests in an iteration. kv_mean: share of the KV cache in use, averaged over busy time.
        itl_counts: int64 histogram of inter-token latencies, see `metrics.itl_bin_edges`. itl_sum: their sum,
            seconds.
        iterations: a record array with a row an iteration (ITERATION), or None.
        schedule: all decisions, or None.
    """

    requests: Requests
    scheduler: str
    profile: str
    engine: EngineConfig
    gpus: int
    capacity: Capacity | None
    first_scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    generated_tokens: NDArray[np.int64]
    preemptions: NDArray[np.int32]
    recomputed_tokens: NDArray[np.int64]
    iterations_total: int
    preemptions_total: int
    busy_s: float
    makespan_s: float
    prefill_tokens: int
    decode_tokens: int
    wasted_tokens: int
    batch_mean: float
    kv_mean: float
    itl_counts: NDArray[np.int64]
    itl_sum: float
    iterations: NDArray[Any] | None = None
    schedule: Schedule | None = None

    def metrics(self, **options: Any) -> dict[str, Any]:
        """All metrics as plain numbers; see `metrics.summary` for the options (targets, trimming)."""
        from llmsched_env.metrics import summary

        return summary(self, **options)

    def to_frame(self) -> pd.DataFrame:
        """A pandas table with a row a request."""
        from llmsched_env.metrics import to_frame

        return to_frame(self)


def simulate(
    workload: Requests | Workload,
    scheduler: Scheduler,
    profile: str | Profile = "a100-llama3-8b",
    engine: EngineConfig | None = None,
    *,
    seed: int = 0,
    record: str | None = None,
    skip: str = "exact",
    oversized: str = "error",
    horizon_s: float = math.inf,
    max_iterations: int | None = None,
) -> Result:
    """Serve a workload to the end and measure.

    Args:
        workload: requests, or a recipe that draws them (its load is relative to this engine's capacity for
            it).
        scheduler: e.g. `baselines.get("sarathi")`, or one of your own.
        profile: a cost profile or its name.
        engine: engine settings; what is None comes from the scheduler's system and the profile.
        seed: of the engine's own generator, which only schedulers that draw lots use.
        record: "iterations" keeps a row for each iteration, "schedule" also who got how many tokens.
        skip: how stretches of pure decoding are run: "exact" gives the same bits as "none" faster; "closed"
            sums them in closed form, equal within rounding (1e-9 relative), where the cost model is linear in
            the KV reads.
        oversized: what becomes of a request that can never fit: "error", "drop" (it is never served, and
            reported unfinished) or "keep" (it waits for ever, and whoever it blocks with it).
        horizon_s: the run ends with the first iteration that ends at this time or later.
        max_iterations: the run ends after so many iterations.

    Raises:
        InputError: for contradictory settings, a request that can never fit (by name), missing predictions,
            or a scheduler that breaks a rule of the engine or stops making progress (with the request, the
            iteration and the rule).
    """
    return _run(
        *_prepare(workload, scheduler, profile, engine or EngineConfig(), seed, oversized),
        record=_choice("record", record, (None, "iterations", "schedule")),
        skip=Skip[_choice("skip", skip, ("none", "exact", "closed")).upper()],
        horizon_s=horizon_s,
        max_iterations=max_iterations,
    )


def replay(
    schedule: Schedule,
    workload: Requests,
    profile: str | Profile = "a100-llama3-8b",
    engine: EngineConfig | None = None,
    *,
    scheduler: Scheduler | None = None,
) -> Result:
    """Run the decisions of a schedule and nothing else; the same engine gives the same times to the last bit.

    `scheduler` is the one that made it, if it was one: only what it reserves at admission and its engine
    defaults matter.

    Raises:
        InputError: names the iteration and the rule if the schedule breaks one, or if it leaves requests
            unfinished.
    """
    made_by = scheduler or Scheduler("schedule")
    prepared = _prepare(workload, made_by, profile, engine or EngineConfig(), 0, "error")
    return _run(
        *prepared, record="schedule", skip=Skip.NONE, horizon_s=math.inf, max_iterations=None, follow=schedule
    )


@dataclasses.dataclass(frozen=True)
class Backlog:
    """How much work an engine had left at K times.

    Work is counted in the five sums that a capacity depends on, as the means of `Moments`, each over what is
    left of the requests that have arrived:

        0  requests whose prefill is not complete
        1  prefill tokens
        2  twice the context that the attention of those reads: t^2 - c^2 of t known tokens, c computed
        3  output tokens
        4  KV token-iterations: the tokens that a request holds, summed over its iterations to come

    What a preemption throws away has to be done again, and counts again.

    Attributes:
        time_s: (K,) float64; the ends of the iterations that were the first to end at the times asked for.
        requests: (K,) int64, arrived and not finished.
        left: (K, 5) float64, the work that is left.
        arrived: (K, 5) float64, that of all that have arrived, done or not.
    """

    time_s: NDArray[np.float64]
    requests: NDArray[np.int64]
    left: NDArray[np.float64]
    arrived: NDArray[np.float64]

    @property
    def tokens(self) -> NDArray[np.float64]:
        """(K,) tokens left: prefill, and a decode for each output token but the one that ends the prefill."""
        return self.left @ TOKENS

    @property
    def arrived_tokens(self) -> NDArray[np.float64]:
        """(K,) tokens of all that have arrived: I + O - 1 of each request."""
        return self.arrived @ TOKENS


TOKENS = np.array([-1.0, 1.0, 0.0, 1.0, 0.0])
"""What makes tokens of the five sums of a `Backlog`."""


def watch(
    requests: Requests,
    scheduler: Scheduler,
    profile: str | Profile = "a100-llama3-8b",
    engine: EngineConfig | None = None,
    *,
    at: NDArray[np.float64],
    seed: int = 0,
    oversized: str = "error",
) -> Backlog:
    """Serve requests and look at the backlog at some times.

    Args:
        at: (K,) float64, increasing seconds; the run ends at the last of them.
        oversized: what becomes of a request that can never fit: see `simulate`. A dropped one is no work.

    Raises:
        InputError: as `simulate`; times that do not increase from above 0.
    """
    if at.ndim != 1 or len(at) == 0 or not (np.isfinite(at).all() and (np.diff(at, prepend=0.0) > 0).all()):
        raise InputError("at must be increasing seconds above 0")
    requests, scheduler, _, _, _, lanes = _prepare(
        requests, scheduler, profile, engine or EngineConfig(), seed, oversized
    )
    log = _make_log(None, len(requests), rows=0)
    run = _runner(scheduler, lanes, None)
    req = lanes.req
    n = len(at)
    seen = Backlog(at.astype(np.float64), np.zeros(n, np.int64), np.zeros((n, 5)), np.zeros((n, 5)))
    oldest, total = 0, np.zeros(5)
    arrived = 0
    for k, horizon in enumerate(at.tolist()):
        while (outcome := run(log, _OFTEN, horizon, int(Skip.EXACT))) == Outcome.MORE:
            pass
        if outcome == Outcome.ERROR:
            raise InputError(_broken_rule(requests, scheduler, lanes))
        seen.time_s[k] = now = max(float(lanes.s[0]["clock"]), horizon)
        arrived = _add_arrivals(req, arrived, now, total)
        seen.arrived[k] = total
        seen.requests[k], oldest = _add_left(req, oldest, arrived, seen.left[k])
    return seen


@njit
def _add_arrivals(req: Any, begin: int, until: float, total: Any) -> int:
    """Add the work of the requests from `begin` on that arrive up to `until` (s) to the five sums; returns
    the first that does not."""
    r = begin
    while r < len(req) and req[r].arrival <= until:
        q = req[r]
        if q.status != _DROPPED:
            prompt, output = float(q.prompt), float(q.stop)
            total[0] += 1.0
            total[1] += prompt
            total[2] += prompt * prompt
            total[3] += output
            total[4] += prompt * output + 0.5 * output * (output - 1.0)
        r += 1
    return r


@njit
def _add_left(req: Any, begin: int, end: int, total: Any) -> tuple[int, int]:
    """Add what is left of the requests from `begin` to `end` to the five sums; how many are not finished, and
    the first of them."""
    some, first = 0, end
    for r in range(begin, end):
        q = req[r]
        if q.status == _FINISHED or q.status == _DROPPED:
            continue
        some += 1
        if first == end:
            first = r
        known, computed = float(q.prompt + q.generated), float(q.computed)
        to_come = float(q.stop - q.generated)
        if (q.status != _RUNNING and q.status != _SWAPPED) or q.computed < q.target:
            total[0] += 1.0
            total[1] += known - computed
            total[2] += known * known - computed * computed
        total[3] += to_come
        total[4] += to_come * known + 0.5 * to_come * (to_come - 1.0)
    return some, first


# ---------------------------------------------------------------------- before the run


def resolve(
    engine: EngineConfig, scheduler: Scheduler, profile: Profile, longest: int = 2**31 - 1
) -> EngineConfig:
    """Engine settings with the scheduler's defaults, the profile's KV capacity, and as model length that
    capacity or `longest` (tokens).

    Raises:
        InputError: if neither says how large the KV cache is, or settings contradict each other.
    """
    config = engine
    if config.kv_blocks is None:
        if profile.kv_tokens is None:
            raise InputError(f"profile {profile.name} has no KV capacity; give kv_blocks (--kv-tokens)")
        config = config.replace(kv_blocks=max(1, profile.kv_tokens // config.block_size))
    if config.max_model_len is None:
        config = config.replace(max_model_len=min(config.kv_tokens, longest))
    return scheduler.resolve(config)


def servable(
    requests: Requests, scheduler: Scheduler, profile: str | Profile, engine: EngineConfig | None = None
) -> NDArray[np.bool_]:
    """(N,) which of the requests can ever be served: the others are too large for the engine as the scheduler
    runs it."""
    longest = int((requests.prompt_tokens.astype(np.int64) + requests.declared_tokens).max())
    config = resolve(engine or EngineConfig(), scheduler, profiles.get(profile), longest)
    return ~_fitted(requests, scheduler, config)[2]


def _prepare(
    workload: Requests | Workload,
    scheduler: Scheduler,
    profile: str | Profile,
    engine: EngineConfig,
    seed: int,
    oversized: str,
) -> tuple[Requests, Scheduler, Profile, EngineConfig, Capacity | None, Lanes]:
    """Resolve everything and lay the engine out."""
    if not isinstance(scheduler, Scheduler):
        raise InputError(f"{scheduler!r} is not a Scheduler; pass baselines.get({str(scheduler)!r})")
    if not isinstance(workload, Requests | Workload):
        raise InputError(f"workload {workload!r} is neither; pass Requests or workloads.get(NAME, ...)")
    profile = profiles.get(profile)
    limit: Capacity | None = None
    if isinstance(workload, Requests):
        requests = workload
    else:
        if workload.load is not None:
            limit = capacity(workload.moments(), profile.time, resolve(engine, scheduler, profile))
        requests = workload.draw(None if limit is None else limit.rps)
    config = resolve(
        engine,
        scheduler,
        profile,
        int((requests.prompt_tokens.astype(np.int64) + requests.declared_tokens).max()),
    )
    if scheduler.needs_predictions():
        missing = np.isnan(requests.predicted_tokens)
        if missing.any():
            i = int(np.argmax(missing))
            raise InputError(
                f"scheduler {scheduler.name} needs predicted lengths, and request {requests.name(i)} "
                "has none; choose a prediction"
            )
    _choice("oversized", oversized, ("error", "drop", "keep"))
    stop, limit_tokens, bad = _fitted(requests, scheduler, config)
    if bad.any() and oversized == "error":
        i = int(np.argmax(bad))
        raise InputError(_misfit(requests, i, scheduler, config, stop))
    spec = LaneSpec(
        requests=requests,
        config=config,
        pack=scheduler.pack,
        cost=profile.pack(),
        kv_bytes_per_token=profile.kv_bytes_per_token or 0.0,
        stop_tokens=stop,
        limit_tokens=limit_tokens,
        dropped=bad if oversized == "drop" else np.zeros(len(requests), bool),
        seed=seed,
        workspace=scheduler.work_size(len(requests), int(requests.client.max()) + 1),
        patient=oversized == "keep",
    )
    return requests, scheduler, profile, config, limit, make_lanes([spec], ENGINE)


def _fitted(
    requests: Requests, scheduler: Scheduler, config: EngineConfig
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Where each answer ends, where the engine would end it at the latest, and who can never be served."""
    settings = scheduler.settings
    assert config.max_model_len is not None and config.kv_blocks is not None
    assert config.token_budget is not None
    # Beyond the longest that there can be a model length says nothing, and int32 suffices.
    model_len = np.int32(min(config.max_model_len, 2**31 - 2))
    longest = model_len - requests.prompt_tokens + np.int32(1 if settings.stop_one_later else 0)
    limit = np.maximum(np.minimum(requests.declared_tokens, longest), np.int32(1))
    stop = np.minimum(requests.output_tokens, limit)
    bad = (
        (longest < 1)
        | (scheduler.least_blocks(requests, stop, limit, config) > config.kv_blocks)
        | (scheduler.least_budget(requests, stop) > config.token_budget)
    )
    return stop, limit, bad


def _misfit(
    requests: Requests, i: int, scheduler: Scheduler, config: EngineConfig, stop: NDArray[np.int32]
) -> str:
    """Why request i can never be served, and what to do about it."""
    one = requests.take(np.array([i]))
    prompt, output = int(one.prompt_tokens[0]), int(one.output_tokens[0])
    who = f"request {requests.name(i)} ({prompt} prompt + {output} output tokens) can never fit: "
    mend = "; clip or drop it (max_total_tokens, oversized='drop'), or "
    assert config.max_model_len is not None and config.token_budget is not None
    if prompt >= config.max_model_len:
        return f"{who}the prompt fills the model length of {config.max_model_len} tokens{mend}raise it"
    budget = int(scheduler.least_budget(one, stop[i : i + 1])[0])
    if budget > config.token_budget:
        return (
            f"{who}{scheduler.name} does not cut prompts and needs a token budget of {budget}, "
            f"not {config.token_budget}{mend}raise token_budget"
        )
    _, limit, _ = _fitted(one, scheduler, config)
    blocks = int(scheduler.least_blocks(one, stop[i : i + 1], limit, config)[0])
    return (
        f"{who}{scheduler.name} needs {blocks} KV blocks of {config.block_size} tokens for it, "
        f"the engine has {config.kv_blocks}{mend}raise kv_blocks (--kv-tokens)"
    )


def _choice(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise unknown(name, value, [str(k) for k in known])
    return value


# ---------------------------------------------------------------------- the run


def _run(
    requests: Requests,
    scheduler: Scheduler,
    profile: Profile,
    config: EngineConfig,
    limit: Capacity | None,
    lanes: Lanes,
    *,
    record: str | None,
    skip: Skip,
    horizon_s: float,
    max_iterations: int | None,
    follow: Schedule | None = None,
) -> Result:
    if math.isnan(horizon_s) or horizon_s <= 0:
        raise InputError(f"horizon_s must be positive seconds, not {horizon_s}")
    log = _make_log(record, len(requests), rows=4096 if record else 0)
    left = _FOREVER if max_iterations is None else max_iterations
    run = _runner(scheduler, lanes, follow)
    while True:
        before = int(lanes.s[0]["iterations"])
        outcome = run(log, min(left, _OFTEN), horizon_s, int(skip))
        left -= int(lanes.s[0]["iterations"]) - before
        if outcome == Outcome.LOG_FULL:
            log = _grow(log, len(requests))
        elif outcome == Outcome.ERROR:
            raise InputError(_broken_rule(requests, scheduler, lanes))
        elif outcome != Outcome.MORE or left <= 0 or _used_up(follow, lanes):
            break
    if follow is not None:
        done = int(lanes.s[0]["num_finished"])
        if done < len(requests):
            raise InputError(
                f"the schedule ends after {len(follow)} iterations with {len(requests) - done} requests "
                "unfinished"
            )
    return _result(requests, scheduler, profile, config, limit, lanes, log, record)


def _used_up(follow: Schedule | None, lanes: Lanes) -> bool:
    return follow is not None and int(lanes.s[0]["iterations"]) >= len(follow)


def _runner(scheduler: Scheduler, lanes: Lanes, follow: Schedule | None) -> Any:
    """The function that advances the engine under whatever decides."""
    if follow is not None:
        return lambda log, most, horizon, skip: run_schedule(
            lanes, 0, log, most, horizon, follow.start_s, follow.ends, follow.requests, follow.tokens
        )
    if scheduler.plan is None:
        run = run_unified if scheduler.settings.routine is Routine.UNIFIED else run_lane
        return lambda log, most, horizon, skip: run(lanes, 0, log, most, horizon, skip)
    plan = scheduler.plan
    if isinstance(plan, numba.core.registry.CPUDispatcher):
        own = _loop_of(plan)
        return lambda log, most, horizon, skip: own(lanes, 0, plan, log, most, horizon, skip)
    view = engine_view(lanes, 0)
    return lambda log, most, horizon, skip: run_python(view, plan, log, most, horizon, skip)


@lru_cache(maxsize=8)
def _loop_of(plan: Any) -> Any:
    """The compiled loop around a scheduler of the user's own: compiled anew for each, and kept in memory, for
    a function that is an argument cannot be cached on disk."""
    loop: Any = run_compiled
    return numba.njit(loop.py_func, nogil=True)


def _make_log(record: str | None, num_requests: int, rows: int) -> Log:
    entries = max(4 * rows, 4 * num_requests) if record == "schedule" else 0
    return Log(
        np.zeros(rows, ITERATION),
        np.zeros(entries, np.int32),
        np.zeros(entries, np.int32),
        np.zeros(2, np.int64),
    )


def _grow(log: Log, num_requests: int) -> Log:
    """The log with twice the room."""

    def longer(array: NDArray[Any], least: int) -> NDArray[Any]:
        grown = np.zeros(2 * len(array) + (least if len(array) else 0), array.dtype)
        grown[: len(array)] = array
        return grown

    return Log(
        longer(log.rows, 0),
        longer(log.requests, 4 * num_requests),
        longer(log.tokens, 4 * num_requests),
        log.used,
    )


def _broken_rule(requests: Requests, scheduler: Scheduler, lanes: Lanes) -> str:
    """The message for the rule of the engine that was broken."""
    s = lanes.s[0]
    r, value, limit = int(s["error_request"]), int(s["error_value"]), int(s["error_limit"])
    name = requests.name(r) if 0 <= r < len(requests) else str(r)
    what = {
        Error.UNKNOWN_REQUEST: f"there is no request {r}; they are numbered 0 to {len(requests) - 1}",
        Error.NOT_SCHEDULABLE: f"request {name} is {_status(value)} and cannot be given tokens",
        Error.TWICE: f"request {name} was given tokens twice in one iteration",
        Error.TOKENS: f"request {name} was given {value} tokens and can use 1 to {limit}",
        Error.BUDGET: f"request {name} was given {value} tokens, and the token budget has {limit} left",
        Error.KV: f"request {name} needs {value} more KV blocks, and {limit} are free; preempt somebody",
        Error.SEQS: f"request {name} was admitted while {value} of at most {limit} requests run",
        Error.NOT_RESIDENT: f"request {name} is {_status(value)}; only running ones can be preempted",
        Error.NOT_PLANNED: f"request {name} has no tokens in this iteration that could be taken back",
        Error.STUCK: f"nothing is planned, nothing more arrives, and {int(s['num_waiting'])} requests wait, "
        f"the first of them {name}; a scheduler must always serve somebody",
        Error.LIVELOCK: f"no token came out for {1_000_000} iterations; {name} is preempted again and again",
    }[Error(int(s["error"]))]
    return (
        f"scheduler {scheduler.name}, iteration {int(s['iterations'])} at {float(s['clock']):.6g} s: {what}"
    )


def _status(value: int) -> str:
    words: dict[int, str] = {
        Status.FUTURE: "not there yet",
        Status.WAITING: "waiting",
        Status.RUNNING: "running",
        Status.SWAPPED: "swapped out",
        Status.EVICTED: "preempted in this iteration",
        Status.FINISHED: "finished",
        Status.DROPPED: "dropped as too large",
    }
    return words.get(value, "")  # the messages of other errors are written too, and thrown away


def _result(
    requests: Requests,
    scheduler: Scheduler,
    profile: Profile,
    config: EngineConfig,
    limit: Capacity | None,
    lanes: Lanes,
    log: Log,
    record: str | None,
) -> Result:
    s = lanes.s[0]
    iterations, busy = int(s["iterations"]), float(s["busy"])
    rows = log.rows[: log.used[0]].copy() if record else None
    schedule = None
    if record == "schedule" and rows is not None:
        schedule = Schedule(
            rows["start_s"].copy(),
            rows["entries"].copy(),
            log.requests[: log.used[1]].copy(),
            log.tokens[: log.used[1]].copy(),
        )
    done = served(lanes.req)
    finish = done.finish_s
    return Result(
        requests=requests,
        scheduler=scheduler.name,
        profile=profile.name,
        engine=config,
        gpus=profile.gpus,
        capacity=limit,
        first_scheduled_s=done.first_scheduled_s,
        first_token_s=done.first_token_s,
        finish_s=finish,
        generated_tokens=done.generated_tokens,
        preemptions=done.preemptions,
        recomputed_tokens=done.recomputed_tokens,
        iterations_total=iterations,
        preemptions_total=int(s["preemptions"]),
        busy_s=busy,
        makespan_s=float(np.nanmax(finish)) if int(s["num_finished"]) == len(requests) else float(s["clock"]),
        prefill_tokens=int(s["total_prefill"]),
        decode_tokens=int(s["total_decode"]),
        wasted_tokens=int(s["total_wasted"]),
        batch_mean=float(s["batch_sum"]) / iterations if iterations else 0.0,
        kv_mean=float(s["kv_seconds"]) / (busy * config.kv_tokens) if busy > 0 else 0.0,
        itl_counts=lanes.itl,
        itl_sum=float(np.nansum(done.last_token_s - done.first_token_s)),
        iterations=rows,
        schedule=schedule,
    )


__all__ = ["TOKENS", "Backlog", "Result", "replay", "resolve", "servable", "simulate", "watch"]
