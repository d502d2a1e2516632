"""The settings of the one scheduling routine, and how they are packed for compiled code."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold, Listing
from llmsched_env.errors import InputError, unknown


class Routine(enum.IntEnum):
    """Which compiled function plans an iteration."""

    UNIFIED = 0
    RANDOM = 1
    FASTSERVE = 2
    SGLANG = 3
    TRTLLM = 4
    LIGHTLLM = 5
    TGI = 6
    VTC = 7
    RANKED = 8  # LTR
    SORTED_F = 9
    WAIT = 11
    SLAI = 13
    SIMPLE_CHUNKING = 14
    PRIORITY_RULE = 15
    LEVELS = 16


class Pass(enum.IntEnum):
    """One walk over requests; a scheduler makes up to four, in its order."""

    NONE = 0
    RUNNING = 1  # decodes and unfinished prefills, in the order of the running list
    DECODES = 2
    CHUNKS = 3  # running requests whose prefill is unfinished
    ADMIT = 4  # the queue
    SWAP_IN = 5  # the CPU tier
    MERGED = 6  # running and waiting requests together, by the queue's key


class Victim(enum.IntEnum):
    """Who is preempted when a running request finds no KV block."""

    NEWEST = 0  # the last of the running list (vLLM, Sarathi-Serve, "NRF")
    PRIORITY = 1  # the lowest priority, then the latest arrival, even if it is in the plan already
    SHORTEST = 2  # fewest KVs among those not in the plan ("SRF"), newest among equals
    LONGEST = 3  # most KVs among those not in the plan ("LRF")
    KEY = 4  # the last in the queue's order, among those not in the plan
    LEAST_KEY = 5  # the first in the queue's order, even if it is in the plan already (A_min)


class Sort(enum.IntEnum):
    """How the running list is ordered before an iteration is planned."""

    ADMISSION = 0
    ARRIVAL = 1
    LONGEST_KV = 2  # most KVs first
    KEY = 3  # the queue's key


class Budget(enum.IntEnum):
    """How many tokens an iteration may hold."""

    FIXED = 0
    PRESSURE = 1  # `budget_low` while two prefills or more are under way or wait and somebody decodes (P-PAS)


class Peak(enum.IntEnum):
    """The forward-looking admission test: whether memory suffices at every coming completion."""

    NONE = 0
    PREDICTED = 1  # with predicted lengths
    TRUE = 2  # with true lengths
    LOWER_BOUND = 3  # with the lower bounds of the order of that name (A_min)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What makes a scheduler, in the vocabulary of one routine (after INFERMAX, arXiv 2411.07447, section 3).

    An iteration is planned by up to four passes. A pass visits requests in order and gives each the tokens it
    wants, as the token budget, the running slots and the KV cache allow; a running request that finds no
    block preempts a victim.

    What would do nothing as the others stand, or contradicts them, is an `InputError`.

    Attributes:
        routine: the compiled function; all but `UNIFIED` have rules of their own and read `x`.
        passes: the walks of an iteration, in order.
        order: order of the waiting queue.
        resume: where a preempted request enters it again.
        mixed: whether prefill and decode tokens may share an iteration; if not, the first pass that finds
            work wins.
        chunked: whether prompts may be cut to the token budget; if not, a prompt that does not fit stops the
            pass.
        chunk_cap: most tokens of one chunk; 0: the budget alone (vLLM V1: long_prefill_token_threshold).
        chunk_cap_alone: whether the cap also holds for a request that is alone in the engine (vLLM V1 0.11:
            yes, 0.33: no).
        chunk_cap_adaptive: raise the cap to token budget // requests present (vLLM V1 0.33, optional).
        limit_decodes: whether decodes stop at the token budget; else they only use it up.
        limit_prefills: whether prefills stop at the token budget; else prompts of any length run together.
        test: for how many tokens KV must be free to admit a request, at least those of `hold`.
        hold: for how many tokens KV is reserved at once.
        watermark_when_idle: whether the watermark also holds while nothing runs.
        admit_after_preemption: whether requests are admitted in an iteration that preempted someone.
        admit_while_swapped: whether new requests are admitted while some are in the CPU tier.
        defer_victims: whether a victim enters the queue only when the plan is complete.
        drop_unfit: whether a request that not even the empty engine could take is dropped when its turn comes
            (vLLM v0), rather than waiting for ever.
        pass_over: whether a prompt that may not be cut and exceeds the token budget is passed over, rather
            than stopping the pass (vLLM V1 0.11).
        backfill: behind a request that does not fit, later ones that the free blocks can take are admitted
            until so many of them fail another test; 0: strict head-of-line blocking.
        backfill_within: with that, only requests whose key is at most so many times that of the first that
            does not fit.
        victim: who is preempted.
        sort: how the running list is ordered.
        free_block_for_decode: whether every decode needs a free block even if it crosses no block boundary
            (vLLM v0, Sarathi-Serve).
        free_block_for_chunk: likewise an unfinished chunk, unless its sequence ends on a block boundary (vLLM
            v0, chunked).
        reorder_chunked: vLLM v0's running list after a chunked iteration: left-overs, swapped in, decodes,
            prefills, new.
        listing: the order in which the plan is reported.
        admission_preempts: whether the queue's head may preempt running requests that come after it in the
            order (SRPT, priorities).
        protect_after: with that, share of the predicted output after which a request is not preempted
            (TRAIL); inf: never safe.
        preempt_for_priority: vLLM v0's priority policy.
        max_batch_requests: most requests in one iteration; 0: no limit.
        prefill_interval: iterations between two that carry prefills (vLLM V1: prefill_schedule_interval).
        budget_rule: how the token budget of an iteration is set.
        budget_low: the smaller budget, for rules that move it between that and the engine's.
        peak: the forward-looking admission test.
        length_classes: SRF+Hist: admit a prompt of a length class only if its mean total would fit.
        hist_threshold: smallest prompt for which that holds.
        boost_gamma: gamma of the `BOOST` order, per second.
        boost_s_per_token: seconds that it takes a prefill token to need.
        lower_bound: share of the predicted output that the `LOWER_BOUND` order and test take for sure.
        stop_one_later: whether an answer ends when it exceeds the model length rather than when it reaches it
            (vLLM v0).
        x: what a routine of its own is set by: a dataclass of up to 16 numbers, or a tuple of them.
    """

    routine: Routine = Routine.UNIFIED
    passes: tuple[Pass, ...] = (Pass.RUNNING, Pass.ADMIT)
    order: Order = Order.FIFO
    resume: Place = Place.HEAD
    mixed: bool = True
    chunked: bool = True
    chunk_cap: int = 0
    chunk_cap_alone: bool = False
    chunk_cap_adaptive: bool = False
    limit_decodes: bool = True
    limit_prefills: bool = True
    test: Hold = Hold.KNOWN
    hold: Hold = Hold.CHUNK
    watermark_when_idle: bool = True
    admit_after_preemption: bool = True
    admit_while_swapped: bool = False
    defer_victims: bool = False
    drop_unfit: bool = False
    pass_over: bool = False
    backfill: int = 0
    backfill_within: float = float("inf")
    victim: Victim = Victim.NEWEST
    sort: Sort = Sort.ADMISSION
    free_block_for_decode: bool = False
    free_block_for_chunk: bool = False
    reorder_chunked: bool = False
    listing: Listing = Listing.PLANNED
    admission_preempts: bool = False
    protect_after: float = float("inf")
    preempt_for_priority: bool = False
    max_batch_requests: int = 0
    prefill_interval: int = 1
    budget_rule: Budget = Budget.FIXED
    budget_low: int = 0
    peak: Peak = Peak.NONE
    length_classes: bool = False
    hist_threshold: int = 0
    boost_gamma: float = 0.0
    boost_s_per_token: float = 0.0
    lower_bound: float = 1.0
    stop_one_later: bool = False
    x: Any = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.passes) <= 4:
            raise InputError(f"a scheduler makes 1 to 4 passes, not {len(self.passes)}")
        for name in ("chunk_cap", "backfill", "max_batch_requests", "budget_low", "hist_threshold"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.prefill_interval < 1:
            raise InputError(f"prefill_interval must be at least 1, not {self.prefill_interval}")
        if self.order is Order.BOOST and not (self.boost_gamma > 0 and self.boost_s_per_token > 0):
            both = f"{self.boost_gamma} and {self.boost_s_per_token}"
            raise InputError(f"the order BOOST needs boost_gamma and boost_s_per_token above 0, not {both}")
        if self.budget_rule is not Budget.FIXED and self.budget_low < 1:
            raise InputError(f"budget_low must be at least 1 token, not {self.budget_low}")
        if not 0 < self.lower_bound <= 1:
            raise InputError(
                f"lower_bound must be a share of the prediction in (0, 1], not {self.lower_bound}"
            )
        if not self.backfill_within >= 1:
            raise InputError(f"backfill_within must be at least 1, not {self.backfill_within}")
        if not self.protect_after > 0:
            raise InputError(f"protect_after must be above 0, not {self.protect_after}; inf: never safe")
        if len(_numbers(self.x)) > _X:
            raise InputError(f"x holds at most {_X} numbers, not {len(_numbers(self.x))}")
        for complaint in _complaints(self):
            raise InputError(f"scheduler setting {complaint}")

    def names(self) -> list[str]:
        """The names that `replace` knows: the settings in `x`, and then the others."""
        return [*self._own(), *(f.name for f in dataclasses.fields(self) if f.name not in ("routine", "x"))]

    def _own(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self.x)] if dataclasses.is_dataclass(self.x) else []

    def replace(self, **changes: Any) -> Settings:
        """A copy with some settings changed, those in `x` included.

        Values may be text, as from a command line; unknown names are an `InputError`, and so are those that a
        routine of its own does not read.
        """
        own, known = self._own(), self.names()
        parsed: dict[str, Any] = {}
        x: dict[str, Any] = {}
        for name, value in changes.items():
            if name in own:
                x[name] = _parse(name, value, getattr(self.x, name))
            elif name in known:
                if name in _UNREAD.get(self.routine, ()):
                    where = f"the routine {_text(self.routine)} of this scheduler"
                    raise InputError(f"scheduler setting {name} does nothing in {where}; leave it out")
                parsed[name] = _parse(name, value, getattr(self, name))
            else:
                raise unknown("scheduler setting", name, known)
        if x:
            parsed["x"] = dataclasses.replace(self.x, **x)
        return dataclasses.replace(self, **parsed)

    def pack(self, record: Any) -> None:
        """Write the settings into the fields of an engine's record."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "passes":
                for i in range(4):
                    record[f"pass{i}"] = value[i] if i < len(value) else Pass.NONE
            elif field.name == "x":
                record["x"][: len(_numbers(value))] = _numbers(value)
            else:
                record[field.name] = value


# -- settings that could not do what they say
# ----------------------------------------------------------------------------------------------------


_GO_ON = {Pass.RUNNING, Pass.CHUNKS, Pass.MERGED}  # with prompts that were cut


def _complaints(s: Settings) -> Iterator[str]:
    """What would do nothing as the others stand, or contradicts them, and how to mend it."""
    needs: dict[str, tuple[object, str]] = {
        "backfill_within": (s.backfill > 0, "backfill"),
        "protect_after": (s.admission_preempts, "admission_preempts"),
        "chunk_cap_adaptive": (s.chunk_cap > 0, "chunk_cap"),
        "budget_low": (s.budget_rule is Budget.PRESSURE, "budget_rule=pressure"),
        "hist_threshold": (s.length_classes, "length_classes"),
        "boost_gamma": (s.order is Order.BOOST, "order=boost"),
        "boost_s_per_token": (s.order is Order.BOOST, "order=boost"),
        "lower_bound": (
            s.order is Order.LOWER_BOUND or s.peak is Peak.LOWER_BOUND,
            "order=lower-bound or peak=lower-bound",
        ),
    }
    if s.routine in (Routine.UNIFIED, Routine.SORTED_F):  # they make the passes
        yield from _complaints_of_passes(s)
        passes = {*s.passes}
        admits = (Pass.ADMIT in passes, "the pass admit")
        needs |= {
            "backfill": admits,
            "peak": admits,
            "pass_over": admits,
            "admit_after_preemption": admits,
            "admission_preempts": admits,
            "preempt_for_priority": admits,
            "drop_unfit": (passes & {Pass.ADMIT, Pass.SWAP_IN}, "the pass admit or swap-in"),
            "admit_while_swapped": (Pass.SWAP_IN in passes, "the pass swap-in"),
            "limit_decodes": (passes & {Pass.RUNNING, Pass.DECODES}, "the pass running or decodes"),
            "free_block_for_chunk": (passes & _GO_ON, "the pass running, chunks or merged"),
        }
    for name, (there, needed) in needs.items():
        value, default = getattr(s, name), getattr(Settings, name)
        if value != default and not there:
            what = f"{name}={_text(value)} does nothing without {needed}"
            yield f"{what}; set that, or leave {name}={_text(default)}"
    if s.admission_preempts:
        if s.resume is Place.HEAD:
            yield "admission_preempts with resume=head brings a victim back first of all; set resume=key"
        if s.order is Order.FIFO:
            yield "admission_preempts with order=fifo, where nobody comes before who runs; set another order"
        if s.preempt_for_priority:
            yield "admission_preempts and preempt_for_priority are two rules for one thing; set one of them"
    if s.preempt_for_priority:
        if s.order is not Order.PRIORITY:
            yield f"preempt_for_priority with order={_text(s.order)}; set order=priority"
        if s.resume is Place.END:
            yield "preempt_for_priority with resume=end leaves victims behind all others; set resume=head"
    if s.backfill_within < float("inf") and s.order in (Order.FIFO, Order.LONGEST):
        yield f"backfill_within with order={_text(s.order)}, whose keys are not above 0; set another order"


def _complaints_of_passes(s: Settings) -> Iterator[str]:
    passes = {*s.passes}
    if Pass.NONE in passes:
        yield "passes holds none, which is no pass; leave it out"
    if not passes & {Pass.RUNNING, Pass.DECODES, Pass.MERGED}:
        yield "passes never let anybody decode; add running, or decodes"
    if not passes & {Pass.ADMIT, Pass.MERGED}:
        yield "passes never admit anybody; add admit"
    if ((s.chunked and s.limit_prefills) or s.chunk_cap > 0) and not passes & _GO_ON:
        yield "passes never go on with a prompt that was cut; add chunks, or set chunked=false, chunk_cap=0"
    if not s.mixed and passes & {Pass.RUNNING, Pass.MERGED}:
        yield "mixed=false with a pass that mixes prefills and decodes; set passes=decodes,chunks,admit"
    if s.prefill_interval > 1 and Pass.MERGED in passes:
        yield "prefill_interval with the pass merged, which does not wait for it; set passes=running,admit"
    if s.reorder_chunked and s.sort is not Sort.ADMISSION:
        yield f"reorder_chunked and sort={_text(s.sort)} both order the running list; set sort=admission"


def _text(value: Any) -> str:
    """A setting's value as on the command line."""
    if isinstance(value, enum.IntEnum):
        return value.name.lower().replace("_", "-")
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


# What routines of their own do not read: they share less and less with the one routine.
_OF_VICTIMS = {"victim", "free_block_for_decode", "free_block_for_chunk"}
_OF_RUNNING = {
    "mixed",
    "limit_decodes",
    "chunk_cap",
    "chunk_cap_alone",
    "chunk_cap_adaptive",
    "max_batch_requests",
}
_OF_ADMISSION = {
    "admit_after_preemption",
    "admit_while_swapped",
    "drop_unfit",
    "pass_over",
    "backfill",
    "backfill_within",
    "admission_preempts",
    "protect_after",
    "peak",
    "length_classes",
    "hist_threshold",
}
_OF_PASSES = {
    "passes",
    "sort",
    "prefill_interval",
    "reorder_chunked",
    "preempt_for_priority",
    "budget_rule",
    "budget_low",
}
_OF_QUEUE = {"order", "resume"}
_NOT_ADMITTING = _OF_PASSES | _OF_ADMISSION
_ALONE = _NOT_ADMITTING | _OF_RUNNING | _OF_VICTIMS
_UNREAD: dict[Routine, set[str]] = {
    Routine.RANDOM: _ALONE,
    Routine.FASTSERVE: (_ALONE | _OF_QUEUE) - {"max_batch_requests"},
    Routine.SGLANG: _ALONE - {"mixed"},  # which only says what it is
    Routine.TRTLLM: _ALONE - {"sort"},
    Routine.LIGHTLLM: _NOT_ADMITTING,
    Routine.TGI: _OF_PASSES,
    Routine.VTC: _NOT_ADMITTING | _OF_QUEUE,
    Routine.RANKED: _ALONE,
    Routine.WAIT: (_ALONE | _OF_QUEUE) - _OF_VICTIMS,
    Routine.SLAI: _OF_PASSES,
    Routine.SIMPLE_CHUNKING: _OF_PASSES - {"sort"},
    Routine.PRIORITY_RULE: _ALONE | _OF_QUEUE,
    Routine.LEVELS: (_ALONE | _OF_VICTIMS | {"resume"}) - {"max_batch_requests"},
}


# -- how they are packed
# ----------------------------------------------------------------------------------------------------

_X = 16


def _numbers(x: Any) -> tuple[float, ...]:
    """The numbers of `x`, by position."""
    return tuple(
        float(v)
        for v in (dataclasses.astuple(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else x)
    )


def policy_fields() -> list[tuple[Any, ...]]:
    """numpy fields that hold packed `Settings`: integers, except for floats; `x` is an array."""
    fields: list[tuple[Any, ...]] = []
    for field in dataclasses.fields(Settings):
        if field.name == "passes":
            fields += [(f"pass{i}", "i8") for i in range(4)]
        elif field.name == "x":
            fields.append(("x", "f8", (_X,)))
        else:
            fields.append((field.name, "f8" if isinstance(field.default, float) else "i8"))
    # How a run treats the scheduler, and what its passes note down.
    fields += [
        ("enforce_budget", "i8"),
        ("steady", "i8"),
        ("lockstep", "i8"),
        ("last_prefill", "i8"),
        ("saturated", "i8"),
        ("unsorted", "i8"),
        ("ordered", "i8"),
    ]
    return fields


def _parse(name: str, value: Any, like: Any) -> Any:
    """`value`, perhaps text, as the type of the setting's present value."""
    try:
        if isinstance(like, bool):
            if isinstance(value, str):
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                    value.lower()
                ]
            return bool(value)
        if isinstance(like, enum.IntEnum):
            kind = type(like)
            return kind[value.upper().replace("-", "_")] if isinstance(value, str) else kind(value)
        if isinstance(like, tuple):
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(Pass[p.upper().replace("-", "_")] if isinstance(p, str) else Pass(p) for p in parts)
        if isinstance(like, float):
            number = float(value)
            if np.isnan(number):
                raise ValueError
            return number
        if isinstance(value, float) and value != int(value):
            raise ValueError
        return int(value)
    except (KeyError, ValueError, TypeError):
        known = ""
        if isinstance(like, enum.IntEnum):
            known = "; known: " + ", ".join(m.lower().replace("_", "-") for m in type(like).__members__)
        raise InputError(f"scheduler setting {name}: {value!r} is not a value for it{known}") from None
