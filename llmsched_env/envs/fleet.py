"""What the scalar environments and the native vector ones share: some environments of a kind, their memory,
and the episodes that they are given.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from llmsched_env import scenarios
from llmsched_env.core.compile import njit
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.cost import batch_time
from llmsched_env.core.lanes import LaneSpec, _fill_engine
from llmsched_env.core.requests import Requests
from llmsched_env.core.run import Log
from llmsched_env.core.span import span
from llmsched_env.core.state import Hold
from llmsched_env.envs.episode import OVER
from llmsched_env.envs.kinds import Kind
from llmsched_env.envs.lane import MOST_CLASSES, MOST_CLIENTS, Bank, env_at
from llmsched_env.envs.observation import NUM_GLOBAL, NUM_SLOT, SLACK, LengthInfo, scales
from llmsched_env.envs.options import LENGTHS, RUNNING_ORDERS, Options, change, whole
from llmsched_env.errors import InputError
from llmsched_env.scenarios import Problem, Reference
from llmsched_env.scheduling import ENGINE, Scheduler

# ---------------------------------------------------------------------- what is seen


def observation_space(options: Options) -> spaces.Space[Any]:
    """Of one environment: float32 in [0, 1], the slack of a request in [-1, 1]."""
    low = np.zeros(NUM_SLOT, np.float32)
    low[SLACK] = -1.0
    waiting, running = np.tile(low, options.waiting_slots), np.tile(low, options.running_slots)
    parts = {"engine": np.zeros(NUM_GLOBAL, np.float32), "waiting": waiting, "running": running}
    if options.observation == "dict":
        return spaces.Dict({name: spaces.Box(part, np.float32(1.0)) for name, part in parts.items()})
    return spaces.Box(np.concatenate([*parts.values()]), np.float32(1.0))


def present(rows: NDArray[np.float32], options: Options) -> Any:
    """Observations as their space has them: views of rows (..., D)."""
    if options.observation == "flat":
        return rows
    stop = NUM_GLOBAL + options.waiting_slots * NUM_SLOT
    return {
        "engine": rows[..., :NUM_GLOBAL],
        "waiting": rows[..., NUM_GLOBAL:stop],
        "running": rows[..., stop:],
    }


# ---------------------------------------------------------------------- episodes

_FITS, _TOO_LONG, _NO_BLOCKS, _UNPREDICTED = range(4)
# Without a horizon an episode is cut after so many times what its requests take one after the other: policies
# that preempt for ever would never end. The slowest of the named schedulers takes 5 times as long.
_PATIENCE = 10
_DECLARED, _MODEL_LEN = int(Hold.DECLARED), int(Hold.MODEL_LEN)
_NONE, _CLASS, _ORACLE = int(LengthInfo.NONE), int(LengthInfo.CLASS), int(LengthInfo.ORACLE)


@njit
def _write(  # type: ignore[no-untyped-def]
    table, lane, arrival, prompt, output, declared, predicted, priority, client, class_id, ttft, tpot, horizon
):
    """Make these requests the next episode of a lane, with the predictions that its length regime allows.

    Returns what is wrong, with which request, and the seconds that all take together if each is alone.
    """
    env = env_at(span(table), lane)
    s, v = env.template, env.v
    # Declared maxima that are the true lengths would tell them, through what is reserved: none is known then.
    telling = v.length_info != _ORACLE
    for r in range(len(arrival)):
        telling &= declared[r] == output[r]
    for r in range(len(arrival)):  # nothing is written unless all is well
        room = s.max_model_len - prompt[r]
        if room < 1:
            return _TOO_LONG, r, 0.0
        limit = room if telling else min(declared[r], room)
        held = prompt[r] + min(output[r], limit) - 1
        if s.hold == _DECLARED:
            held = prompt[r] + limit - 1
        elif s.hold == _MODEL_LEN:
            held = s.max_model_len
        if held > s.kv_blocks * s.block_size:
            return _NO_BLOCKS, r, 0.0
        if v.length_info > _CLASS and v.length_info != _ORACLE and np.isnan(predicted[r]):
            return _UNPREDICTED, r, 0.0
    alone = 0.0
    for r in range(len(arrival)):
        room = s.max_model_len - prompt[r]
        limit = room if telling else min(declared[r], room)
        stop = min(output[r], limit)
        if v.length_info == _NONE:
            told = np.nan
        elif v.length_info == _CLASS:
            told = v.class_means[min(class_id[r], MOST_CLASSES - 1)]
        elif v.length_info == _ORACLE:
            told = np.float64(stop)
        else:
            told = predicted[r]
        d = env.pool[r]
        d.arrival, d.predicted, d.ttft_target, d.tpot_target = arrival[r], told, ttft[r], tpot[r]
        d.prompt, d.stop, d.limit = prompt[r], stop, limit
        d.priority, d.client, d.class_id = priority[r], client[r], class_id[r]
        pairs = 0.5 * np.float64(prompt[r]) * prompt[r]
        alone += batch_time(env.e.cost, np.float64(prompt[r]), 1.0, pairs, 0.0, 0.0, 0.0)
        alone += (stop - 1) * batch_time(env.e.cost, 0.0, 0.0, 0.0, 0.0, 1.0, prompt[r] + 0.5 * stop)
    v.next_horizon = horizon if horizon < np.inf else arrival[-1] + _PATIENCE * alone
    v.drawn = 1
    return _FITS, 0, alone


_DONE = (
    "return",
    "latency",
    "goodput",
    "ttft",
    "tpot",
    "tokens",
    "clock",
    "busy",
    "fairness",
    "finished",
    "preemptions",
    "iterations",
    "steps",
    "illegal",
)


class Fleet:
    """Environments of one kind with the same options and the same problem.

    Attributes:
        kind, problem, options: as given. num_requests: of each episode.
        bank: their memory.
        alone: (E,) float64: mean seconds that a request of the episode takes if it has the engine to itself;
            alone_next: of the episode that is drawn.
        references: (E,) object: what is known of the best schedule of the episode, or None; next_references:
            of the episode that is drawn.
    """

    def __init__(
        self,
        kind: Kind,
        problem: Problem,
        options: Options,
        num_envs: int,
        *,
        num_requests: int | None = None,
        autoreset: int,
        log_rows: int = 0,
    ) -> None:
        self.kind, self.problem, self.options = kind, problem, options
        self.num_requests = problem.num_requests if num_requests is None else num_requests
        for field in dataclasses.fields(Options):
            if field.name in kind.unread and getattr(options, field.name) != field.default:
                raise InputError(f"option {field.name} has no meaning in this environment; leave it out")
        template = _template(kind, problem, options)
        slots = options.waiting_slots + options.running_slots
        engine, scale = problem.engine, problem.time_scale_s
        units = {
            "kv_blocks": engine.kv_blocks,
            "token_budget": int(template["token_budget"][0]),
            "max_num_seqs": engine.max_num_seqs,
            "time_scale": scale,
            "ten_times": 10 * scale,
            "tenth": 0.1 * scale,
        }
        self.bank = Bank(
            num_envs,
            self.num_requests,
            template,
            problem.profile.pack(),
            scales(slots, units),  # type: ignore[arg-type]
            sum(kind.mask_parts(options)),
            log_rows,
            _scheduler(kind, options).work_size(self.num_requests, problem.num_clients),
        )
        self._set_options(autoreset)
        self.alone = np.full(num_envs, np.nan)
        self.alone_next = np.full(num_envs, np.nan)
        self.references: NDArray[Any] = np.full(num_envs, None, object)
        self.next_references: NDArray[Any] = np.full(num_envs, None, object)

    def _set_options(self, autoreset: int) -> None:
        options, problem = self.options, self.problem
        means = problem.class_means
        if len(means) > MOST_CLASSES:
            raise InputError(
                f"environments know {MOST_CLASSES} classes, not the {len(means)} of the scenario"
            )
        weights = options.objective.weights
        if problem.num_clients > MOST_CLIENTS and options.objective.fairness:
            raise InputError(
                f"fairness is measured between up to {MOST_CLIENTS} clients, not the {problem.num_clients} "
                "of the scenario"
            )
        output = problem.workload.moments().output
        window = options.rate_window_s
        levels = options.chunk_levels
        lane = self.bank.lane
        for name, value in (
            ("waiting_slots", options.waiting_slots),
            ("running_slots", options.running_slots),
            ("running_order", RUNNING_ORDERS[options.running_order]),
            ("length_info", LENGTHS[options.length_info]),
            ("num_levels", len(levels) + 1),
            ("skip_forced", options.skip_forced),
            ("work_conserving", options.work_conserving),
            ("voluntary", options.preempt == "free"),
            ("readmit", options.readmit),
            ("idle", options.idle),
            ("autoreset", autoreset),
            ("time_scale", problem.time_scale_s),
            ("rate_window", 10 * problem.time_scale_s if window is None else window),
            ("discount_rate", options.discount_rate),
            ("unit_time", self.num_requests * problem.time_scale_s),
            ("unit_tokens", self.num_requests * output),
        ):
            lane[name] = value
        lane["levels"][:, : len(levels)] = levels
        lane["weights"] = weights
        lane["class_means"] = output
        lane["class_means"][:, : len(means)] = means

    def put(self, lane: int, requests: Requests, reference: Reference | None = None) -> None:
        """Make these the requests of the lane's next episode, and this what is known of its best schedule.

        Raises:
            InputError: if there are not as many as an episode has, one can never fit, or one lacks a
                prediction that is to be seen.
        """
        r = requests
        if len(r) == 0:
            raise InputError("an episode needs a request at least")
        if len(r) != self.num_requests:
            raise InputError(f"an episode has {self.num_requests} requests here, not {len(r)}")
        wrong, i, alone = _write(
            self.bank.table,
            lane,
            r.arrival_s,
            r.prompt_tokens,
            r.output_tokens,
            r.declared_tokens,
            r.predicted_tokens,
            r.priority,
            r.client,
            r.class_id,
            r.ttft_target_s,
            r.tpot_target_s,
            self.problem.scenario.horizon_s,
        )
        if wrong == _UNPREDICTED:
            raise InputError(
                f'request {r.name(i)} has no predicted length to be seen; set length_info="class" or "none"'
            )
        if wrong != _FITS:
            engine = self.problem.engine
            what = (
                f"its prompt of {r.prompt_tokens[i]} tokens fills the model length of {engine.max_model_len}"
                if wrong == _TOO_LONG
                else f"it needs more than the {engine.kv_blocks} KV blocks of {engine.block_size} tokens"
            )
            raise InputError(f"request {r.name(i)} can never be served: {what}; cut it")
        self.alone_next[lane] = alone / self.num_requests
        self.next_references[lane] = reference

    def reset(self, chosen: NDArray[np.bool_]) -> None:
        """Begin the drawn episode in each lane that is chosen, (E,) bool."""
        self.kind.reset(self.bank.table, chosen)
        while self._full():
            self._lengthen()
            self.kind.reset(self.bank.table, chosen)
        self.begun(chosen)

    def begun(self, chosen: NDArray[np.bool_]) -> None:
        """The drawn episode has begun in these lanes, and the next is not drawn yet."""
        lane = self.bank.lane
        self.alone[chosen] = self.alone_next[chosen]
        self.references[chosen] = self.next_references[chosen]
        void = chosen & (lane["phase"] == OVER)
        if void.any():  # nothing can be decided in this episode: at least one decision is asked for
            lane["skip_forced"][void] = 0
            self.kind.reset(self.bank.table, void)
            lane["skip_forced"][void] = 1

    def step(self, actions: NDArray[np.int64], out: NDArray[np.float64], max_steps: int = 0) -> int:
        """A step of all lanes, see `Kind.step`. If there is a log, it is made longer as needed."""
        bank = self.bank
        if len(bank.log.rows) == 0:
            return self.kind.step(bank.table, actions, out, 0, len(bank.table), max_steps)
        state = [
            array for name, array in vars(bank).items() if isinstance(array, np.ndarray) and name != "table"
        ]
        state += [bank.log.used, out]
        before = [array.copy() for array in state]
        events = self.kind.step(bank.table, actions, out, 0, len(bank.table), max_steps)
        while self._full():  # which ends a step early: take it back
            for array, was in zip(state, before, strict=True):
                array[...] = was
            self._lengthen()
            events = self.kind.step(bank.table, actions, out, 0, len(bank.table), max_steps)
        return events

    def _full(self) -> bool:
        """Whether another iteration might not find room in the log."""
        log = self.bank.log
        rows, entries = log.used
        full = rows >= len(log.rows) or entries + 2 * self.num_requests > len(log.requests)
        return bool(full and len(log.rows))

    def _lengthen(self) -> None:
        """The log with twice the room."""
        log = self.bank.log
        rows, requests, tokens = (np.concatenate([array, np.zeros_like(array)]) for array in log[:3])
        self.bank.log = Log(rows, requests, tokens, log.used)
        self.bank.address()

    def metrics(self, lanes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What the episodes that these lanes ended last came to; each of shape lanes.shape.

        Keys: return; decisions, illegal (actions that were not); latency_s (mean of all requests; of an
        episode that was cut the seconds up to then), goodput (share of the requests that met their targets),
        ttft_s and tpot_s (means of those that finished, the latter of those with more than one output token),
        finished, throughput_tps (output tokens a second), gpu_s (seconds in which an iteration ran),
        makespan_s, preemptions, iterations, fairness (Jain's index; nan unless it is rewarded), and score,
        from 0 to 1: the share of the requests that finished, times the mean latency that they would have
        alone over that which they had; and normalised_score, 0 for the mean latency of vLLM V1 and 1 for the
        best that is known, nan without a reference or if some did not finish.
        """
        done = {name: self.bank.lane[f"done_{name}"][lanes] for name in _DONE}
        clock, latency = done["clock"], done["latency"]
        finished = done["finished"]
        alone = self.alone[lanes]
        fair = self.options.objective.fairness != 0
        return {
            "return": done["return"],
            "score": finished / self.num_requests * alone / np.maximum(latency, alone),
            "normalised_score": self._normalised(latency, finished, self.references[lanes]),
            "latency_s": latency,
            "goodput": done["goodput"],
            "ttft_s": done["ttft"],
            "tpot_s": done["tpot"],
            "throughput_tps": done["tokens"] / np.maximum(clock, np.finfo(float).tiny),
            "gpu_s": done["busy"],
            "makespan_s": clock,
            "fairness": done["fairness"] if fair else np.full(len(lanes), np.nan),
            "finished": finished,
            "preemptions": done["preemptions"],
            "iterations": done["iterations"],
            "decisions": done["steps"],
            "illegal": done["illegal"],
        }

    def _normalised(
        self, latency: NDArray[Any], finished: NDArray[Any], references: NDArray[Any]
    ) -> NDArray[np.float64]:
        found = np.full(len(references), np.nan)
        for k, reference in enumerate(references):
            if reference is not None and finished[k] == self.num_requests:
                found[k] = reference.score(float(latency[k]))
        return found


# ---------------------------------------------------------------------- what is given


def take_actions(actions: Any, into: NDArray[np.int64]) -> None:
    """Write actions of any numbers where a step looks for them.

    Raises:
        InputError: if they are not whole numbers, or not of that shape: nothing is rounded or repeated.
    """
    given = np.asarray(actions)
    if given.shape != into.shape or given.dtype.kind not in "iub":
        raise InputError(
            f"actions must be whole numbers of shape {into.shape}, not {given.dtype} of shape {given.shape}"
        )
    into[...] = given


def take_episode(options: dict[str, Any]) -> tuple[Requests | None, int | None]:
    """Take out of the options of a reset what holds for one episode: its requests, or the seed they have.

    Raises:
        InputError: if they are neither, or both.
    """
    requests, seed = options.pop("requests", None), options.pop("seed", None)
    if requests is not None and not isinstance(requests, Requests):
        raise InputError(f"option requests must be Requests, not {type(requests).__name__}")
    if seed is not None and not (whole(seed) and seed >= 0):
        raise InputError(f"option seed must be a whole number from 0, not {seed!r}")
    if requests is not None and seed is not None:
        raise InputError("options requests and seed are two ways to say the same; give one of them")
    return requests, None if seed is None else int(seed)


def take_reference(options: dict[str, Any]) -> Reference | None:
    """Take out of the options of a reset what is known of the best schedule of its episode.

    Raises:
        InputError: if it is no reference.
    """
    reference = options.pop("reference", None)
    return None if reference is None else Reference.of(reference)


def take_problem(problem: Problem, options: dict[str, Any], others: tuple[str, ...]) -> Problem:
    """The problem as the options of a reset, `scenario` and its settings, change it; `others` are known too.

    Raises:
        InputError: for an unknown option, with the nearest match, or a value that does not fit.
    """
    if not options:
        return problem
    found = problem.scenario
    if "scenario" in options:
        found = scenarios.get(options.pop("scenario"))
    return change(found, options, others).resolve()


def draw(problem: Problem, seed: int) -> Requests:
    """The requests of the episode with this seed."""
    return problem.draw(np.random.default_rng(seed))


# ---------------------------------------------------------------------- the beginning


def _scheduler(kind: Kind, options: Options) -> Scheduler:
    """What an environment that decides by itself only what actions leave open comes to."""
    return Scheduler("environment", kind.settings(options))


def _template(kind: Kind, problem: Problem, options: Options) -> NDArray[Any]:
    """(1,) the engine's record at the beginning of an episode."""
    engine: EngineConfig = problem.engine
    if engine.async_scheduling:
        raise InputError("environments plan an iteration when the last is over; set async_scheduling=False")
    nothing = np.zeros(0, np.int32)
    template = np.zeros(1, ENGINE)
    spec = LaneSpec(
        requests=Requests.of([0.0], [1], [1]),  # of no account
        config=engine,
        pack=_scheduler(kind, options).pack,
        cost=problem.profile.pack(),
        kv_bytes_per_token=problem.kv_bytes_per_token,
        stop_tokens=nothing,
        limit_tokens=nothing,
        dropped=nothing.astype(bool),
    )
    _fill_engine(template[0], spec)
    template["token_budget"] = min(int(template["token_budget"][0]), options.most_tokens or 2**62)
    template["by_arrival"] = options.waiting_order == "arrival"
    template["steady"] = 1  # decoding goes on by itself only while nobody waits
    return template
