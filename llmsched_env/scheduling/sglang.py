"""SGLang: prefills first, a moving estimate of what decodes will need, retraction when it was too low."""

from __future__ import annotations

import dataclasses

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import evict, grant, grant_error
from llmsched_env.core.facts import known_tokens
from llmsched_env.core.state import Engine
from llmsched_env.errors import InputError
from llmsched_env.scheduling.common import decode_blocks, fits_alone, next_tokens


@dataclasses.dataclass(frozen=True)
class SGLang:
    """Parameters of SGLang. The chunk size is the engine's token budget.

    Attributes:
        max_prefill_tokens: most prefill tokens of an iteration, except for its first request.
        clip_tokens: most output tokens that the admission test counts for a request.
        ratio: share of their declared output that running requests are first expected to need.
        least_ratio: what it falls to,
        ratio_steps: in so many decode iterations.
        retract_steps: tokens per remaining request that a retraction frees.
        mixed_chunk: whether decodes join a prefill batch.
    """

    max_prefill_tokens: int = 16384
    clip_tokens: int = 4096
    ratio: float = 0.7
    least_ratio: float = 0.098
    ratio_steps: int = 600
    retract_steps: int = 20
    mixed_chunk: bool = False

    def __post_init__(self) -> None:
        if not (
            0 <= self.least_ratio <= self.ratio <= 1 and self.ratio_steps >= 1 and self.retract_steps >= 0
        ):
            raise InputError(
                f"0 <= least_ratio <= ratio <= 1, ratio_steps >= 1 and retract_steps >= 0 must hold: {self}"
            )


_MAX_PREFILL, _CLIP, _INITIAL, _LEAST, _STEPS, _RETRACT, _MIXED = range(7)

# `work`: the ratio (0: not set), whether the batch was found full, requests finished when last looked, the
# iteration after the one last planned
_RATIO, _FULL, _FINISHED, _NEXT = range(4)
SGLANG_SIZE = 4


@njit
def plan_sglang(e: Engine) -> None:
    """Plan one iteration: a prefill batch if there is one, else all decodes; both, where chunks are mixed."""
    s, work = e.s, e.work
    if work[_RATIO] == 0.0 or s.num_running + s.num_waiting == 0:
        work[_RATIO] = s.x[_INITIAL]
    elif s.iterations > work[_NEXT]:  # decodes that were taken in one go
        _decay(e, s.iterations - work[_NEXT])
    work[_NEXT] = s.iterations + 1.0
    if s.num_finished > work[_FINISHED]:
        work[_FINISHED] = s.num_finished
        work[_FULL] = 0.0
    if s.x[_MIXED] > 0.0:
        retracted = _decode(e)
        _prefill(e, not retracted)
        if s.prefill_requests == 0 and not retracted:
            _decay(e, 1.0)
    else:
        _prefill(e, True)
        if s.prefill_requests == 0 and not _decode(e):
            _decay(e, 1.0)


@njit
def _decay(e: Engine, steps: float) -> None:
    """Lower the ratio as `steps` decode iterations without a retraction do."""
    x = e.s.x
    e.work[_RATIO] = max(x[_LEAST], e.work[_RATIO] - steps * (x[_INITIAL] - x[_LEAST]) / x[_STEPS])


# --------------------------------------------------------------------------------------------------- prefills


@njit
def _to_come(e: Engine, q) -> int:  # type: ignore[no-untyped-def]
    """Output tokens that q may still produce, as far as they are counted."""
    return min(q.limit - q.generated, int(e.s.x[_CLIP]))


@njit
def _prefill(e: Engine, admits: bool) -> None:
    """Grant the unfinished chunk, then admissions while budgets and the expected memory suffice.

    At most one request is partly prefilled. The memory test is waived for the first request of an idle
    engine.
    """
    s, req, work = e.s, e.req, e.work
    left = int(s.x[_MAX_PREFILL]) - s.decodes
    chunk = s.token_budget - s.decodes
    reserved = 0.0
    unfinished = -1
    for k in range(s.num_running):
        q = req[e.running[k]]
        if q.computed >= q.target:
            reserved += work[_RATIO] * _to_come(e, q)
        else:
            unfinished = e.running[k]
    if unfinished >= 0:
        q = req[unfinished]
        rest = q.target - q.computed
        want = min(rest, chunk, (s.free + q.blocks) * s.block_size - q.computed)
        if want > 0:
            grant(e, unfinished, want)
        if want < rest:
            return
        left -= want
        chunk -= want
        reserved += _to_come(e, q)
    while admits and work[_FULL] == 0.0 and s.num_waiting > 0 and s.num_running < s.max_num_seqs:
        r = queue.first(e)
        q = req[r]
        rest = known_tokens(q)
        if s.num_running > 0 and rest + _to_come(e, q) >= s.free * s.block_size - reserved:
            work[_FULL] = 1.0
            return
        want = min(rest, chunk)
        if (rest > left and s.prefill_requests > 0) or not fits_alone(e, q) or grant_error(e, r, want) != 0:
            return
        grant(e, r, want)
        if want < rest:
            return
        left -= want
        chunk -= want
        reserved += _to_come(e, q)


# ---------------------------------------------------------------------------------------------------- decodes


@njit
def _decode(e: Engine) -> bool:
    """Grant all decodes; returns whether memory was short, so that some were retracted."""
    s, req = e.s, e.req
    short = decode_blocks(e) > s.free
    if short:
        _retract(e)
    for k in range(s.num_running):
        q = req[e.running[k]]
        if q.computed >= q.target and next_tokens(q) > 0:
            grant(e, e.running[k], 1)
    return short


@njit
def _retract(e: Engine) -> None:
    """Preempt decodes until the others have room for some steps: fewest tokens first, then longest prompt.

    One stays. The ratio becomes what those who stay have used, and these steps.
    """
    s, req = e.s, e.req
    decodes = 0
    for k in range(s.num_running):
        q = req[e.running[k]]
        if q.computed >= q.target:
            decodes += 1
    retracted = 0
    while decodes > 1:
        room = s.free * s.block_size >= int(s.x[_RETRACT]) * decodes and decode_blocks(e) <= s.free
        if room and retracted > 0:
            break
        worst = -1
        for k in range(s.num_running):
            r = e.running[k]
            if req[r].computed >= req[r].target and (worst < 0 or not _outlasts(e, r, worst)):
                worst = r
        evict(e, worst)
        retracted += 1
        decodes -= 1
    k = s.num_running - 1
    while k >= 0 and decode_blocks(e) > s.free:  # the memory is with an unfinished chunk
        if req[e.running[k]].computed < req[e.running[k]].target:
            evict(e, e.running[k])
        k -= 1
    generated, declared = 0, 0
    for k in range(s.num_running):
        q = req[e.running[k]]
        if q.computed >= q.target:
            generated += q.generated
            declared += q.limit
    e.work[_RATIO] = min(1.0, (generated + s.x[_RETRACT] * decodes) / max(1, declared))
    e.work[_FULL] = 0.0


@njit
def _outlasts(e: Engine, a: int, b: int) -> bool:
    """Whether b is retracted before a."""
    p, q = e.req[a], e.req[b]
    return p.generated > q.generated or (p.generated == q.generated and p.prompt < q.prompt)
