"""The scalar environments: thin shells over the compiled core."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from llmsched_env import scenarios
from llmsched_env.core.histogram import BINS
from llmsched_env.core.lanes import served
from llmsched_env.core.requests import Requests
from llmsched_env.core.run import EVICTED
from llmsched_env.core.schedule import Schedule
from llmsched_env.envs.dispatch import VICTIMS, Mixing, Queue, Reserve
from llmsched_env.envs.fleet import (
    Fleet,
    draw,
    observation_space,
    present,
    take_episode,
    take_problem,
)
from llmsched_env.envs.frame import DISABLED
from llmsched_env.envs.kinds import BATCH, DECISION, DISPATCH, Kind, tally
from llmsched_env.envs.options import split
from llmsched_env.errors import InputError, unknown
from llmsched_env.scenarios import Problem, Scenario
from llmsched_env.simulation import Result

_LOG_ROWS = 1024  # iterations for which a log has room at first
_EPISODE = ("scenario", "seed", "requests")  # options of a reset, beside the scenario's settings


class SchedulingEnv(gym.Env[Any, Any]):
    """What the environments of the package share: see `DecisionEnv`.

    Attributes:
        options: what is seen, what may be done, what is rewarded.
        problem: the scenario of this episode, with everything settled.
        episode_seed: the seed that this episode's requests were drawn from; None if they were given.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array", "human", "ansi"],
        "render_fps": 10,
    }
    kind: ClassVar[Kind]

    def __init__(
        self,
        scenario: str | Path | Scenario = "azure-conv",
        *,
        render_mode: str | None = None,
        record: bool = False,
        **keywords: Any,
    ) -> None:
        """The arguments are described with the class.

        Raises:
            InputError: an unknown keyword or scenario, with the nearest match, or a value that does not fit.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise unknown("render_mode", render_mode, self.metadata["render_modes"])
        self.options, found = split(keywords, scenarios.get(scenario))
        self.render_mode = render_mode
        self.records = bool(record) or render_mode is not None
        self.observation_space = observation_space(self.options)
        self.action_space = self.kind.action_space(self.options)
        self.episode_seed: int | None = None
        stops = np.cumsum(self.kind.mask_parts(self.options)).tolist()
        self._parts = [slice(a, b) for a, b in zip([0, *stops], stops, strict=False)]
        self._actions = np.zeros((1, *(self.action_space.shape or ())), np.int64)
        self._out = np.zeros((4, 1))
        self._begun = self._over = False
        self._said: tuple[str, int | None] = ("", None)  # the last action, and the request that it concerns
        self._painter: Any = None
        self._window: Any = None
        self._set_up(found.resolve())

    def _set_up(self, problem: Problem, num_requests: int | None = None) -> None:
        """Memory for episodes of this problem."""
        self.problem = problem
        self.fleet = Fleet(
            self.kind,
            problem,
            self.options,
            1,
            num_requests=num_requests,
            autoreset=DISABLED,
            log_rows=_LOG_ROWS if self.records else 0,
        )
        self._bind()

    def _bind(self) -> None:
        """What each step reads, looked up once."""
        bank = self.fleet.bank
        self._table, self._seen, self._mask = bank.table, bank.observation[0], bank.mask[0]

    # ------------------------------------------------------------------ an episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of the generator `np_random`, which gives each episode the seed of its requests.
            options: `scenario` and any of its settings, such as `load`, `num_requests` or `kv_blocks`, which
                hold from now on; and for this episode `seed`, from which its requests are drawn (`np_random`
                is left alone), or `requests`, which are `Requests` of any number.

        Returns:
            The observation, and what `step` returns as info.

        Raises:
            InputError: an unknown option, with the nearest match, requests that can never be served, or
                options that contradict each other.
        """
        super().reset(seed=seed)
        asked = dict(options or {})
        requests, episode_seed = take_episode(asked)
        problem = take_problem(self.problem, asked, _EPISODE)
        n = problem.num_requests if requests is None else len(requests)
        if problem is not self.problem or n != self.fleet.num_requests:
            self._set_up(problem, n)
        if requests is None:
            if episode_seed is None:
                episode_seed = int(self.np_random.integers(2**63))
            requests = draw(problem, episode_seed)
        self.fleet.put(0, requests)
        self.episode_seed, self._requests = episode_seed, requests
        self._out[:] = 0.0
        self._begun, self._over, self._said = True, False, ("", None)
        self.fleet.reset(np.ones(1, np.bool_))
        if self.render_mode == "human":
            self.render()
        info = {"action_mask": self._legal(), "dt": float(self.fleet.bank.s["clock"][0])}
        return present(self._seen.copy(), self.options), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action; one that is not legal counts as the first one that is. What is over stays as it is.

        Returns:
            Observation, reward, whether all requests are served, whether the episode was cut at the
            scenario's horizon, and info: `action_mask`, `dt` (seconds that passed) and, when the episode
            ends, `metrics`.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        self._actions[0] = action
        if not self._begun:
            raise gym.error.ResetNeeded("call reset before the first step")
        if self.records:
            self._step_recorded()
        else:
            self.kind.step(self._table, self._actions, self._out, 0, 1, 0)
        reward, dt, terminated, truncated = self._out[:, 0].tolist()
        info = {"action_mask": self._legal(), "dt": dt}
        if terminated + truncated > 0 and not self._over:
            self._over = True
            info["metrics"] = self.metrics()
        return present(self._seen.copy(), self.options), reward, terminated > 0, truncated > 0, info

    def _step_recorded(self) -> None:
        lane = self.fleet.bank.lane[0]
        waiting, running = lane["wait"].copy(), lane["run"].copy()
        self.fleet.step(self._actions, self._out)
        if not self._over:
            self._said = self._say(waiting, running)
        if self.render_mode == "human":
            self.render()

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, (A,) bool; all of them when the episode is over."""
        return self._mask.astype(np.bool_)

    def _legal(self) -> Any:
        """The mask as `action_space.sample` takes it, int8."""
        mask = self._mask.copy()
        return mask if len(self._parts) == 1 else tuple([mask[part] for part in self._parts])

    # ------------------------------------------------------------------ what came of it

    @property
    def requests(self) -> Requests:
        """The requests of this episode, with the predictions that `length_info` allows.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        self._need_reset()
        told = self.fleet.bank.req["predicted"][0].copy()
        return dataclasses.replace(self._requests, predicted_tokens=told)

    @property
    def schedule(self) -> Schedule | None:
        """All decisions of the episode so far; None unless it is recorded."""
        if not self.records:
            return None
        log = self.fleet.bank.log
        rows, entries = log.rows[: log.used[0]], log.used[1]
        return Schedule(
            rows["start_s"].copy(),
            rows["entries"].copy(),
            log.requests[:entries].copy(),
            log.tokens[:entries].copy(),
        )

    def metrics(self) -> dict[str, float]:
        """What the episode has come to so far, see `Fleet.metrics`.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        self._need_reset()
        if not self._over:
            tally(self._table, 0)
        found = self.fleet.metrics(np.zeros(1, np.int64))
        return {name: values.item() for name, values in found.items()}

    def result(self) -> Result:
        """The episode so far as `simulate` returns a run: with the finish times and all else of each request.

        Its schedule is kept only if the environment records; inter-token latencies are not counted.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        self._need_reset()
        bank, problem = self.fleet.bank, self.problem
        s, done = bank.s[0], served(bank.req[0])
        clock, iterations, busy = float(s["clock"]), int(s["iterations"]), float(s["busy"])
        finished = int(s["num_finished"]) == len(done.finish_s)
        kv_tokens = problem.engine.kv_tokens
        return Result(
            requests=self.requests,
            scheduler=self._name,
            profile=problem.profile.name,
            engine=problem.engine,
            gpus=problem.profile.gpus,
            capacity=problem.capacity,
            first_scheduled_s=done.first_scheduled_s,
            first_token_s=done.first_token_s,
            finish_s=done.finish_s,
            generated_tokens=done.generated_tokens,
            preemptions=done.preemptions,
            recomputed_tokens=done.recomputed_tokens,
            iterations_total=iterations,
            preemptions_total=int(s["preemptions"]),
            busy_s=busy,
            makespan_s=float(done.finish_s.max()) if finished else clock,
            prefill_tokens=int(s["total_prefill"]),
            decode_tokens=int(s["total_decode"]),
            wasted_tokens=0,
            batch_mean=float(s["batch_sum"]) / iterations if iterations else 0.0,
            kv_mean=float(s["kv_seconds"]) / (busy * kv_tokens) if busy > 0 else 0.0,
            itl_counts=np.zeros(BINS, np.int64),
            itl_sum=float(np.nansum(done.last_token_s - done.first_token_s)),
            iterations=bank.log.rows[: bank.log.used[0]].copy() if self.records else None,
            schedule=self.schedule,
        )

    @property
    def _name(self) -> str:
        return self.spec.id if self.spec is not None else type(self).__name__

    def _need_reset(self) -> None:
        if not self._begun:
            raise gym.error.ResetNeeded("call reset first")

    # ------------------------------------------------------------------ pictures

    def scene(self) -> Any:
        """What a picture of the episode so far needs (`llmsched_env.envs.scene.Scene`).

        Raises:
            InputError: if the environment does not record.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        from llmsched_env.envs.scene import Scene

        self._need_reset()
        if not self.records:
            raise InputError("nothing was recorded to be shown; make it with record=True, or a render_mode")
        bank, problem = self.fleet.bank, self.problem
        s, req, log = bank.s[0], bank.req[0], bank.log
        plan, victims = bank.lists[0, 1, : s["num_planned"]], bank.lists[0, 2, : s["num_victims"]]
        planned = [(int(r), EVICTED) for r in victims] + [(int(r), int(req["granted"][r])) for r in plan]
        decision, focus = self._said
        return Scene(
            rows=log.rows[: log.used[0]].copy(),
            requests=log.requests[: log.used[1]].copy(),
            tokens=log.tokens[: log.used[1]].copy(),
            workload=self.requests,
            kv_tokens=problem.engine.kv_tokens,
            now=float(s["clock"]),
            finish_s=req["finish"].copy(),
            planned=() if self._over else planned,
            decision=decision,
            title=f"{self._name}, {problem.scenario.name}",
            metrics={"return": float(bank.lane["total"][0])},
            focus=focus,
        )

    def render(self) -> Any:
        """The episode so far: (H, W, 3) uint8 pixels ("rgb_array"), text ("ansi"), or a window ("human").

        Raises:
            InputError: if there is no display, or pygame is missing, for a window.
        """
        if self.render_mode is None:
            gym.logger.warn('render was called without a render_mode; give one, such as "rgb_array", to make')
            return None
        from llmsched_env.envs import rendering

        scene = self.scene()
        if self.render_mode == "ansi":
            return rendering.text(scene)
        if self._painter is None:
            self._painter = rendering.Painter()
        frame = self._painter.draw(scene)
        if self.render_mode == "rgb_array":
            return frame
        if self._window is None:
            self._window = rendering.Window(title=self._name)
        self._window.show(frame)
        return None

    def _say(self, waiting: NDArray[np.int32], running: NDArray[np.int32]) -> tuple[str, int | None]:
        """The action just taken in words, and the request that it concerns; the slots are those before."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the window, if there is one; again does nothing."""
        if self._window is not None:
            self._window.close()
            self._window = None

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        views = dict.fromkeys(("_table", "_seen", "_mask", "_painter", "_window"))
        return {**self.__dict__, **views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()


class DecisionEnv(SchedulingEnv):
    """..."""

    kind = DECISION

    def _say(self, waiting: NDArray[np.int32], running: NDArray[np.int32]) -> tuple[str, int | None]:
        action = int(self.fleet.bank.lane["last_action"][0])
        if action < 2:
            return ("RUN", "HOLD the decodes")[action], None
        levels = (*map(str, self.options.chunk_levels), "all that fits")
        slot, level = divmod(action - 2, len(levels))
        most = self.options.waiting_slots
        if slot < most:
            r = int(waiting[slot])
            return f"ADMIT request {self._requests.name(r)}, {levels[level]}", r
        if slot < most + self.options.running_slots:
            r = int(running[slot - most])
            return f"CHUNK of request {self._requests.name(r)}, {levels[level]}", r
        r = int(running[action - 2 - (most + self.options.running_slots) * len(levels)])
        return f"PREEMPT request {self._requests.name(r)}", r


class BatchEnv(SchedulingEnv):
    """..."""

    kind = BATCH

    def _say(self, waiting: NDArray[np.int32], running: NDArray[np.int32]) -> tuple[str, int | None]:
        most, last = self.options.waiting_slots, len(self.options.chunk_levels) + 2
        given = self._actions[0]
        counts = {
            "ADMIT": np.count_nonzero((given[:most] > 0) & (given[:most] < last)),
            "RUN": np.count_nonzero((given[most:] > 0) & (given[most:] < last)),
            "PREEMPT": np.count_nonzero(given[most:] == last),
        }
        return ", ".join(f"{what} in {n} slots" for what, n in counts.items() if n) or "SKIP", None


class DispatchEnv(SchedulingEnv):
    """..."""

    kind = DISPATCH

    def _say(self, waiting: NDArray[np.int32], running: NDArray[np.int32]) -> tuple[str, int | None]:
        levels = (*map(str, self.options.chunk_levels), "all")
        order, budget, mixing, victim, reserve = self._actions[0].tolist()
        words = (Queue(order), levels[budget], Mixing(mixing), VICTIMS[victim], Reserve(reserve))
        return ", ".join(str(getattr(word, "name", word)).lower() for word in words), None
