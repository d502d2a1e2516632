"""A network of engines in plain Python, to be read: one list of events, nothing incremental.

For jobs of a few dozen calls on stations with token-level disciplines (the routine LEVELS). The compiled
network must agree with it to the last bit. What happens at a moment: iterations end, station by station;
delays end, in the order in which they are due; jobs arrive; then all calls that were let go are routed, in
that order; then stations plan.

A station serves groups of calls one after the other, the group of the lowest key first. A group gives one
token to each call that decodes, then goes on with prompts, then admits; always in order of arrival at the
station. `max-weight` and `back-pressure` choose the order of groups, which are classes, each time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from oracle_cost import batch_time

from llmsched_env import profiles
from llmsched_env.core.state import Hold
from llmsched_env.networks import Jobs, Network, disciplines, loads
from llmsched_env.networks.core.state import Rule
from llmsched_env.networks.load import resolved
from llmsched_env.networks.network import TOKEN_LEVEL

NAN = float("nan")


@dataclass(eq=False)
class Call:
    """One hop."""

    index: int
    job: int
    cls: int
    prompt: int
    output: int
    delay: float
    before: list[Call] = field(default_factory=list)
    after: list[Call] = field(default_factory=list)
    state: str = "future"
    station: Engine | None = None
    rank: int = -1  # in the order in which calls came to stations
    key: float = 0.0
    base: int = 0  # tokens attained before it, as PLAS or ATLAS count
    computed: int = 0
    generated: int = 0
    target: int = 0
    blocks: int = 0
    lost: int = 0  # tokens computed in vain
    preemptions: int = 0
    released: float = NAN
    first_scheduled: float = NAN
    first_token: float = NAN
    finish: float = NAN

    @property
    def decodes(self) -> bool:
        return self.state == "running" and self.computed >= self.target

    @property
    def left(self) -> int:
        """Tokens that it has left."""
        return self.prompt + self.output - 1 - self.computed

    @property
    def attained(self) -> int:
        return self.computed + self.lost

    def path(self) -> int:
        """Tokens served on the longest path before it."""
        return max((b.path() + b.attained for b in self.before), default=0)

    def depth(self) -> int:
        return max((b.depth() + 1 for b in self.before), default=0)


@dataclass(eq=False)
class Engine:
    """One station."""

    net: Oracle
    number: int
    name: str
    s_per_token: float = 1.0
    busy_until: float | None = None
    asleep: bool = False

    def __post_init__(self) -> None:
        station = self.net.network.stations[self.number]
        self.scheduler = station.scheduler or TOKEN_LEVEL
        self.profile = profiles.get(station.profile)
        self.config = resolved(station, 2**20)
        self.calls: list[Call] = []  # all that are here
        self.running: list[Call] = []
        self.granted: dict[Call, int] = {}
        self.iterations = 0
        self.busy = 0.0

    @property
    def remaining(self) -> int:
        return sum(call.left for call in self.calls)

    @property
    def free(self) -> int:
        return self.config.kv_blocks - sum(call.blocks for call in self.running)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def held(self, call: Call) -> int:
        """Tokens of cache that it holds at least while it runs."""
        return call.prompt + call.output - 1 if self.scheduler.settings.hold is Hold.PEAK else 0

    @property
    def budget(self) -> int:
        return self.config.token_budget - sum(self.granted.values())

    @property
    def full(self) -> bool:
        most = self.scheduler.settings.max_batch_requests
        return self.budget <= 0 or 0 < most <= len(self.granted)

    # --------------------------------------------------------------------------------------------- a plan

    def plan(self) -> None:
        """Plan the next iteration and start it, or fall asleep."""
        now = self.net.now
        self.granted, self.victims = {}, []
        self.raise_keys()
        self.running.sort(key=lambda call: (call.key, call.rank))
        admitting = True
        if self.net.rule in (Rule.MAX_WEIGHT, Rule.PRESSURE):
            for key in self.by_pressure():
                if not self.full:
                    self.serve(key, True)
        else:
            served: set[float] = set()
            while not self.full:
                keys = {call.key for call in self.running}
                if admitting:
                    keys |= {call.key for call in self.waiting()}
                keys -= served
                if not keys:
                    break
                served.add(min(keys))
                admitting = self.serve(min(keys), admitting) and admitting
        if self.granted or self.victims:
            self.busy_until = now + self.seconds()
        else:
            self.asleep = True

    def waiting(self) -> list[Call]:
        return sorted(
            (call for call in self.calls if call.state == "waiting"), key=lambda call: (call.key, call.rank)
        )

    def raise_keys(self) -> None:
        if self.net.rule in (Rule.PLAS, Rule.ATLAS):
            for call in self.running:
                call.key = self.net.level(call.base + call.attained)

    def by_pressure(self) -> list[int]:
        """Classes that are here, in the order in which they are served."""
        pressures = {}
        for c, (_, node) in enumerate(self.net.network.classes):
            here = [call for call in self.calls if call.cls == c]
            if here:
                if self.net.rule is Rule.MAX_WEIGHT:
                    pressures[c] = node.weight * sum(call.left for call in here)
                else:
                    pressures[c] = node.weight * (len(here) - self.net.below(c)) / self.net.mean_tokens(c)
        return sorted(pressures, key=lambda c: (-pressures[c], c))

    def serve(self, key: float, admitting: bool) -> bool:
        """Serve a group; False if one that waits found no room."""
        group = [call for call in self.running if call.key == key]
        for kind in (True, False):
            for call in list(group):
                if self.full:
                    return True
                if call.state != "running" or call in self.granted or call.decodes is not kind:
                    continue
                tokens = 1 if kind else min(call.target - call.computed, self.budget)
                if self.make_room(call, tokens):
                    self.give(call, tokens)
        if not admitting or self.victims:
            return True
        for call in [call for call in self.waiting() if call.key == key]:
            if self.full:
                return True
            tokens = min(call.prompt + call.generated, self.budget)
            if len(self.running) >= self.config.max_num_seqs or not self.fits(call, tokens):
                return False
            call.state, call.target = "running", call.prompt + call.generated
            if math.isnan(call.first_scheduled):
                call.first_scheduled = self.net.now
            self.running.append(call)
            self.give(call, tokens)
        return True

    def fits(self, call: Call, tokens: int) -> bool:
        """Whether the cache takes it: its whole answer, or all that is known of it."""
        known = call.prompt + call.generated
        return self.blocks_for(max(1, self.held(call), known)) <= self.free

    def give(self, call: Call, tokens: int) -> None:
        call.blocks = max(call.blocks, self.blocks_for(max(call.computed + tokens, self.held(call))))
        assert self.free >= 0
        self.granted[call] = tokens

    def make_room(self, call: Call, tokens: int) -> bool:
        """Preempt from the end of the running list until it finds its blocks; False if it had to go."""
        need = self.blocks_for(max(call.computed + tokens, self.held(call))) - call.blocks
        while self.free < need:
            victim = [other for other in self.running if other not in self.granted][-1]
            self.running.remove(victim)
            victim.state = "waiting"
            victim.preemptions += 1
            victim.lost += victim.computed
            victim.computed = victim.blocks = 0
            self.victims.append(victim)
            if victim is call:
                return False
        return True

    def seconds(self) -> float:
        prefills = [(call, tokens) for call, tokens in self.granted.items() if not call.decodes]
        decodes = [call for call in self.granted if call.decodes]
        return batch_time(
            self.profile,
            sum(tokens for _, tokens in prefills),
            len(prefills),
            sum(tokens * (call.computed + 0.5 * tokens) for call, tokens in prefills),
            sum(call.computed for call, _ in prefills),
            len(decodes),
            sum(call.computed + 1 for call in decodes),
        )

    def end(self) -> list[Call]:
        """The iteration ends: tokens come out. Returns those that are done."""
        now = self.busy_until
        done = []
        self.iterations += 1
        self.busy += self.seconds()
        for call, tokens in self.granted.items():
            call.computed += tokens
            if call.computed >= call.prompt + call.generated:
                call.generated += 1
                if call.generated == 1:
                    call.first_token = now
                if call.generated >= call.output:
                    call.state, call.finish = "ended", now
                    self.running.remove(call)
                    self.calls.remove(call)
                    done.append(call)
        self.granted = {}
        self.busy_until = None
        return done


class Oracle:
    """A network under a discipline, run until all jobs are done."""

    def __init__(self, network: Network, discipline: str, jobs: Jobs, seed: int = 0) -> None:
        self.network, self.jobs = network, jobs
        self.discipline = disciplines.get(discipline)
        self.rule = self.discipline.rule
        self.calls = [
            Call(h, int(j), int(jobs.node[h]), int(p), int(o), float(d))
            for h, (j, p, o, d) in enumerate(
                zip(jobs.job_of_hop, jobs.prompt_tokens, jobs.output_tokens, jobs.delay_s, strict=True)
            )
        ]
        for b, a in zip(jobs.before, jobs.after, strict=True):
            self.calls[b].after.append(self.calls[a])
            self.calls[a].before.append(self.calls[b])
        self.left_of_workflow = {w.name: w.hops_left() for w in network.workflows}
        self.engines = [Engine(self, k, s.name) for k, s in enumerate(network.stations)]
        by_name = {engine.name: engine for engine in self.engines}
        for load in loads(network):
            pool = next(p for p in network.all_pools if p.name == load.pool)
            for name, seconds in zip(pool.stations, load.s_per_token, strict=True):
                by_name[name].s_per_token = seconds
        self.pools = {
            pool.name: (pool.routing, [by_name[name] for name in pool.stations]) for pool in network.all_pools
        }
        self.turns = dict.fromkeys(self.pools, 0)
        self.random = (seed * 0x9E3779B97F4A7C15 + 1) % 2**64
        self.now = 0.0
        self.sent = 0
        self.history: list[tuple[float, list[int], int]] = []  # time, remaining tokens, jobs in system
        self.job_finish = [NAN] * len(jobs)

    # ------------------------------------------------------------------------------------------ small facts

    def level(self, tokens: int) -> float:
        """Level i ends at quantum * (2^(i + 1) - 1) tokens."""
        level = 0
        while tokens >= self.discipline.quantum * (2 ** (level + 1) - 1):
            level += 1
        return float(level)

    def of_class(self, c: int) -> list[Call]:
        return [call for call in self.calls if call.cls == c]

    def mean_tokens(self, c: int) -> float:
        return sum(call.prompt + call.output - 1 for call in self.of_class(c)) / len(self.of_class(c))

    def below(self, c: int) -> float:
        """Hops downstream of class c, for each station of their pools, by the share of its hops that go
        there."""
        total = 0.0
        for j, (_, node) in enumerate(self.network.classes):
            edges = sum(1 / len(a.before) for call in self.of_class(c) for a in call.after if a.cls == j)
            if edges:
                there = [call for call in self.of_class(j) if call.state in ("waiting", "running")]
                total += edges / len(self.of_class(c)) * len(there) / len(self.pools[node.pool][1])
        return total

    def key(self, call: Call) -> float:
        if self.rule is Rule.CLASS:
            workflow, node = self.network.classes[call.cls]
            if self.discipline.keys == "left":
                return self.left_of_workflow[workflow.name][node.name]
            return float(node.priority)
        if self.rule is Rule.DEPTH:
            return float(call.depth())
        if self.rule is Rule.OLDEST:
            return float(call.job)
        if self.rule is Rule.PLAS:
            call.base = sum(c.attained for c in self.calls if c.job == call.job and c.state == "done")
            return self.level(call.base)
        if self.rule is Rule.ATLAS:
            call.base = call.path()
            return self.level(call.base)
        return 0.0 if self.rule is Rule.FCFS else float(call.cls)

    def draw(self, n: int) -> int:
        """SplitMix64."""
        self.random = (self.random + 0x9E3779B97F4A7C15) % 2**64
        x = self.random
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        x ^= x >> 31
        return int((x >> 11) * 2.0**-53 * n)

    def route(self, call: Call) -> Engine:
        name = self.network.classes[call.cls][1].pool
        routing, engines = self.pools[name]
        n = len(engines)
        if n == 1:
            return engines[0]
        if routing == "round-robin":
            self.turns[name] += 1
            return engines[(self.turns[name] - 1) % n]
        if routing == "random":
            return engines[self.draw(n)]
        if routing == "power-of-two":
            one = engines[self.draw(n)]
            other = [engine for engine in engines if engine is not one][self.draw(n - 1)]
            return other if other.remaining < one.remaining else one
        if routing == "by-class":
            return engines[call.cls % n]
        if routing == "by-program":
            return engines[call.job % n]
        if routing == "least-time":
            return min(engines, key=lambda engine: engine.remaining * engine.s_per_token)
        return min(engines, key=lambda engine: engine.remaining)

    # ----------------------------------------------------------------------------------------------- running

    def run(self) -> Oracle:
        to_come = list(range(len(self.jobs)))
        timed: list[tuple[float, int, Call]] = []  # when, order, call
        entries = 0
        if self.jobs.arrival_s[0] > 0:
            for engine in self.engines:
                engine.plan()
        while True:
            times = [e.busy_until for e in self.engines if e.busy_until is not None]
            times += [when for when, _, _ in timed]
            times += [float(self.jobs.arrival_s[j]) for j in to_come[:1]]
            if not times:
                break
            self.now = min(times)
            ready: list[Call] = []

            def release(call: Call, to: list[Call]) -> None:
                nonlocal entries
                call.state = "released"
                if call.delay > 0:
                    timed.append((self.now + call.delay, entries, call))
                    entries += 1
                else:
                    to.append(call)

            due = [e for e in self.engines if e.busy_until is None and not e.asleep]
            for engine in self.engines:
                if engine.busy_until == self.now:
                    due.append(engine)
                    for call in engine.end():
                        call.state = "done"
                        for after in call.after:
                            if after.state == "future" and all(b.state == "done" for b in after.before):
                                release(after, ready)
                        if all(c.state == "done" for c in self.calls if c.job == call.job):
                            self.job_finish[call.job] = self.now
            timed.sort(key=lambda entry: entry[:2])
            while timed and timed[0][0] <= self.now:
                ready.append(timed.pop(0)[2])
            while to_come and self.jobs.arrival_s[to_come[0]] <= self.now:
                job = to_come.pop(0)
                for call in self.calls:
                    if call.job == job and not call.before:
                        release(call, ready)
            for call in ready:
                engine = self.route(call)
                call.state, call.station, call.released = "waiting", engine, self.now
                call.rank = self.sent
                self.sent += 1
                call.key = self.key(call)
                engine.calls.append(call)
                if engine.asleep:
                    engine.asleep = False
                    due.append(engine)
            for engine in self.engines:
                if engine in due:
                    engine.plan()
            inside = sum(
                math.isnan(finish) and arrival <= self.now
                for finish, arrival in zip(self.job_finish, self.jobs.arrival_s, strict=True)
            )
            self.history.append((self.now, [engine.remaining for engine in self.engines], inside))
        return self

    def at(self, time: float) -> tuple[list[int], int]:
        """Remaining tokens of the stations and jobs in system, after all that happens at `time`."""
        state = ([0] * len(self.engines), 0)
        for when, tokens, inside in self.history:
            if when <= time:
                state = (tokens, inside)
        return state
