"""A priority rule with a few numbers to tune: who has the lowest score comes first."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.cost import batch_time
from llmsched_env.core.engine import evict, grant
from llmsched_env.core.facts import blocks_for, known_tokens
from llmsched_env.core.state import Engine
from llmsched_env.errors import InputError
from llmsched_env.scheduling.common import decode_blocks, insert_pair, peak_with, set_pair, sort_pairs
from llmsched_env.scheduling.routine import visit_running
from llmsched_env.scheduling.settings import Pass

_DECODES = int(Pass.DECODES)
_MISFITS = 64  # requests that may be tried in vain in one iteration


@dataclasses.dataclass(frozen=True)
class PriorityRule:
    """Parameters of the priority rule. Its score is a sum of

        area * ln(KV area)    the tokens of KV cache that a request will hold, summed over the output tokens
                              still to come: O*I + O^2/2; of one without a predicted length, its known tokens
        + prompt * ln(tokens) that are known of it, prompt and answer so far: its prefill
        - age * seconds       since it arrived
        + urgency * slack     the share of its time to first token that is left: 1 at arrival and without
                              a target, 0 when the token is due, and from then on
        + late                if its first token came late, or will even if it gets the engine to itself
        + priority * number   its priority, 0 being the highest

    Attributes:
        area, prompt, age (1/s), urgency, late, priority: the weights.
        trust: share of each predicted length that is taken for sure; an admission has to leave room for as
            much at every coming completion. 0: no such test, as for requests without a predicted length.
        headroom: share of the KV blocks that admissions leave free, unless the engine is idle.
        margin: behind a request that does not fit, others are tried whose score is at most so much higher;
            0: only its equals, inf: all.
        budget: tokens of an iteration up to which prompts fill it up beside the decodes.
        pace: that many are halved until the iteration stays within the time that each decoding request has in
            hand before its next token is due, or `pace` times its target if that is longer; inf: regardless
            of targets. Requests whose first token was late have no say.
    """

    area: float = 1.0
    prompt: float = 0.0
    age: float = 0.0
    urgency: float = 0.0
    late: float = 0.0
    priority: float = 0.0
    trust: float = 1.0
    headroom: float = 0.0
    margin: float = math.log(2)
    budget: float = math.inf
    pace: float = math.inf

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or math.isnan(value):
                raise InputError(f"priority rule: {field.name} must be a number, not {value!r}")
            if field.name in _WEIGHTS and not math.isfinite(value):
                raise InputError(f"priority rule: the weight {field.name} must be finite, not {value}")
            object.__setattr__(self, field.name, float(value))
        for name, least, most in (
            ("trust", 0.0, 1.0),
            ("headroom", 0.0, 0.99),
            ("margin", 0.0, math.inf),
            ("budget", 1.0, math.inf),
            ("pace", 0.0, math.inf),
        ):
            if not least <= getattr(self, name) <= most:
                value = getattr(self, name)
                raise InputError(f"priority rule: {name} must be from {least:g} to {most:g}, not {value:g}")


_WEIGHTS = ("area", "prompt", "age", "urgency", "late", "priority")
_AREA, _PROMPT, _AGE, _URGENCY, _LATE, _PRIORITY, _TRUST, _HEADROOM, _MARGIN, _BUDGET, _PACE = range(11)


def rule_size(num_requests: int, num_clients: int) -> int:
    """float64 numbers of workspace: pairs for the peak of memory."""
    return 2 * (num_requests + 1)


@njit
def plan_rule(e: Engine) -> None:
    """Plan one iteration: every decode, then prompts, unfinished and waiting ones, lowest score first.

    When KV blocks run out, who has the highest score makes room, and nobody is admitted.
    """
    s = e.s
    promised = _promised(e)
    if s.num_running > 0 and s.free < s.num_running + promised:  # else there is room in any case
        while decode_blocks(e) + promised > s.free:
            evict(e, _worst(e))
            promised = _promised(e)
    visit_running(e, _DECODES, 2**31 - 1, False)
    if s.num_waiting == 0 and s.decodes == s.num_running:
        return
    _serve_prompts(e, _prompt_tokens(e))


@njit
def score(e: Engine, r: int) -> float:
    """What request r is ranked by."""
    s, q = e.s, e.req[r]
    x = s.x
    known = np.float64(known_tokens(q))
    if np.isnan(q.predicted):
        area = known
    else:
        coming = max(1.0, q.predicted - q.generated)
        area = coming * known + 0.5 * coming * coming
    value = x[_AREA] * np.log(area) + x[_PROMPT] * np.log(known)
    value += x[_PRIORITY] * q.priority - x[_AGE] * (s.clock - q.arrival)
    slack = 1.0
    if q.ttft_target < np.inf:
        slack = 0.0
        due = q.arrival + q.ttft_target
        if q.generated > 0:
            late = q.first_token > due
        else:
            rest = np.float64(q.prompt - q.computed)
            soonest = batch_time(
                e.cost, rest, 1.0, rest * (q.computed + 0.5 * rest), np.float64(q.computed), 0.0, 0.0
            )
            late = s.clock + soonest > due
            slack = max(0.0, (due - s.clock) / q.ttft_target)
        if late:
            value += x[_LATE]
    return value + x[_URGENCY] * slack


# ------------------------------------------------------------------------------------------ running requests


@njit
def _promised(e: Engine) -> int:
    """KV blocks that unfinished prompts will still need; they count as taken."""
    blocks = 0
    for k in range(e.s.num_running):
        q = e.req[e.running[k]]
        if q.computed < q.target:
            blocks += blocks_for(e, q.target) - q.blocks
    return blocks


@njit
def _worst(e: Engine) -> int:
    """The running request with the highest score, the later one of equals."""
    worst, most = -1, -np.inf
    for k in range(e.s.num_running):
        r = e.running[k]
        own = score(e, r)
        if own > most or (own == most and r > worst):
            worst, most = r, own
    return worst


@njit
def _prompt_tokens(e: Engine) -> int:
    """Prompt tokens that this iteration may hold beside its decodes."""
    s, x = e.s, e.s.x
    left = int(max(0.0, min(np.float64(s.budget), x[_BUDGET] - s.decodes)))
    if x[_PACE] == np.inf:
        return left
    seconds = np.inf
    for k in range(s.num_running):
        q = e.req[e.running[k]]
        if q.granted == 0 or q.computed < q.target or q.tpot_target == np.inf:
            continue
        if q.first_token - q.arrival <= q.ttft_target:
            in_hand = q.first_token + q.generated * q.tpot_target - s.clock
            seconds = min(seconds, max(in_hand, x[_PACE] * q.tpot_target))
    while left > 0 and _time_with(e, left) > seconds:
        left //= 2
    return left


@njit
def _time_with(e: Engine, tokens: int) -> float:
    """Seconds of the iteration with so many tokens of one prompt from its beginning."""
    s = e.s
    p = np.float64(tokens)
    return batch_time(e.cost, p, 1.0, 0.5 * p * p, 0.0, np.float64(s.decodes), np.float64(s.decode_context))


# ---------------------------------------------------------------------------------------------------- prompts


@njit
def _serve_prompts(e: Engine, left: int) -> None:
    """Give `left` tokens to unfinished prompts and to waiting requests, which they admit, lowest score first;
    who does not fit is passed over."""
    s, x = e.s, e.s.x
    room = s.free - _promised(e)  # blocks for admissions; while somebody runs, so many of them stay free:
    headroom = int(x[_HEADROOM] * s.kv_blocks) + s.watermark_blocks
    waiting = -1
    if s.num_victims == 0 and queue.first_fit(e, room - (headroom if s.num_running > 0 else 0)) >= 0:
        _rank(e)
        waiting = queue.first(e)
    begun = _next_begun(e)
    pairs = -1  # of the running requests, in `work`: not set yet
    misfits, last = 0, np.inf
    while left > 0:
        if waiting >= 0 and (e.req[waiting].key > last or s.num_running >= s.max_num_seqs):
            waiting = -1
        if begun >= 0 and (waiting < 0 or e.req[begun].score <= e.req[waiting].key):
            tokens = min(left, e.req[begun].target - e.req[begun].computed)
            grant(e, begun, tokens)
            left -= tokens
            begun = _next_begun(e)
            continue
        if waiting < 0:
            return
        r = waiting
        q = e.req[r]
        fits = q.need <= room - (headroom if s.num_running > 0 else 0)
        if fits and x[_TRUST] > 0.0 and s.num_running > 0 and not np.isnan(q.predicted):
            if pairs < 0:
                pairs = _set_pairs(e)
            fits = peak_with(e, 0, pairs, _coming(e, q), _held(e, q)) <= s.kv_blocks * s.block_size
        waiting = queue.following(e, r)
        if fits:
            if pairs >= 0:
                insert_pair(e, 0, pairs, _coming(e, q), _held(e, q))
                pairs += 1
            tokens = min(left, known_tokens(q))
            room -= q.need
            grant(e, r, tokens)
            left -= tokens
        else:
            if misfits == 0:
                last = q.key + x[_MARGIN]
            misfits += 1
        if misfits > _MISFITS:
            waiting = -1
        elif misfits > 0 and waiting >= 0 and e.req[waiting].need > room - headroom:
            waiting = queue.following_fit(e, waiting, room - headroom)


@njit
def _next_begun(e: Engine) -> int:
    """The unfinished prompt with the lowest score that has no tokens yet in this iteration; -1: none."""
    best = -1
    for k in range(e.s.num_running):
        r = e.running[k]
        q = e.req[r]
        if q.computed < q.target and q.granted == 0:
            q.score = score(e, r)
            if best < 0 or q.score < e.req[best].score:
                best = r
    return best


@njit
def _rank(e: Engine) -> None:
    """Bring the queue into the order of the scores of now, which has mostly changed little."""
    req = e.req
    out, count = e.victims, 0  # scratch: nobody is preempted in this iteration
    best, rank = -np.inf, -1
    r = queue.first(e)
    while r >= 0:
        after = queue.following(e, r)
        q = req[r]
        own = score(e, r)
        if own < best or (own == best and q.rank < rank):
            queue.remove(e, r)
            out[count] = r
            count += 1
        else:
            best, rank = own, q.rank
        q.key = own
        q.order = q.rank
        r = after
    for i in range(count):
        queue.insert(e, out[i])


# ----------------------------------------------------------------------------------------- the peak of memory


@njit
def _set_pairs(e: Engine) -> int:
    """Note what each running request holds and will still add, for `peak_with`; returns how many they are."""
    n = e.s.num_running
    for k in range(n):
        q = e.req[e.running[k]]
        set_pair(e, 0, k, _coming(e, q), _held(e, q))
    sort_pairs(e, 0, n)
    return n


@njit
def _coming(e: Engine, q) -> float:  # type: ignore[no-untyped-def]
    """Output tokens that q is trusted to add; at least 1."""
    length = q.generated + 1.0
    if not np.isnan(q.predicted):
        length = np.ceil(min(max(e.s.x[_TRUST] * q.predicted, length), np.float64(q.limit)))
    return max(1.0, length - q.generated)


@njit
def _held(e: Engine, q) -> float:  # type: ignore[no-untyped-def]
    """Tokens of KV of q before its next token comes out, as if its prompt were done; blocks are taken
    whole."""
    decodes = q.target > 0 and q.computed >= q.target
    return np.float64((q.computed if decodes else known_tokens(q) - 1) + e.s.block_size - 1)
