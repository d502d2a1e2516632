"""`llmsched/AgentNetwork-v0`: networks of engines that serve programs of agents, scalar and native vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from llmsched_env.envs import network as dynamics
from llmsched_env.envs.fleet import take_actions
from llmsched_env.envs.native import NativeVectorEnv
from llmsched_env.envs.network_lanes import (
    EPISODE_SEEDS,
    NetworkLanes,
    NetworkProblem,
    options_of,
    picture,
    take_jobs,
)
from llmsched_env.errors import InputError, unknown
from llmsched_env.networks import Jobs, Network
from llmsched_env.networks.simulation import Prepared


class AgentNetworkEnv(gym.Env[Any, Any]):
    """A network of engines that serves the programs of agents; see `llmsched_env.networks`.

    Jobs arrive at random, each a workflow of calls ("hops") that wait for each other, of classes that are
    served at certain stations. Whenever a station forms a batch, the action says which class it serves next;
    where several stations could take a call, and `route`, to which it goes. The actions are described in
    `llmsched_env.envs.network`; `action_meanings` has them by name.

    **Observation.** float32 in [0, 1]. Of the network, 6: whether a plan is asked for, whether a route, jobs
    in the system, share of the horizon that has passed, share of the token budget that the plan has left, and
    tokens of the prompt that is routed; and the class of that, one-hot. Of each station, 5: whether it is the
    one that decides, whether it is busy and for how long, share of its KV cache in use, tokens left. Of each
    class at each station, 4: hops, tokens left, how long ago the oldest of the hops came, whether it is
    served in this plan already. Counts are logarithmic: log(1 + x) / log(10^6). Times are t / (t + scale),
    with the time that a job takes alone as the scale.

    **Reward.** `objective`, divided by what it would be if every job of the episode took the time that a job
    takes in the mean if it has the network to itself: returns are minus the mean latency in these units
    ("jobs", "latency"); "backlog" counts tokens for jobs, divided by those of a mean job.

    **Episode end.** With a horizon, the episode is cut (truncated) there; with a number of jobs, it ends
    (terminates) when all are done.

    Attributes:
        options: as given.
        network: as given, at the load that holds.
        episode_seed: the seed that this episode's jobs were drawn from; None: they were given.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array", "ansi"],
        "render_fps": 10,
    }

    def __init__(
        self,
        network: str | Network = "rybko-stolyar",
        *,
        load: float | None = None,
        horizon_s: float | None = None,
        num_jobs: int | None = None,
        render_mode: str | None = None,
        **keywords: Any,
    ) -> None:
        """
        Args:
            network: its name, JSON file, or itself. Schedulers of its stations decide nothing here.
            load: share of the capacity of its busiest station that arrives; None: as the network has it.
            horizon_s: seconds after which an episode is cut; None: in which 1000 jobs arrive in the mean,
                unless `num_jobs` says when it ends.
            num_jobs: of an episode that goes on until all are done; None: all that arrive up to the horizon.
            render_mode: "rgb_array": a picture of hops at the stations over time; "ansi": a line of text.
            keywords: fields of `NetworkOptions`.

        Raises:
            InputError: an unknown keyword or network, with the nearest match, or a value that does not fit.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise unknown("render_mode", render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.options = options_of(keywords)
        self._lanes = NetworkLanes(NetworkProblem.of(network, load, horizon_s, num_jobs), self.options, 1)
        self.observation_space = self._lanes.observation_space
        self.action_space = self._lanes.action_space
        self.episode_seed: int | None = None
        self._action = np.zeros(1, np.int64)
        self._out = np.zeros((4, 1))
        self._begun = self._over = False
        self._history: list[tuple[float, NDArray[np.int64]]] = []

    @property
    def network(self) -> Network:
        """The network, at the load that holds."""
        return self._lanes.problem.network

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of the generator `np_random`, which gives each episode the seed of its jobs.
            options: `load`, `horizon_s` or `num_jobs`, which hold from now on; and for this episode `seed`,
                from which its jobs are drawn (`np_random` is left alone), or `jobs`, a `networks.Jobs`.

        Raises:
            InputError: an unknown option, with the nearest match, or a value that does not fit.
        """
        super().reset(seed=seed)
        asked = dict(options or {})
        jobs, episode_seed = take_jobs(asked)
        problem = self._lanes.problem.changed(asked)
        if jobs is None and episode_seed is None:
            episode_seed = int(self.np_random.integers(EPISODE_SEEDS))
        if episode_seed is not None:
            jobs = problem.jobs(episode_seed)
        assert jobs is not None
        laid_out = problem.lay_out(jobs, self.options, episode_seed or 0)
        self._lanes.problem = problem
        self._lanes.begin(0, laid_out)
        self.episode_seed = episode_seed
        self._begun, self._over = True, False
        self._out[:] = 0.0
        self._history = []
        self._note()
        dt = float(self._lanes.lane["dt"][0])
        return self._lanes.seen(0), {"action_mask": self._lanes.mask[0].copy(), "dt": dt}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action; one that is not legal counts as the first one that is. What is over stays as it is.

        Returns:
            Observation, reward, whether all jobs are done, whether the episode was cut, and info:
            `action_mask`, `dt` (seconds that passed) and, when the episode ends, `metrics`.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InputError: for an action that is no whole number.
        """
        if not self._begun:
            raise gym.error.ResetNeeded("call reset before the first step")
        take_actions(np.reshape(action, (1,)) if np.ndim(action) == 0 else action, self._action)
        dynamics.step_networks(self._lanes.table, self._action, self._out, 0, 1)
        try:
            self._lanes.check(np.zeros(1, np.int64))
        except InputError:
            self._begun = False  # nothing comes of this episode any more
            raise
        self._note()
        reward, dt, terminated, truncated = self._out[:, 0].tolist()
        info: dict[str, Any] = {"action_mask": self._lanes.mask[0].copy(), "dt": dt}
        if terminated + truncated > 0 and not self._over:
            self._over = True
            info["metrics"] = self.metrics()
        return self._lanes.seen(0), reward, terminated > 0, truncated > 0, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, (A,) bool; all of them when the episode is over."""
        return self._lanes.mask[0].astype(np.bool_)

    def action_meanings(self) -> list[str]:
        """What each action does, in words."""
        return self._lanes.problem.meanings(self.options)

    def jobs_of(self, seed: int) -> Jobs:
        """The jobs of the episode with this seed, for `networks.simulate_network`."""
        return self._lanes.problem.jobs(seed)

    def metrics(self) -> dict[str, float]:
        """What the episode has come to so far, see `AgentNetworkVectorEnv`.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if not self._begun:
            raise gym.error.ResetNeeded("call reset first")
        return {name: values.item() for name, values in self._lanes.metrics(np.zeros(1, np.int64)).items()}

    # ------------------------------------------------------------------ pictures

    def _note(self) -> None:
        """Keep what a picture shows: hops of each class at each station."""
        if self.render_mode == "rgb_array":
            made = self._lanes.made[0]
            self._history.append((float(made.g["clock"][0]), made.cell["present"].copy()))

    def render(self) -> Any:
        """The episode so far: (H, W, 3) uint8 pixels ("rgb_array"), or text ("ansi")."""
        if self.render_mode is None:
            gym.logger.warn('render was called without a render_mode; give one, such as "rgb_array", to make')
            return None
        if not self._begun:
            raise gym.error.ResetNeeded("call reset first")
        problem, made = self._lanes.problem, self._lanes.made[0]
        if self.render_mode == "ansi":
            present = made.cell["present"].reshape(len(problem.stations), -1)
            each = "; ".join(
                f"{name}: " + ", ".join(f"{n} {c}" for n, c in zip(row, problem.classes, strict=True) if n)
                for name, row in zip(problem.stations, present.tolist(), strict=True)
            )
            return f"t = {float(made.g['clock'][0]):.3f} s, {int(made.g['jobs_in'][0])} jobs; {each}"
        return picture(self._history, problem)


class AgentNetworkVectorEnv(NativeVectorEnv):
    """`AgentNetworkEnv`, many at a time; keywords are those of it, and those of `NativeVectorEnv`.

    `metrics` of episodes that have ended: return; decisions, illegal; latency_s (seconds that jobs were in
    the system, by job that arrived), jobs_mean (in the system, over time), backlog_mean (tokens left, over
    time), arrived, finished, throughput (jobs done per second), makespan_s.

    Attributes:
        options: as those of the scalar environment.
    """

    def __init__(
        self,
        num_envs: int = 1,
        network: str | Network = "rybko-stolyar",
        *,
        load: float | None = None,
        horizon_s: float | None = None,
        num_jobs: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        num_threads: int = 1,
        max_episode_steps: int | None = None,
        copy: bool = True,
        render_mode: None = None,
        **keywords: Any,
    ) -> None:
        """The arguments are described with the scalar environment and `NativeVectorEnv`.

        Raises:
            InputError: an unknown keyword or network, with the nearest match, or a value that does not fit.
        """
        super().__init__(num_envs, autoreset_mode, num_threads, max_episode_steps, copy, render_mode)
        self.options = options_of(keywords)
        problem = NetworkProblem.of(network, load, horizon_s, num_jobs)
        self._lanes = NetworkLanes(problem, self.options, self.num_envs, self._most_steps)
        self.single_observation_space = self._lanes.observation_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = self._lanes.action_space
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._actions = np.zeros(self.num_envs, np.int64)
        self._over: NDArray[np.bool_] = np.zeros(self.num_envs, np.bool_)

    @property
    def network(self) -> Network:
        """The network, at the load that holds."""
        return self._lanes.problem.network

    @property
    def time_scale_s(self) -> float:
        """Seconds that a job takes if it has the network to itself, in the mean."""
        return self._lanes.problem.time_scale_s

    @property
    def clocks(self) -> NDArray[np.float64]:
        clocks: NDArray[np.float64] = self._lanes.lane["clock"]
        return clocks

    @property
    def episodes_begun(self) -> NDArray[np.int64]:
        begun: NDArray[np.int64] = self._lanes.lane["begun"]
        return begun

    @property
    def job_seconds(self) -> NDArray[np.float64]:
        """(num_envs,) float64: integral of the jobs in the system over the time of each episode so far."""
        seconds: NDArray[np.float64] = self._lanes.lane["job_seconds"]
        return seconds

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in all environments, or in those of `options["reset_mask"]`, (num_envs,) bool.

        Args:
            seed: environment i gets the seed `seed + i`; or one for each, None leaving its generator as it
                is.
            options: as for the scalar environment, and `reset_mask`. `load`, `horizon_s` and `num_jobs` can
                only be changed in all environments together.

        Raises:
            InputError: as the scalar environment's, and if seeds or mask do not fit the number of
                environments.
        """
        chosen, fresh, asked = self._take_reset(seed, options)
        chosen = chosen.copy()
        jobs, episode_seed = take_jobs(asked)
        problem = self._lanes.problem.changed(asked)
        if problem is not self._lanes.problem and not chosen.all():
            raise InputError("settings can only be changed in all environments together; drop reset_mask")
        before = [*self._rngs], [*self._rng_seeds]
        try:
            for i in np.flatnonzero(chosen):
                if (new := fresh[i]) is not None:
                    self._rngs[i], self._rng_seeds[i] = new
            drawn = self._draw(problem, chosen, jobs, episode_seed)
        except Exception:  # all goes on as if nobody had asked
            self._rngs, self._rng_seeds = before
            raise
        self._lanes.problem = problem
        self._begin(drawn)
        self._begun = True
        self._out[:, chosen] = 0.0
        self._flags[:, chosen] = False
        self._over[chosen] = False
        self._out[1, chosen] = self._lanes.lane["dt"][chosen]
        return self._observation(), self._infos(chosen)

    def _draw(
        self,
        problem: NetworkProblem,
        chosen: NDArray[np.bool_],
        jobs: Jobs | None = None,
        seed: int | None = None,
    ) -> list[tuple[int, int, Prepared]]:
        """Episodes for these environments, with their seeds."""
        drawn = []
        for i in np.flatnonzero(chosen).tolist():
            if jobs is not None:  # given ones need no seed; what else is drawn takes 0
                drawn.append((i, -1, problem.lay_out(jobs, self.options, 0)))
                continue
            own = int(self._rng(i).integers(EPISODE_SEEDS)) if seed is None else seed
            drawn.append((i, own, problem.lay_out(problem.jobs(own), self.options, own)))
        return drawn

    def _begin(self, drawn: list[tuple[int, int, Prepared]]) -> None:
        """Begin these episodes."""
        for i, seed, prepared in drawn:
            self._lanes.begin(i, prepared)
            self.episode_seeds[i] = seed

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """A step of each environment; actions as `action_space` has them.

        Returns:
            Observations, rewards (num_envs,), whether each episode terminated, or was truncated, and infos.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InputError: for actions that are no whole numbers, or of another shape than `action_space` has.
        """
        if not self._begun:
            raise gym.error.ResetNeeded("call reset before the first step")
        take_actions(actions, self._actions)
        lanes, out, mode = self._lanes, self._out, self.autoreset_mode
        were = self._over
        if self._threads == 1:
            events = dynamics.step_networks(lanes.table, self._actions, out, 0, self.num_envs)
        else:
            work = (lanes.table, self._actions, out)
            events = self._helped(dynamics.share_networks, work).step()
        more: dict[str, Any] = {}
        if events or were.any():
            np.not_equal(out[2:], 0.0, out=self._flags)
            over: NDArray[np.bool_] = np.logical_or(*self._flags)
            try:
                more = self._after(over & ~were)
                if mode is AutoresetMode.NEXT_STEP and were.any():
                    self._begin(self._draw(lanes.problem, were))
            except InputError:
                self._begun = False  # nothing comes of these episodes any more
                raise
            self._over = over
            if mode is AutoresetMode.NEXT_STEP and were.any():
                out[2:, were] = 0.0
                out[1, were] = lanes.lane["dt"][were]
                self._flags[:, were] = False
                self._over = over & ~were
        rewards, (terminated, truncated) = out[0], self._flags
        if self.copy or more:
            rewards, terminated, truncated = rewards.copy(), terminated.copy(), truncated.copy()
        if more and mode is AutoresetMode.SAME_STEP:  # what they do from here on is the next episode
            self._flags[:] = False
            self._over = np.zeros(self.num_envs, np.bool_)
        return self._observation(), rewards, terminated, truncated, {**self._infos(self._all), **more}

    def _after(self, ended: NDArray[np.bool_]) -> dict[str, Any]:
        """See to the episodes that have ended in this step; returns what is to be said of them."""
        if not ended.any():
            return {}
        lanes, out = self._lanes, self._out
        rows = np.flatnonzero(ended)
        lanes.check(rows)
        metrics = self._spread(lanes.metrics(rows), ended)
        told: dict[str, Any] = {"metrics": metrics, "_metrics": ended}
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            return told
        final = np.full(self.num_envs, None, dtype=object)
        for i in rows:
            final[i] = lanes.seen(int(i))
        mask = np.zeros_like(lanes.mask)
        mask[ended] = 1
        dt = np.where(ended, out[1], 0.0)
        told = {"action_mask": mask, "_action_mask": ended, "dt": dt, "_dt": ended, **told}
        self._begin(self._draw(lanes.problem, ended))
        out[2:, ended] = 0.0
        out[1, ended] = lanes.lane["dt"][ended]
        return {"final_obs": final, "_final_obs": ended, "final_info": told, "_final_info": ended}

    def _observation(self) -> Any:
        rows = self._lanes.observation
        return self._lanes.present(rows.copy() if self.copy else rows)

    def _infos(self, there: NDArray[np.bool_]) -> dict[str, Any]:
        mask, dt = self._lanes.mask, self._out[1]
        if self.copy:
            mask, dt, there = mask.copy(), dt.copy(), there.copy()
        return {"action_mask": mask, "_action_mask": there, "dt": dt, "_dt": there}

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, (num_envs, A) bool; all of an environment whose episode is over."""
        legal: NDArray[np.bool_] = self._lanes.mask.view(np.bool_)
        return legal.copy() if self.copy else legal

    def action_meanings(self) -> list[str]:
        """What each action does, in words."""
        return self._lanes.problem.meanings(self.options)

    def jobs_of(self, seed: int) -> Jobs:
        """The jobs of the episode with this seed, for `networks.simulate_network`."""
        return self._lanes.problem.jobs(seed)
