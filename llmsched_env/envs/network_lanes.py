"""What the environments of networks share: options, episodes, memory, pictures."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from llmsched_env import networks
from llmsched_env.envs import network as dynamics
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
EPISODE_SEEDS = 2**31  # of episodes
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


_MOST_LOAD, _FEWEST = 100.0, 10  # and jobs that arrive in the mean: with fewer there are none at times
_JOBS = 1000  # that arrive in an episode in the mean, unless it is said how many
_SAMPLE = 20_000  # jobs behind the means that rewards and observations are measured by
_ALONE, _FAR_APART = 100, 1e6  # jobs, and seconds between them, so that each has the network to itself


class NetworkProblem:
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

    def __deepcopy__(self, memo: Any) -> NetworkProblem:
        return self  # it never changes

    def __reduce__(self) -> Any:
        return NetworkProblem, (self._base, *self._settings.values())

    @staticmethod
    def of(
        network: str | Network, load: float | None, horizon_s: float | None, num_jobs: int | None
    ) -> NetworkProblem:
        """The problem of a network, or of the one with a name or in a JSON file."""
        found = networks.get(
            network, schedulers=lambda name: TOKEN_LEVEL
        )  # a file's; whoever acts decides here
        return NetworkProblem(found, load, horizon_s, num_jobs)

    def changed(self, asked: dict[str, Any]) -> NetworkProblem:
        """With other settings; itself if there are none."""
        settings = {**self._settings, **asked}
        if len({"horizon_s", "num_jobs"} & {*asked}) == 1:  # takes the place of the other
            settings["num_jobs" if "horizon_s" in asked else "horizon_s"] = None
        if settings == self._settings:
            return self
        return NetworkProblem(self._base, **settings)

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


class NetworkLanes:
    """The memory of environments, a network each, and what they have in common.

    Attributes:
        problem: what episodes are drawn from.
        made: their networks' arrays; empty before the first episode.
        lane: (E,) LANE. observation: (E, D) float32. mask: (E, A) int8. table: (E, COLUMNS) int64.
        observation_space, action_space: of one.
    """

    def __init__(
        self, problem: NetworkProblem, options: NetworkOptions, num_envs: int, most_steps: int = 0
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


def options_of(keywords: dict[str, Any]) -> NetworkOptions:
    known = [field.name for field in dataclasses.fields(NetworkOptions)]
    for name in keywords:
        if name not in known:
            raise unknown("keyword", name, [*known, "network", *_SETTINGS])
    return NetworkOptions(**keywords)


def take_jobs(options: dict[str, Any]) -> tuple[Jobs | None, int | None]:
    """Take the jobs of an episode, or their seed, out of the options of a reset."""
    for name in options:
        if name not in _EPISODE:
            raise unknown("option", name, (*_EPISODE, "reset_mask"))
    jobs, seed = options.pop("jobs", None), options.pop("seed", None)
    if jobs is not None and not isinstance(jobs, Jobs):
        raise InputError(f"option jobs must be networks.Jobs, not {type(jobs).__name__}")
    if seed is not None and not (whole(seed) and 0 <= seed < EPISODE_SEEDS):
        raise InputError(f"option seed must be a whole number from 0 to {EPISODE_SEEDS - 1}, not {seed!r}")
    if jobs is not None and seed is not None:
        raise InputError("options jobs and seed are two ways to say the same; give one of them")
    return jobs, None if seed is None else int(seed)


def picture(history: list[tuple[float, NDArray[np.int64]]], problem: NetworkProblem) -> NDArray[np.uint8]:
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
