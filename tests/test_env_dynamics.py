"""The compiled dynamics of Batch-v0 and Dispatch-v0, driven without Gymnasium: whatever the actions, no rule
of the engine is broken, rewards are what they say, and named schedulers come out to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import baselines
from llmsched_env import EngineConfig, Requests, Result, profiles, simulate
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.lanes import LaneSpec, _fill_engine
from llmsched_env.core.span import span
from llmsched_env.core.state import Hold, Status
from llmsched_env.envs import batch, dispatch
from llmsched_env.envs.dispatch import Mixing, Queue, Reserve
from llmsched_env.envs.frame import DISABLED, NEXT_STEP, SAME_STEP
from llmsched_env.envs.lane import Bank, Phase, env_at
from llmsched_env.envs.observation import find_running, find_waiting, observe, scales
from llmsched_env.errors import InputError
from llmsched_env.scheduling import ENGINE, Scheduler, Settings
from llmsched_env.simulation import _fitted, resolve

N = 60  # requests
LEVELS = (16, 64)  # tokens; and all that fits
L = len(LEVELS) + 1
BATCH, DISPATCH = "batch", "dispatch"
PROFILE = profiles.get("a100-llama3-8b")
FAIR = Settings(order=Order.ARRIVAL, resume=Place.KEY, watermark_when_idle=False)
TIGHT = EngineConfig(kv_blocks=60, block_size=16, token_budget=128, max_num_seqs=16, max_model_len=450)
AMPLE = TIGHT.replace(kv_blocks=2000)


def requests(seed: int, n: int = N, rate: float = 25.0) -> Requests:
    """Up to 300 prompt and 120 output tokens, at `rate` requests/s: the tight engine holds about three."""
    g = np.random.default_rng(seed)
    output = g.integers(1, 120, n)
    return Requests.of(
        np.cumsum(g.exponential(1 / rate, n)),
        g.integers(1, 300, n),
        output,
        declared_tokens=output + g.integers(0, 20, n),
        predicted_tokens=np.maximum(1, output + g.integers(-10, 10, n)).astype(float),
        ttft_target_s=1.0,
        tpot_target_s=0.05,
    )


class Lab:
    """Environments of one kind with the same options, and what Gymnasium's shells would do for them."""

    def __init__(
        self,
        kind: str,
        drawn: list[Requests],
        engine: EngineConfig = TIGHT,
        settings: Settings | None = None,
        scheduler: Scheduler | None = None,
        waiting: int = 8,
        running: int = 8,
        **options: Any,
    ) -> None:
        self.kind, self.waiting, self.running = kind, waiting, running
        if scheduler is None:
            scheduler = Scheduler("env", settings or (FAIR if kind == BATCH else dispatch.RULES))
        if kind == BATCH:
            self.nvec = batch.nvec(waiting, running, L)
            mask_size = batch.mask_size(waiting, running, L)
            self._step, self._reset = batch.step_batch, batch.reset_batch
        else:
            self.nvec, mask_size = dispatch.nvec(L), dispatch.mask_size(L)
            self._step, self._reset = dispatch.step_dispatch, dispatch.reset_dispatch
        assert mask_size == self.nvec.sum()
        config = resolve(engine, scheduler, PROFILE)
        self.config = config
        template = np.zeros(1, ENGINE)
        one = drawn[0]
        spec = LaneSpec(
            requests=one,
            config=config,
            pack=scheduler.pack,
            cost=PROFILE.pack(),
            kv_bytes_per_token=0.0,
            stop_tokens=one.output_tokens,
            limit_tokens=one.declared_tokens,
            dropped=np.zeros(len(one), bool),
        )
        _fill_engine(template[0], spec)
        template["steady"] = 1
        units = {
            "kv_blocks": config.kv_blocks,
            "token_budget": config.token_budget,
            "max_num_seqs": config.max_num_seqs,
            "time_scale": 2.0,
            "ten_times": 20.0,
            "tenth": 0.2,
        }
        self.n = len(drawn)
        self.bank = Bank(
            self.n,
            len(one),
            template,
            PROFILE.pack(),
            scales(waiting + running, {k: float(v or 0) for k, v in units.items()}),
            mask_size,
        )
        lane = self.bank.lane
        base: dict[str, Any] = {
            "waiting_slots": waiting,
            "running_slots": running,
            "length_info": 2,
            "num_levels": L,
            "skip_forced": 1,
            "voluntary": 1,
            "autoreset": DISABLED,
            "next_horizon": np.inf,
            "time_scale": 2.0,
            "rate_window": 5.0,
            "unit_time": 2.0 * len(one),
            "unit_tokens": 60.0 * len(one),
            "phase": Phase.OVER,
        }
        for name, value in {**base, **options}.items():
            lane[name] = value
        lane["levels"][:, : len(LEVELS)] = LEVELS
        lane["weights"][:, 0] = 1.0  # latency
        self.drawn = drawn
        self.scheduler = scheduler
        self.draw()

    def draw(self) -> None:
        """Give the lanes that want one their next episode: the same again."""
        for i in np.flatnonzero(self.bank.lane["drawn"] == 0):
            r, p = self.drawn[i], self.bank.pool[i]
            stop, limit, bad = _fitted(r, self.scheduler, self.config)
            assert not bad.any()
            p["arrival"], p["predicted"] = r.arrival_s, r.predicted_tokens
            p["ttft_target"], p["tpot_target"] = r.ttft_target_s, r.tpot_target_s
            p["prompt"], p["stop"], p["limit"] = r.prompt_tokens, stop, limit
            self.bank.lane["drawn"][i] = 1

    def reset(self) -> None:
        self._reset(self.bank.table, np.ones(self.n, bool))
        self.draw()

    def step(self, actions: Any) -> None:
        """One step; `actions` is (E, entries), or one for all."""
        given = np.array(np.broadcast_to(actions, (self.n, len(self.nvec))), np.int64, order="C")
        self._step(self.bank.table, given, 0, self.n)
        self.draw()

    def legal(self, g: np.random.Generator) -> NDArray[np.int64]:
        """(E, entries) drawn from what the masks allow."""
        score = self.bank.mask * g.random(self.bank.mask.shape)
        ends = np.cumsum(self.nvec)
        parts = [score[:, end - size : end].argmax(1) for size, end in zip(self.nvec, ends, strict=True)]
        return np.stack(parts, 1).astype(np.int64)

    @property
    def over(self) -> bool:
        return bool((self.bank.lane["phase"] == Phase.OVER).all())

    def run(self, policy: Callable[[Lab], Any], most: int = 20_000) -> None:
        """An episode in all lanes; `policy(lab)` gives the actions."""
        self.reset()
        for _ in range(most):
            if self.over:
                return
            self.step(policy(self))
        raise AssertionError(f"not over after {most} steps")


def check_engine(lab: Lab, lane: int) -> None:
    """The engine's books agree with its requests."""
    s, req = lab.bank.s[lane], lab.bank.req[lane]
    assert s["error"] == 0
    assert s["free"] >= 0
    assert req["blocks"].sum() + s["free"] == s["kv_blocks"]
    status = req["status"]
    running = lab.bank.lists[lane, 0, : s["num_running"]]
    assert (req["computed"][running] <= req["blocks"][running] * s["block_size"]).all()
    assert (status[running] == Status.RUNNING).all() and len(set(running)) == len(running)
    assert (status == Status.RUNNING).sum() == s["num_running"] <= s["max_num_seqs"]
    assert (status == Status.WAITING).sum() == s["num_waiting"]
    assert (status == Status.FINISHED).sum() == s["num_finished"]
    assert (req["blocks"][status != Status.RUNNING] == 0).all()
    assert (req["chosen"] == 0).all()


def check_finished(lab: Lab, lane: int) -> None:
    """Everybody was served, and every token and second is accounted for."""
    s, req, v, r = lab.bank.s[lane], lab.bank.req[lane], lab.bank.lane[lane], lab.drawn[lane]
    assert v["terminated"] == 1 and v["truncated"] == 0
    assert (req["status"] == Status.FINISHED).all()
    assert (req["generated"] == req["stop"]).all()
    assert s["total_generated"] == req["stop"].sum()
    computed = req["prompt"].astype(np.int64) + req["stop"] - 1 + req["recomputed"]
    assert s["total_prefill"] + s["total_decode"] == computed.sum()
    assert s["preemptions"] == req["preemptions"].sum()
    latency = req["finish"] - r.arrival_s
    assert (latency > 0).all()
    assert v["request_seconds"] == pytest.approx(latency.sum(), rel=1e-9)
    assert v["done_return"] == pytest.approx(-latency.sum() / v["unit_time"], rel=1e-9)
    assert v["done_latency"] == pytest.approx(latency.mean(), rel=1e-9)
    ttft = req["first_token"] - r.arrival_s
    with np.errstate(invalid="ignore"):
        tpot = (req["finish"] - req["first_token"]) / (req["stop"] - 1)
    met = (ttft <= r.ttft_target_s) & ((req["stop"] == 1) | (tpot <= r.tpot_target_s))
    assert v["done_goodput"] == met.mean()
    assert v["done_ttft"] == pytest.approx(ttft.mean(), rel=1e-9)
    assert v["done_tpot"] == pytest.approx(tpot[req["stop"] > 1].mean(), rel=1e-9, nan_ok=True)


KINDS = pytest.mark.parametrize("kind", [BATCH, DISPATCH])


# ---------------------------------------------------------------------- whatever the actions


@KINDS
@pytest.mark.parametrize("forced", [0, 1])
def test_legal_actions_break_no_rule(kind: str, forced: int) -> None:
    lab = Lab(
        kind,
        [requests(seed) for seed in range(8)],
        skip_forced=forced,
        voluntary=[0, 1] * 4,
        idle=[0, 0, 1, 1] * 2,
        running_order=[0, 1, 2, 3, 0, 1, 2, 3],
    )
    g = np.random.default_rng(0)
    lab.reset()
    clock = np.zeros(lab.n)
    rewards = np.zeros(lab.n)
    ended = np.zeros(lab.n, int)
    for _ in range(4000):
        playing = lab.bank.lane["phase"] != Phase.OVER
        before = lab.bank.s["clock"].copy()
        lab.step(lab.legal(g))
        lane = lab.bank.lane
        assert (lab.bank.s["error"] == 0).all() and (lane["illegal"] == 0).all()
        assert (np.abs(lab.bank.observation) <= 1.0).all()
        assert (lab.bank.s["clock"] >= clock).all()
        clock[:] = lab.bank.s["clock"]
        rewards[playing] += lane["reward"][playing]
        np.testing.assert_allclose(lane["dt"][playing], (clock - before)[playing], rtol=1e-9, atol=1e-12)
        for i in np.flatnonzero(playing):
            check_engine(lab, i)
            if lane["phase"][i] == Phase.OVER:
                check_finished(lab, i)
                assert rewards[i] == pytest.approx(lane["done_return"][i])
                ended[i] += 1
        over = lane["phase"] == Phase.OVER
        if over.any():
            lab._reset(lab.bank.table, over)
            lab.draw()
            clock[over] = lab.bank.s["clock"][over]
            rewards[over] = lane["reward"][over]
    assert (ended > 0).all() if kind == DISPATCH else ended.sum() > 4


@njit(cache=False)
def look_afresh(table: Any) -> None:
    """Find and write all that is visible in the first environment, whatever was found before."""
    env = env_at(span(table), 0)
    find_waiting(env)
    env.v.num_run = 0
    find_running(env)
    observe(env)


@KINDS
def test_what_is_kept_of_the_visible_is_what_is_there(kind: str) -> None:
    """With who is preempted admitted again in the same iteration, too."""
    settings = baselines.get("sarathi").settings if kind == DISPATCH else FAIR
    g = np.random.default_rng(8)
    for order in range(4):
        lab = Lab(kind, [requests(order)], settings=settings, running_order=order, waiting=4, running=4)
        lab.reset()
        for _ in range(300):
            lab.step(lab.legal(g))
            twin = copy.deepcopy(lab.bank)
            look_afresh(twin.table)
            np.testing.assert_array_equal(lab.bank.observation, twin.observation)
            if lab.over:
                break


@KINDS
def test_any_numbers_do(kind: str) -> None:
    lab = Lab(kind, [requests(seed) for seed in range(4)], voluntary=[0, 1, 0, 1], autoreset=SAME_STEP)
    g = np.random.default_rng(1)
    lab.reset()
    for _ in range(2000):
        actions = g.integers(-2, 9, (lab.n, len(lab.nvec)))
        actions[g.random(actions.shape) < 0.01] = 2**40
        allowed = allows(lab, actions)
        illegal = lab.bank.lane["illegal"].copy()
        lab.step(actions)
        ended = lab.bank.lane["was_reset"] == 1
        added = np.where(ended, lab.bank.lane["done_illegal"], lab.bank.lane["illegal"]) - illegal
        np.testing.assert_array_equal(added, ~allowed)
        assert (lab.bank.s["error"] == 0).all()
    for i in range(lab.n):
        check_engine(lab, i)


def allows(lab: Lab, actions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(E,) whether the masks allow all entries."""
    result = np.ones(lab.n, bool)
    first = np.cumsum(lab.nvec) - lab.nvec
    for i in range(lab.n):
        for at, size, choice in zip(first, lab.nvec, actions[i], strict=True):
            result[i] &= bool(0 <= choice < size and lab.bank.mask[i, at + choice])
    return result


@KINDS
def test_the_mask_is_what_counts_as_legal(kind: str) -> None:
    """Each entry by itself, executed in a copy of the environment."""
    lab = Lab(kind, [requests(3)], voluntary=0, waiting=3, running=3, length_info=1)
    g = np.random.default_rng(2)
    lab.reset()
    for _ in range(60):
        for _ in range(12):
            lab.step(lab.legal(g))
            if lab.over:
                lab.reset()
        at = 0
        for slot, size in enumerate(lab.nvec):
            for choice in range(size):
                twin = copy.copy(lab)
                twin.bank = copy.deepcopy(lab.bank)
                action = np.zeros(len(lab.nvec), np.int64) if kind == BATCH else lab.legal(g)[0]
                action[slot] = choice
                illegal = int(twin.bank.lane["illegal"][0])
                twin.step(action)
                assert twin.bank.lane["illegal"][0] - illegal == 1 - lab.bank.mask[0, at + choice]
            at += size


@KINDS
def test_the_same_seed_gives_the_same(kind: str) -> None:
    drawn = [requests(seed) for seed in range(3)]
    one = list(trajectory(Lab(kind, drawn)))
    assert one == list(trajectory(Lab(kind, drawn)))
    alone = list(trajectory(Lab(kind, drawn[1:2]), entries=slice(1, 2)))
    assert [step[1] for step in one] == [step[0] for step in alone]


@KINDS
def test_hidden_lengths_change_nothing(kind: str) -> None:
    drawn = requests(0)
    other = drawn.replace(predicted_tokens=drawn.predicted_tokens[::-1] + 1.0)
    known, unknown = (
        [list(trajectory(Lab(kind, [r], length_info=info), slice(1))) for r in (drawn, other)]
        for info in (2, 0)
    )
    assert known[0] != known[1] and unknown[0] == unknown[1]


def trajectory(lab: Lab, entries: slice = slice(None)) -> Iterator[list[tuple[Any, ...]]]:
    """What each lane shows, for actions drawn for three of them."""
    g = np.random.default_rng(3)
    lab.reset()
    for _ in range(500):
        lane, bank = lab.bank.lane, lab.bank
        yield [
            (lane["reward"][i], lane["dt"][i], bank.observation[i].tobytes(), bank.mask[i].tobytes())
            for i in range(lab.n)
        ]
        lab.step(g.integers(0, lab.nvec, (3, len(lab.nvec)))[entries])


@KINDS
@pytest.mark.parametrize("autoreset", [NEXT_STEP, SAME_STEP, DISABLED])
def test_autoreset(kind: str, autoreset: int) -> None:
    lab = Lab(kind, [requests(0, n=12), requests(1, n=12)], autoreset=autoreset, next_horizon=[np.inf, 0.3])
    good = np.ones(len(lab.nvec), np.int64) if kind == BATCH else np.array([0, L - 1, 0, 0, 0])
    lab.reset()
    first, mask = lab.bank.observation.copy(), lab.bank.mask.copy()
    lane = lab.bank.lane
    assert (lane["was_reset"] == 1).all()
    ended, cut = np.zeros(2, bool), np.zeros(2, bool)
    for _ in range(200):
        was_over = lane["phase"] == Phase.OVER
        lab.step(good)
        end = (lane["terminated"] + lane["truncated"] == 1) & ~was_over
        assert (lane["terminated"] + lane["truncated"] <= 1).all()
        cut |= lane["truncated"] == 1
        for i in range(2):
            shown = lab.bank.observation[i]
            if end[i]:
                ended[i] = True
                if autoreset == SAME_STEP:
                    assert lane["was_reset"][i] == 1 and lane["steps"][i] == 0 and lane["reward"][i] != 0.0
                    np.testing.assert_array_equal(shown, first[i])
                    np.testing.assert_array_equal(lab.bank.mask[i], mask[i])
                    assert (lab.bank.final[i] != first[i]).any()
                else:
                    assert lane["was_reset"][i] == 0 and (lab.bank.mask[i] == 1).all()
                if lane["terminated"][i]:
                    assert lane["done_finished"][i] == 12
            elif was_over[i] and autoreset == NEXT_STEP:
                assert lane["was_reset"][i] == 1 and lane["reward"][i] == 0.0
                assert lane["terminated"][i] == lane["truncated"][i] == 0
                np.testing.assert_array_equal(shown, first[i])
                np.testing.assert_array_equal(lab.bank.mask[i], mask[i])
            elif was_over[i]:
                assert autoreset == DISABLED and lane["was_reset"][i] == 0
    assert ended.all() and list(cut) == [False, True]
    assert (lane["episodes"] == 1).all() if autoreset == DISABLED else (lane["episodes"] > 1).all()


@KINDS
def test_a_horizon_truncates(kind: str) -> None:
    lab = Lab(kind, [requests(0)], next_horizon=0.5)
    g = np.random.default_rng(5)
    lab.run(lambda lab: lab.legal(g))
    s, v = lab.bank.s[0], lab.bank.lane[0]
    assert v["truncated"] == 1 and v["terminated"] == 0 and s["clock"] >= 0.5 and s["num_finished"] < N


# ---------------------------------------------------------------------- what actions mean: Batch


def entry(lab: Lab, waiting: Any = (), running: Any = ()) -> NDArray[np.int64]:
    """An action: the entries of the first slots, SKIP in the others."""
    action = np.zeros(lab.waiting + lab.running, np.int64)
    action[: len(waiting)] = waiting
    action[lab.waiting : lab.waiting + len(running)] = running
    return action


def together(prompt: list[int], output: list[int], **options: Any) -> Lab:
    """Requests that are all there at time 0, on an engine of 10 blocks of 16 tokens."""
    n = len(prompt)
    drawn = Requests.of(np.zeros(n), prompt, output, predicted_tokens=np.ones(n))
    return Lab(BATCH, [drawn], TIGHT.replace(kv_blocks=10), **{"idle": 0, **options})


PREEMPT = L + 1


def column(lab: Lab, field: str) -> list[int]:
    return [int(x) for x in lab.bank.req[0][field]]


def test_entries_get_what_fits() -> None:
    lab = together([100, 60, 60, 20], [20, 20, 20, 20])
    lab.reset()
    lab.step(entry(lab, [2, 3, 1, 0]))  # at most 16, at most 64, all that fits
    assert column(lab, "computed") == [16, 60, 52, 0]  # of 128 tokens of budget
    assert column(lab, "generated") == [0, 1, 0, 0]
    assert lab.bank.lane["steps"][0] == 1 and lab.bank.s["iterations"][0] == 1
    lab.step(entry(lab, [1], [1, 2, 1]))  # a level of a decode is RUN; 10 - 1 - 4 - 4 blocks are left
    assert column(lab, "computed") == [32, 61, 60, 0]  # the chunk takes what is left, in slot order
    assert lab.bank.s["free"][0] == 0
    lab.step(entry(lab, [], [1, 0, 1]))
    assert column(lab, "computed") == [32, 61, 61, 0]


def test_preemption_makes_room_first() -> None:
    lab = together([70, 70], [30, 30])
    lab.reset()
    lab.step(entry(lab, [1, 1]))
    assert column(lab, "computed") == [70, 58]
    lab.step(entry(lab, [], [1, 1]))
    assert column(lab, "blocks") == [5, 5]
    while lab.bank.lane["phase"][0] != Phase.FORCED:
        lab.step(entry(lab, [], [1, 1]))
    assert column(lab, "generated") == [11, 10]  # the first wants its 6th block
    lab.step(entry(lab, [], [1, PREEMPT]))
    assert column(lab, "generated") == [12, 10] and column(lab, "preemptions") == [0, 1]
    assert lab.bank.lane["wait"][0, 0] == 1  # it may come back now
    assert lab.bank.s["num_planned"][0] == 0
    lab.step(entry(lab, [1], [0]))
    assert column(lab, "computed") == [81, 64]  # clipped to the 4 blocks that are free
    assert lab.bank.lane["illegal"][0] == 0


def test_a_decode_without_block_is_passed_over_until_all_lack_one() -> None:
    lab = together([79, 80], [30, 30])
    lab.reset()
    lab.step(entry(lab, [1, 1]))
    lab.step(entry(lab, [], [0, 1]))
    assert column(lab, "computed") == [79, 80] and column(lab, "blocks") == [5, 5]
    lab.step(entry(lab, [], [1, 1]))
    assert column(lab, "computed") == [80, 80]  # the second had no block, the first needed none
    assert lab.bank.lane["phase"][0] == Phase.FORCED
    lab.step(entry(lab, [], [1, 1]))  # nobody has: the newest goes
    assert column(lab, "computed") == [81, 0] and column(lab, "preemptions") == [0, 1]
    assert lab.bank.lane["illegal"][0] == 0


def test_time_goes_on_if_all_is_skipped() -> None:
    lab = together([20, 20, 20], [5, 5, 5])
    lab.reset()
    lab.step(entry(lab))
    assert column(lab, "computed") == [20, 0, 0]  # the first is admitted
    lab.step(entry(lab))
    assert column(lab, "computed") == [21, 0, 0]  # who runs goes on, and nobody is admitted
    lab.step(entry(lab, [], [PREEMPT]))
    assert column(lab, "computed") == [0, 20, 0]
    assert lab.bank.s["clock"][0] > 0.0


def test_the_engine_may_idle_where_that_is_allowed() -> None:
    drawn = Requests.of([0.0, 5.0], [20, 20], [5, 5])
    lab = Lab(BATCH, [drawn], idle=1)
    lab.reset()
    lab.step(entry(lab))
    assert lab.bank.s["clock"][0] == 5.0 and lab.bank.s["num_waiting"][0] == 2
    lab.step(entry(lab))  # nothing more to wait for
    assert column(lab, "computed") == [20, 0]


def test_requests_beyond_the_window() -> None:
    lab = together([10] * 6, [50] * 6, waiting=6, running=2, skip_forced=0)
    lab.reset()
    lab.step(entry(lab, [1] * 6))
    assert column(lab, "computed") == [10] * 6
    lab.step(entry(lab, [], [0, 1]))
    assert column(lab, "computed") == [10] + [11] * 5  # those who are not seen go on
    lab.bank.lane["running_order"] = 1  # newest
    lab.step(entry(lab, [], [1, 0]))  # (who is seen was found before)
    assert column(lab, "computed") == [11, 11, 12, 12, 12, 12]
    lab.step(entry(lab, [], [0, 0]))
    assert column(lab, "computed") == [12, 12, 13, 13, 12, 12]
    narrow = together([10] * 3, [50] * 3, waiting=1, skip_forced=0)
    narrow.reset()
    narrow.step(entry(narrow, [1]))
    assert column(narrow, "computed") == [10, 0, 0]


def test_what_is_forced_is_skipped() -> None:
    """One request: admitted by a step, and the rest follows of itself."""
    drawn = Requests.of([1.0, 9.0], [20, 20], [50, 50])
    lab = Lab(BATCH, [drawn])
    lab.reset()
    assert lab.bank.s["clock"][0] == 1.0
    lab.step(entry(lab, [1]))
    assert lab.bank.s["num_finished"][0] == 1 and lab.bank.s["clock"][0] == 9.0
    lab.step(entry(lab, [1]))
    assert lab.over and lab.bank.lane["steps"][0] == 2


# ---------------------------------------------------------------------- named schedulers


def assert_served_alike(lab: Lab, result: Result) -> None:
    req = lab.bank.req[0]
    np.testing.assert_array_equal(req["first_scheduled"], result.first_scheduled_s)
    np.testing.assert_array_equal(req["first_token"], result.first_token_s)
    np.testing.assert_array_equal(req["finish"], result.finish_s)
    np.testing.assert_array_equal(req["preemptions"], result.preemptions)
    assert lab.bank.s["busy"][0] == result.busy_s
    check_finished(lab, 0)


def expressible() -> list[str]:
    """The named schedulers that are a constant action."""
    found = []
    for name in baselines.names():
        made = baselines.get(name)
        config = resolve(AMPLE, made, PROFILE)
        if config.async_scheduling or config.preemption == "swap":
            continue
        try:
            dispatch.express(made.settings, L)
        except InputError as error:
            assert "no action of Dispatch has" in str(error)
        else:
            found.append(name)
    return found


def test_what_dispatch_can_express() -> None:
    assert {"vllm-v1", "srf", "lrf", "sarathi", "sarathi-nohy", "orca", "vllm-v0", "sjf", "edf"} <= {
        *expressible()
    }
    action = dispatch.express(baselines.get("vllm-v1").settings, L)
    assert list(action) == [Queue.FIFO, L - 1, Mixing.MIXED, 0, Reserve.CHUNK]
    with pytest.raises(InputError, match="order=priority"):
        dispatch.express(baselines.get("vllm-v1-priority").settings, L)


@pytest.mark.parametrize("forced", [0, 1])
@pytest.mark.parametrize("name", expressible())
def test_dispatch_is_the_named_scheduler(name: str, forced: int) -> None:
    """With its own rules for all that is not chosen."""
    scheduler = baselines.get(name)
    action = dispatch.express(scheduler.settings, L)
    preemptions = 0
    for seed, engine in ((0, TIGHT), (1, TIGHT), (2, AMPLE), (3, TIGHT.replace(block_size=4, kv_blocks=250))):
        if not scheduler.settings.chunked and scheduler.settings.limit_prefills:
            engine = engine.replace(token_budget=512)
        drawn = requests(seed)
        if Hold.PEAK in (scheduler.settings.hold, scheduler.settings.test):  # an oracle's prediction
            drawn = drawn.replace(predicted_tokens=drawn.output_tokens.astype(float))
        lab = Lab(DISPATCH, [drawn], engine, scheduler=scheduler, skip_forced=forced)
        lab.run(lambda lab: action)
        assert lab.bank.lane["illegal"][0] == 0
        result = simulate(drawn, scheduler, PROFILE, engine)
        assert_served_alike(lab, result)
        preemptions += result.preemptions_total
    assert preemptions > 0 or name not in ("vllm-v1", "srf", "lrf", "sarathi", "vllm-v0")


@pytest.mark.parametrize("name", ["vllm-v1", "srf", "lrf"])
def test_dispatch_with_its_usual_rules(name: str) -> None:
    scheduler = baselines.get(name)
    drawn = requests(9)
    lab = Lab(DISPATCH, [drawn])
    lab.run(lambda lab: dispatch.express(scheduler.settings, L))
    result = simulate(drawn, scheduler, PROFILE, TIGHT)
    assert result.preemptions_total > 0
    assert_served_alike(lab, result)


def test_dispatch_with_its_usual_rules_is_sarathi_while_blocks_suffice() -> None:
    engine = AMPLE.replace(token_budget=256, max_num_seqs=128, watermark=0.01)
    drawn = requests(4)
    lab = Lab(DISPATCH, [drawn], engine)
    lab.run(lambda lab: np.array([Queue.FIFO, LEVELS.index(64), Mixing.DECODES, 0, Reserve.KNOWN]))
    assert_served_alike(
        lab, simulate(drawn, baselines.get("sarathi"), PROFILE, engine.replace(token_budget=64))
    )


def test_dispatch_orders_the_queue_anew() -> None:
    """Switching the order at any time gives the order that there would have been all along."""
    scheduler = Scheduler("sjf", dispatch.RULES.replace(order=Order.OUTPUT, resume=Place.KEY))
    drawn = requests(5)
    g = np.random.default_rng(6)
    lab = Lab(DISPATCH, [drawn], skip_forced=0)

    def mostly_output(lab: Lab) -> Any:
        """OUTPUT; another order and reservation in iterations in which nobody could be admitted."""
        s, v = lab.bank.s[0], lab.bank.lane[0]
        blocked = s["num_waiting"] == 0 or s["num_running"] >= s["max_num_seqs"]
        if blocked and v["phase"] == Phase.BUILDING and s["free"] > s["num_running"] + 8:
            return np.array([g.integers(5), L - 1, Mixing.MIXED, 0, g.integers(3)])
        return np.array([Queue.OUTPUT, L - 1, Mixing.MIXED, 0, Reserve.CHUNK])

    lab.run(mostly_output)
    assert_served_alike(lab, simulate(drawn, scheduler, PROFILE, TIGHT))


def test_dispatch_hides_what_the_length_regime_hides() -> None:
    for info, there in ((0, 0), (1, 1), (2, 1), (3, 1)):
        lab = Lab(DISPATCH, [requests(0)], length_info=info)
        lab.reset()
        mask = lab.bank.mask[0]
        reserve = mask[-len(Reserve) :]
        assert mask[Queue.OUTPUT] == mask[Queue.AREA] == reserve[Reserve.PREDICTED] == there
        assert mask[[Queue.FIFO, Queue.PROMPT, Queue.DEADLINE]].all() and reserve[Reserve.KNOWN] == 1
    whole = Lab(DISPATCH, [requests(0)], TIGHT.replace(token_budget=1024), baselines.get("vllm-v0").settings)
    whole.reset()
    assert list(whole.bank.mask[0][len(Queue) : len(Queue) + L]) == [0] * (L - 1) + [1]


def run_all(lab: Lab) -> NDArray[np.int64]:
    """RUN for all who are there."""
    v = lab.bank.lane[0]
    return entry(lab, [1] * v["num_wait"], [1] * v["num_run"])


WIDE = {"waiting": 60, "running": 60}


@pytest.mark.parametrize("forced", [0, 1])
def test_batch_that_runs_all_is_first_come_first_served(forced: int) -> None:
    """Where KV blocks suffice, vLLM V1."""
    drawn = requests(7)
    lab = Lab(BATCH, [drawn], AMPLE, skip_forced=forced, **WIDE)
    lab.run(run_all)
    assert lab.bank.lane["illegal"][0] == 0
    assert_served_alike(lab, simulate(drawn, baselines.get("vllm-v1"), PROFILE, AMPLE))


@pytest.mark.parametrize("forced", [0, 1])
def test_batch_that_runs_all_and_reserves(forced: int) -> None:
    """Where the engine reserves the peak, the queue with all that fits backfilled."""
    settings = FAIR.replace(test=Hold.PEAK, hold=Hold.PEAK, backfill=1000)
    for seed in range(3):
        drawn = requests(seed)
        lab = Lab(BATCH, [drawn], TIGHT, settings, skip_forced=forced, **WIDE)
        lab.run(run_all)
        assert_served_alike(lab, simulate(drawn, Scheduler("reserving", settings), PROFILE, TIGHT))


def like_v1(lab: Lab) -> NDArray[np.int64]:
    """vLLM V1 in Batch's terms."""
    s, req, v = lab.bank.s[0], lab.bank.req[0], lab.bank.lane[0]
    size, free, budget = int(s["block_size"]), int(s["free"]), int(s["token_budget"])
    left = [int(r) for r in lab.bank.lists[0, 0, : s["num_running"]]]  # running, victims taken off its end
    victims: list[int] = []
    i = 0
    while i < len(left) and budget > 0:
        computed, target, blocks = (int(req[x][left[i]]) for x in ("computed", "target", "blocks"))
        want = max(1, min(target - computed, budget))
        need = max(0, -(-(computed + want) // size) - blocks)
        if need > free:
            victims.append(left.pop())
            free += int(req["blocks"][victims[-1]])
            continue  # with the same request, unless it had to go itself
        free -= need
        budget -= want
        i += 1
    served = left[:i]
    admitted = 0
    for r in v["wait"][: v["num_wait"]] if not victims else []:
        known = int(req["prompt"][r] + req["generated"][r])
        if budget <= 0 or len(left) + admitted >= s["max_num_seqs"] or -(-known // size) > free:
            break
        want = min(known, budget)
        admitted += 1
        free -= -(-want // size)
        budget -= want
    running = [PREEMPT if r in victims else int(r in served) for r in v["run"][: v["num_run"]]]
    return entry(lab, [1] * admitted, running)


@pytest.mark.parametrize("forced", [0, 1])
def test_batch_can_be_vllm_v1(forced: int) -> None:
    for seed in range(3):
        drawn = requests(seed)
        lab = Lab(BATCH, [drawn], skip_forced=forced, **WIDE)
        lab.run(like_v1)
        assert lab.bank.lane["illegal"][0] == 0
        result = simulate(drawn, baselines.get("vllm-v1"), PROFILE, TIGHT)
        assert result.preemptions_total > 0
        assert_served_alike(lab, result)
