"""The largest rate of requests that any scheduler can sustain, and what some schedulers come to.

The model is that of Dai, Deng, Li and Peng (arXiv 2504.07347v3): a batch of b tokens takes t_b seconds, a
request brings v_p prefill and v_d decode tokens. The first token of an answer comes out of its prefill, so
that a request with I prompt and O output tokens has v_p = I and v_d = O - 1.

`limit` is for any cost profile and with KV memory. `capacity` (`theory.capacity`), which loads are shares of,
is the same fluid point as an estimate: it also counts the context that later chunks read again, and one
decode more for each request. The limit leaves out what a scheduler might avoid, and so is never below.

The closed forms (`faster_transformer_rps`, `vanilla_vllm_rps`, `full_slots_rps`) say where schedulers that do
not reach the limit stand, for requests that are all of one size. `TokenTime` is t_b; `token_time` makes it of
a profile.
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
from llmsched_env.profiles import Profile
from llmsched_env.theory.capacity import Rates
from llmsched_env.workloads.lengths import Moments

TokenTime = Callable[[Any], Any]
"""t(b) -> seconds of a batch of b tokens, for a number or a float64 array."""

_GRID = 16384  # batch sizes that are tried, at most
_TOKENS_ONLY = ("staircase", "piecewise")
_CONVEX = ("hinge", "linear", "roofline")


def token_time(profile: Profile) -> TokenTime:
    """Least seconds of a batch of b tokens under a profile: of prefill tokens or of decodes alone, contexts
    left out.

    The very time where that depends on the tokens alone (staircase, piecewise); else a lower bound of it.
    """

    def time(tokens: Any) -> Any:
        b = np.asarray(tokens, dtype=np.float64)
        return np.minimum(profile.time(b, 1, 0, 0, 0, 0), profile.time(0, 0, 0, 0, b, 0))[()]

    return time


def best_batch(time: TokenTime, token_budget: int) -> tuple[int, float]:
    """The number of tokens b, up to the budget, with the largest b / t_b, and that rate in tokens/s.

    Theorem 2(a) of Dai et al.: more than so many tokens a second nobody serves, whatever the scheduler. The
    theorem has it at b = b_max, for staircases whose step divides b_max; this is for any t_b. Of more than
    16,384 batch sizes only as many, evenly spaced, are tried, and the budget itself.
    """
    if token_budget < 1:
        raise InputError(f"token_budget must be at least 1, not {token_budget}")
    step = -(-token_budget // _GRID)
    tokens = np.unique(np.append(np.arange(step, token_budget, step), token_budget)).astype(np.float64)
    rate = tokens / _positive(np.broadcast_to(np.asarray(time(tokens), np.float64), tokens.shape))
    i = int(np.argmax(rate))
    return int(tokens[i]), float(rate[i])


@dataclasses.dataclass(frozen=True)
class Limit(Rates):
    """What no scheduler sustains more of; requests/s.

    Attributes:
        compute_rps: as the token budget and the number of requests in a batch allow.
        kv_rps: as KV memory allows; inf where that has no limit.
        tokens: of the batch at the smaller of the two, and how long it takes.
        iteration_s: see `tokens`.
        kind: "exact": Theorem 2 applies, so that every work-conserving scheduler is stable up to here: time
            depends on the tokens of a batch alone, a full batch is the best one, memory is not what limits
            it, nor are slots, of which there are as many as a batch may have tokens. "bound": no scheduler
            is stable above; whether one is up to here is open. "estimate": a fixed point at the mean batch,
            which a scheduler that mixes unlike batches may pass.
    """

    tokens: float
    iteration_s: float
    kind: str


def limit(moments: Moments, profile: Profile, engine: EngineConfig) -> Limit:
    """The limit of an engine for requests with these moments, under any scheduler.

    In n iterations for each request the mean batch is 1/n of what a request brings: I prefill tokens in one
    chunk or more, with I^2/2 tokens of context, and O - 1 decodes that read I + 1, ..., I + O - 1 tokens. No
    iteration has more than the budget of C tokens, K requests, M tokens of KV cache; a request is in at least
    O batches, and holds at least I, I + 1, ..., I + O - 1 tokens of cache in them. So

        n >= (I + O - 1) / C,    n >= O / K,    n >= E[sum over j < O of (I + j)] / M

    (means), and the limit is the largest 1 / (n t(mean batch)). With t_b that depends on the tokens alone it
    is b / t_b / (I + O - 1), Theorem 2 of Dai et al. The third line is the limit M / (T E[g]) of Nie, Si and
    Zhou (arXiv 2605.04595), T here the shortest iteration that serves these requests at that rate; half a
    block for each request is added to what it holds.

    Where time is convex in the features of a batch (hinge, linear, roofline) this is a bound: by Jensen's
    inequality n batches take no less than n mean ones. Other profiles need not be convex: it is an estimate.
    Where attention makes time depend on context, it is the context of the mean batch that counts.

    Args:
        moments: of the workload, `Workload.moments()`.
        profile: what an iteration costs.
        engine: resolved settings; token_budget, max_num_seqs, kv_blocks and block_size matter, None is no
            limit.

    Raises:
        InputError: if nothing limits the batch, or the cost is not positive.
    """
    work = moments.prompt + moments.output - 1
    budget = math.inf if engine.token_budget is None else engine.token_budget / work
    slots = math.inf if engine.max_num_seqs is None else engine.max_num_seqs / moments.output
    held = moments.kv_token_iterations + 0.5 * (engine.block_size - 1) * moments.output
    memory = math.inf if engine.kv_blocks is None else engine.kv_blocks * engine.block_size / held
    compute = min(budget, slots)
    if math.isinf(min(compute, memory)):
        raise InputError("limit: nothing limits the batch; give token_budget, max_num_seqs or kv_blocks")

    def best(most: float) -> tuple[float, float, float]:
        """The largest rate with up to `most` requests' worth of work in an iteration; and that, and the
        seconds that it takes."""
        if math.isinf(most):
            return math.inf, math.inf, math.inf
        share = _shares(most, work)
        seconds = _positive(
            profile.time(
                share * moments.prompt,
                share,
                share * moments.prefill_context,
                0,
                share * (moments.output - 1),
                share * (moments.kv_token_iterations - moments.prompt),
            )
        )
        rate = share / seconds
        i = int(np.argmax(rate))
        return float(rate[i]), float(share[i]), float(seconds[i])

    by_compute, by_memory = best(compute), best(memory)
    rate, share, seconds = min(by_compute, by_memory)
    kind = "bound" if profile.form in _CONVEX else "estimate"
    by_tokens = profile.form in _TOKENS_ONLY and profile.cpu_s_per_request == 0
    if by_tokens and engine.token_budget is not None and rate == best(budget)[0]:
        capped = engine.max_num_seqs is not None and engine.max_num_seqs < engine.token_budget
        # Who has to fill the batch serves this, which is less where the budget lies between two steps.
        full = budget / float(profile.time(engine.token_budget, 0, 0, 0, 0, 0))
        kind = "bound" if capped or full < rate * (1 - 1e-9) else "exact"
    return Limit(by_compute[0], by_memory[0], share * work, seconds, kind)


def prices(moments: Moments, profile: Profile, engine: EngineConfig) -> NDArray[np.float64]:
    """(5,) what the engine's time at the limit goes to, in seconds: for each request, prefill token, square
    of a prompt's length, output token, and KV token-iteration (means in `Moments`, but for the first).

    They are the derivatives of the time that a request takes at the limit, 1 / `limit`, and add up to it over
    the mean request. So requests of all sizes are measured in the time that they cost, in whatever order they
    are served. Where batches take time by their tokens alone, it is by the tokens; where they are limited by
    their number of requests, or by memory, by what there is too little of.
    """
    found = limit(moments, profile, engine)
    means = np.array([1.0, *dataclasses.astuple(moments)])[[0, 1, 3, 2, 5]]
    if profile.form in _TOKENS_ONLY and profile.cpu_s_per_request == 0:  # in steps: without derivatives
        tokens = np.array([-1.0, 1.0, 0.0, 1.0, 0.0])
        slots = np.array([0.0, 0.0, 0.0, 1.0, 0.0])
        held = np.array([0.0, 0.0, 0.0, 0.5 * (engine.block_size - 1), 1.0])
        budget = math.inf if engine.token_budget is None else engine.token_budget / (tokens @ means)
        most = math.inf if engine.max_num_seqs is None else engine.max_num_seqs / (slots @ means)
        scarce = held if found.bound == "kv" else tokens if budget <= most else slots
        return scarce / (found.rps * (scarce @ means))
    step = 1e-3
    result = np.zeros(5)
    for i, name in ((1, "prompt"), (2, "prompt_squared"), (3, "output"), (4, "kv_token_iterations")):
        value = getattr(moments, name)
        times = [
            1 / limit(dataclasses.replace(moments, **{name: value * (1 + sign * step)}), profile, engine).rps
            for sign in (1, -1)
        ]
        result[i] = max(0.0, (times[0] - times[1]) / (2 * step * value))
    result[0] = 1 / found.rps - result @ means
    return result


def _shares(most: float, work: float) -> NDArray[np.float64]:
    """Requests' worth of work in an iteration, up to `most`: at whole numbers of tokens, where a staircase
    has its maxima, and `most` itself."""
    tokens = most * work
    step = max(1, math.ceil(tokens / _GRID))
    whole = np.arange(step, tokens, step) / work
    return np.append(whole, most) * (1 - 1e-12)  # rounding must not carry a batch over a step of a staircase


def faster_transformer_rps(
    time: TokenTime, prefill: int, decodes: int, token_budget: int, max_batch: int | None = None
) -> float:
    """Requests/s that FasterTransformer serves, of requests that are all of one size: its stability limit.

    It prefills as many whole prompts as fit, n, and then decodes these alone to their ends: n / (t(n v_p) +
    v_d t(n)). Not in the paper; follows from its rule (v3, section 4), and simulations confirm it. Assumes
    that n prompts always wait, as they do when it falls behind.

    Args:
        prefill, decodes: v_p and v_d. max_batch: k_max, requests in a batch; None: no limit.
    """
    _check_sizes(prefill, decodes, token_budget, max_batch)
    together = _whole_prompts(prefill, token_budget, max_batch)
    if together == 0:
        return 0.0
    return together / (float(time(together * prefill)) + decodes * float(time(together)))


def vanilla_vllm_rps(
    time: TokenTime, prefill: int, decodes: int, token_budget: int, max_batch: int | None = None
) -> float:
    """Requests/s up to which vanilla vLLM is stable, for Poisson arrivals of requests of one size.

    vLLM batches prompts whenever one waits, so that each decode batch has to wait for a moment without any.
    With many requests decoding, the number of prompts that wait at the ends of batches is a Markov chain: q
    waiting prompts make a batch of min(q, n) whole prompts, none a batch of b_max decodes (or k_max), and
    Poisson many arrive meanwhile. The chain says how often decodes get their turn; they keep up while lambda
    v_d is less than what these turns serve. That is the condition lambda (E[t of a prefill batch] / k + v_d
    t_b / b) < 1 with k, the mean number of prompts in a batch, not guessed. It is the limit as long as
    prefills alone are stable; that the chain does not depend on how many decode, beyond the first b_max,
    makes the argument that of a saturated queue. Not in the paper."""
    _check_sizes(prefill, decodes, token_budget, max_batch)
    together = _whole_prompts(prefill, token_budget, max_batch)
    if together == 0:
        return 0.0
    batch = token_budget if max_batch is None else min(token_budget, max_batch)
    decode_s = float(time(batch))
    seconds = np.array([decode_s, *(float(time(k * prefill)) for k in range(1, together + 1))])
    if decodes < 1:
        return together / float(seconds[-1])

    def keeps_up(rate: float) -> bool:
        turns, mean_s = _decode_turns(rate, seconds)
        return rate * decodes < turns * batch / mean_s

    low, high = 0.0, together / float(seconds[-1])
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if keeps_up(middle) else (low, middle)
    return low


def _decode_turns(rate: float, seconds: NDArray[np.float64]) -> tuple[float, float]:
    """Share of batches that decode, and the mean time of a batch, where seconds[k] is that of k prompts and
    seconds[0] that of decodes; Poisson arrivals."""
    most = len(seconds) - 1
    if rate * seconds[-1] >= most:
        return 0.0, float(seconds[-1])
    size = _room(rate, seconds)
    arrived = [_poisson(rate * float(t), size) for t in seconds]
    chain = np.zeros((size, size))
    for waiting in range(size):
        k = min(waiting, most)
        left = waiting - k
        chain[waiting, left:] = arrived[k][: size - left]
        chain[waiting, -1] += 1 - chain[waiting].sum()
    # The stationary distribution: pi (chain - 1) = 0, with one equation replaced by sum(pi) = 1.
    system = chain.T - np.eye(size)
    system[-1] = 1.0
    target = np.zeros(size)
    target[-1] = 1.0
    share = np.linalg.solve(system, target)
    return float(share[0]), float(share @ seconds[np.minimum(np.arange(size), most)])


def _room(rate: float, seconds: NDArray[np.float64]) -> int:
    """Numbers of waiting prompts that are looked at: so many that more are next to impossible, at most 2,000.

    When full batches are the rule, the queue's tail falls by exp(-2 drift / variance) a prompt.
    """
    most = len(seconds) - 1
    mean = rate * float(seconds.max())
    drift = most - rate * float(seconds[-1])
    tail = 30 * rate * float(seconds[-1]) / (2 * drift)
    return int(min(2000, most + mean + 10 * math.sqrt(mean) + tail + 20))


def _poisson(mean: float, size: int) -> NDArray[np.float64]:
    k = np.arange(size)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size)))])
    return np.exp(k * math.log(mean) - mean - factorials) if mean > 0 else (k == 0).astype(np.float64)


def _whole_prompts(prefill: int, token_budget: int, max_batch: int | None) -> int:
    """How many prompts fit in a batch uncut."""
    fit = token_budget // prefill
    return fit if max_batch is None else min(fit, max_batch)


def full_slots_rps(
    time: TokenTime, prefill: int, decodes: int, token_budget: int, max_batch: int, *, decodes_first: bool
) -> float:
    """Requests/s of Sarathi (decodes first) or Orca (prefills first) when every one of k_max slots is taken.

    With a cap of k_max requests in a batch a work-conserving scheduler can fill up with requests that decode,
    and is then left with the rate of batches of k_max decodes, one request being prefilled among them from
    time to time: 1 / lambda is the time of the batches that carry one request's prefill, and (v_d - s) /
    k_max batches of decodes alone, s the decodes that were served in the former. Above this rate the state,
    once reached, does not mend. Not in the paper, but it accounts for its section 6, where of five
    configurations at load 1 only Sarathi with a budget of 128 stays bounded.

    Assumes requests of one size, and that one is prefilled at a time. Where answers are all of one length it
    is a few per cent too low for large budgets: who was prefilled together also ends together.
    """
    _check_sizes(prefill, decodes, token_budget, max_batch)
    left, seconds, served = prefill, 0.0, 0
    while left > 0:
        if decodes_first:
            riding = min(max_batch - 1, token_budget - 1)
            chunk = min(left, token_budget - riding)
        else:
            chunk = min(left, token_budget)
            riding = min(max_batch - 1, token_budget - chunk)
        left -= chunk
        served += riding
        seconds += float(time(chunk + riding))
    batch = min(max_batch, token_budget)
    return 1 / (seconds + max(0.0, decodes - served) / batch * float(time(batch)))


def _check_sizes(prefill: int, decodes: int, token_budget: int, max_batch: int | None) -> None:
    least = {"prefill": (prefill, 1), "decodes": (decodes, 0), "token_budget": (token_budget, 1)}
    if max_batch is not None:
        least["max_batch"] = (max_batch, 1)
    for name, (value, smallest) in least.items():
        if not value >= smallest:
            raise InputError(f"{name} must be at least {smallest}, not {value}")


def _positive(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise InputError("limit: the cost profile gives an iteration that takes no time, or an infinite one")
    return seconds
