"""A scheduler: its settings or the user's own function, and the engine defaults of the system it stands
for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order
from llmsched_env.core.requests import Requests
from llmsched_env.core.state import Engine, Hold, engine_dtype
from llmsched_env.errors import InputError
from llmsched_env.scheduling.forecast import forecast_size
from llmsched_env.scheduling.settings import (
    Budget,
    Pass,
    Peak,
    Routine,
    Settings,
    Sort,
    Victim,
    policy_fields,
)

ENGINE = engine_dtype(policy_fields())

# Engine settings where neither the user nor the scheduler's system says anything.
DEFAULTS: dict[str, Any] = {
    "token_budget": 2048,
    "max_num_seqs": 256,
    "watermark": 0.0,
    "preemption": "recompute",
    "async_scheduling": False,
}
_CHANGING = {Order.REMAINING, Order.BOOST, Order.LOWER_BOUND}  # their keys change with every token
_PREDICTING = {Order.OUTPUT, Order.TOTAL, Order.AREA, Order.REMAINING, Order.LOWER_BOUND}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """Who decides what runs in an iteration.

    Attributes:
        name: as in tables and on the command line.
        settings: of the one routine, or of a routine of its own.
        engine: engine settings of the system it stands for, or functions of the `EngineConfig` so far that
            give them; a user's `EngineConfig` goes before them.
        plan: a function of the user's own with the signature `plan(engine)`, plain Python or compiled by
            numba; None: the routine that `settings` names.
        uses_predictions: whether it needs predicted lengths. (The routine's orders and tests that do are
            recognised without it.)
        workspace: float64 numbers of scratch memory it needs, as a function of the number of requests and of
            clients.
        summary, source: what it is, and where its rules are from.
    """

    name: str
    settings: Settings = dataclasses.field(default_factory=Settings)
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plan: Callable[[Engine], None] | None = None
    uses_predictions: bool = False
    workspace: Callable[[int, int], int] | None = None
    summary: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        own = self.plan is not None or self.settings.routine is Routine.LEVELS
        if self.settings.order is Order.SCORE and not own:
            raise InputError("order=score is for a plan of one's own that keeps scores; set another order")

    def replace(self, **changes: Any) -> Scheduler:
        """A copy with some settings changed (`Settings.replace`)."""
        return dataclasses.replace(self, settings=self.settings.replace(**changes))

    def resolve(self, config: EngineConfig) -> EngineConfig:
        """`config` with this scheduler's defaults where it says nothing (KV capacity and model length are
        left alone: functions among the defaults need them set).

        Raises:
            InputError: if the engine is to swap, and this scheduler never brings anybody back from the CPU
                tier.
        """
        defaults = {**DEFAULTS, **self.engine}
        resolved = config.or_else(**{k: v(config) if callable(v) else v for k, v in defaults.items()})
        own = self.settings.routine is not Routine.UNIFIED and self.engine.get("preemption") == "swap"
        if resolved.preemption == "swap" and not (own or self.plan or Pass.SWAP_IN in self.settings.passes):
            raise InputError(f"scheduler {self.name} does not swap; choose preemption='recompute'")
        return resolved

    def pack(self, record: Any) -> None:
        """Write the settings into an engine's record."""
        self.settings.pack(record)
        record["enforce_budget"] = self.plan is not None
        record["steady"] = self._steady()
        record["lockstep"] = self._lockstep()

    def needs_predictions(self) -> bool:
        """Whether it decides with predicted lengths, so that requests without one are an error."""
        s = self.settings
        believed = s.peak in (Peak.PREDICTED, Peak.LOWER_BOUND) or Hold.PREDICTED in (s.test, s.hold)
        return self.uses_predictions or s.order in _PREDICTING or believed or s.protect_after != float("inf")

    def work_size(self, num_requests: int, num_clients: int) -> int:
        """float64 numbers of workspace for so many requests and clients."""
        own = self.workspace(num_requests, num_clients) if self.workspace is not None else 0
        return max(own, forecast_size(num_requests) if self.settings.peak is not Peak.NONE else 0)

    def least_blocks(
        self, requests: Requests, stop: NDArray[np.int32], limit: NDArray[np.int32], config: EngineConfig
    ) -> NDArray[np.int64]:
        """(N,) KV blocks that an engine must have so that this scheduler serves each request when it is
        alone.

        Args:
            stop, limit: (N,) tokens at which each answer ends, and at which the engine would end it at the
                latest.
            config: resolved settings.
        """
        assert (
            config.max_model_len is not None and config.kv_blocks is not None and config.watermark is not None
        )
        s, size = self.settings, config.block_size
        prompt = requests.prompt_tokens.astype(np.int64)
        held = peak = prompt + (stop - 1)
        if Hold.DECLARED in (s.hold, s.test):
            held = np.maximum(held, prompt + (limit - 1))
        if Hold.MODEL_LEN in (s.hold, s.test):
            held = np.maximum(held, config.max_model_len)
        blocks = -(-held // size)
        if s.watermark_when_idle:
            blocks = blocks + int(config.watermark * config.kv_blocks)
        if (
            s.free_block_for_decode
        ):  # the last decode, from peak - 1 to peak tokens, wants a free block in any case
            blocks = np.maximum(blocks, np.where(stop > 1, -(-(peak - 1) // size) + 1, 0))
        return np.asarray(blocks, dtype=np.int64)

    def least_budget(self, requests: Requests, stop: NDArray[np.int32]) -> NDArray[np.int64]:
        """(N,) token budget that each request needs: its whole prompt, and what a preemption adds to it,
        where prompts are not cut.
        """
        s = self.settings
        prompt = requests.prompt_tokens.astype(np.int64)
        if s.chunked or not s.limit_prefills:
            return np.ones(len(prompt), np.int64)
        return prompt if s.hold in (Hold.PEAK, Hold.DECLARED, Hold.MODEL_LEN) else prompt + stop - 1

    def _lockstep(self) -> bool:
        """Whether its requests may cruise (`core.cruise`) while it plans: it looks at no decoding request
        by itself, unless it has to preempt."""
        s = self.settings
        looks = s.sort is not Sort.ADMISSION or s.reorder_chunked or Pass.MERGED in s.passes
        return self._steady() == 2 and not looks

    def _steady(self) -> int:
        """How long its decisions stay the same while all that happens is decoding: 2, until something
        arrives, finishes or finds no block; 1, only while nobody waits; 0, they may change at any time."""
        s = self.settings
        if self.plan is not None or s.prefill_interval > 1:
            return 0
        if s.routine in (Routine.RANDOM, Routine.FASTSERVE, Routine.VTC, Routine.RANKED):
            return 0
        if s.routine is not Routine.UNIFIED:
            return 1
        moving = (
            s.peak is not Peak.NONE
            or s.admission_preempts
            or s.budget_rule is not Budget.FIXED
            or s.preempt_for_priority
        )
        keyed = (
            s.sort is Sort.KEY
            or s.victim is Victim.KEY
            or s.order in (Order.RANDOM, Order.SCORE, Order.ATTAINED)
            or (Pass.MERGED in s.passes and s.order in _CHANGING)
        )
        return 1 if moving or keyed else 2
