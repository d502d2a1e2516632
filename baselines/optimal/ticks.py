"""`Ticks`: an instance in whole numbers, as CP-SAT wants it, and the bounds that follow from its sums.

Time is counted in ticks. Coefficients and arrivals are taken as the decimals that they are written as; the
tick divides them all if a run stays below `_MOST` ticks ("exact"). Otherwise every coefficient and arrival is
rounded down to a tick: any true schedule is then one of the model, with no greater finish times, if the model
may idle. So the optimum of the model is a bound on the true one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cached_property

import numpy as np

from baselines.optimal.instance import Instance
from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile

FORMS = ("hinge", "infermax", "linear", "piecewise", "roofline", "staircase")
Line = Mapping[str, int]
"""Ticks for each unit of a feature: those of `core.cost`, and U (1 for every batch), CX2 (twice CX), HP and
HD (1 for a batch that has prefills, has decodes)."""
_MOST = 10**13  # ticks of a run; sums of some thousand such numbers stay within 64 bits
_ROUNDED = 10**11  # ticks of a run whose numbers have to be rounded


@dataclasses.dataclass(frozen=True)
class Cost:
    """A batch takes `line` plus, for each pair of `larger`, the larger of the two, plus, for each (a, p, q)
    of `stairs`, a for each p/q tokens begun."""

    line: Line
    larger: tuple[tuple[Line, Line], ...] = ()
    stairs: tuple[tuple[int, int, int], ...] = ()

    def time(self, features: Mapping[str, int]) -> int:
        """Ticks of a batch."""

        def along(line: Line) -> int:
            return sum(k * features[f] for f, k in line.items())

        b = features["P"] + features["D"]
        steps = (a * -(-b * q // p) for a, p, q in self.stairs)
        return along(self.line) + sum(max(map(along, pair)) for pair in self.larger) + sum(steps)

    @cached_property
    def linear(self) -> bool:
        """Whether the work of a batch is the sum of that of its parts, besides a constant."""
        parts = {f for f, k in self.line.items() if k}
        return not self.larger and not self.stairs and not parts & {"HP", "HD"}

    def minorants(self) -> Iterator[dict[str, int]]:
        """Lines that are nowhere above the cost."""
        sides = [list(pair) for pair in self.larger]
        for a, p, q in self.stairs:
            sides.append([{"U": a}, {"P": a * q // p, "D": a * q // p}])
        for chosen in itertools.product(*sides):
            total = dict(self.line)
            for line in chosen:
                for f, k in line.items():
                    total[f] = total.get(f, 0) + k
            yield total


@dataclasses.dataclass(frozen=True)
class Ticks:
    """An instance in whole numbers.

    Attributes:
        instance: it.
        per_second: ticks.
        exact: whether nothing was rounded.
        cost: of a batch.
        arrival: of each request.
        prompt, output: tokens of each request.
    """

    instance: Instance
    per_second: Fraction
    exact: bool
    cost: Cost
    arrival: tuple[int, ...]
    prompt: tuple[int, ...]
    output: tuple[int, ...]

    @staticmethod
    def of(instance: Instance, seconds: float) -> Ticks:
        """Whole numbers for an instance whose good schedules take about so many seconds.

        Raises:
            InputError: a cost model of another form.
        """
        line, larger, stairs = _parts(instance.profile)
        requests, longest = instance.requests, instance.engine.max_model_len
        assert longest is not None
        output = np.minimum(requests.output_tokens, np.maximum(1, longest - requests.prompt_tokens))
        arrival = [Fraction(repr(float(a))) for a in instance.requests.arrival_s]
        numbers = [*arrival, *line.values(), *(a for a, _ in stairs)]
        numbers += [k for pair in larger for side in pair for k in side.values()]
        length = Fraction(max(seconds, 1e-9))
        scale = Fraction(math.lcm(*(x.denominator for x in numbers)))
        common = math.gcd(*(int(x * scale) for x in numbers)) or 1
        scale /= common
        exact = scale * length <= _MOST
        if not exact:
            scale = _ROUNDED / length

        def whole(values: Mapping[str, Fraction]) -> dict[str, int]:
            return {f: math.floor(k * scale) for f, k in values.items() if k}

        return Ticks(
            instance,
            scale,
            exact,
            Cost(
                whole(line),
                tuple((whole(a), whole(b)) for a, b in larger),
                tuple((math.floor(a * scale), b.numerator, b.denominator) for a, b in stairs),
            ),
            tuple(math.floor(a * scale) for a in arrival),
            tuple(requests.prompt_tokens.tolist()),
            tuple(output.tolist()),
        )

    # ------------------------------------------------------------------ to and from the objective

    @property
    def together(self) -> bool:
        """Whether all requests arrive at once."""
        return self.arrival[0] == self.arrival[-1]

    def value(self, ticks: float) -> float:
        """The objective, from the model's: ticks in all, for latencies with the arrivals still in it; the
        targets that are missed."""
        instance, arrival = self.instance, self.instance.requests.arrival_s
        if instance.maximise:
            return len(instance) - ticks
        seconds = float(ticks / self.per_second) if math.isfinite(ticks) else ticks
        if instance.objective == "total_latency":
            return seconds - math.fsum(arrival)
        if instance.objective == "mean_ttft":
            return (seconds - math.fsum(arrival)) / len(instance)
        return seconds

    def ticks_below(self, objective: float) -> int:
        """The most that the model's objective of a schedule that is better than `objective` can be."""
        if self.instance.maximise:
            return math.ceil(len(self.instance) - objective) - 1
        return self._ticks(objective) - 1 if self.exact else math.floor(self._real(objective))

    def ticks_at_most(self, objective: float) -> int:
        """The most that the model's objective of a schedule of at most `objective` can be."""
        if self.instance.maximise:
            return math.floor(len(self.instance) - objective + 1e-9)
        return math.floor(self._real(objective) * (1 + Fraction(1, 10**12)))

    def ticks_at_least(self, bound: float) -> int:
        """The least that the model's objective of a schedule that is no better than `bound` can be; exact
        ticks."""
        if self.instance.maximise:
            return math.ceil(len(self.instance) - bound - 1e-9)
        return math.ceil(self._real(bound) * (1 - Fraction(1, 10**12)))

    def _real(self, objective: float) -> Fraction:
        instance = self.instance
        total = Fraction(objective) * (len(instance) if instance.objective == "mean_ttft" else 1)
        if instance.objective in ("total_latency", "mean_ttft"):
            total += sum(Fraction(repr(float(a))) for a in instance.requests.arrival_s)
        return total * self.per_second

    def _ticks(self, objective: float) -> int:
        """The objective of a schedule; whole, but for the rounding of its floating-point sums."""
        return round(self._real(objective))

    # ------------------------------------------------------------------ bounds

    def least(self, batches: int = 0) -> int:
        """No schedule that has so many batches or more does better; in ticks of the model's objective.

        Let every batch take at least b ticks plus w for each part of its work. On any schedule:

        - GPU time is b times the batches plus all work, however it is shared out. The batches are as many as
          the tokens need at C a batch, the KV cache in use (summed over batches) at M, and any one request
          alone. Makespan: the same for those who arrive from some time on.
        - While a request is there, it sees b for each batch and all the work done meanwhile. All at once: the
          k-th to finish has seen the work of k requests, so the sum is that of the shortest first; and as
          many batches as k requests need at the least; the last one has seen all batches. Else each has seen
          its own, and every batch is seen by somebody.
        - The same for first tokens, with the prompts alone; the last batches do not matter.
        """
        return max(self._least_along(line, batches) for line in self._lines)

    def least_work(self) -> list[tuple[int, list[int]]]:
        """Ticks that every batch takes at the least, and those that each request adds; several such pairs."""
        return [(base, work) for base, work, _ in self._lines]

    @cached_property
    def _lines(self) -> list[tuple[int, list[int], list[int]]]:
        """For each line below the cost: b, the least work of each request, and that of its prompt."""
        preempt = self.instance.allows("preempt")
        shapes = list(zip(self.prompt, self.output, strict=True))
        lines = []
        for line in self.cost.minorants():
            k = {f: line.get(f, 0) for f in ("U", "P", "NP", "CX2", "KP", "D", "KV", "HP", "HD")}
            base = k["U"] + min(k["HP"], k["HD"])
            if base < 0:
                continue

            def prefill(tokens: int, k: dict[str, int] = k) -> int:
                return k["P"] * tokens + k["NP"] + k["CX2"] * tokens * tokens

            def decode(tokens: int, k: dict[str, int] = k) -> int:
                return k["D"] + k["KV"] * tokens

            first = [prefill(i) for i, _ in shapes]
            rest = [
                sum(min(decode(i + g), prefill(i + g)) if preempt else decode(i + g) for g in range(1, o))
                for i, o in shapes
            ]
            lines.append((base, [f + r for f, r in zip(first, rest, strict=True)], first))
        return lines

    def _least_along(self, line: tuple[int, list[int], list[int]], batches: int) -> int:
        base, work, first = line
        goal, n = self.instance.objective, len(self.instance)
        everyone = range(n)
        if goal == "slo_goodput":
            return 0
        if goal == "gpu_time":
            return base * max(batches, self.fewest(everyone)) + sum(work)
        if goal == "makespan":
            later = [range(i, n) for i in range(n) if i == 0 or self.arrival[i] > self.arrival[i - 1]]
            bounds = [self.arrival[s[0]] + base * self.fewest(s) + sum(work[i] for i in s) for s in later]
            return max(*bounds, base * batches + sum(work) + self.arrival[0])
        arrived = sum(self.arrival)
        if goal == "mean_ttft":
            chunks = [self._chunks(i) for i in everyone]
            if not self.together:
                return arrived + base * sum(chunks) + sum(first)
            seen = _shares(list(self.prompt), self.instance.token_budget)
            return arrived + base * sum(map(max, seen, sorted(chunks))) + _shortest_first(first)
        if not self.together:
            return arrived + base * max(batches, sum(map(self._alone, everyone))) + sum(work)
        seen = self._seen
        return arrived + base * (sum(seen) + max(0, batches - seen[-1])) + _shortest_first(work)

    @cached_property
    def _seen(self) -> list[int]:
        """Batches that the k-th to finish has seen at the least, all being there from the start."""
        everyone, instance = range(len(self.instance)), self.instance
        assert instance.engine.kv_blocks
        return [
            max(each)
            for each in zip(
                sorted(map(self._alone, everyone)),
                _shares([self._area(i) for i in everyone], instance.engine.kv_blocks),
                _shares([self._tokens(i) for i in everyone], instance.token_budget),
                strict=True,
            )
        ]

    def fewest(self, some: range) -> int:
        """The fewest batches that can serve these requests."""
        engine = self.instance.engine
        assert engine.kv_blocks and engine.token_budget and engine.max_num_seqs
        area, ramp = sum(map(self._area, some)), 0
        while area > 0 and engine.token_budget * (ramp + 1) < engine.kv_blocks:
            # No more is in the cache than was computed so far.
            ramp += 1
            area -= engine.token_budget * ramp
        return max(
            -(-sum(map(self._tokens, some)) // engine.token_budget),
            ramp + max(0, -(-area // engine.kv_blocks)),
            -(-sum(map(self._alone, some)) // engine.max_num_seqs),
            max(map(self._alone, some)),
        )

    def _chunks(self, i: int) -> int:
        return self._chunks_of(self.prompt[i])

    def _chunks_of(self, tokens: int) -> int:
        return -(-tokens // self.instance.token_budget)

    def _alone(self, i: int) -> int:
        """Batches that request i takes at the least."""
        return self._chunks(i) + self.output[i] - 1

    def _tokens(self, i: int) -> int:
        return self.prompt[i] + self.output[i] - 1

    def _area(self, i: int) -> int:
        """KV blocks times batches of request i: for each token of its answer, what has to be in the cache."""
        size, prompt = self.instance.engine.block_size, self.prompt[i]
        return sum(-(-(prompt + g) // size) for g in range(self.output[i]))

    # ------------------------------------------------------------------ horizon

    def most_batches(self, below: int) -> int | None:
        """A number of batches such that some best schedule has no more, if the model's objective can be
        `below` or less; None if no such number is known.

        - Without preemption every batch adds to somebody's tokens, so there are no more than tokens (without
          chunks: than tokens of answers).
        - `least` of so many batches exceeds `below`.
        - Mean TTFT and SLO goodput with preemption: from some time on, nothing counts any more, and a batch
          takes time. Then preempt all who can be recomputed within the token budget (whoever cannot is never
          preempted any more), let the others go on as they do, in the batches in which they get tokens, and
          finish the rest one by one.
        """
        instance, everyone = self.instance, range(len(self.instance))
        bounds = []
        if not instance.allows("preempt"):
            chunked = instance.allows("chunk")
            bounds.append(sum(map(self._tokens, everyone) if chunked else self.output))
        if instance.objective not in ("mean_ttft", "slo_goodput"):
            low, slope = self.least(), max(base for base, _, _ in self._lines)
            if slope:
                batches = max(0, (below - low) // slope)  # `least` grows by no more than that a batch
                while self.least(batches + 1) <= below:
                    batches += max(1, (below - self.least(batches + 1)) // slope)
                bounds.append(batches)
            elif below // self._shortest() < 10**6:
                bounds.append(below // self._shortest())
        elif instance.allows("preempt"):
            decided = self._decided(below)
            if decided is not None:
                tail = sum(self._alone(i) + self._chunks_of(self._tokens(i)) for i in everyone)
                bounds.append(decided // self._shortest() + 1 + tail)
        return min(bounds, default=None)

    def _decided(self, below: int) -> int | None:
        """A tick from which on nothing counts for a schedule whose objective is `below` or less."""
        requests = self.instance.requests
        if self.instance.objective == "mean_ttft":
            return below - sum(self.arrival) + self.arrival[-1]
        rest = requests.tpot_target_s * (np.array(self.output) - 1)
        last = requests.arrival_s + requests.ttft_target_s + np.where(np.isfinite(rest), rest, 0.0)
        seconds = float(last.max()) * (1 + 1e-6)
        return math.ceil(Fraction(seconds) * self.per_second) if math.isfinite(seconds) else None

    def _shortest(self) -> int:
        """Ticks of the shortest batch; at least 1."""
        none = dict.fromkeys(("P", "NP", "CX2", "KP", "D", "KV", "HP", "HD"), 0) | {"U": 1}
        prefill = none | {"P": 1, "NP": 1, "CX2": 1, "HP": 1}
        return max(1, min(self.cost.time(prefill), self.cost.time(none | {"D": 1, "KV": 1, "HD": 1})))


def _shares(sizes: list[int], capacity: int) -> list[int]:
    """Batches that the k smallest need, k = 1, 2, ..."""
    return [-(-total // capacity) for total in itertools.accumulate(sorted(sizes))]


def _shortest_first(work: list[int]) -> int:
    return sum(itertools.accumulate(sorted(work)))


def _parts(
    profile: Profile,
) -> tuple[
    dict[str, Fraction],
    list[tuple[dict[str, Fraction], dict[str, Fraction]]],
    list[tuple[Fraction, Fraction]],
]:
    """The cost in seconds: see `Cost`."""
    if profile.form not in FORMS:
        raise InputError(
            f"cpsat takes the cost forms {', '.join(FORMS)}, not {profile.form}; the search takes any"
        )
    v = {key: Fraction(repr(float(value))) for key, value in profile.params.items()}
    larger: list[tuple[dict[str, Fraction], dict[str, Fraction]]] = []
    stairs: list[tuple[Fraction, Fraction]] = []
    half = Fraction(1, 2)
    if profile.form == "linear":
        line = {"U": v["c0"], "P": v["c1"], "D": v["c2"], "KV": v["c3"], "CX2": v["c4"] * half}
    elif profile.form == "hinge":
        line = {"U": v["h0"], "KV": v["h3"], "CX2": v["h4"] * half, "D": v["h5"]}
        larger = [({"U": v["h1"]}, {"P": v["h2"], "D": v["h2"]})]
    elif profile.form == "piecewise":
        line = {"U": v["c"]}
        larger = [({"U": Fraction(0)}, {"P": v["a"], "D": v["a"], "U": -v["a"] * v["b0"]})]
    elif profile.form == "staircase":
        line, stairs = {"U": v["c"]}, [(v["a"], v["b0"])]
    elif profile.form == "infermax":
        k = v["layers"] / 1000
        line = {"HD": k * v["b_d"], "KV": k * v["a_d"], "D": k * v["s_d"], "HP": k * v["b_p"]}
        line |= {"CX2": k * v["a_p"], "NP": k * v["s_p"], "KP": k * v["m_p"]}
        matrices = {"P": k * v["a_o"], "D": k * v["a_o"], "U": k * v["b_o"]}
        larger = [(matrices, {"U": k * v.get("floor", Fraction(0))})]
    else:
        b, kv = v["communication"], v["kv_prefill"]
        line = {"U": v["t0"], "KV": v["kv_decode"], "P": b, "D": b}
        larger = [
            ({"U": v["weights"]}, {"P": v["token"], "D": v["token"]}),
            ({"U": v["head_weights"]}, {"NP": v["head_token"], "D": v["head_token"]}),
            ({"CX2": v["attention"] * half}, {"KP": kv, "P": kv}),
        ]
    line["U"] = line.get("U", Fraction(0)) + Fraction(repr(profile.cpu_s))
    for f in ("NP", "D"):
        line[f] = line.get(f, Fraction(0)) + Fraction(repr(profile.cpu_s_per_request))
    return line, larger, stairs
