"""The largest rate of requests that an engine can sustain: loads are shares of it.

In the fluid picture D requests decode in steady state. An iteration then carries D decode tokens and, as each
request brings E[I] prompt and E[O] output tokens, D E[I] / E[O] prefill tokens; it takes T(D) seconds and
finishes D / E[O] requests:

    rate(D) = D / (T(D) E[O])

Two limits bound D, and each gives a capacity, the largest rate(D) up to it:

* compute: the token budget C, D (1 + E[I] / E[O]) <= C, and the limit on running requests. Where T depends
  only on the number of tokens b this is Theorem 2 of Dai, Deng, Li and Peng (arXiv 2504.07347v3): with b = C,
  (b / t_b) / (E[I] + E[O]) requests/s, above which every scheduler is unstable and below which every
  work-conserving one is stable. The theorem asks that b / t_b be largest at b = C (a staircase whose step
  divides C); here the maximum is taken.
* KV memory: D mean-sized requests must fit, D E[sum over j < O of (I + j)] / E[O] <= M tokens. That is the
  limit M / (T E[g]) of Nie, Si and Zhou (arXiv 2605.04595), with g a request's lifetime KV token-iterations
  and T the time of a typical iteration: unstable above it, stable below it by a slack of about the largest
      request's share of M.

It is a fluid limit, of means: nothing is said about the time that a queue takes to drain, nor about requests
so large that only few fit at once. Prompts in prefill hold no memory, a scheduler that evicts, reserves or
leaves memory empty gets less, and so does one that never mixes prefill and decode. As in the theorem each
output token costs one decode token; engines whose last prefill chunk yields the first output token decode one
less, and may pass the capacity by a factor of up to (E[I] + E[O]) / (E[I] + E[O] - 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.config import EngineConfig
from llmsched_env.errors import InputError
from llmsched_env.workloads.lengths import Moments

_GRID = 16384  # values of D that are tried, at most

BatchTime = Callable[..., Any]
"""time(P, NP, CX, KP, D, KV) -> seconds, for equally long float64 arrays; see `core.cost`."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """Requests/s that an engine's compute, and its KV memory, allow; inf where that has no limit."""

    compute_rps: float
    kv_rps: float

    @property
    def rps(self) -> float:
        """The smaller of the two."""
        return min(self.compute_rps, self.kv_rps)

    @property
    def bound(self) -> str:
        """Which of the two it is: "compute" or "kv"."""
        return "compute" if self.compute_rps <= self.kv_rps else "kv"


@dataclasses.dataclass(frozen=True)
class Capacity(Rates):
    """Sustainable requests/s of an engine for a workload.

    Attributes:
        compute_rps: limited by the token budget and the number of running requests alone.
        kv_rps: limited by KV memory alone; inf where memory has no limit.
        decodes: requests that decode together at the smaller of the two.
        iteration_s: seconds of an iteration then.
    """

    decodes: float
    iteration_s: float


def capacity(moments: Moments, time: BatchTime, engine: EngineConfig) -> Capacity:
    """The capacity of an engine for requests with these moments.

    Args:
        moments: of the workload, `Workload.moments()`.
        time: seconds of an iteration, `Profile.time`.
        engine: resolved settings; token_budget, max_num_seqs, kv_blocks and block_size matter, None is no
            limit.

    Raises:
        InputError: if nothing limits the batch, or the cost is not positive.
    """
    per_decode = moments.prompt / moments.output  # prefill tokens
    budget = math.inf if engine.token_budget is None else float(engine.token_budget)
    most = math.inf if engine.max_num_seqs is None else float(engine.max_num_seqs)
    compute = min(budget / (1 + per_decode), most)
    # A block is half empty on average, and filled token by token.
    held = moments.kv_held + 0.5 * (engine.block_size - 1)
    memory = math.inf if engine.kv_blocks is None else engine.kv_blocks * engine.block_size / held
    if math.isinf(min(compute, memory)):
        raise InputError("capacity: nothing limits the batch; give token_budget, max_num_seqs or kv_blocks")

    def best(limit: float) -> tuple[float, float, float]:
        """The largest rate for D <= limit, and the D and T it is reached at."""
        if math.isinf(limit):
            return math.inf, math.inf, math.inf
        decodes = _grid(limit, 1 + per_decode)
        seconds = _iteration(decodes, moments, time, budget)
        if not (np.isfinite(seconds) & (seconds > 0)).all():
            raise InputError(
                "capacity: the cost profile gives an iteration that takes no time, or an infinite one"
            )
        rate = decodes / (seconds * moments.output)
        i = int(np.argmax(rate))
        return float(rate[i]), float(decodes[i]), float(seconds[i])

    by_compute, by_memory = best(compute), best(memory)
    _, decodes, seconds = min(by_compute, by_memory)
    return Capacity(by_compute[0], by_memory[0], decodes, seconds)


def _iteration(
    decodes: NDArray[np.float64], moments: Moments, time: BatchTime, budget: float
) -> NDArray[np.float64]:
    """Seconds of the fluid iteration with so many decodes: float64, same shape."""
    requests = decodes / moments.output  # that begin, and end, in an iteration
    prefill = requests * moments.prompt
    # Prompts longer than the room that the decodes leave are cut into chunks of it; later chunks read the
    # earlier ones.
    room = np.maximum(np.maximum(budget - decodes, prefill), 1.0)
    chunks = np.maximum(moments.prompt / room, 1.0)
    reread = np.maximum(0.5 * moments.prompt_squared / room - 0.5 * moments.prompt, 0.0)
    features = (
        prefill,
        requests * chunks,
        requests * moments.prefill_context,
        requests * reread,
        decodes,
        decodes * (moments.kv_held + 1),
    )
    return np.broadcast_to(np.asarray(time(*features), dtype=np.float64), decodes.shape)


def _grid(limit: float, tokens_per_decode: float) -> NDArray[np.float64]:
    """Values of D up to `limit` at whole numbers of tokens, where a staircase has its maxima."""
    tokens = limit * tokens_per_decode
    step = max(1, math.ceil(tokens / _GRID))
    whole = np.arange(step, tokens, step) / tokens_per_decode
    return np.append(whole, limit) * (1 - 1e-9)  # rounding must not carry a batch over a step of a staircase
