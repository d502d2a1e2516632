"""The constraint satisfaction problem of INFERMAX (Kim et al., arXiv 2411.07447), for CP-SAT.

The authors' solver is not published. Its variables are exported by their simulator, and the constraints are
put together again from those: for requests i and batches j = 0, 1, ..., J - 1, in the paper's letters,

    c[i,j]      tokens computed                   z[i,j]    whether there are any
    m[i,j]      tokens in the KV cache afterwards e[i,j]    whether they are dropped then
    B[i,j]      tokens that its prefill has to reach (prompt, and what was out when it was dropped)
    delta[i,j]  whether it decodes: m[i,j-1] >= B[i,j-1]
    gen[i,j]    whether a token of its answer comes out: z and m[i,j-1] + c[i,j] >= B[i,j-1]

What is ours: the objectives other than GPU time, arrivals and the clock, what may not be done (chunks,
pauses, preemption, idling), KV blocks, and every form of cost that `ticks` knows. Batches that are not empty
come first, so that a schedule of fewer batches has one place in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from baselines.optimal.runner import cp_model
from baselines.optimal.ticks import Line, Ticks
from llmsched_env import simulation
from llmsched_env.core.run import EVICTED
from llmsched_env.core.schedule import Schedule
from llmsched_env.scheduling import Scheduler

Batch = tuple[dict[int, int], set[int]]
"""Tokens for requests, and those that are preempted before."""


class Csp:
    """The model of schedules of at most `batches` batches.

    Attributes:
        model: to be solved.
        objective: the linear expression to be minimised, in ticks.
        used: whether batch j is not empty.
        batches: J.
    """

    def __init__(self, ticks: Ticks, batches: int, hint: Sequence[Batch] | None = None) -> None:
        """
        Args:
            hint: a schedule of at most so many batches; every variable gets a hint from it.
        """
        self.ticks, self.instance, self.batches = ticks, ticks.instance, batches
        self.model = cp_model().CpModel()
        self._hinted = hint is not None
        plan = list(hint or ())
        self._plan: list[Batch] = plan + [({}, set())] * (batches - len(plan))
        self._value: dict[int, int] = {}  # of the hint, by index of the variable
        n = range(len(self.instance))
        self.requests = [_Request(self, i) for i in n]
        self.used = [self._bool(f"used{j}", bool(self._plan[j][0])) for j in range(batches)]
        self._engine()
        self.time = [self._time(j) for j in range(batches)]
        self._clock()
        self._rules()
        self._objective_terms = self._objective()
        self.objective = sum(self._objective_terms)

    # ------------------------------------------------------------------ variables with hints

    def _int(self, low: int, high: int, name: str, value: int) -> Any:
        x = self.model.new_int_var(low, high, name)
        self._value[x.index] = value
        if self._hinted:
            self.model.add_hint(x, value)
        return x

    def _bool(self, name: str, value: bool) -> Any:
        x = self.model.new_bool_var(name)
        self._value[x.index] = int(value)
        if self._hinted:
            self.model.add_hint(x, bool(value))
        return x

    def _hint(self, x: Any) -> int:
        """The value of a variable or constant in the hint."""
        return int(x) if isinstance(x, int) else self._value[x.index]

    def _sum(self, terms: Mapping[str, int], features: Mapping[str, Any]) -> Any:
        return sum(k * features[f] for f, k in terms.items() if k)

    # ------------------------------------------------------------------ parts

    def _engine(self) -> None:
        """Token budget, KV cache, running requests; batches in use come first."""
        add, engine = self.model.add, self.instance.engine
        for j in range(self.batches):
            here = [r.at[j] for r in self.requests]
            add(sum(a["c"] for a in here) <= self.instance.token_budget * self.used[j])
            add(sum(a["blocks"] for a in here) <= engine.kv_blocks)
            self.model.add_bool_or(*(a["z"] for a in here), ~self.used[j])
            for a in here:
                self.model.add_implication(a["z"], self.used[j])
            if j:
                self.model.add_implication(self.used[j], self.used[j - 1])
            if "held" in here[0]:
                add(sum(a["held"] for a in here) <= engine.max_num_seqs)

    def _time(self, j: int) -> Any:
        """Ticks of batch j, 0 if it is empty."""
        cost, name = self.ticks.cost, f"t{j}"
        here = [r.at[j] for r in self.requests]
        features: dict[str, Any] = {
            "U": self.used[j],
            "P": sum(a["prefill_tokens"] for a in here),
            "NP": sum(a["p"] for a in here),
            "D": sum(a["d"] for a in here),
            "CX2": sum(a.get("squares", 0) for a in here),
            "KP": sum(a.get("cached", 0) for a in here),
            "KV": sum(a.get("reads", 0) for a in here),
        }
        values = {"U": self._hint(self.used[j])}
        for f, key in _OF_FEATURE.items():
            values[f] = sum(self._hint(a.get(key, 0)) for a in here)
        for f, key, of in (("HP", "p", "NP"), ("HD", "d", "D")):
            values[f] = int(values[of] > 0)
            if not cost.line.get(f):
                continue
            features[f] = self._bool(f"{f}{j}", bool(values[f]))
            self.model.add_bool_or(*(a[key] for a in here), ~features[f])
            for each in here:
                self.model.add_implication(each[key], features[f])
        total = self._sum(cost.line, features)
        for n, pair in enumerate(cost.larger):
            sides = [sum(c * values[f] for f, c in side.items()) for side in pair]
            bound = max(_largest(side, self.ticks) for side in pair)
            larger = self._int(0, bound, f"larger{j},{n}", max(0, *sides))
            self.model.add_max_equality(larger, [self._sum(side, features) for side in pair])
            total += larger
        b = features["P"] + features["D"]
        for n, (a, p, q) in enumerate(cost.stairs):
            most = -(-self.instance.token_budget * q // p)
            step = self._int(0, most, f"step{j},{n}", -(-(values["P"] + values["D"]) * q // p))
            self.model.add(p * step >= q * b)
            self.model.add(p * step <= q * b + p - 1)
            total += a * step
        taken = cost.time(values) if values["U"] else 0
        time = self._int(0, max(taken, self._longest()), name, taken)
        self.model.add(time == total)
        return time

    def _longest(self) -> int:
        cost = self.ticks.cost
        total = _largest(cost.line, self.ticks) + sum(
            max(_largest(side, self.ticks) for side in pair) for pair in cost.larger
        )
        return total + sum(a * -(-self.instance.token_budget * q // p) for a, p, q in cost.stairs)

    def _clock(self) -> None:
        """Starts and ends of batches."""
        ticks, add = self.ticks, self.model.add
        free = self.instance.allows("idle") or not ticks.exact
        horizon = ticks.arrival[-1] + self.batches * self._longest()
        before: Any = 0
        self.end = []
        for j in range(self.batches):
            clock = self._hint(before)
            coming = [ticks.arrival[i] for i in self._plan[j][0]]
            start = self._int(0, horizon, f"start{j}", max(clock, *coming, 0))
            if ticks.together:
                add(start == (before if j else ticks.arrival[0]))
            elif free:
                add(start >= before)
            else:
                waits = self._bool(f"waits{j}", self._hint(start) > clock)
                add(start == before).only_enforce_if(~waits)
                add(start > before).only_enforce_if(waits)
                for r in self.requests:  # to the first arrival among the unfinished: nobody is there
                    left = [~r.at[j - 1]["done"]] if j else []
                    add(start <= ticks.arrival[r.i]).only_enforce_if([waits, self.used[j], *left])
            if not ticks.together:
                for r in self.requests:
                    if ticks.arrival[r.i]:
                        add(start >= ticks.arrival[r.i]).only_enforce_if(r.at[j]["z"])
            end = self._int(0, horizon, f"end{j}", self._hint(start) + self._hint(self.time[j]))
            add(end == start + self.time[j])
            self.end.append(end)
            before = end

    def _rules(self) -> None:
        """What follows from symmetry: of two equal requests, the first starts first."""
        ticks = self.ticks
        seen: dict[Any, int] = {}
        targets = self.instance.requests
        for r in self.requests:
            i = r.i
            shape = (
                ticks.arrival[i], ticks.prompt[i], ticks.output[i],
                float(targets.arrival_s[i]), float(targets.ttft_target_s[i]), float(targets.tpot_target_s[i]),
            )  # fmt: skip
            if shape in seen and self._ordered(seen[shape], i):
                other = self.requests[seen[shape]]
                for j in range(self.batches):
                    self.model.add(r.at[j]["begun"] <= other.at[j]["begun"])
            seen[shape] = i

    def _ordered(self, a: int, b: int) -> bool:
        """Whether the hint keeps to the order."""
        first = [next((j for j, (g, _) in enumerate(self._plan) if i in g), self.batches) for i in (a, b)]
        return not self._hinted or first[0] <= first[1]

    def _objective(self) -> list[Any]:
        """Variables whose sum is to be minimised."""
        goal, ticks = self.instance.objective, self.ticks
        if goal == "gpu_time":
            return self.time
        last = self.end[-1]
        if goal == "makespan":
            # Batches after the last one that is used take no time; they start at its end at the earliest.
            return [last]
        horizon = ticks.arrival[-1] + self.batches * self._longest()
        add = self.model.add
        finish, first = [], []
        base, work = max(ticks.least_work(), key=lambda line: line[0])
        for r in self.requests:
            i = r.i
            if goal != "mean_ttft":
                f = self._int(0, horizon, f"finish{i}", self._when(r, "done"))
                for j in range(self.batches):
                    left = [~r.at[j - 1]["done"]] if j else []
                    add(f >= self.end[j]).only_enforce_if([self.used[j], *left])
                if ticks.together:
                    unfinished = 1 + sum(1 - r.at[j]["done"] for j in range(self.batches - 1))
                    add(f >= ticks.arrival[i] + base * unfinished + work[i])
                finish.append(f)
            if goal != "total_latency":
                f = self._int(0, horizon, f"first{i}", self._when(r, "out"))
                for j in range(self.batches):
                    waits = [~r.at[j - 1]["out"]] if j else []
                    add(f >= self.end[j]).only_enforce_if([self.used[j], *waits])
                    if goal == "slo_goodput":
                        add(f <= self.end[j]).only_enforce_if(r.at[j]["out"])
                first.append(f)
        if goal == "total_latency":
            return finish
        if goal == "mean_ttft":
            return first
        return [self._missed(r, first[r.i], finish[r.i]) for r in self.requests]

    def _when(self, r: _Request, what: str) -> int:
        ends = (self._hint(self.end[j]) for j in range(self.batches) if self._hint(r.at[j][what]))
        return next(ends, 0)

    def _missed(self, r: _Request, first: Any, finish: Any) -> Any:
        """Whether request r misses a target."""
        ticks, requests = self.ticks, self.instance.requests
        i, add = r.i, self.model.add
        # Where numbers were rounded down, a true schedule may be late by a tick and the error of a batch.
        slack = 0 if ticks.exact else 1 + _error(ticks)
        ttft = float(requests.arrival_s[i]) + float(requests.ttft_target_s[i]) * (1 + 1e-9)
        tpot = float(requests.tpot_target_s[i]) * (1 + 1e-9) * (ticks.output[i] - 1)
        most_first, most_rest = (_floor(s, ticks) for s in (ttft, tpot))
        good = True
        if most_first is not None:
            good &= self._hint(first) <= most_first
        if most_rest is not None:
            good &= self._hint(finish) - self._hint(first) <= most_rest + slack
        missed = self._bool(f"missed{i}", not good)
        if most_first is not None:
            add(first <= most_first).only_enforce_if(~missed)
        if most_rest is not None:
            add(finish - first <= most_rest + slack).only_enforce_if(~missed)
        return missed

    # ------------------------------------------------------------------ what is found

    def value(self, value: Any) -> int:
        """The objective of a solution; `value` gives a variable's."""
        return sum(value(x) for x in self._objective_terms)

    def hinted_objective(self) -> int:
        """The objective of the hint."""
        return self.value(self._hint)

    def hint_is_complete(self) -> bool:
        """Whether every variable has a hint, within its domain."""
        proto = self.model.proto
        hinted = dict(zip(proto.solution_hint.vars, proto.solution_hint.values, strict=True))
        domains = [(min(v.domain), max(v.domain)) for v in proto.variables]
        return all(k in hinted and a <= hinted[k] <= b for k, (a, b) in enumerate(domains))

    def plan(self, value: Any) -> list[Batch]:
        """The batches of a solution; `value` gives a variable's."""
        batches: list[Batch] = []
        for j in range(self.batches):
            if not value(self.used[j]):
                break
            tokens = {r.i: int(value(r.at[j]["c"])) for r in self.requests if value(r.at[j]["z"])}
            dropped = {r.i for r in self.requests if j and "e" in r.at[j] and value(r.at[j - 1]["e"])}
            batches.append((tokens, dropped))
        return batches


_OF_FEATURE = {
    "P": "prefill_tokens", "NP": "p", "D": "d", "CX2": "squares", "KP": "cached", "KV": "reads",
}  # fmt: skip


class _Request:
    """The variables of request i: `at[j]` by name, see the top of this module.

    Besides those of the paper: d and p (decodes, prefills), done (finished), out (its first token is), begun
    (it got tokens), x (KV tokens held in the batch), blocks of them, and what the batch's time needs:
    prefill_tokens, squares (what the chunk adds to the square of x), cached (KP), reads (KV).
    """

    def __init__(self, csp: Csp, i: int) -> None:
        self.i, self.at = i, []
        instance, ticks, model = csp.instance, csp.ticks, csp.model
        add, integer, boolean = model.add, csp._int, csp._bool
        prompt, output = ticks.prompt[i], ticks.output[i]
        longest, size, plan = prompt + output - 1, instance.engine.block_size, csp._plan
        chunked, preempts = instance.allows("chunk"), instance.allows("preempt")
        assert instance.engine.max_num_seqs is not None and instance.engine.kv_blocks is not None
        seats = instance.engine.max_num_seqs < len(instance)
        needs = {
            f
            for side in (ticks.cost.line, *(side for pair in ticks.cost.larger for side in pair))
            for f, k in side.items()
            if k
        }
        m: Any = 0
        B: Any = prompt
        delta: Any = 0
        out_tokens: Any = 0
        square: Any = 0
        before: dict[str, Any] = {}
        for j in range(csp.batches):
            tag = f"{i},{j}"
            held, decodes, target = csp._hint(m), csp._hint(delta), csp._hint(B)
            got = plan[j][0].get(i, 0)
            drop = j + 1 < len(plan) and i in plan[j + 1][1]
            a: dict[str, Any] = {}
            a["c"] = c = integer(0, min(instance.token_budget, longest), f"c{tag}", got)
            a["z"] = z = boolean(f"z{tag}", got > 0)
            a["d"] = d = boolean(f"d{tag}", got > 0 and bool(decodes))
            a["p"] = p = boolean(f"p{tag}", got > 0 and not decodes)
            add(c >= z)
            add(c <= min(instance.token_budget, longest) * z)
            add(d + p == z)
            add(d <= delta)
            add(p <= 1 - delta)
            if not instance.allows("pause"):
                add(d >= delta)
            a["prefill_tokens"] = tokens = integer(
                0, min(instance.token_budget, longest), f"P{tag}", got * (not decodes)
            )
            add(c == tokens + d)
            add(tokens <= min(instance.token_budget, longest) * p)
            # A token comes out: of a decode, or of a prefill that gets all that is left.
            complete = got > 0 and not decodes and held + got == target
            full = boolean(f"full{tag}", complete) if chunked else p
            if preempts or chunked:
                add(m + tokens == B).only_enforce_if(full)
            else:
                add(tokens == prompt * p)
            if chunked:
                add(full <= p)
                add(m + tokens <= B - 1).only_enforce_if(p, ~full)
            a["gen"] = gen = boolean(f"gen{tag}", bool(csp._hint(d)) or complete)
            add(gen == d + full)
            a["x"] = x = integer(0, longest, f"x{tag}", held + got)
            add(x == m + c)
            a["blocks"] = blocks = x
            if size > 1:
                a["blocks"] = blocks = integer(0, -(-longest // size), f"k{tag}", -(-(held + got) // size))
                add(size * blocks >= x)
            if seats:
                a["held"] = boolean(f"held{tag}", held + got > 0)
                add(x <= longest * a["held"])
            g = csp._hint(out_tokens) + csp._hint(gen)
            now = integer(0, output, f"g{tag}", g)
            add(now == out_tokens + gen)
            a["done"] = done = boolean(f"done{tag}", g == output)
            add(now >= output * done)
            add(now <= output - 1 + done)
            a["out"] = out = boolean(f"out{tag}", g > 0)
            add(now >= out)
            add(now <= output * out)
            a["begun"] = begun = boolean(
                f"begun{tag}", got > 0 or bool(before and csp._hint(before["begun"]))
            )
            add(begun >= z)
            add(begun <= z + (before["begun"] if before else 0))
            if before:
                add(begun >= before["begun"])
                add(z <= 1 - before["done"])
            dropped: Any = done
            if preempts:
                a["e"] = e = boolean(f"e{tag}", drop)
                add(e + done <= 1)
                add(x >= e)
                dropped = integer(0, 1, f"dropped{tag}", int(drop or g == output))
                add(dropped == e + done)
            # KV tokens afterwards, and whether it decodes next.
            after = 0 if drop or g == output else held + got
            next_m = integer(0, longest, f"m{tag}", after)
            add(next_m <= longest * (1 - dropped))
            add(next_m <= x)
            add(next_m >= x - longest * dropped)
            phase = (bool(decodes) or complete) and not drop and g < output
            next_delta = boolean(f"delta{tag}", phase)
            add(next_delta <= delta + full)
            add(next_delta <= 1 - dropped)
            add(next_delta >= delta + full - dropped)
            if "KV" in needs:
                a["reads"] = reads = integer(0, longest, f"KV{tag}", (held + 1) * csp._hint(d))
                add(reads == x).only_enforce_if(d)
                add(reads <= longest * d)
            if "KP" in needs:
                a["cached"] = cached = integer(0, longest, f"KP{tag}", held * csp._hint(p))
                add(cached == m).only_enforce_if(p)
                add(cached <= longest * p)
            if "CX2" in needs:
                was, now_square = held * held, (held + got) ** 2
                value = (now_square - was) * csp._hint(p)
                a["squares"] = squares = integer(0, longest**2, f"CX2{tag}", value)
                if chunked or preempts:
                    whole = integer(0, longest**2, f"xx{tag}", now_square)
                    model.add_multiplication_equality(whole, [x, x])
                    add(squares == whole - square).only_enforce_if(p)
                    add(squares <= longest**2 * p)
                    square = integer(0, longest**2, f"mm{tag}", after * after)
                    model.add_multiplication_equality(square, [next_m, next_m])
                else:
                    add(squares == prompt**2 * p)
            if preempts:
                next_B = integer(prompt, longest, f"B{tag}", prompt + g if drop else target)
                add(next_B == B).only_enforce_if(~e)
                add(next_B == prompt + now).only_enforce_if(e)
                B = next_B
            m, delta, out_tokens, before = next_m, next_delta, now, a
            self.at.append(a)
        add(self.at[-1]["done"] == 1)
        if not preempts:  # then it is known what is computed and read in all
            add(sum(a["prefill_tokens"] for a in self.at) == prompt)
            add(sum(a["d"] for a in self.at) == output - 1)
            if "KV" in needs:
                add(sum(a["reads"] for a in self.at) == sum(prompt + g for g in range(1, output)))


def _largest(line: Line, ticks: Ticks) -> int:
    """No batch takes more along this line."""
    engine = ticks.instance.engine
    n = len(ticks.instance)
    longest = max(p + o for p, o in zip(ticks.prompt, ticks.output, strict=True))
    assert engine.token_budget is not None
    held = min(n * longest, engine.kv_tokens)
    most = {"U": 1, "HP": 1, "HD": 1, "NP": n, "D": n, "P": engine.token_budget, "KP": held, "KV": held}
    most["CX2"] = min(n, engine.token_budget) * longest**2
    return sum(max(0, k) * most[f] for f, k in line.items())


def _error(ticks: Ticks) -> int:
    """No batch is rounded by more ticks."""
    lines = [ticks.cost.line, *(max(pair, key=len) for pair in ticks.cost.larger)]
    units = sum(_largest(dict.fromkeys(line, 1), ticks) for line in lines)
    return units + sum(-(-ticks.instance.token_budget * q // p) for _, p, q in ticks.cost.stairs)


def _floor(seconds: float, ticks: Ticks) -> int | None:
    """Whole ticks in so many seconds; None if there is no end to them."""
    from fractions import Fraction

    return None if seconds == np.inf else int(Fraction(seconds) * ticks.per_second // 1)


# ---------------------------------------------------------------------- schedules


def batches_of(schedule: Schedule) -> list[Batch]:
    """What a schedule does, batch by batch."""
    return [(dict(d.granted), set(d.preempted)) for d in schedule]


def schedule_of(ticks: Ticks, plan: Sequence[Batch]) -> Schedule:
    """The schedule in which each batch starts as soon as the one before has ended and its requests are
    there.

    Raises:
        InputError: the engine cannot follow it.
    """
    instance = ticks.instance
    arrival = instance.requests.arrival_s.tolist()
    rows = [[(r, EVICTED) for r in sorted(drops)] + sorted(given.items()) for given, drops in plan]
    schedule = Schedule(
        np.array([max(arrival[r] for r in given) for given, _ in plan], np.float64),
        np.cumsum([len(row) for row in rows], dtype=np.int64),
        np.array([r for row in rows for r, _ in row], np.int32),
        np.array([tokens for row in rows for _, tokens in row], np.int32),
    )
    # The engine's own clock says when the batch before has ended.
    result = simulation.replay(
        schedule, instance.requests, instance.profile, instance.engine, scheduler=Scheduler("schedule")
    )
    assert result.schedule is not None
    return result.schedule


def one_by_one(ticks: Ticks) -> list[Batch]:
    """A plan that is legal whatever is allowed: each request alone, in order of arrival."""
    plan: list[Batch] = []
    for i, (prompt, output) in enumerate(zip(ticks.prompt, ticks.output, strict=True)):
        while prompt > 0:
            plan.append(({i: min(prompt, ticks.instance.token_budget)}, set()))
            prompt -= ticks.instance.token_budget
        plan += [({i: 1}, set()) for _ in range(output - 1)]
    return plan
