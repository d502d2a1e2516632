"""Sorted-F: batches of the least F = sum of outputs / size squared, one after the other."""

from __future__ import annotations

import numpy as np

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.facts import known_tokens
from llmsched_env.core.state import Engine
from llmsched_env.scheduling.forecast import forecast_size
from llmsched_env.scheduling.routine import plan_unified

_WINDOW = 256  # requests with the shortest outputs, among which a batch is chosen
_CAPS = 8  # limits on the prompt that are tried: the longest in the window, half of it, ...
_CHOSEN = 1e9  # what is taken off the key of those in the batch, so that they come first


def sorted_f_size(num_requests: int) -> int:
    """float64 numbers of workspace, behind those of the forward-looking test."""
    return forecast_size(num_requests) + 6 * _WINDOW


@njit
def plan_sorted_f(e: Engine) -> None:
    """Plan one iteration: the unified routine admits the batch; when it is used up, the next is chosen."""
    head = queue.first(e)
    if head >= 0 and e.req[head].key >= 0.0:
        _choose(e, len(e.work) - 6 * _WINDOW)
    plan_unified(e)


@njit
def _choose(e: Engine, at: int) -> None:
    """Choose the next batch and move it to the head of the queue; scratch memory begins at `at`."""
    req, work = e.req, e.work
    ids, outputs, prompts, peaks, member, best = (
        at, at + _WINDOW, at + 2 * _WINDOW, at + 3 * _WINDOW, at + 4 * _WINDOW, at + 5 * _WINDOW,
    )  # fmt: skip
    n, longest = 0, 0.0
    r = queue.first(e)
    while r >= 0 and n < _WINDOW:
        q = req[r]
        work[ids + n] = r
        work[outputs + n] = max(1.0, np.ceil(min(q.predicted, np.float64(q.limit))) - q.generated)
        work[prompts + n] = known_tokens(q) + e.s.block_size - 1
        longest = max(longest, work[prompts + n])
        n += 1
        r = queue.following(e, r)
    least = np.inf
    for _ in range(_CAPS):
        value = _fill(e, n, longest, outputs, prompts, peaks, member)
        if value < least:
            least = value
            for k in range(n):
                work[best + k] = work[member + k]
        longest *= 0.5
    for k in range(n):
        if work[best + k] > 0.0:
            r = int(work[ids + k])
            queue.remove(e, r)
            req[r].key -= _CHOSEN
            queue.insert(e, r)


@njit
def _fill(e: Engine, n: int, longest: float, outputs: int, prompts: int, peaks: int, member: int) -> float:
    """Fill a batch of prompts up to `longest`, least output first, while F falls and all fit; its F."""
    s, work = e.s, e.work
    capacity = np.float64(s.kv_blocks * s.block_size)
    size, total = 0, 0.0
    for i in range(n):
        work[member + i] = 0.0
        output, prompt = work[outputs + i], work[prompts + i]
        if prompt > longest:
            continue
        better = size == 0 or (total + output) * size * size < total * (size + 1) * (size + 1)
        if size >= s.max_num_seqs or not better:
            break
        fits = size == 0 or prompt + output <= capacity
        for k in range(i):  # usage when k completes
            if work[member + k] > 0.0 and work[peaks + k] + prompt + work[outputs + k] > capacity:
                fits = False
        if not fits:
            continue
        for k in range(i):
            work[peaks + k] += prompt + work[outputs + k]
        work[peaks + i] = prompt + output
        work[member + i] = 1.0
        size += 1
        total += output
    return total / (size * size) if size > 0 else np.inf
