"""The options of the environments: what is seen, what may be done, what is rewarded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order
from llmsched_env.core.state import Hold
from llmsched_env.envs.lane import MOST_LEVELS, MOST_SLOTS
from llmsched_env.envs.objective import Objective
from llmsched_env.envs.observation import LengthInfo, RunningOrder
from llmsched_env.errors import InputError, unknown
from llmsched_env.scenarios import Scenario
from llmsched_env.scheduling import Peak, Settings

# Keys that stay as they are while a request waits, and that need nothing but the request.
_ORDERS = (
    Order.FIFO,
    Order.ARRIVAL,
    Order.PRIORITY,
    Order.PROMPT,
    Order.LONGEST,
    Order.OUTPUT,
    Order.TOTAL,
    Order.AREA,
    Order.REMAINING,
    Order.DEADLINE,
    Order.ATTAINED,
)
_OF_LENGTH = (Order.OUTPUT, Order.TOTAL, Order.AREA, Order.REMAINING)


def _name(member: Any) -> str:
    return str(member.name).lower().replace("_", "-")


WAITING_ORDERS = {_name(order): order for order in _ORDERS}
RUNNING_ORDERS = {_name(order): order for order in RunningOrder}
LENGTHS = {_name(info): info for info in LengthInfo}
FORECAST = "forecast"
HOLDS = {_name(hold): (hold, Peak.NONE) for hold in Hold} | {FORECAST: (Hold.KNOWN, Peak.PREDICTED)}
OBSERVATIONS = ("dict", "flat")
PREEMPTS = ("free", "forced")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that all environments share.

    Attributes:
        waiting_slots, running_slots: how many waiting and running requests are visible, 1 to 64 each; the
            others appear as aggregates.
        waiting_order: which waiting requests are visible, and in which order: "fifo" (as they entered),
            "arrival", "priority", "prompt" (shortest first), "longest" (prompt), "deadline", "attained"
            (fewest tokens of the answer so far), or by what is known of lengths: "output", "total", "area",
            "remaining".
        running_order: likewise running requests: "newest" or "oldest" (by admission), "shortest" or "longest"
            (by KVs).
        chunk_levels: tokens of the prefill chunks that can be chosen, ascending; "all that fits" is added to
            them as the last. Chunks are cut to what fits.
        most_tokens: of an iteration, decodes and chunks together, where that is less than the engine's token
            budget: short iterations keep tokens coming. Decodes are never left out for it. None: no limit.
        length_info: what is known of the length of an answer before it ends: its true length ("oracle"), the
            scenario's prediction ("predicted"), the mean of its class ("class") or nothing ("none"). That is
            what is observed, and what stands in the requests' predictions; nothing else of it is visible.
        objective: what is rewarded: a name, weights by name of term, or an `Objective`, which it becomes.
        observation: "dict", a Box for each part, or "flat", one Box with all of them behind each other.
        skip_forced: whether states in which only one action is legal are passed through without asking.
        work_conserving: whether a plan can only be run when nobody else can be given tokens in it.
        preempt: "free": anybody who is not being prefilled in this plan may be preempted while somebody
            waits; "forced": only if a decode finds no KV block, or nothing else can be done.
        readmit: whether who is preempted in a plan may be admitted again in it.
        idle: whether the engine may wait for the next arrival although somebody could be served.
        hold: for how many tokens an admission reserves KV cache: "chunk" (those of this iteration), "known"
            (the prompt and the answer so far), "predicted", "declared", "peak" (the true length),
            "model-len", or "forecast": as "known", and whoever is admitted while others run must fit at every
            coming completion, by what is known of lengths (MC-SF, arXiv 2502.07115). That can still err: a
            decode that finds no block preempts somebody.
        discount_rate: rate, 1/s, at which rewards are discounted within a step by the time that has passed;
            an agent that discounts by exp(-discount_rate * info["dt"]) from step to step then maximises the
            rewards discounted in continuous time. 0: not at all.
        rate_window_s: seconds over which arrival and departure rates are averaged; None: ten times the
            scenario's time scale.
        max_steps: steps after which an episode is cut; None: no limit. It is what `max_episode_steps` of
            `gymnasium.make` is, of which the environment itself is not told; only with this one it ends as
            others do, with `metrics` in its last info.

    Raises:
        InputError: a value that does not fit, or options that contradict each other.
    """

    waiting_slots: int = 16
    running_slots: int = 16
    waiting_order: str = "arrival"
    running_order: str = "newest"
    chunk_levels: tuple[int, ...] = (128, 256, 512)
    most_tokens: int | None = None
    length_info: str = "predicted"
    objective: Any = "latency"
    observation: str = "dict"
    skip_forced: bool = True
    work_conserving: bool = False
    preempt: str = "free"
    readmit: bool = False
    idle: bool = False
    hold: str = "chunk"
    discount_rate: float = 0.0
    rate_window_s: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("waiting_slots", "running_slots"):
            value = getattr(self, name)
            if not (whole(value) and 1 <= value <= MOST_SLOTS):
                raise InputError(f"{name} must be a whole number from 1 to {MOST_SLOTS}, not {value!r}")
        for name, known in (
            ("waiting_order", WAITING_ORDERS),
            ("running_order", RUNNING_ORDERS),
            ("length_info", LENGTHS),
            ("hold", HOLDS),
            ("observation", OBSERVATIONS),
            ("preempt", PREEMPTS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise unknown(name, value, known)
        for name in ("skip_forced", "work_conserving", "readmit", "idle"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        self._set("chunk_levels", _levels(self.chunk_levels))
        self._set("objective", Objective.get(self.objective))
        if not (_number(self.discount_rate) and 0 <= self.discount_rate < math.inf):
            raise InputError(f"discount_rate must be a rate per second from 0, not {self.discount_rate!r}")
        window = self.rate_window_s
        if window is not None and not (_number(window) and 0 < window < math.inf):
            raise InputError(f"rate_window_s must be positive seconds, not {window!r}")
        for name in ("max_steps", "most_tokens"):
            value = getattr(self, name)
            if value is not None and not (whole(value) and 1 <= value < 2**63):
                raise InputError(f"{name} must be a whole number from 1, or None, not {value!r}")
        if self.hold == "peak" and self.length_info != "oracle":
            raise InputError('hold="peak" reserves for the true length; set length_info="oracle" with it')
        if self.length_info == "none":
            for name, needing in (
                ("waiting_order", [_name(order) for order in _OF_LENGTH]),
                ("hold", ["predicted", FORECAST]),
            ):
                if getattr(self, name) in needing:
                    raise InputError(
                        f'{name}="{getattr(self, name)}" with length_info="none", where nothing is known of '
                        'lengths; set length_info="class" or "predicted"'
                    )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def hold_of(settings: Settings) -> str:
    """The value of `hold` that reserves as a scheduler with these settings does."""
    return next(
        (name for name, reserves in HOLDS.items() if reserves == (settings.hold, settings.peak)),
        _name(settings.hold),
    )


NAMES = tuple(field.name for field in dataclasses.fields(Options))


def settings(scenario: Scenario) -> tuple[str, ...]:
    """The settings of a scenario that an environment's keywords can change."""
    own = [field.name for field in dataclasses.fields(scenario) if field.name not in _NAMING]
    engine = [field.name for field in dataclasses.fields(EngineConfig)]
    return (*own, *engine, *(name for name in scenario.workload.options() if name != "seed"))


_NAMING = ("name", "summary", "source", "optimum", "references")


def split(keywords: Mapping[str, Any], scenario: Scenario) -> tuple[Options, Scenario]:
    """The options among the keywords of an environment, and the scenario as the other keywords change it.

    Raises:
        InputError: for a keyword that is neither, with the nearest match, or a value that does not fit.
    """
    own = {name: value for name, value in keywords.items() if name in NAMES}
    rest = {name: value for name, value in keywords.items() if name not in NAMES}
    return Options(**own), change(scenario, rest, NAMES)


def change(scenario: Scenario, changes: Mapping[str, Any], others: tuple[str, ...]) -> Scenario:
    """The scenario with some settings changed; `others` are options that are known beside them.

    Raises:
        InputError: for a setting that there is not, with the nearest match, or a value that does not fit.
    """
    if not changes:
        return scenario
    known = (*others, *settings(scenario))
    for name in changes:
        if name not in known:
            raise unknown("option", name, known)
    return scenario.replace(**changes)


def _levels(levels: Any) -> tuple[int, ...]:
    """Chunk levels as a tuple of ints."""
    try:
        found = tuple(levels)
    except TypeError:
        found = (None,)
    if not (
        all(whole(x) and 1 <= x < 2**31 for x in found)
        and list(found) == sorted(set(found))
        and len(found) < MOST_LEVELS
    ):
        raise InputError(
            f"chunk_levels must be up to {MOST_LEVELS - 1} numbers of tokens from 1 in ascending order, "
            f"not {levels!r}"
        )
    return tuple(map(int, found))


def whole(value: Any) -> bool:
    """Whether it is a whole number, Python's or NumPy's."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return whole(value) or isinstance(value, float | np.floating)
