"""`search`: the exact optimum of a small instance by label-setting A*, for any cost model, not quantised."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baselines.optimal import astar
from baselines.optimal.astar import DECODING, FINISHED, PREFILLING, WAITING, Labels, Rules, Scratch
from baselines.optimal.instance import ALLOWANCES, Instance
from baselines.optimal.minorant import blends, linear_minorants
from baselines.optimal.solution import Solution
from llmsched_env.core.run import EVICTED
from llmsched_env.core.schedule import Schedule
from llmsched_env.errors import InputError

Progress = Callable[[dict[str, Any]], None]
_OBJECTIVES = {
    "total_latency": astar.TOTAL_LATENCY,
    "mean_ttft": astar.MEAN_TTFT,
    "gpu_time": astar.GPU_TIME,
    "makespan": astar.MAKESPAN,
}
_WIDTHS = (4, 32, 256)  # of the beams that look for a schedule to begin with
_TABLE = 4  # places in the table of states for each label
_OFTEN_S = 0.25
_MOST_PHASES = 2**16


def search(
    instance: Instance,
    *,
    time_limit_s: float = 60.0,
    memory_limit_bytes: int = 4 * 2**30,
    start: Solution | None = None,
    progress: Progress | None = None,
) -> Solution:
    """The optimum, or as much as can be proved of it within the limits.

    First a beam, wider and wider, for a good schedule; then best first until no open label can lead to a
    better one. Interrupted (Ctrl-C) it gives what it has.

    Args:
        time_limit_s: wall seconds.
        memory_limit_bytes: of labels and their table.
        start: a solution to begin with.
        progress: called about four times a second with figures: seconds, objective, bound, labels, open.

    Returns:
        method "astar", status optimal, gap (memory used up), timeout or interrupted.

    Raises:
        InputError: an objective, or a size, that it cannot do.
    """
    began = time.perf_counter()
    model = _Model(instance)
    stopped = "gap"
    try:
        stopped = model.run(began + time_limit_s, memory_limit_bytes, start, progress)
    except KeyboardInterrupt:
        stopped = "interrupted"
    schedule = model.schedule()
    if schedule is None and start is not None:
        schedule = start.schedule
    return Solution.of(
        instance,
        schedule,
        model.bound,
        "astar",
        time.perf_counter() - began,
        stopped,
        **model.figures(),
    )


class _Model:
    """The search's arrays, and what it has found so far. Costs are those of `astar`: sums, arrivals not taken
    off: objective = cost / scale - offset."""

    def __init__(self, instance: Instance) -> None:
        if instance.objective not in _OBJECTIVES:
            raise InputError(
                f"the exact search has no objective {instance.objective}; it has {', '.join(_OBJECTIVES)}; "
                "use method cpsat or search"
            )
        if len(instance) > astar.MAX_REQUESTS:
            raise InputError(
                f"the exact search takes at most {astar.MAX_REQUESTS} requests, not {len(instance)}; use "
                "method search, or fewer requests"
            )
        self.rules = _rules(instance)
        self.words = int(self.rules.s[0]["words"])
        arrivals = math.fsum(instance.requests.arrival_s)
        self.scale = float(len(instance)) if instance.objective == "mean_ttft" else 1.0
        self.offset = arrivals / self.scale if instance.objective in ("total_latency", "mean_ttft") else 0.0
        self.scratch = _scratch(self.rules)
        self.labels = _labels(self.words, 1 << 12)
        self.proved = -math.inf
        self.chain: list[
            tuple[NDArray[np.int64], float, int]
        ] = []  # phases, clock, evicted: to the incumbent

    @property
    def best(self) -> float:
        """The incumbent's cost."""
        return float(self.scratch.best[0])

    @property
    def bound(self) -> float:
        """What is proved of the objective."""
        return self.proved / self.scale - self.offset

    # ------------------------------------------------------------------ the run

    def run(self, until: float, memory: int, start: Solution | None, progress: Progress | None) -> str:
        """Search; the status if the bound does not prove the incumbent."""
        rules, scratch = self.rules, self.scratch
        if start is not None and start.schedule is not None:
            # A little more, so that a schedule as good is found, and kept.
            scratch.best[0] = (start.objective + self.offset) * self.scale * (1 + 1e-12)
        room = self._room(memory)
        for width in _WIDTHS:
            self._begin(min(1 << 18, room))
            astar.beam(rules, self.labels, scratch, width)
            self._keep()
            if time.perf_counter() > until:
                break
        self._begin(min(1 << 14, room))
        self.proved = self._least_open()
        shown, most = -math.inf, 64
        while True:
            outcome = astar.expand_best(rules, self.labels, scratch, most)
            self._keep()
            self.proved = self._least_open()
            if outcome in (astar.EMPTY, astar.SOLVED):
                self.proved = self.best
                return "gap"
            now = time.perf_counter()
            if now > until:
                return "timeout"
            if outcome == astar.FULL and not self._grow(room):
                return "gap"
            if progress is not None and now > shown + _OFTEN_S:
                progress(self.figures())
                shown = now
            most = min(2 * most, 1024)

    def _begin(self, size: int) -> None:
        """Start anew from the beginning of the instance, the incumbent kept."""
        self.labels = _labels(self.words, size)
        astar.add_first(self.rules, self.labels, self.scratch)

    def _room(self, memory: int) -> int:
        """Labels that the memory holds, twice while it grows."""
        each = astar.LABEL.itemsize + 8 * self.words + _TABLE * 4
        return int(max(1 << 12, min(memory // (2 * each), 2**31 - 1)))

    def _grow(self, room: int) -> bool:
        """Make room for more labels; False: the memory is used up."""
        old, size = self.labels, min(2 * len(self.labels.of), room)
        if size == len(old.of):
            return False
        count = int(old.counts[0]["labels"])
        new = _labels(self.words, size)
        new.counts[:] = old.counts
        new.of[: len(old.of)] = old.of
        new.key[: count * self.words] = old.key[: count * self.words]
        astar.rehash(new, self.words)
        self.labels = new
        return True

    def _keep(self) -> None:
        """Remember the way to the incumbent, if it is new."""
        labels = self.labels
        label = int(labels.counts[0]["solved_by"])
        if label < 0:
            return
        labels.counts[0]["solved_by"] = -1
        chain = []
        while label >= 0:
            at = labels.of[label]
            chain.append((self._phases(label), float(at["t"]), int(at["evicted"])))
            label = int(at["parent"])
        self.chain = chain[::-1]

    def _least_open(self) -> float:
        if not self.labels.counts[0]["open"]:
            return self.best
        return min(self.best, float(self.labels.of[self.labels.of[0]["open"]]["priority"]))

    def figures(self) -> dict[str, Any]:
        """How far the search is."""

        def told(cost: float) -> float | None:
            return cost / self.scale - self.offset if math.isfinite(cost) else None

        counts = {name: int(self.labels.counts[0][name]) for name in astar.COUNTS[:7]}
        return {"incumbent": told(self.best), "proved": told(self.proved), **counts}

    # ------------------------------------------------------------------ the schedule

    def schedule(self) -> Schedule | None:
        """The incumbent's decisions."""
        if not self.chain:
            return None
        table, request = self.rules.phase, self.rules.request
        n = len(request)
        start, ends, requests, tokens = [], [], [], []
        for (before, t, _), (after, _, evicted) in zip(self.chain[:-1], self.chain[1:], strict=True):
            was, now = table[before], table[after]
            dropped = [i for i in range(n) if evicted >> i & 1]
            requests += dropped
            tokens += [EVICTED] * len(dropped)
            computed = np.where([i in dropped for i in range(n)], 0, was["computed"])
            whole = request["prompt"] + was["generated"] - computed
            given = np.where(now["generated"] > was["generated"], whole, now["computed"] - computed)
            served = [i for i in range(n) if given[i] > 0 and was["kind"][i] != FINISHED]
            served.sort(
                key=lambda i: was["kind"][i] == WAITING
            )  # the running ones first, as an engine has it
            requests += served
            tokens += [int(given[i]) for i in served]
            start.append(max(t, *request["arrival"][served].tolist()))  # it waited for the last of them
            ends.append(len(requests))
        return Schedule(
            np.array(start, np.float64),
            np.array(ends, np.int64),
            np.array(requests, np.int32),
            np.array(tokens, np.int32),
        )

    def _phases(self, label: int) -> NDArray[np.int64]:
        """Where the phases of a label are in the table of phases."""
        request = self.rules.request
        words = self.labels.key[label * self.words + request["word"]]
        phase = ((words >> request["shift"]) & request["mask"]).astype(np.int64)
        return phase + np.arange(len(request)) * int(self.rules.s[0]["phases"])


# ---------------------------------------------------------------------- arrays


def _rules(instance: Instance) -> Rules:
    """The instance in arrays."""
    requests, engine = instance.requests, instance.engine
    assert engine.kv_blocks and engine.token_budget and engine.max_num_seqs
    n = len(instance)
    prompt, output = requests.prompt_tokens.astype(np.int64), requests.output_tokens.astype(np.int64)
    chunk, preempt = instance.allows("chunk"), instance.allows("preempt")
    tables = [_phases_of(p, o, chunk, preempt) for p, o in zip(prompt.tolist(), output.tolist(), strict=True)]
    phases, tokens = max(len(table) for table in tables), int(output.max()) + 1
    lines = blends(
        linear_minorants(
            instance.profile,
            max_prefill_tokens=engine.token_budget,
            max_decodes=min(n, engine.max_num_seqs, engine.token_budget),
            max_context=int((prompt + output).max()),
        )
    )
    decode, refill = _token_work(lines, prompt, tokens)
    own = decode.copy()
    own[:, :, 0] = refill[:, :, 0]  # the first token comes from the prompt
    least = np.minimum(own, refill) if preempt else own
    rigid = instance.objective == "total_latency" and not instance.allow & {"chunk", "pause", "preempt"}

    s = np.zeros(1, astar.RULES)
    request = np.zeros(n, astar.REQUEST)
    phase = np.zeros((n, phases), astar.PHASE)
    waiting, decoding = np.zeros((n, tokens), np.int32), np.zeros((n, tokens), np.int32)
    request["arrival"], request["prompt"], request["output"] = requests.arrival_s, prompt, output
    request["last"] = 1 if instance.objective == "mean_ttft" else output
    used, words = 0, 0  # bits and words of the key
    for i, table in enumerate(tables):
        for k, (kind, computed, generated) in enumerate(table):
            phase[i, k]["kind"], phase[i, k]["computed"], phase[i, k]["generated"] = kind, computed, generated
            if kind == WAITING:
                waiting[i, generated] = k
            elif kind == DECODING:
                decoding[i, generated] = k
        bits = max(1, (len(table) - 1).bit_length())
        if used + bits > 64:
            words, used = words + 1, 0
        request[i]["finished"] = len(table) - 1
        request[i]["word"], request[i]["shift"], request[i]["mask"] = words, used, 2**bits - 1
        used += bits
    s["objective"] = _OBJECTIVES[instance.objective]
    s["blocks"], s["block_size"] = engine.kv_blocks, engine.block_size
    s["token_budget"], s["max_num_seqs"] = engine.token_budget, engine.max_num_seqs
    for name in ALLOWANCES:
        s[name] = instance.allows(name)
    s["rigid"] = rigid
    s["refill_pays"] = preempt and (instance.profile.form != "linear" or (refill < decode).any())
    s["requests"], s["phases"], s["tokens"], s["rows"] = n, phases, tokens, len(lines)
    s["words"] = words + 1
    work, work_after = _least(phase, request, lines, least, engine.block_size, engine.token_budget, preempt)
    pairs = len(lines) * astar.SHARES * n**3 if rigid else 1
    rules = Rules(
        s,
        request,
        phase.ravel(),
        waiting.ravel(),
        decoding.ravel(),
        instance.profile.pack(),
        lines.ravel(),
        work.ravel(),
        work_after.ravel(),
        own.ravel(),
        np.zeros(pairs),
    )
    if rigid:
        astar.fill_pair_costs(rules)
    return rules


def _phases_of(prompt: int, output: int, chunk: bool, preempt: bool) -> list[tuple[int, int, int]]:
    """(kind, computed, generated) of every phase that a request can be in; the last: it has ended."""
    most = output * (prompt + output) if chunk and preempt else prompt + output
    if most > _MOST_PHASES:
        raise InputError(
            f"the exact search takes requests of at most {_MOST_PHASES} states each, and one of {prompt} "
            f'prompt + {output} output tokens has {most}; forbid "chunk" or "preempt", or use method search'
        )
    found = []
    for g in range(output):
        if g == 0 or preempt:
            found.append((WAITING, 0, g))
            if chunk:
                found += [(PREFILLING, c, g) for c in range(1, prompt + g)]
        if g > 0:
            found.append((DECODING, prompt + g - 1, g))
    return [*found, (FINISHED, 0, output)]


def _token_work(
    lines: NDArray[np.float64], prompt: NDArray[np.int64], tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(R, N, T) seconds, the constant of an iteration left out, to bring token g + 1 by a decode, and by
    computing prompt and answer so far at once."""
    known = (prompt[:, None] + np.arange(tokens))[None]
    _, c1, c2, c3, c4 = lines.T[:, :, None, None]
    return np.ascontiguousarray(c2 + c3 * known), np.ascontiguousarray(c1 * known + 0.5 * c4 * known**2)


def _least(
    phase: NDArray[Any],
    request: NDArray[Any],
    lines: NDArray[np.float64],
    least: NDArray[np.float64],
    block_size: int,
    token_budget: int,
    preempt: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each request still needs at least in each of its phases: written into `phase`, and the work."""
    n, phases = phase.shape
    work, after = np.zeros((len(lines), n, phases)), np.zeros_like(least)
    for i in range(n):
        prompt, last = int(request[i]["prompt"]), int(request[i]["last"])
        for g in range(last - 1, -1, -1):
            after[:, i, g] = after[:, i, g + 1] + least[:, i, g]
        for k in range(phases):
            q = phase[i, k]
            g, computed = int(q["generated"]), int(q["computed"])
            if k >= request[i]["finished"] or g >= last:
                q["done"] = 1
                continue
            known, decodes = prompt + g, q["kind"] == DECODING
            rest = 1 if decodes else known - computed
            q["tokens"] = rest + last - g - 1
            q["batches"] = -(-rest // token_budget) + last - g - 1
            q["area"] = sum(-(-(prompt + j) // block_size) for j in range(g, last))
            for row, (_, c1, _, _, c4) in enumerate(lines):
                now = least[row, i, g] if decodes else c1 * rest + 0.5 * c4 * (known**2 - computed**2)
                if preempt:
                    now = min(now, c1 * known + 0.5 * c4 * known**2)
                work[row, i, k] = now + after[row, i, g + 1]
    return work, after


def _labels(words: int, size: int) -> Labels:
    counts = np.zeros(1, astar.COUNTERS)
    counts["solved_by"] = -1
    table = 1 << max(10, (_TABLE * size - 1).bit_length() - 1)
    return Labels(
        counts, np.zeros(size, astar.LABEL), np.zeros(words * size, np.uint64), np.full(table, -1, np.int32)
    )


def _scratch(rules: Rules) -> Scratch:
    n, tokens = len(rules.request), int(rules.s[0]["tokens"])
    return Scratch(
        best=np.array([np.inf]),
        phase=np.zeros(n, np.int32),
        child=np.zeros(n, np.int32),
        depth=np.zeros(n + 1, astar.DEPTH),
        profile=np.zeros((n + 1) * tokens, np.int64),
        area=np.zeros(n),
        tokens=np.zeros(n),
        batches=np.zeros(n),
        waiting=np.zeros(n, np.int64),
        begun=np.zeros(n, np.int64),
        alive=np.zeros(tokens),
        done_work=np.zeros(tokens),
    )
