"""`llmsched/AgentNetwork-v0`: networks of engines that serve programs of agents, scalar and native vector."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from llmsched_env import networks
from llmsched_env.envs import network as dynamics
from llmsched_env.envs.fleet import take_actions
from llmsched_env.envs.native import NativeVectorEnv
from llmsched_env.envs.network import LANE, OVER, Objective
from llmsched_env.envs.options import whole
from llmsched_env.errors import InputError, unknown
from llmsched_env.networks import TOKEN_LEVEL, Jobs, Network
from llmsched_env.networks.core.assemble import NetSpec, make_networks
from llmsched_env.networks.core.state import Routing
from llmsched_env.networks.load import loads
from llmsched_env.networks.simulation import Prepared, failure, prepare, simulate_network

OBJECTIVES = {str(o.name).lower(): o for o in Objective}
OBSERVATIONS = ("dict", "flat")
LENGTHS = ("oracle", "class")
_SETTINGS = ("load", "horizon_s", "num_jobs")  # of an episode
_SEEDS = 2**31  # of episodes
_EPISODE = ("seed", "jobs", *_SETTINGS)  # options of a reset


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """What is seen, what may be done, what is rewarded.

    Attributes:
        observation: "dict", a Box for each part, or "flat", one Box with all of them behind each other.
        objective: "jobs": minus the jobs in the system, over time, so that the return is minus the sum of
            their latencies (Little's law); "latency": minus each job's latency when it is done, and of those
            that are not when the episode is cut, the time up to then; "backlog": minus the tokens left at the
            stations, over time.
        work_conserving: whether a plan can only be run when no other class can be given tokens in it.
        skip_forced: whether states in which only one action is legal are passed through without asking.
        route: whether in pools of several stations it is asked where each hop goes; if not, the pool's own
            rule says it.
        length_info: what is known of lengths: the tokens that each class has left ("oracle"), or what as many
            hops have in the mean ("class").
        discount_rate: rate, 1/s, at which rewards are discounted within a step by the time that has passed.
        max_steps: steps after which an episode is cut; None: no limit.
    """

    observation: str = "dict"
    objective: str = "jobs"
    work_conserving: bool = True
    skip_forced: bool = True
    route: bool = True
    length_info: str = "oracle"
    discount_rate: float = 0.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("observation", OBSERVATIONS),
            ("objective", OBJECTIVES),
            ("length_info", LENGTHS),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name in ("work_conserving", "skip_forced", "route"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.discount_rate != 0:
            _number("discount_rate", self.discount_rate, "a rate >= 0 in 1/s")
        if self.max_steps is not None and not (whole(self.max_steps) and self.max_steps >= 1):
            raise InputError(f"max_steps must be a whole number from 1, not {self.max_steps!r}")


def _number(name: str, value: Any, what: str, most: float = np.inf) -> float:
    """A positive, finite number of at most `most`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise InputError(f"{name} must be {what}, not {value!r}")
    number = float(value)
    if not 0 < number <= most or number == np.inf:
        raise InputError(f"{name} must be {what}, not {value!r}")
    return number


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
        self.options = _options(keywords)
        self._lanes = _Lanes(_Problem.of(network, load, horizon_s, num_jobs), self.options, 1)
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
        jobs, episode_seed = _take_episode(asked)
        problem = self._lanes.problem.changed(asked)
        if jobs is None and episode_seed is None:
            episode_seed = int(self.np_random.integers(_SEEDS))
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
        return _picture(self._history, problem)


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
        self.options = _options(keywords)
        problem = _Problem.of(network, load, horizon_s, num_jobs)
        self._lanes = _Lanes(problem, self.options, self.num_envs, self._most_steps)
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
        jobs, episode_seed = _take_episode(asked)
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
        problem: _Problem,
        chosen: NDArray[np.bool_],
        jobs: Jobs | None = None,
        seed: int | None = None,
    ) -> list[tuple[int, int, Prepared]]:
        """Episodes for these environments, with their seeds."""
        drawn = []
        for i in np.flatnonzero(chosen).tolist():
            own = -1 if jobs is not None else int(self._rng(i).integers(_SEEDS)) if seed is None else seed
            of_episode = problem.jobs(own) if jobs is None else jobs
            drawn.append((i, own, problem.lay_out(of_episode, self.options, max(0, own))))
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


_MOST_LOAD, _FEWEST = 100.0, 10  # and jobs that arrive in the mean: with fewer there are none at times
_JOBS = 1000  # that arrive in an episode in the mean, unless it is said how many
_SAMPLE = 20_000  # jobs behind the means that rewards and observations are measured by
_ALONE, _FAR_APART = 100, 1e6  # jobs, and seconds between them, so that each has the network to itself


class _Problem:
    """What episodes are drawn from: a network at some load, for some time or number of jobs.

    Attributes:
        network: at the load that holds. horizon_s: seconds; inf with a number of jobs. num_jobs: or None.
        stations, classes: names. routes: stations of the largest pool that has several; 0: there is none.
        time_scale_s: that a job takes if it has the network to itself, in the mean. tokens_per_job: the mean.
    """

    def __init__(
        self, base: Network, load: float | None, horizon_s: float | None, num_jobs: int | None
    ) -> None:
        if horizon_s is not None and num_jobs is not None:
            raise InputError(
                "horizon_s and num_jobs are two ways to say how long an episode is; give one of them"
            )
        if horizon_s is not None:
            horizon_s = _number("horizon_s", horizon_s, "positive seconds")
        if load is not None:
            load = _number("load", load, f"a share from 0 to {_MOST_LOAD}, above 0", _MOST_LOAD)
        if num_jobs is not None and not (whole(num_jobs) and num_jobs >= 1):
            raise InputError(f"num_jobs must be a whole number from 1, not {num_jobs!r}")
        self._settings = {"load": load, "horizon_s": horizon_s, "num_jobs": num_jobs}
        self._base = base
        network = (base if load is None else base.at_load(load)).scheduled(None)
        self.network = network
        self.stations = [station.name for station in network.stations]
        self.classes = network.class_names()
        if len(self.classes) > dynamics.MOST_CLASSES:
            raise InputError(
                f"network {network.name} has {len(self.classes)} classes; environments take up to "
                f"{dynamics.MOST_CLASSES}"
            )
        sizes = [len(pool.stations) for pool in network.all_pools]
        self.routes = max((size for size in sizes if size > 1), default=0)
        self._loads = loads(network)
        self._rate = sum(workflow.rate for workflow in network.workflows)
        self.num_jobs = None if num_jobs is None else int(num_jobs)
        self.horizon_s = np.inf
        if num_jobs is None:
            self.horizon_s = _JOBS / self._rate if horizon_s is None else horizon_s
            if self._rate * self.horizon_s < _FEWEST:
                raise InputError(
                    f"horizon_s: in {self.horizon_s:g} s {self._rate * self.horizon_s:.3g} jobs arrive in "
                    f"the mean; take at least {_FEWEST / self._rate:.4g} s, or num_jobs"
                )
        sample = network.draw(_SAMPLE, seed=0)
        self._template = prepare(network, "max-weight", jobs=sample, known=self._loads)
        self._uncut = bool((self._template.spec.stop_tokens == sample.output_tokens).all())
        tokens = sample.prompt_tokens.astype(np.float64) + sample.output_tokens - 1
        self.tokens_per_job = float(tokens.sum() / _SAMPLE)
        self._longest = _longest(sample, len(self.classes))
        alone = network.draw(_ALONE, seed=0)
        alone = dataclasses.replace(alone, arrival_s=_FAR_APART * np.arange(_ALONE, dtype=np.float64))
        self.time_scale_s = float(simulate_network(network, jobs=alone).job_latency_s.mean())

    def __deepcopy__(self, memo: Any) -> _Problem:
        return self  # it never changes

    def __reduce__(self) -> Any:
        return _Problem, (self._base, *self._settings.values())

    @staticmethod
    def of(
        network: str | Network, load: float | None, horizon_s: float | None, num_jobs: int | None
    ) -> _Problem:
        """The problem of a network, or of the one with a name or in a JSON file."""
        found = networks.get(
            network, schedulers=lambda name: TOKEN_LEVEL
        )  # a file's; whoever acts decides here
        return _Problem(found, load, horizon_s, num_jobs)

    def changed(self, asked: dict[str, Any]) -> _Problem:
        """With other settings; itself if there are none."""
        settings = {**self._settings, **asked}
        if len({"horizon_s", "num_jobs"} & {*asked}) == 1:  # takes the place of the other
            settings["num_jobs" if "horizon_s" in asked else "horizon_s"] = None
        if settings == self._settings:
            return self
        return _Problem(self._base, **settings)

    def unit(self) -> float:
        """Job-seconds of one unit of reward: those of an episode whose jobs take the time scale each."""
        expected = self._rate * self.horizon_s if self.num_jobs is None else self.num_jobs
        return float(expected * self.time_scale_s)

    def jobs(self, seed: int) -> Jobs:
        """The jobs of the episode with this seed."""
        return self.network.draw(self.num_jobs, horizon_s=self.horizon_s, seed=seed)

    def lay_out(self, jobs: Jobs, options: NetworkOptions, seed: int = 0) -> Prepared:
        """An episode with these jobs, every decision to be made from outside."""
        template = self._template.spec
        known = len(self.classes), len(self.network.workflows)
        if jobs.node.max() >= known[0] or jobs.workflow.max() >= known[1]:
            raise InputError(
                f"jobs have hops of class {int(jobs.node.max())} of workflow {int(jobs.workflow.max())}; "
                f"network {self.network.name} has {known[0]} classes and {known[1]} workflows"
            )
        # They fit as those do.
        if self._uncut and (_longest(jobs, len(self.classes)) <= self._longest).all():
            priorities = np.array([node.priority for _, node in self.network.classes], np.int32)
            made = dataclasses.replace(self._template, jobs=jobs, seed=seed)
            ends = jobs.output_tokens
            spec = dataclasses.replace(
                template,
                jobs=jobs,
                seed=seed,
                stop_tokens=ends,
                limit_tokens=ends,
                priority=priorities[jobs.node],
                client=jobs.workflow[jobs.job_of_hop],
            )
        else:
            made = prepare(self.network, "max-weight", jobs=jobs, seed=seed, known=self._loads)
            spec = made.spec
        spec = dataclasses.replace(
            spec,
            stations=[dataclasses.replace(station, outside=True) for station in spec.stations],
            pools=[
                dataclasses.replace(pool, routing=Routing.OUTSIDE) if options.route else pool
                for pool in spec.pools
            ],
            node_tokens=template.node_tokens,
            flow=template.flow,
            samples=0,
        )
        return dataclasses.replace(made, spec=spec)

    def meanings(self, options: NetworkOptions) -> list[str]:
        """What each action does."""
        routes = range(self.routes if options.route else 0)
        return [*(f"SERVE {name}" for name in self.classes), "RUN", *(f"ROUTE {i}" for i in routes)]


def _longest(jobs: Jobs, classes: int) -> NDArray[np.int64]:
    """(2, K) the longest prompt of each class, and the most tokens of prompt and answer."""
    found: NDArray[np.int64] = np.zeros((2, classes), np.int64)
    np.maximum.at(found[0], jobs.node, jobs.prompt_tokens)
    np.maximum.at(found[1], jobs.node, jobs.prompt_tokens.astype(np.int64) + jobs.output_tokens)
    return found


class _Lanes:
    """The memory of environments, a network each, and what they have in common.

    Attributes:
        problem: what episodes are drawn from.
        made: their networks' arrays; empty before the first episode.
        lane: (E,) LANE. observation: (E, D) float32. mask: (E, A) int8. table: (E, COLUMNS) int64.
        observation_space, action_space: of one.
    """

    def __init__(
        self, problem: _Problem, options: NetworkOptions, num_envs: int, most_steps: int = 0
    ) -> None:
        self.problem, self.options = problem, options
        stations, classes = len(problem.stations), len(problem.classes)
        self._parts = (dynamics.NUM_GLOBAL + classes, stations * dynamics.NUM_STATION)
        size = dynamics.observation_size(stations, classes)
        routes = problem.routes if options.route else 0
        self.action_space: spaces.Discrete = spaces.Discrete(classes + 1 + routes)
        self.observation_space = self._space(size)
        self.lane = np.zeros(num_envs, LANE)
        limits = (options.max_steps or 0, most_steps)
        for name, value in (
            ("objective", OBJECTIVES[options.objective]),
            ("work_conserving", options.work_conserving),
            ("skip_forced", options.skip_forced),
            ("telling", options.length_info == "oracle"),
            ("discount_rate", options.discount_rate),
            ("max_steps", min((steps for steps in limits if steps), default=0)),
            ("ask", OVER),
        ):
            self.lane[name] = value
        self.observation = np.zeros((num_envs, size), np.float32)
        self.mask = np.ones((num_envs, int(self.action_space.n)), np.int8)
        self.made: list[Any] = [None] * num_envs
        self._jobs: list[Any] = [None] * num_envs
        self.table = np.zeros((num_envs, dynamics.COLUMNS), np.int64)
        self._address()

    def _space(self, size: int) -> spaces.Space[Any]:
        if self.options.observation == "flat":
            return spaces.Box(0.0, 1.0, (size,), np.float32)
        first, second = self._parts
        sizes = {"network": first, "stations": second, "classes": size - first - second}
        return spaces.Dict({name: spaces.Box(0.0, 1.0, (n,), np.float32) for name, n in sizes.items()})

    def present(self, rows: NDArray[np.float32]) -> Any:
        """Observations as their space has them: views of rows (..., D)."""
        if self.options.observation == "flat":
            return rows
        first, second = self._parts
        return {
            "network": rows[..., :first],
            "stations": rows[..., first : first + second],
            "classes": rows[..., first + second :],
        }

    def seen(self, i: int) -> Any:
        """What environment i shows, a copy."""
        return self.present(self.observation[i].copy())

    def begin(self, i: int, prepared: Prepared) -> None:
        """Begin an episode in environment i."""
        record, problem = self.lane[i], self.problem
        backlog = self.options.objective == "backlog"
        record["horizon"], record["time_scale"] = problem.horizon_s, problem.time_scale_s
        record["unit"] = problem.unit() * (problem.tokens_per_job if backlog else 1.0)
        self._jobs[i] = prepared.jobs
        self._lay(i, prepared.spec)

    def _lay(self, i: int, spec: NetSpec) -> None:
        """Lay an episode out, and go on to its first decision."""
        self.made[i] = make_networks([spec])
        dynamics.put_network(self.table[i], self.made[i])
        dynamics.begin_networks(self.table[i : i + 1], np.ones(1, np.bool_))
        self.check(np.array([i]))

    def check(self, rows: NDArray[Any]) -> None:
        """Raise what has gone wrong in these environments."""
        for i in rows:
            if int(self.made[i].g["error"][0]) != 0:
                raise InputError(failure(self.problem.network, self._jobs[i], self.made[i]))

    def metrics(self, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What episodes have come to, see `AgentNetworkVectorEnv`; of these rows."""
        lane = self.lane[rows]
        g = np.concatenate([self.made[i].g for i in rows])
        seconds = np.maximum(g["clock"], 1e-300)
        return {
            "return": lane["total"],
            "decisions": lane["steps"],
            "illegal": lane["illegal"],
            "latency_s": g["area"] / np.maximum(g["next_job"], 1),
            "jobs_mean": g["area"] / seconds,
            "backlog_mean": lane["token_seconds"] / seconds,
            "arrived": g["next_job"],
            "finished": g["jobs_done"],
            "throughput": g["jobs_done"] / seconds,
            "makespan_s": g["clock"],
        }

    def _address(self) -> None:
        dynamics.put_own(self.table, self.lane, self.observation, self.mask)
        for row, made in zip(self.table, self.made, strict=True):
            if made is not None:
                dynamics.put_network(row, made)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._address()  # the old ones mean nothing here


def _options(keywords: dict[str, Any]) -> NetworkOptions:
    known = [field.name for field in dataclasses.fields(NetworkOptions)]
    for name in keywords:
        if name not in known:
            raise unknown("keyword", name, [*known, "network", *_SETTINGS])
    return NetworkOptions(**keywords)


def _take_episode(options: dict[str, Any]) -> tuple[Jobs | None, int | None]:
    """Take the jobs of an episode, or their seed, out of the options of a reset."""
    for name in options:
        if name not in _EPISODE:
            raise unknown("option", name, (*_EPISODE, "reset_mask"))
    jobs, seed = options.pop("jobs", None), options.pop("seed", None)
    if jobs is not None and not isinstance(jobs, Jobs):
        raise InputError(f"option jobs must be networks.Jobs, not {type(jobs).__name__}")
    if seed is not None and not (whole(seed) and 0 <= seed < _SEEDS):
        raise InputError(f"option seed must be a whole number from 0 to {_SEEDS - 1}, not {seed!r}")
    if jobs is not None and seed is not None:
        raise InputError("options jobs and seed are two ways to say the same; give one of them")
    return jobs, None if seed is None else int(seed)


def _picture(history: list[tuple[float, NDArray[np.int64]]], problem: _Problem) -> NDArray[np.uint8]:
    """Hops at each station over time, by class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times = np.array([when for when, _ in history])
    counts = np.stack([present for _, present in history])
    figure = Figure(figsize=(8, 1.2 + 1.8 * len(problem.stations)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(len(problem.stations), 1, sharex=True))
    classes = len(problem.classes)
    for k, axes in enumerate(panels):
        here = counts[:, k * classes : (k + 1) * classes]
        served = [c for c in range(classes) if here[:, c].any()]
        if served:
            axes.stackplot(times, here[:, served].T, labels=[problem.classes[c] for c in served], step="post")
            axes.legend(loc="upper left", fontsize=8, frameon=False)
        axes.set_ylabel(f"hops at {problem.stations[k]}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("time (s)", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
