"""The engine and its one routine in plain Python, to be read: lists and small records, nothing incremental.

Written from the rules (`Settings`, and those of the real systems that it follows), for workloads of a few
dozen requests. The compiled engine must agree with it to the last bit, so clock, busy time and KV-seconds are
summed iteration by iteration, in this order; tokens and blocks are whole numbers, counted in any way.

Where the rules leave something open, this is what holds:
- a request's place in the queue is settled by its key when it enters;
- RUNNING and MERGED passes may mix prefills and decodes, `mixed` or not; a MERGED pass looks at the head of
  the queue only, without `backfill`, `admission_preempts`, `peak` and `prefill_interval`, and all of it stops
  at the token budget;
- behind a request that does not fit, those that the free blocks could not take are passed over without
  counting as tried, and those that fit do not count either;
- who comes after a waiting request, so that it may preempt them, is who has a greater key; with `peak`, it
  preempts before that test is made;
- a swapped request comes back with all that is left of its prefill, or not at all.

Not here: `Order.RANDOM` and `Order.SCORE`, and routines other than `UNIFIED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from oracle_cost import batch_time

from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.histogram import itl_bin_edges
from llmsched_env.core.requests import Requests
from llmsched_env.core.state import Hold, Listing
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import Budget, Pass, Peak, Settings, Sort, Victim

FUTURE, WAITING, RUNNING, SWAPPED, DEFERRED, FINISHED, DROPPED = range(7)
NAN = float("nan")


class Stuck(Exception):
    """Nothing is planned, nothing more arrives, and somebody waits."""


@dataclass(eq=False)
class Request:
    """One request. The KV of `computed` tokens is in the cache; its prefill is done at `target`."""

    index: int  # also the order of arrival
    arrival: float
    prompt: int
    stop: int  # tokens of the answer when it ends
    limit: int  # tokens of the answer at which the engine would stop it
    predicted: float
    priority: int
    deadline: float
    status: int = FUTURE
    computed: int = 0
    target: int = 0
    generated: int = 0
    in_flight: int = 0  # tokens sampled, not yet seen (asynchronous scheduling)
    hold: int = 0  # tokens of KV reserved at admission
    blocks: int = 0  # on the GPU while running, in the CPU tier while swapped
    place: tuple[float, int] = (0.0, 0)  # in the queue
    evicted_in: int = -1  # iteration
    evicted_rest: int = 0  # prefill tokens that were left then
    preemptions: int = 0
    recomputed: int = 0
    first_scheduled: float = NAN
    first_token: float = NAN
    last_token: float = NAN
    finish: float = NAN

    @property
    def known(self) -> int:
        """Prompt and answer so far: what a re-admission prefills."""
        return self.prompt + self.generated

    @property
    def prefilling(self) -> bool:
        return self.computed < self.target


@dataclass
class Row:
    """What an iteration did."""

    start: float
    end: float
    prefill_tokens: int
    decodes: int
    kv_tokens: int
    free_blocks: int  # when the plan was complete
    swapped_in: int
    victims: list[tuple[int, bool]]  # and whether it went to the CPU tier
    granted: list[tuple[int, int]]  # in the order of the listing


@dataclass
class Oracle:
    """One engine. `config` is resolved; `dropped` are indices of requests that are never admitted."""

    requests: Requests
    settings: Settings
    config: EngineConfig
    profile: Profile
    dropped: frozenset[int] = frozenset()

    clock: float = 0.0
    iterations: int = 0
    busy: float = 0.0
    kv_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    wasted: int = 0
    batch_sum: int = 0
    gaps: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        c, n = self.config, self.requests
        self.req = [
            Request(
                i,
                float(n.arrival_s[i]),
                int(n.prompt_tokens[i]),
                stop=0,
                limit=0,
                predicted=float(n.predicted_tokens[i]),
                priority=int(n.priority[i]),
                deadline=float(n.arrival_s[i] + n.ttft_target_s[i]),
            )
            for i in range(len(n))
        ]
        for i, r in enumerate(self.req):
            # The answer ends at the declared maximum, or when the sequence fills the model's length.
            room = c.max_model_len - r.prompt + (1 if self.settings.stop_one_later else 0)
            r.limit = min(int(n.declared_tokens[i]), room)
            r.stop = min(int(n.output_tokens[i]), r.limit)
            if i in self.dropped:
                r.status = DROPPED
        self.watermark_blocks = int(c.watermark * c.kv_blocks)
        self.running: list[Request] = []
        self.swapped: list[Request] = []  # oldest first
        self.unseen: list[Request] = []  # whose token of the last iteration nobody has seen yet
        self.to_come = list(self.req)
        self.front = self.back = 0
        self.last_prefill: int | None = None
        self.capacity_bound = False
        self.class_totals: dict[int, list[int]] = {}
        self.plan_is_empty()

    # -------------------------------------------------------------------------------------------- small facts

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    @property
    def free(self) -> int:
        return self.config.kv_blocks - sum(r.blocks for r in self.running)

    @property
    def cpu_free(self) -> float:
        size = math.inf if self.config.cpu_blocks is None else self.config.cpu_blocks
        return size - sum(r.blocks for r in self.swapped)

    @property
    def watermark(self) -> int:
        return self.watermark_blocks if self.settings.watermark_when_idle or self.running else 0

    @property
    def budget(self) -> int:
        """Tokens left in this iteration."""
        return self.most_tokens - sum(self.granted.values())

    @property
    def batch_full(self) -> bool:
        return 0 < self.settings.max_batch_requests <= len(self.granted)

    @property
    def prefills(self) -> list[Request]:
        """Those in the plan that prefill."""
        return [r for r in self.granted if r.prefilling]

    @property
    def decodes(self) -> list[Request]:
        return [r for r in self.granted if not r.prefilling]

    def hold_tokens(self, r: Request, hold: Hold) -> int:
        """For how many tokens `hold` wants room when r is admitted."""
        c = self.config
        if hold is Hold.CHUNK:
            return 0
        if hold is Hold.KNOWN:
            return r.known
        if hold is Hold.PEAK:
            return r.prompt + r.stop - 1
        if hold is Hold.PREDICTED:  # never more than the watermark leaves of all
            answer = math.ceil(min(r.predicted, r.limit))
            return max(
                r.known, min(r.prompt + answer - 1, (c.kv_blocks - self.watermark_blocks) * c.block_size)
            )
        if hold is Hold.DECLARED:
            return max(r.known, r.prompt + r.limit - 1)
        return c.max_model_len

    # ---------------------------------------------------------------------------------------------- the queue

    @property
    def queue(self) -> list[Request]:
        """Waiting requests in order."""
        return sorted((r for r in self.req if r.status == WAITING), key=lambda r: r.place)

    def key(self, r: Request) -> float:
        s, order = self.settings, self.settings.order
        if order is Order.ARRIVAL:
            return r.arrival
        if order is Order.PRIORITY:
            return float(r.priority)
        if order is Order.PROMPT:
            return float(r.prompt)
        if order is Order.LONGEST:
            return -float(r.prompt)
        if order is Order.OUTPUT:
            return r.predicted
        if order is Order.TOTAL:
            return r.prompt + r.predicted
        if order is Order.AREA:
            return r.predicted * r.prompt + 0.5 * r.predicted * r.predicted
        if order is Order.REMAINING:
            return r.predicted - r.generated
        if order is Order.DEADLINE:
            return r.deadline
        if order is Order.BOOST:
            prefill_s = s.boost_s_per_token * r.known
            return r.arrival + math.log(-math.expm1(-s.boost_gamma * prefill_s)) / s.boost_gamma
        if order is Order.ATTAINED:
            level = 0
            while r.generated >= 32 * (2 ** (level + 1) - 1):
                level += 1
            return float(level)
        if order is Order.LOWER_BOUND:
            return max(s.lower_bound * r.predicted, float(r.generated))
        assert order is Order.FIFO
        return 0.0

    def rank(self, r: Request) -> tuple[float, int]:
        """Where r would be in the queue's order now; ties go to the earlier arrival."""
        return self.key(r), r.index

    def enter_queue(self, r: Request, place: Place) -> None:
        """The place of a request is settled when it enters."""
        r.status = WAITING
        if place is Place.HEAD:
            self.front -= 1
            r.place = (-math.inf, self.front)
        elif place is Place.END or self.settings.order is Order.FIFO:
            self.back += 1
            key = 0.0 if self.settings.order is Order.FIFO else math.inf
            r.place = (key, len(self.req) + self.back)
        else:
            r.place = self.rank(r)

    # -------------------------------------------------------------------------------------- giving and taking

    def plan_is_empty(self) -> None:
        self.granted: dict[Request, int] = {}  # in order
        self.victims: dict[Request, bool] = {}  # in order; whether they went to the CPU tier
        self.admitted: set[Request] = set()
        self.brought_back: set[Request] = set()
        self.swapped_tokens = 0
        self.most_tokens = self.config.token_budget

    def grant(self, r: Request, tokens: int) -> None:
        """Blocks are taken at once, those held in reserve included."""
        if r.status == WAITING:
            r.status = RUNNING
            r.target = r.known
            r.hold = self.hold_tokens(r, self.settings.hold)
            self.running.append(r)
            self.admitted.add(r)
            if math.isnan(r.first_scheduled):
                r.first_scheduled = self.clock
        r.blocks = max(r.blocks, self.blocks_for(max(r.computed + tokens, r.hold)))
        assert self.free >= 0 and r not in self.granted and 1 <= tokens <= max(1, r.target - r.computed)
        assert len(self.running) <= self.config.max_num_seqs
        self.granted[r] = tokens

    def evict(self, r: Request, may_swap: bool = True) -> None:
        """To the CPU tier where the engine swaps and there is room; else its KV is dropped."""
        self.granted.pop(r, None)
        self.running.remove(r)
        r.preemptions += 1
        r.evicted_in, r.evicted_rest = self.iterations, max(0, r.target - r.computed)
        to_cpu = may_swap and self.config.preemption == "swap" and r.blocks <= self.cpu_free
        self.victims[r] = to_cpu
        if to_cpu:
            r.status = SWAPPED
            self.swapped.append(r)
            self.swapped_tokens += r.computed
            return
        r.recomputed += r.computed
        r.computed = r.blocks = r.hold = 0
        if self.settings.defer_victims:
            r.status = DEFERRED
        else:
            self.enter_queue(r, self.settings.resume)

    # ----------------------------------------------------------------------------------------------- planning

    def plan(self) -> None:
        s = self.settings
        self.plan_is_empty()
        if s.sort is Sort.ARRIVAL:
            self.running.sort(key=lambda r: r.index)
        elif s.sort is Sort.LONGEST_KV:
            self.running.sort(key=lambda r: -r.computed)
        elif s.sort is Sort.KEY:
            self.running.sort(key=self.rank)
        cap = self.chunk_cap()
        held = self.prefills_held()
        if s.budget_rule is Budget.PRESSURE and self.under_pressure():
            self.most_tokens = min(self.most_tokens, s.budget_low)
        for what in s.passes:
            if what in (Pass.RUNNING, Pass.DECODES, Pass.CHUNKS):
                self.serve_running(what, cap, held)
            elif what is Pass.ADMIT:
                if not held and (s.mixed or not self.decodes):
                    self.admit(cap)
                if s.preempt_for_priority and not self.prefills:
                    self.preempt_for_priority()
            elif what is Pass.SWAP_IN:
                self.bring_back()
            elif what is Pass.MERGED:
                self.serve_merged(cap)
        if s.reorder_chunked:
            self.running.sort(key=self.level)
        if not held:
            self.capacity_bound = len(self.queue) > 0
            if self.prefills:
                self.last_prefill = self.iterations
        for r in self.victims:
            if r.status == DEFERRED:
                self.enter_queue(r, s.resume)

    def chunk_cap(self) -> float:
        """vLLM V1's long_prefill_token_threshold."""
        s, present = self.settings, len(self.running) + len(self.queue)
        if s.chunk_cap == 0 or (present <= 1 and not s.chunk_cap_alone):
            return math.inf
        if s.chunk_cap_adaptive:
            return max(s.chunk_cap, self.config.token_budget // max(1, present))
        return s.chunk_cap

    def prefills_held(self) -> bool:
        """vLLM V1's prefill_schedule_interval: so many steps from one with a prefill to the next.

        Not if that step left somebody waiting, or nobody is decoding.
        """
        return (
            self.settings.prefill_interval > 1
            and self.last_prefill is not None
            and self.iterations - self.last_prefill < self.settings.prefill_interval
            and not self.capacity_bound
            and any(not r.prefilling for r in self.running)
        )

    def under_pressure(self) -> bool:
        """P-PAS: two prefills or more, of prompts, are under way or wait, and somebody decodes."""
        prefills = sum(r.computed < r.prompt for r in self.running)
        return prefills + len(self.queue) >= 2 and prefills < len(self.running)

    def chunk(self, rest: int, cap: float) -> int:
        """Tokens of the next chunk when `rest` are left; 0: none now."""
        want = int(min(rest, cap))
        if not self.settings.limit_prefills or want <= self.budget:
            return want
        return max(0, self.budget) if self.settings.chunked else 0

    def wanted(self, r: Request, cap: float) -> int:
        """Tokens that running request r can use now."""
        if r.prefilling:
            return self.chunk(r.target - r.computed, cap)
        if r.generated + r.in_flight >= r.limit or (self.settings.limit_decodes and self.budget <= 0):
            return 0
        return 1

    def serve_running(self, what: Pass, cap: float, held: bool) -> None:
        if not self.settings.mixed:  # the first pass that finds work wins
            if (what is Pass.DECODES and self.prefills) or (what is Pass.CHUNKS and self.decodes):
                return
        for r in list(self.running):
            if r.status != RUNNING or r in self.granted:
                continue
            if self.batch_full:
                break
            if what is (Pass.DECODES if r.prefilling else Pass.CHUNKS) or (r.prefilling and held):
                continue
            want = self.wanted(r, cap)
            if want > 0 and self.make_room(r, want):
                self.grant(r, want)

    def make_room(self, r: Request, want: int) -> bool:
        """Preempt until r finds its blocks; False if it had to go itself."""
        s = self.settings
        need = max(0, self.blocks_for(max(r.computed + want, r.hold)) - r.blocks)
        if r.prefilling:
            if s.free_block_for_chunk and r.target % self.config.block_size:
                need = max(1, need)
        elif s.free_block_for_decode:
            need = max(1, need)
        while self.free < need:
            victim = self.victim(r)
            self.evict(victim)
            if victim is r:
                return False
        return True

    def victim(self, r: Request) -> Request:
        rule = self.settings.victim
        idle = [v for v in self.running if v not in self.granted]  # r among them
        if rule is Victim.NEWEST:
            return idle[-1]
        if rule is Victim.PRIORITY:
            return max(self.running, key=lambda v: (v.priority, v.index))
        if rule is Victim.LEAST_KEY:
            return min(self.running, key=self.rank)
        if rule is Victim.SHORTEST:
            return max(idle, key=lambda v: (-v.computed, v.index))
        if rule is Victim.LONGEST:
            return max(idle, key=lambda v: (v.computed, v.index))
        return max(idle, key=self.rank)

    def level(self, r: Request) -> int:
        """Where r stands in the running list after an iteration of chunked vLLM v0."""
        if r in self.brought_back:
            return 2 if r.prefilling else 1
        if r in self.admitted:
            return 5
        return 0 if r not in self.granted else 4 if r.prefilling else 3

    # ---------------------------------------------------------------------------------------------- admission

    def admit(self, cap: float) -> None:
        s = self.settings
        if (self.victims and not s.admit_after_preemption) or (self.swapped and not s.admit_while_swapped):
            return
        misfits, last_key = 0, math.inf
        candidates = self.queue
        while candidates and candidates[0].place[0] <= last_key:
            if (s.limit_prefills and self.budget <= 0) or self.batch_full:
                return
            r = candidates[0]
            want = self.chunk(self.prefill_of(r), cap)
            if want <= 0:
                if not s.pass_over:
                    return
                candidates = candidates[1:]
                continue
            fits = len(self.running) < self.config.max_num_seqs and self.fits(r, want)
            if not fits and s.admission_preempts:
                fits = self.preempt_for(r, want)
            if fits and s.peak is not Peak.NONE and self.running:
                fits = self.peak_fits(r)
            if fits:
                self.grant(r, want)
            else:
                if misfits >= s.backfill or len(self.running) >= self.config.max_num_seqs:
                    return
                if misfits == 0 and s.backfill_within < math.inf:
                    last_key = s.backfill_within * r.place[0]
                misfits += 1
            candidates = self.queue
            if (
                misfits
            ):  # behind one that did not fit, only those are looked at that the free blocks could take
                room = self.free - self.watermark
                candidates = [
                    w for w in candidates if w.place > r.place and self.blocks_to_admit(w, 0) <= room
                ]

    def prefill_of(self, r: Request) -> int:
        """What waiting request r has to prefill.

        A victim's progress is reset only after the iteration, so that in this one it could go on with its
        unfinished prefill, and has nothing to do after a finished one (Sarathi-Serve).
        """
        return r.evicted_rest if r.evicted_in == self.iterations else r.known

    def blocks_to_admit(self, r: Request, want: int) -> int:
        """Blocks that must be free, beyond the watermark, to admit r with a chunk of `want` tokens."""
        s = self.settings
        tokens = max(self.hold_tokens(r, s.test), self.hold_tokens(r, s.hold))
        if s.test is Hold.CHUNK:
            tokens = max(tokens, want)
        return max(1, self.blocks_for(tokens))

    def fits(self, r: Request, want: int, without: list[Request] | None = None) -> bool:
        """Whether the KV cache takes r; `without`: if these running requests were preempted."""
        s, gone = self.settings, without or []
        alone = len(self.running) == len(gone)
        need = self.blocks_to_admit(r, want)
        if s.length_classes and r.prompt >= s.hist_threshold and not alone:  # SRF+Hist
            totals = self.class_totals.get(r.prompt.bit_length(), [])
            if totals:
                need = max(need, self.blocks_for(int(sum(totals) / len(totals))))
        if s.watermark_when_idle or not alone:
            need += self.watermark_blocks
        return need <= self.free + sum(v.blocks for v in gone)

    def preempt_for(self, r: Request, want: int) -> bool:
        """Preempt running requests that come after r, the last first, until it fits; else nobody."""
        s = self.settings
        after = [
            v
            for v in self.running
            if self.key(v) > r.place[0] and not v.generated >= s.protect_after * v.predicted
        ]
        after.sort(key=self.rank, reverse=True)
        for n in range(1, len(after) + 1):
            gone = after[:n]
            if len(self.running) - n < self.config.max_num_seqs and self.fits(r, want, without=gone):
                for v in gone:
                    self.evict(v)
                return True
        return False

    def peak_fits(self, r: Request) -> bool:
        """Whether memory suffices at every coming completion if r is there and all decode in lock-step."""
        s, size = self.settings, self.config.block_size

        def left(v: Request) -> int:
            if s.peak is Peak.TRUE:
                return max(1, v.stop - v.generated)
            length = v.predicted
            if s.peak is Peak.LOWER_BOUND:
                length = max(s.lower_bound * length, v.generated)
            return max(1, math.ceil(min(length, v.limit)) - v.generated)

        def held(v: Request) -> int:
            """As if its prefill ended with this iteration; the last block may hold one token only."""
            decoding = v.status == RUNNING and not v.prefilling
            return (v.computed if decoding else v.known - 1) + size - 1

        all_of_them = [(left(v), held(v)) for v in [*self.running, r]]
        for when, _ in all_of_them:
            usage = sum(h + when for d, h in all_of_them if d >= when)
            if usage > self.config.kv_blocks * size:
                return False
        return True

    def preempt_for_priority(self) -> None:
        """vLLM v0: running requests below the head of the queue make room for it, the lowest first.

        The running list is sorted before that and the queue after it. The head is admitted in the next
        iteration at the earliest.
        """
        self.running.sort(key=lambda r: (r.priority, r.index))
        if self.queue:
            head = self.queue[0]
            while self.running:
                last = self.running[-1]
                if (last.priority, last.index) < (head.priority, head.index):
                    break
                fits = self.blocks_to_admit(head, 0) + self.watermark <= self.free
                if fits and head.known <= self.budget and len(self.running) < self.config.max_num_seqs:
                    break
                self.evict(last, may_swap=False)
        for r in self.queue:
            r.place = self.rank(r)

    def bring_back(self) -> None:
        """vLLM v0: oldest first, with room for the next token, never in pieces."""
        s = self.settings
        while self.swapped and not self.victims:
            r = self.swapped[0]
            want = max(1, r.target - r.computed)
            full = len(self.running) >= self.config.max_num_seqs or self.batch_full
            mixes = not s.mixed and (self.decodes if r.prefilling else self.prefills)
            if full or mixes or want > self.budget:
                break
            need = max(
                r.computed // self.config.block_size + 1, self.blocks_for(max(r.computed + want, r.hold))
            )
            if need + self.watermark > self.free:
                break
            self.swapped.remove(r)
            r.status = RUNNING
            self.running.append(r)
            self.brought_back.add(r)
            self.swapped_tokens += r.computed
            self.grant(r, want)

    def serve_merged(self, cap: float) -> None:
        """Running and waiting requests together, by the queue's key; who runs goes first among equals."""
        closed = False
        passed: set[Request] = set()
        while self.budget > 0 and not self.batch_full:
            run = next((r for r in self.running if r not in self.granted and r not in passed), None)
            wait = None if closed else next(iter(self.queue), None)
            if run is not None and (wait is None or self.key(run) <= wait.place[0]):
                want = self.wanted(run, cap)
                if want <= 0:
                    passed.add(run)
                elif self.make_room(run, want):
                    self.grant(run, want)
            elif wait is not None:
                want = self.chunk(self.prefill_of(wait), cap)
                if want <= 0 or len(self.running) >= self.config.max_num_seqs or not self.fits(wait, want):
                    closed = True
                else:
                    self.grant(wait, want)
            else:
                break

    # ------------------------------------------------------------------------------------------------ running

    def run(self, max_iterations: float = math.inf, horizon: float = math.inf) -> Oracle:
        """Serve everything, or until so many iterations are done or one ends at the horizon."""
        seen = 0.0  # the scheduler knows of arrivals up to here
        while self.iterations < max_iterations and self.clock < horizon:
            while self.to_come and self.to_come[0].arrival <= seen:
                r = self.to_come.pop(0)
                if r.status == FUTURE:
                    self.enter_queue(r, Place.END if self.settings.preempt_for_priority else Place.KEY)
            self.plan()
            if self.granted or self.victims or self.brought_back:
                row = self.plan_row()
                seen = self.iterate(row)
                self.check(row)
                continue
            self.see_tokens()
            if seen < self.clock:  # plan again, knowing what the iteration before has brought
                seen = self.clock
            elif self.to_come:
                self.clock = seen = max(self.clock, self.to_come[0].arrival)
            elif all(r.status in (FINISHED, DROPPED) for r in self.req):
                break
            else:
                raise Stuck
        return self

    def plan_row(self) -> Row:
        """The plan as it is reported."""
        listed = list(self.granted)
        if self.settings.listing is Listing.PREFILLS_FIRST:
            listed.sort(key=lambda r: not r.prefilling)
        elif self.settings.listing is Listing.NEW_FIRST:

            def group(r: Request) -> int:
                if r in self.brought_back:
                    return 2 if r.prefilling else 4
                return 3 if not r.prefilling else 0 if r in self.admitted else 1

            listed.sort(key=group)
        return Row(
            start=self.clock,
            end=NAN,
            prefill_tokens=sum(self.granted[r] for r in self.prefills),
            decodes=len(self.decodes),
            kv_tokens=0,
            free_blocks=self.free,
            swapped_in=len(self.brought_back),
            victims=[(r.index, to_cpu) for r, to_cpu in self.victims.items()],
            granted=[(r.index, self.granted[r]) for r in listed],
        )

    def seconds(self) -> float:
        """How long the planned iteration takes."""
        prefills, decodes = self.prefills, self.decodes
        t = batch_time(
            self.profile,
            sum(self.granted[r] for r in prefills),
            len(prefills),
            sum(self.granted[r] * (r.computed + 0.5 * self.granted[r]) for r in prefills),
            sum(r.computed for r in prefills),
            len(decodes),
            sum(r.computed + 1 for r in decodes),
        )
        if self.swapped_tokens:
            per_token = (self.profile.kv_bytes_per_token or 0.0) / self.config.swap_bandwidth
            transfer = self.swapped_tokens * per_token
            t = max(t, transfer) if self.config.swap_overlap else t + transfer
        return t

    def iterate(self, row: Row) -> float:
        """Run the planned iteration; returns up to when the next plan knows of arrivals."""
        dt = self.seconds()
        size = len(self.granted)
        self.see_tokens()  # asynchronous: of the iteration before, too late for this plan
        self.clock = row.end = row.start + dt
        for r, tokens in self.granted.items():
            if r.status == FINISHED:
                self.wasted += 1
                continue
            r.computed += tokens
            if r.computed >= r.known + r.in_flight:
                r.in_flight += 1
                self.unseen.append(r)
        self.iterations += 1
        self.busy += dt
        self.prefill_tokens += row.prefill_tokens
        self.decode_tokens += row.decodes
        self.batch_sum += size
        row.kv_tokens = sum(r.computed for r in self.running)
        self.kv_seconds += row.kv_tokens * dt
        self.rows.append(row)
        if self.config.async_scheduling:
            return row.start
        self.see_tokens()
        return self.clock

    def see_tokens(self) -> None:
        """The tokens sampled by now come out; what is done leaves."""
        for r in self.unseen:
            r.in_flight -= 1
            r.generated += 1
            if r.generated == 1:
                r.first_token = self.clock
            else:
                self.gaps.append(self.clock - r.last_token)
            r.last_token = self.clock
            if r.generated >= r.stop:
                if r.status == WAITING:  # its KV was dropped meanwhile, and is not needed again
                    r.recomputed -= r.known - 1
                for where in (self.running, self.swapped):
                    if r in where:
                        where.remove(r)
                r.status = FINISHED
                r.finish = self.clock
                self.class_totals.setdefault(r.prompt.bit_length(), []).append(r.known)
        self.unseen.clear()

    def check(self, row: Row) -> None:
        """What must hold after every iteration."""
        assert 0 <= row.free_blocks <= self.config.kv_blocks and self.cpu_free >= 0
        for r in self.running:
            assert r.computed <= r.blocks * self.config.block_size and r.computed <= r.known + r.in_flight

    def itl_counts(self) -> Any:
        """Histogram of the gaps between tokens."""
        edges = itl_bin_edges()
        bins = np.searchsorted(edges, np.array(self.gaps), side="right") - 1
        return np.bincount(np.clip(bins, 0, len(edges) - 2), minlength=len(edges) - 1)
