"""What every part of the engine has to know of a request: its blocks, its lengths, its end."""

from __future__ import annotations

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.state import Engine, Hold, Status

# Plain integers: compiled code compares them fastest.
CHUNK, KNOWN, PEAK, PREDICTED, DECLARED, MODEL_LEN = (int(x) for x in Hold)
_FINISHED = int(Status.FINISHED)


@njit(forceinline=True)
def blocks_for(e: Engine, tokens: int) -> int:
    """KV blocks that hold `tokens` tokens."""
    # Unsigned, so that the division has no case for negatives.
    count: int = np.int64(np.uint32(tokens + e.s.block_size - 1) // np.uint32(e.s.block_size))  # type: ignore
    return count


@njit(forceinline=True)
def known_tokens(q) -> int:  # type: ignore[no-untyped-def]
    """Prompt and answer so far: what a re-admission would have to prefill."""
    return q.prompt + q.generated


@njit
def hold_tokens(e: Engine, q, hold: int) -> int:  # type: ignore[no-untyped-def]
    """Tokens of KV cache that the rule `hold` (`Hold`) asks for when q is admitted; 0 for CHUNK."""
    if hold == CHUNK:
        return 0
    known = q.prompt + q.generated
    if hold == KNOWN:
        return known
    if hold == PEAK:
        return q.prompt + q.stop - 1
    if hold == PREDICTED:
        whole = (
            e.s.kv_blocks - e.s.watermark_blocks
        ) * e.s.block_size  # who is predicted to need more gets all, alone
        answer = int(np.ceil(min(q.predicted, np.float64(q.limit))))
        return max(known, min(q.prompt + answer - 1, whole))
    if hold == DECLARED:
        return max(known, q.prompt + q.limit - 1)
    return e.s.max_model_len


@njit(forceinline=True)
def length_class(prompt: int) -> int:
    """floor(log2(prompt)): the length class by which finished requests are counted."""
    k = 0
    while prompt > 1:
        prompt >>= 1
        k += 1
    return k


@njit
def random_unit(e: Engine) -> float:
    """A uniform number in [0, 1) from the engine's own generator (SplitMix64)."""
    state = e.s.random + np.uint64(0x9E3779B97F4A7C15)
    e.s.random = state
    x = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return np.float64(x >> np.uint64(11)) * 2.0**-53


@njit(forceinline=True)
def finish(e: Engine, r: int, now: float) -> None:
    """Request r is done: its KV blocks are free. It still has to leave the running list."""
    s, q = e.s, e.req[r]
    s.free += q.blocks
    q.blocks = 0
    s.kv_tokens -= q.computed
    q.status = _FINISHED
    q.finish = now
    s.num_finished += 1
    k = length_class(q.prompt)
    s.class_count[k] += 1.0
    s.class_total[k] += q.prompt + q.generated
