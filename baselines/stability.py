"""Up to what rate a scheduler is stable, and how sure that is.

A scheduler is stable on a workload if its backlog of work does not grow without end. Whether it does is
decided here as the fluid limit decides it (Dai, Deng, Li and Peng, arXiv 2504.07347v3): the engine begins
with many requests waiting, and requests arrive; if the backlog shrinks, any backlog is worked off in the end,
and if it grows, it grows for ever. The backlog is counted in tokens that are left: prefill, and decodes.
Tokens are weighed by what they cost at the engine's limit (`theory.limits.prices`), a mean one being 1, so
that a backlog is the same amount of work whoever is served first; where time depends on the number of tokens
alone, as in the paper, each is 1.

What is measured is the drift, in tokens/s, over the second half of a run, once for each of several seeds. Of
what arrived only the mean is left in it: how far the arrivals of a seed are off their mean is known, and
taken out, which leaves little noise. The drifts of the seeds are independent, and Student's t gives the
interval of their mean:

* stable: the interval lies below 0,
* unstable: it lies above 0, and does so again in runs of twice the length that begin with twice the backlog:
  a state that is merely large, and fills up slowly, has levelled off by then,
* undecided: neither, after runs as long as allowed; or the interval is narrow about 0, at the very limit.

Each test looks at most `looks` times, and each look has its share of the error (Bonferroni), so that a
verdict is false with at most 1 - confidence. That is about the noise: no finite run can tell of what would
happen later still.

Runs that begin empty (`start="empty"`) show what an operator sees, and what the paper plots. They say less
near the limit: a stable backlog takes long to become stationary, and grows meanwhile, like the square root of
time at the limit itself. So there the drift must also pass what such a critical random walk would show, and a
small drift counts as none. A scheduler that is stable so but not when filled works until its first large
burst.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from baselines.intervals import mean_interval
from llmsched_env import EngineConfig, Requests, Scheduler, profiles
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import require_writable_folder, writing
from llmsched_env.profiles import Profile
from llmsched_env.simulation import Backlog, resolve, servable, watch
from llmsched_env.theory.limits import Limit, limit, prices
from llmsched_env.workloads import Moments, Replay, Synthetic, Workload

if TYPE_CHECKING:
    from rich.table import Table

STARTS = ("filled", "empty")
STABLE, UNSTABLE, UNDECIDED = "stable", "unstable", "undecided"

_MOST_FIRST = 8  # times the requests asked for, in a first look
# Requests of a recipe by which it is known whether all of them can be served; and if not, how many, and how
# large. An error there would shift the drifts of all seeds alike, which no interval shows.
_SAMPLE, _LARGE_SAMPLE = 2**16, 2**20
_DRAINED = 0.5  # of the first backlog: from here on what is left might be what there always is
# Slope over the second half of a run, by least squares, of the mean of a critical random walk that is kept
# from falling below 0 and began there: this many standard deviations of what arrives in a unit of time, over
# the square root of the run's length. (sqrt(2 t / pi), fitted on [1/2, 1].)
_CRITICAL = 0.4646


@dataclasses.dataclass(frozen=True)
class Procedure:
    """How stability is tested.

    Attributes:
        seeds: independent runs of each look, at least 2.
        confidence: with which a verdict is right, as far as noise goes; in (0, 1).
        requests: that arrive in a run of the first look, or more where the engine holds so many that the
            backlog of a filled run would not be large against that.
        looks: a test looks again at runs of twice the length while it is undecided, so many times in all.
        start: "filled" or "empty".
        fill: requests that wait at the beginning of a filled run, as a share of those that arrive.
        resolution: a drift within so much of 0, as a share of the tokens that arrive, is not told from it.
        growth: likewise of runs that begin empty, whose backlog fluctuates more.
        tolerance: the search ends when stable and unstable rates are as near as that, relatively.
        most_tests: of a search.
        samples: of the backlog in a run.
    """

    seeds: int = 8
    confidence: float = 0.95
    requests: int = 4000
    looks: int = 3
    start: str = "filled"
    fill: float = 0.125
    resolution: float = 0.002
    growth: float = 0.01
    tolerance: float = 0.01
    most_tests: int = 16
    samples: int = 128

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise unknown("start", self.start, STARTS)
        least = {"seeds": 2, "requests": 100, "looks": 1, "most_tests": 2, "samples": 16}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise InputError(f"{name} must be a whole number of at least {smallest}, not {value!r}")
        for name in ("confidence", "fill", "resolution", "growth", "tolerance"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must be between 0 and 1, not {getattr(self, name)}")

    @property
    def level(self) -> float:
        """Confidence of one look's interval."""
        return 1 - (1 - self.confidence) / self.looks


# ---------------------------------------------------------------------- the statistics


@dataclasses.dataclass(frozen=True)
class Drift:
    """Mean change of the backlog, tokens/s, and the ends of its interval."""

    value: float
    low: float
    high: float


def drift_of(
    time_s: NDArray[np.float64],
    left: NDArray[np.float64],
    arrived: NDArray[np.float64],
    offered: float,
    start: str = "filled",
) -> float:
    """The drift of one run, tokens/s: the slope of the backlog, by least squares, over the second half.

    Args:
        time_s, left, arrived: (K,) times, the tokens left then, and those of all that had arrived.
        offered: tokens that arrive in a second, on average. Where a run begins filled, the difference of what
            did arrive to that is taken out; if the backlog falls to half of the first, the drift is that up
            to then.
    """
    if start == "empty":
        return _slope(time_s, left, 0.5 * time_s[-1])
    net = left - arrived + offered * time_s  # 0 at time 0
    done = np.flatnonzero(left <= _DRAINED * arrived[0])
    if len(done):
        return float(net[done[0]] / time_s[done[0]])
    return _slope(time_s, net, 0.5 * time_s[-1])


def _slope(x: NDArray[np.float64], y: NDArray[np.float64], begin: float) -> float:
    """Of y over x, by least squares, from x = `begin` on."""
    some = x >= begin
    unit = x[-1]  # squares of very short times would vanish
    x, y = (x[some] - x[some].mean()) / unit, y[some]
    spread = float(x @ x)
    return float(x @ y / spread / unit) if spread > 0 else 0.0


def critical_drift(time_s: Sequence[NDArray[np.float64]], arrived: Sequence[NDArray[np.float64]]) -> float:
    """Mean drift, tokens/s, that runs from an empty engine would show at the limit, where it is not yet
    unstable; by how much the tokens that arrive vary.

    Args:
        time_s, arrived: of each run, as in `drift_of`.
    """
    gained = np.concatenate([np.diff(tokens) for tokens in arrived])
    passed = np.concatenate([np.diff(time) for time in time_s])
    rate = gained.sum() / passed.sum()
    variance = float(((gained - rate * passed) ** 2).sum() / passed.sum())
    length = float(np.mean([time[-1] for time in time_s]))
    return _CRITICAL * math.sqrt(variance / length)


def judge(drifts: NDArray[np.float64], level: float, low: float, high: float) -> tuple[str, Drift]:
    """The verdict on the drifts of S seeds: stable if the interval of their mean, of confidence `level`, lies
    below `low`, unstable if above `high`."""
    found = Drift(*mean_interval(drifts, level))
    if found.high < low:
        return STABLE, found
    return (UNSTABLE if found.low > high else UNDECIDED), found


# ---------------------------------------------------------------------- what is tested


@dataclasses.dataclass(frozen=True)
class Case:
    """A scheduler on a workload and an engine. Make it with `Case.of`.

    Attributes:
        scheduler: who decides.
        workload: a recipe; its rate and its number of requests do not matter. The requests of a trace are
            drawn at random, with Poisson arrivals.
        profile: what an iteration takes.
        engine: resolved settings.
        blocking: whether requests that can never be served stay and wait, rather than being turned away.
    """

    scheduler: Scheduler
    workload: Synthetic | Replay
    profile: Profile
    engine: EngineConfig
    blocking: bool = False

    @staticmethod
    def of(
        scheduler: Scheduler,
        workload: Workload,
        profile: str | Profile = "a100-llama3-8b",
        engine: EngineConfig | None = None,
        *,
        blocking: bool = False,
    ) -> Case:
        """Raises:
        InputError: a workload that has no rate, or no request that the engine could serve.
        """
        if not isinstance(workload, Synthetic | Replay):
            raise InputError(
                f"workload {workload.name} is one of fixed requests without a rate; stability needs a recipe "
                "or a trace to draw from"
            )
        profile = profiles.get(profile)
        made = resolve(engine or EngineConfig(), scheduler, profile, workload.longest())
        case = Case(scheduler, workload, profile, made, blocking)
        if case.served_share == 0 and not blocking:
            raise InputError(
                f"scheduler {scheduler.name} can serve no request of {workload.name} on this engine: all are "
                "too large for its KV cache or, uncut, for its token budget; raise kv_blocks or token_budget"
            )
        return case

    @property
    def served_share(self) -> float:
        """Share of the requests that can be served at all."""
        return self._sized[0]

    @property
    def tokens(self) -> float:
        """Mean work of a request in tokens, of those that are turned away 0."""
        moments = self.moments
        return (1.0 if self.blocking else self.served_share) * (moments.prompt + moments.output - 1)

    @property
    def moments(self) -> Moments:
        """Of the requests that are not turned away."""
        return self._sized[1]

    @cached_property
    def limit(self) -> Limit:
        """What no scheduler can pass on this engine; requests/s, those that are turned away counted too."""
        found = limit(self.moments, self.profile, self._bounds)
        share = 1.0 if self.blocking else self.served_share
        return dataclasses.replace(found, compute_rps=found.compute_rps / share, kv_rps=found.kv_rps / share)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """(5,) tokens for each of the sums of a `Backlog`, a mean request being as many as it has."""
        moments, bounds = self.moments, self._bounds
        each = prices(moments, self.profile, bounds) * limit(moments, self.profile, bounds).rps
        return each * (moments.prompt + moments.output - 1)

    @property
    def _bounds(self) -> EngineConfig:
        """The engine with what the scheduler's settings add to, or take from, the bounds of a batch."""
        engine, settings = self.engine, self.scheduler.settings
        if self.scheduler.plan is None and not settings.limit_prefills:
            engine = engine.replace(token_budget=None)
        if settings.max_batch_requests and engine.max_num_seqs is not None:
            engine = engine.replace(max_num_seqs=min(settings.max_batch_requests, engine.max_num_seqs))
        return engine

    @cached_property
    def _sized(self) -> tuple[float, Moments]:
        """The share of requests that can be served, and the moments of those, or of all if they all can, or
        none."""
        sample = self._sample(_SAMPLE)
        kept = servable(sample, self.scheduler, self.profile, self.engine)
        if kept.all() or self.blocking or not kept.any():
            return float(kept.mean()), self.workload.moments()
        if isinstance(self.workload, Synthetic):
            sample = self._sample(_LARGE_SAMPLE)
            kept = servable(sample, self.scheduler, self.profile, self.engine)
        return float(kept.mean()), Moments.of(sample.prompt_tokens[kept], sample.output_tokens[kept])

    def _sample(self, n: int) -> Requests:
        """n requests of a recipe, or all of a trace once."""
        rng = np.random.default_rng(0)
        return self._sizes(rng, n) if isinstance(self.workload, Synthetic) else self._recorded(rng)

    def _recorded(self, rng: np.random.Generator) -> Requests:
        """The requests of the trace, with predictions and declared lengths drawn anew if they are drawn."""
        return self.workload.replace(load=None, rate=None).draw(rng=rng)

    def _sizes(self, rng: np.random.Generator, n: int) -> Requests:
        """n requests drawn at random, at one a second."""
        if isinstance(self.workload, Synthetic):
            return self.workload.replace(num_requests=n, rate=1.0).draw(rng=rng)
        recorded = self._recorded(rng)
        index = rng.integers(len(recorded), size=n)
        columns = {f.name: getattr(recorded, f.name) for f in dataclasses.fields(recorded)}
        columns |= {"names": None, "arrival_s": np.zeros(len(recorded))}
        drawn = Requests(**columns).take(index)
        return drawn.replace(arrival_s=np.cumsum(rng.standard_exponential(n)))

    def draw(self, rate: float, num_requests: int, waiting: int, seed: int) -> Requests:
        """Requests that arrive at a rate (requests/s), after some that wait at time 0."""
        drawn = self._sizes(np.random.default_rng((seed, 1)), waiting + num_requests)
        arrival = drawn.arrival_s / rate
        arrival[waiting:] -= arrival[waiting - 1] if waiting else 0.0
        arrival[:waiting] = 0.0
        drawn = drawn.replace(arrival_s=arrival)
        if self.blocking:
            return drawn
        kept = servable(drawn, self.scheduler, self.profile, self.engine)
        return drawn if kept.all() else drawn.take(np.flatnonzero(kept))

    def least_requests(self, procedure: Procedure) -> int:
        """Arrivals of a first look: so many that what waits at first is twice what decodes together, as far
        as that is within reason."""
        share = (self.moments.output - 1) / (self.moments.prompt + self.moments.output - 1)
        decoding = self.limit.tokens * share
        wanted = math.ceil(2 * decoding / procedure.fill)
        return max(procedure.requests, min(wanted, _MOST_FIRST * procedure.requests))

    def run(self, rate: float, procedure: Procedure, num_requests: int, seed: int) -> Backlog:
        """The backlog of one run of so many arrivals."""
        waiting = round(procedure.fill * num_requests) if procedure.start == "filled" else 0
        to_spare = math.ceil(5 * math.sqrt(num_requests))  # arrivals must not end before the run
        requests = self.draw(rate, num_requests + to_spare, waiting, seed)
        at = np.arange(1, procedure.samples + 1, dtype=np.float64) * (num_requests / rate / procedure.samples)
        return watch(
            requests,
            self.scheduler,
            self.profile,
            self.engine,
            at=at,
            seed=seed,
            oversized="keep" if self.blocking else "drop",
        )


# ---------------------------------------------------------------------- one rate


@dataclasses.dataclass(frozen=True)
class Trace:
    """The backlog of one run, at K times.

    Attributes:
        time_s: (K,) float64.
        tokens: (K,) float64, left of the requests that had arrived, weighed by what they cost.
        requests: (K,) int64, arrived and not finished.
    """

    time_s: NDArray[np.float64]
    tokens: NDArray[np.float64]
    requests: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a test found at one rate.

    Attributes:
        rate: requests/s. limit_rps: of the case.
        verdict: "stable", "unstable" or "undecided".
        drift: tokens/s, of the last look.
        offered: tokens/s that arrive.
        requests: that arrived in a run of the last look. looks: how many there were.
        runs: the runs of the last look, by seed.
    """

    rate: float
    limit_rps: float
    verdict: str
    drift: Drift
    offered: float
    requests: int
    looks: int
    runs: tuple[Trace, ...] = dataclasses.field(repr=False, compare=False, default=())

    @property
    def load(self) -> float:
        """The rate as a share of the limit."""
        return self.rate / self.limit_rps

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; drifts in tokens/s and as shares of what arrives."""
        drift = dataclasses.asdict(self.drift)
        return {
            "rate": self.rate,
            "limit": self.limit_rps,
            "load": self.load,
            "verdict": self.verdict,
            "drift": drift["value"],
            "drift_interval": [drift["low"], drift["high"]],
            "drift_share": drift["value"] / self.offered,
            "drift_share_interval": [drift["low"] / self.offered, drift["high"] / self.offered],
            "offered_tokens_per_s": self.offered,
            "requests": self.requests,
            "looks": self.looks,
        }


def test(
    case: Case,
    rate: float,
    procedure: Procedure = Procedure(),
    *,
    threads: int | None = 1,
    told: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Whether a case is stable at a rate (requests/s).

    Args:
        threads: runs at once (the compiled simulator releases the GIL); None: as many as there are cores, at
            most 8. The result does not depend on it.
        told: called with a line on each look.
    """
    if not 0 < rate < math.inf:
        raise InputError(f"rate must be positive requests/s, not {rate}")
    p = procedure
    offered, first = rate * case.tokens, case.least_requests(p)
    before: Drift | None = None  # of an unstable look, which has to be confirmed
    for look in range(p.looks):
        n = first * 2**look
        told(f"{rate:.4g} requests/s, {n:,} requests")
        with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
            seen = list(pool.map(lambda seed, n=n: case.run(rate, p, n, seed), range(p.seeds)))
        runs = tuple(Trace(one.time_s, one.left @ case.weights, one.requests) for one in seen)
        arrived = [one.arrived @ case.weights for one in seen]
        each = zip(runs, arrived, strict=True)
        drifts = np.array([drift_of(run.time_s, run.tokens, all_, offered, p.start) for run, all_ in each])
        if p.start == "filled":
            high = p.resolution * offered
            low = -high
        else:
            low = high = max(p.growth * offered, critical_drift([run.time_s for run in runs], arrived))
        verdict, drift = judge(drifts, p.level, low, high)
        found = Verdict(rate, case.limit.rps, verdict, drift, offered, n, look + 1, runs)
        if verdict == STABLE or p.looks == 1:
            return found
        if verdict == UNSTABLE:
            if before is not None and drift.value > 0.5 * before.value:
                return found
            before = drift
            continue
        before = None
        if p.start == "filled" and max(-drift.low, drift.high) <= high:  # as near to 0 as can be told
            break
    return dataclasses.replace(found, verdict=UNDECIDED)


test.__test__ = False  # type: ignore[attr-defined]  # not one of pytest's


def sweep(
    case: Case,
    loads: Sequence[float],
    procedure: Procedure = Procedure(),
    *,
    threads: int | None = 1,
    told: Callable[[str], None] = lambda text: None,
) -> list[Verdict]:
    """A test with a single look at each of several loads (shares of the limit): for pictures."""
    short = dataclasses.replace(procedure, looks=1)
    return [test(case, load * case.limit.rps, short, threads=threads, told=told) for load in loads]


# ---------------------------------------------------------------------- the largest rate


@dataclasses.dataclass(frozen=True)
class Found:
    """The largest stable rate of a case, requests/s.

    Attributes:
        max_stable_rate: the largest rate that was judged stable; 0 if none was.
        unstable_rate: the smallest that was judged unstable; inf if none was.
        estimate: where the drift passes through 0, by interpolation.
        limit: that no scheduler can pass.
        served_share: share of the requests that can be served at all; the others were left out.
        tests: in the order in which they were made.
    """

    max_stable_rate: float
    unstable_rate: float
    estimate: float
    limit: Limit
    served_share: float
    tests: tuple[Verdict, ...]

    @property
    def share(self) -> float:
        """The largest stable rate as a share of the limit."""
        return self.max_stable_rate / self.limit.rps

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        rps = self.limit.rps
        return {
            "max_stable_rate": self.max_stable_rate,
            "rate_interval": [self.max_stable_rate, self.unstable_rate],
            "estimate": self.estimate,
            "limit": rps,
            "limit_kind": self.limit.kind,
            "limit_bound": self.limit.bound,
            "share": self.share,
            "share_interval": [self.share, self.unstable_rate / rps],
            "share_estimate": self.estimate / rps,
            "served_share": self.served_share,
            "tests": [one.to_dict() for one in self.tests],
        }


def search(
    case: Case,
    procedure: Procedure = Procedure(),
    *,
    threads: int | None = 1,
    told: Callable[[str], None] = lambda text: None,
) -> Found:
    """The largest rate at which a case is stable, by tests that close in on it.

    The first test is just above the limit. Each tells by the drift how many requests/s were served, which is
    near the rate that is looked for; the next ones are a little below and above that, or in the middle of
    what is left."""
    p = procedure
    tests: list[Verdict] = []
    rate = 1.05 * case.limit.rps
    low, high = 0.0, math.inf
    while True:
        tests.append(test(case, rate, p, threads=threads, told=told))
        stable = [t.rate for t in tests if t.verdict == STABLE]
        unstable = [t.rate for t in tests if t.verdict == UNSTABLE]
        low, high = max(stable, default=0.0), min(unstable, default=math.inf)
        if high - low <= p.tolerance * high < math.inf or len(tests) >= p.most_tests:
            break
        if high <= 1e-3 * case.limit.rps:  # nothing is stable
            break
        rate = _next_rate(tests, low, high, case.tokens, p.tolerance)
        if math.isnan(rate):
            break
    return Found(low, high, _root(tests, case.tokens), case.limit, case.served_share, tuple(tests))


def _root(tests: Sequence[Verdict], tokens: float) -> float:
    """The rate at which the drift passes through 0: between the tests next to it, or from the nearest of them
    by the requests/s that were served there."""
    below = max((t for t in tests if t.drift.value < 0), key=lambda t: t.rate, default=None)
    above = min((t for t in tests if t.drift.value >= 0), key=lambda t: t.rate, default=None)
    if below is not None and above is not None and below.rate < above.rate:
        share = -below.drift.value / (above.drift.value - below.drift.value)
        return below.rate + share * (above.rate - below.rate)
    nearest = min(tests, key=lambda t: abs(t.drift.value) / t.offered)
    return max(0.0, nearest.rate - nearest.drift.value / tokens)


def _next_rate(tests: Sequence[Verdict], low: float, high: float, tokens: float, tolerance: float) -> float:
    """The rate to test next, given the largest stable and the smallest unstable one; nan: it is no use."""
    root, least = _root(tests, tokens), 0.9e-3 * tests[0].limit_rps
    if root < least:
        return max(least, 0.5 * low)
    # Off the root by so little that both verdicts end the search; but where tests were undecided, by so much
    # that the drift, which is about the distance, stands out of the noise that they had.
    undecided = [t for t in tests if t.verdict == UNDECIDED]
    noise = min((0.5 * (t.drift.high - t.drift.low) / t.offered for t in undecided), default=0.0)
    off = max(0.4 * tolerance, 1.5 * noise)
    bottom = min((t.rate for t in undecided), default=math.inf)
    top = max((t.rate for t in undecided), default=0.0)
    below, above = root * (1 - off), root * (1 + (1.5 if noise else 1) * off)  # growth has to show twice
    while below > bottom * (1 - 0.25 * tolerance):
        below -= 0.5 * off * root
    while above < top * (1 + 0.25 * tolerance):
        above += 0.5 * off * root
    missing = []  # how far the bounds are from where they could be
    if low < below < high:
        missing.append((below / max(low, least), below))
    if low < above < high:
        missing.append((min(high, 1e9) / above, above))
    if missing:
        gap, rate = max(missing)
        return rate if gap > 1 + max(0.25 * tolerance, off) or not noise else math.nan
    if high == math.inf:
        return 1.3 * max(low, root)
    return math.nan if noise else 0.5 * (low + high)


# ---------------------------------------------------------------------- reports


def table(found: Mapping[str, Found]) -> Table:
    """The largest stable rates of several cases, by label, for a terminal."""
    from rich.table import Table

    headings = ("stable up to /s", "unstable from /s", "share of limit", "limit /s", "limit by", "tests")
    view = Table(box=None, pad_edge=False)
    view.add_column("scheduler", no_wrap=True)
    for heading in headings:
        view.add_column(heading, justify="right")
    for name, one in found.items():
        rps = one.limit.rps
        left_out = f" ({1 - one.served_share:.1%} turned away)" if one.served_share < 1 else ""
        view.add_row(
            name + left_out,
            f"{one.max_stable_rate:.4g}",
            f"{one.unstable_rate:.4g}",
            f"{one.share:.1%} to {one.unstable_rate / rps:.1%}",
            f"{rps:.4g}",
            f"{one.limit.bound}, {one.limit.kind}",
            str(len(one.tests)),
        )
    return view


def verdict_table(found: Mapping[str, Verdict]) -> Table:
    """Verdicts at one rate of several cases, by label, for a terminal."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    view.add_column("scheduler", no_wrap=True)
    for heading in ("verdict", "drift tokens/s", "interval", "of what arrives", "load", "requests a run"):
        view.add_column(heading, justify="right")
    for name, one in found.items():
        d = one.drift
        view.add_row(
            name,
            one.verdict,
            f"{d.value:+,.1f}",
            f"{d.low:+,.1f} to {d.high:+,.1f}",
            f"{d.value / one.offered:+.2%}",
            f"{one.load:.3f}",
            f"{one.requests:,}",
        )
    return view


def save(tests: Mapping[str, Sequence[Verdict]], folder: str | Path) -> list[Path]:
    """Write tests.csv, backlog.csv, backlog.png and drift.png into `folder`: all, or none.

    Args:
        tests: of several cases, by label.
    """
    import pandas as pd

    from baselines import plots

    folder = Path(folder)
    require_writable_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    lines: list[pd.DataFrame] = []
    for name, some in tests.items():
        for one in some:
            row = {"scheduler": name, **one.to_dict()}
            for key in ("drift_interval", "drift_share_interval"):
                row[f"{key[:-9]}_low"], row[f"{key[:-9]}_high"] = row.pop(key)
            rows.append(row)
            for seed, run in enumerate(one.runs):
                columns = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
                lines.append(pd.DataFrame({"scheduler": name, "rate": one.rate, "seed": seed, **columns}))
    writers: dict[str, Callable[[Path], object]] = {
        "tests.csv": lambda path: pd.DataFrame(rows).to_csv(path, index=False),
        "backlog.csv": lambda path: pd.concat(lines).to_csv(path, index=False),
        "backlog.png": lambda path: plots.backlog(tests, path),
        "drift.png": lambda path: plots.drift(tests, path),
    }
    with ExitStack() as stack:
        for name, write in writers.items():
            write(stack.enter_context(writing(folder / name)))
    return [folder / name for name in writers]
