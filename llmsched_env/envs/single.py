"""The scalar environments: thin shells over the compiled core."""

from __future__ import annotations

import abc
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
    take_actions,
    take_episode,
    take_problem,
    take_reference,
)
from llmsched_env.envs.frame import DISABLED
from llmsched_env.envs.kinds import BATCH, DECISION, DISPATCH, Kind, tally
from llmsched_env.envs.options import split
from llmsched_env.errors import InputError, unknown
from llmsched_env.scenarios import Problem, Scenario
from llmsched_env.simulation import Result

_LOG_ROWS = 1024  # iterations for which a log has room at first
_EPISODE = ("scenario", "seed", "requests", "reference")  # options of a reset, beside the scenario's settings


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
        self._max_steps = int(self.options.max_steps or 0)
        self._actions = np.zeros((1, *(self.action_space.shape or ())), np.int64)
        self._out = np.zeros((4, 1))
        self._begun = self._over = False
        self._said: tuple[str, int | None] = ("", None)  # the last action, and the request that it concerns
        self._painter: Any = None
        self._window: Any = None
        self.problem = found.resolve()
        self.fleet = self._fleet(self.problem)
        self._bind()

    def _fleet(self, problem: Problem, num_requests: int | None = None) -> Fleet:
        """Memory for episodes of this problem."""
        return Fleet(
            self.kind,
            problem,
            self.options,
            1,
            num_requests=num_requests,
            autoreset=DISABLED,
            log_rows=_LOG_ROWS if self.records else 0,
        )

    def _bind(self) -> None:
        """What each step reads, looked up once."""
        bank = self.fleet.bank
        self._table, self._seen, self._mask = bank.table, bank.observation[0], bank.mask[0]
        self._action = self._actions.reshape(self.action_space.shape)

    # ------------------------------------------------------------------ an episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of the generator `np_random`, which gives each episode the seed of its requests.
            options: `scenario` and any of its settings, such as `load`, `num_requests` or `kv_blocks`, which
                hold from now on; and for this episode `seed`, from which its requests are drawn (`np_random`
                is left alone), or `requests`, which are `Requests` of any number; and `reference`, what is
                known of its best schedule (`scenarios.Reference`, or a mapping), if not by the scenario.

        Returns:
            The observation, and what `step` returns as info, with `reference` where there is one: mean
            latencies `best_known` (or `optimum`), `bound` and `vllm_v1` in seconds, and `method`.

        Raises:
            InputError: an unknown option, with the nearest match, requests that can never be served, or
                options that contradict each other.
        """
        super().reset(seed=seed)
        asked = dict(options or {})
        requests, episode_seed = take_episode(asked)
        reference = take_reference(asked)
        problem = take_problem(self.problem, asked, _EPISODE)
        n = problem.num_requests if requests is None else len(requests)
        same = problem is self.problem and n == self.fleet.num_requests
        fleet = self.fleet if same else self._fleet(problem, n)
        if requests is None:
            if episode_seed is None:
                episode_seed = int(self.np_random.integers(2**63))
            requests = draw(problem, episode_seed)
        fleet.put(0, requests, reference or problem.reference(episode_seed))
        self.problem, self.fleet = problem, fleet  # now that nothing can fail any more
        self._bind()
        self.episode_seed, self._requests = episode_seed, requests
        self._out[:] = 0.0
        self._begun, self._over, self._said = True, False, ("", None)
        self.fleet.reset(np.ones(1, np.bool_))
        if self.render_mode == "human":
            self.render()
        info = {"action_mask": self._legal(), "dt": float(self.fleet.bank.s["clock"][0]), **self._reference()}
        return present(self._seen.copy(), self.options), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action; one that is not legal counts as the first one that is. What is over stays as it is.

        Returns:
            Observation, reward, whether all requests are served, whether the episode was cut (see "Episode
            end"), and info: `action_mask`, `dt` (seconds that passed) and, when the episode ends, `metrics`
            (and again `reference`).

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InputError: for actions that are no whole numbers, or of another shape than `action_space` has.
        """
        if not self._begun:
            raise gym.error.ResetNeeded("call reset before the first step")
        take_actions(action, self._action)
        if self.records:
            self._step_recorded()
        else:
            self.kind.step(self._table, self._actions, self._out, 0, 1, self._max_steps)
        reward, dt, terminated, truncated = self._out[:, 0].tolist()
        info = {"action_mask": self._legal(), "dt": dt}
        if terminated + truncated > 0 and not self._over:
            self._over = True
            info |= {"metrics": self.metrics(), **self._reference()}
        return present(self._seen.copy(), self.options), reward, terminated > 0, truncated > 0, info

    def _reference(self) -> dict[str, Any]:
        reference = self.fleet.references[0]
        return {} if reference is None else {"reference": reference.summary()}

    def _step_recorded(self) -> None:
        lane = self.fleet.bank.lane[0]
        waiting, running = lane["wait"].copy(), lane["run"].copy()
        self.fleet.step(self._actions, self._out, self._max_steps)
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

    @abc.abstractmethod
    def _say(self, waiting: NDArray[np.int32], running: NDArray[np.int32]) -> tuple[str, int | None]:
        """The action just taken in words, and the request that it concerns; the slots are those before."""

    def close(self) -> None:
        """Close the window, if there is one; again does nothing."""
        if self._window is not None:
            self._window.close()
            self._window = None

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        views = dict.fromkeys(("_table", "_seen", "_mask", "_action", "_painter", "_window"))
        return {**self.__dict__, **views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()


class DecisionEnv(SchedulingEnv):
    """The plan of an engine's next iteration, built by one small decision after the other.

    ## Description

    An engine serves requests to a large language model by continuous batching: in each iteration it computes
    some tokens of some prompts (prefill chunks), one token for each request that is being answered (decodes),
    and all of them keep their keys and values in a KV cache of limited size, cut into blocks. Requests arrive
    over time and wait in a queue. Before each iteration the agent builds its plan: whom to admit, with how
    many tokens, whom to preempt; then it runs the plan, and time passes, as long as a cost model fitted to a
    GPU says. Decodes are in the plan from the start. States in which only one action is legal are passed
    through without asking, so that each step is a decision.

    The dynamics are those of `llmsched_env.simulate`, and `baselines.expert` offers its schedulers as
    policies.

    ## Action space

    `Discrete(2 + (W + R) L + R)`, with W waiting slots, R running slots and L chunk levels, the last of which
    is all that fits:

    | Action | Number | Legal if |
    | :-- | :-- | :-- |
    | RUN the plan | 0 | there is something in it, or nothing else can be done |
    | HOLD the decodes, until the next plan | 1 | others have tokens, or could have them then |
    | ADMIT waiting slot k with level l | 2 + k L + l | a seat, budget and KV blocks are free (`hold`) |
    | CHUNK of the prefill in running slot r with level l | 2 + (W + r) L + l | it has none in the plan |
    | PREEMPT running slot r | 2 + (W + R) L + r | somebody waits or lacks KV blocks (`preempt`) |

    A level is legal if more tokens than it would fit, so that each outcome has one action. If decodes find no
    KV block for their next tokens, somebody must be preempted, and only that is legal. Who is preempted loses
    what was computed and waits again.

    Illegal actions are taken as the first legal one, and counted. `info["action_mask"]` is int8, as
    `action_space.sample(mask=...)` takes it, `action_masks()` the same as bool; see also
    `llmsched_env.envs.wrappers.MaskInObservation`. At the end of an episode all actions are legal.

    ## Observation space

    `Dict` of float32 Boxes with `engine` (20,), `waiting` (12 W,) and `running` (12 R,), the latter with 12
    numbers for each slot, slot by slot (`reshape(-1, 12)`), 0 where a slot is empty; or all of them in one
    Box, in this order (`observation="flat"`). A number x is normalised as a share x / b where b is the most
    it can be, and else as x / (|x| + b), so that all lie in [0, 1], and `slack` in [-1, 1].

    | `engine` | | b |
    | --: | :-- | :-- |
    | 0 | `kv_used`: KV blocks in use, those of the plan included | share of all |
    | 1 | `budget_left`: tokens that the plan leaves | share of the token budget |
    | 2 | `seats_used`: running requests | share of the most |
    | 3 | `waiting`: waiting requests | 16 |
    | 4 | `waiting_tokens`: prefill tokens of the visible waiting requests | 4096 |
    | 5 | `running`: running requests | 16 |
    | 6 | `hidden_waiting`: waiting requests beyond the slots | 16 |
    | 7 | `hidden_running`: running requests beyond the slots | 16 |
    | 8 | `hidden_kv`: KV blocks of the latter | share of all |
    | 9 | `planned_prefill`: prefill tokens in the plan | share of the token budget |
    | 10 | `planned_decodes`: decodes in the plan | share of the most running requests |
    | 11 | `planned_requests`: requests with a prefill chunk in the plan | 4 |
    | 12 | `planned_time`: seconds that the plan would take | 0.05 |
    | 13 | `held`: 1 if the decodes are kept out of the plan | 1 |
    | 14 | `forced`: 1 if somebody must be preempted | 1 |
    | 15 | `victims`: requests preempted in this plan | 4 |
    | 16 | `arrivals`: a time scale's worth, at the rate over the window | 1 |
    | 17 | `departures`: likewise of finished requests | 1 |
    | 18 | `iteration_time`: seconds of the last iteration | 0.05 |
    | 19 | `elapsed`: seconds since the episode began | 10 time scales |

    | slot | | b |
    | --: | :-- | :-- |
    | 0 | `present`: 1 if there is a request | 1 |
    | 1 | `prefill_left`: tokens left of its prefill | 512 |
    | 2 | `context`: its tokens in the KV cache | 1024 |
    | 3 | `generated`: tokens of its answer so far | 256 |
    | 4 | `expected_left`: tokens of its answer still expected, as `length_info` allows; 0: unknown | 256 |
    | 5 | `age`: seconds since it arrived | time scale |
    | 6 | `slack`: seconds until its next token is due, below 0 if it is late; 1: no target | time scale |
    | 7 | `class`: number of its class | 1 |
    | 8 | `preemptions`: how often it was preempted | 1 |
    | 9 | `refill`: seconds to compute its KVs anew | 0.1 time scales |
    | 10 | `granted`: tokens in the plan | share of the token budget |
    | 11 | `blocks`: KV blocks that it holds | share of all |

    The time scale is what a request of mean size takes when it is alone. Of an answer's length no more is
    visible, before it ends, than `length_info` says.

    ## Rewards

    With `objective="latency"` the reward is minus the requests in the system, integrated over the time that
    the step takes and scaled: by Little's law the rewards of an episode add up to minus the sum of all
    latencies, in time scales, by the number of requests. Other objectives, and weighted sums, are in
    `llmsched_env.envs.objective`, each with what it adds up to. Steps that take no time bring 0, except
    through fairness. The first step of an episode also brings what came before its decision.

    Steps take unequal times, `info["dt"]` in seconds. With a `discount_rate` (1/s), rewards are discounted
    within a step, and an agent that discounts by exp(-rate dt) from step to step solves the semi-Markov
    problem.

    When an episode ends, `info["metrics"]` has its raw figures: mean latency, goodput, throughput and so on
    (`Fleet.metrics`), and a `score` from 0 to 1 that tells how near the mean latency is to that of requests
    which each have an engine of their own. Where a reference is known of the episode (`info["reference"]`: of
    `toy`, and of some seeds of other scenarios), `normalised_score` is 0 for vLLM V1 and 1 for the best known
    schedule.

    ## Starting state

    An idle engine at time 0, and requests drawn anew from the scenario by a seed that `np_random` gives,
    `episode_seed`. `reset(options=...)` takes `scenario` and any of its settings (such as `load`,
    `num_requests`, `kv_blocks`), which hold from then on, and for one episode `seed`, to see it again, or
    `requests`, a `Requests` of one's own.

    ## Episode end

    Termination: all requests are served. Truncation: the scenario's `horizon_s` is reached (an endless stream
    is cut there), or `max_steps` are taken. Where the scenario has no horizon, it is ten times what the
    requests would take one after the other, from the last arrival on: whatever the policy, episodes end.

    `max_episode_steps` of `gymnasium.make` cuts as well, but from outside (Gymnasium's `TimeLimit`), so that
    the last info is as any other, without `metrics`; with `make_vec` it is the same as `max_steps`.

    ## Arguments

    ```python
    import gymnasium as gym

    env = gym.make("llmsched_env:llmsched/Decision-v0", scenario="azure-conv", load=1.2, running_slots=32)
    ```

    | Argument | Default | |
    | :-- | :-- | :-- |
    | `scenario` | "azure-conv" | a name (`scenarios.names()`), a `Scenario`, or a YAML file |
    | any setting of a scenario | | `load`, `rate`, `num_requests`, `kv_blocks`, `profile`, `horizon_s`, ... |
    | `waiting_slots`, `running_slots` | 16, 16 | visible requests, up to 64 each |
    | `waiting_order` | "arrival" | which waiting requests are visible, in which order |
    | `running_order` | "newest" | likewise running ones |
    | `chunk_levels` | (128, 256, 512) | tokens of a chunk, beside all that fits |
    | `length_info` | "predicted" | what is known of lengths: "oracle", "predicted", "class", "none" |
    | `objective` | "latency" | a name, weights by name, or an `Objective` |
    | `observation` | "dict" | or "flat" |
    | `skip_forced` | True | whether states with a single legal action are passed through |
    | `work_conserving` | False | whether RUN is legal only when nobody else can be given tokens |
    | `preempt` | "free" | "forced": only if it has to be |
    | `readmit` | False | whether who is preempted may be admitted again in the same plan |
    | `idle` | False | whether RUN may wait for an arrival with nothing planned |
    | `hold` | "chunk" | what an admission reserves KV cache for; "forecast": what it must fit into |
    | `discount_rate` | 0.0 | 1/s |
    | `most_tokens` | None | of an iteration, where less than the engine's token budget; None: that |
    | `rate_window_s` | None | of the rates observed; None: 10 time scales |
    | `max_steps` | None | after which an episode is cut |
    | `render_mode` | None | "rgb_array", "human", "ansi" |
    | `record` | False | whether to keep the schedule, for `result()`, Gantt charts and traces |

    `Options` describes them in full. A misspelt one is an error with the nearest match.

    ## Vectorised environment

    `gym.make_vec("llmsched/Decision-v0", num_envs=256)` is a native one: all environments advance in one
    compiled call, each to the last bit as the scalar one with its seed. It takes the same arguments (except
    `render_mode` and `record`), and `autoreset_mode`, `num_threads`, `max_episode_steps` and `copy`; see
    `llmsched_env.envs.vector.SchedulingVectorEnv`.

    >>> import gymnasium as gym
    >>> import numpy as np
    >>> env = gym.make("llmsched/Decision-v0", scenario="toy")
    >>> observation, info = env.reset(seed=0)
    >>> over = False
    >>> while not over:  # the first request that could be admitted, or else RUN
    ...     legal = np.flatnonzero(info["action_mask"])
    ...     observation, reward, over, _, info = env.step(legal[legal > 0][0] if legal[-1] > 0 else 0)
    >>> info["metrics"]["finished"]
    6

    ## Version history

    * v0: first version

    ## References

    * G. Yu et al., Orca: a distributed serving system for Transformer-based generative models, OSDI 2022
    * W. Kwon et al., Efficient memory management for large language model serving with PagedAttention,
      SOSP 2023
    * A. Agrawal et al., Taming throughput-latency tradeoff in LLM inference with Sarathi-Serve, OSDI 2024
    * K. Kim et al., The effect of scheduling and preemption on the efficiency of LLM inference serving,
      arXiv 2411.07447
    """

    kind = DECISION

    def _say(self, waiting: NDArray[np.int32], running: NDArray[np.int32]) -> tuple[str, int | None]:
        action = int(self.fleet.bank.lane["last_action"][0])
        if action < 2:
            return ("RUN", "HOLD the decodes")[action], None
        levels = (*(f"{tokens} tokens" for tokens in self.options.chunk_levels), "all that fits")
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
    """The plan of an engine's next iteration in one step: what each visible request gets.

    ## Description

    The engine of `DecisionEnv`; but a step is a whole iteration, and its action says at once what becomes of
    each visible request. What does not fit together is resolved by a fixed rule, so that every action is a
    plan that can be run.

    ## Action space

    `MultiDiscrete([L + 2] * (W + R))`, one entry for each visible slot, the W waiting ones and then the R
    running ones, with L chunk levels, the last of which is all that fits:

    | Choice | Number | |
    | :-- | :-- | :-- |
    | SKIP | 0 | no tokens in this iteration |
    | RUN | 1 | a decode gets its token, a prefill or an admission all tokens that fit |
    | LEVEL l, for l < L - 1 | 2 + l | as RUN, with at most so many tokens |
    | PREEMPT | L + 1 | running slots only |

    Preemptions come first, then the running requests, then the admissions, in slot order; each gets what the
    token budget, the seats and the KV blocks then allow. Running requests beyond the visible ones go on as if
    they said RUN. A plan that would come out empty, though somebody could be served, is mended: see
    `llmsched_env.envs.batch`, which has the whole rule. An entry that is not legal counts as SKIP.

    `info["action_mask"]` is a tuple of int8 arrays, one for each entry, as `action_space.sample(mask=...)`
    takes it; `action_masks()` is the same in one bool array, one entry after the other.

    ## Observation space

    That of `DecisionEnv`. Nothing is planned when it is observed.

    ## Rewards

    Those of `DecisionEnv`.

    ## Starting state

    That of `DecisionEnv`.

    ## Episode end

    That of `DecisionEnv`.

    ## Arguments

    Those of `DecisionEnv`, without `readmit` and `work_conserving`. With `skip_forced`, iterations in which
    all can only decode, and all fit, are no steps.

    ## Vectorised environment

    `gym.make_vec("llmsched/Batch-v0", num_envs=256)` is a native one, as with `DecisionEnv`. Its masks lie
    flat, (num_envs, (W + R) (L + 2)).

    >>> import gymnasium as gym
    >>> env = gym.make("llmsched/Batch-v0", scenario="toy")
    >>> observation, info = env.reset(seed=0)
    >>> over = False
    >>> while not over:
    ...     *_, over, _, info = env.step([1] * 32)  # everybody runs who can
    >>> info["metrics"]["finished"]
    6

    ## Version history

    * v0: first version

    ## References

    Those of `DecisionEnv`.
    """

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
    """The settings of a scheduling routine, chosen anew for each iteration.

    ## Description

    The engine of `DecisionEnv`; but its plans are made by the one scheduling routine that the schedulers of
    real systems are settings of, and the agent chooses the settings. It decides among heuristics, so to
    speak: easy to learn, and easy to use in a real engine.

    ## Action space

    `MultiDiscrete([5, L, 4, 3, 4])`, with L chunk levels, the last of which is all:

    | Entry | Choices |
    | :-- | :-- |
    | order of the queue | 0 first come first served, 1 shortest predicted output first, |
    | | 2 least predicted KV area, 3 shortest prompt, 4 earliest deadline |
    | budget of tokens | l: the tokens of that chunk level; the last: the engine's token budget |
    | mixing | 0 running requests, then admissions; 1 prefills, and decodes if there are none; |
    | | 2 decodes, then prefills and admissions; 3 decodes, and prefills if there are none |
    | victim, if KV blocks run out | 0 the newest, 1 who has the fewest KVs, 2 the most |
    | reservation at admission | 0 the chunk, 1 all known tokens, 2 the predicted length, 3 the model length |

    Settings that need predictions are not legal without (`length_info="none"`). In place of an entry that is
    not legal stands the first that is. vLLM V1, SRF, Sarathi-Serve, Orca and others are constant actions, see
    `llmsched_env.envs.dispatch`.

    `info["action_mask"]` is a tuple of int8 arrays, one for each entry, as `action_space.sample(mask=...)`
    takes it; `action_masks()` is the same in one bool array, one entry after the other.

    ## Observation space

    That of `DecisionEnv`. Nothing is planned when it is observed, and waiting requests are in the order of
    the last action.

    ## Rewards

    Those of `DecisionEnv`.

    ## Starting state

    That of `DecisionEnv`.

    ## Episode end

    That of `DecisionEnv`.

    ## Arguments

    Those of `DecisionEnv`, without `waiting_order`, `hold`, `preempt`, `readmit`, `idle` and
    `work_conserving`. With `skip_forced`, iterations in which all settings give the same plan are no steps.

    ## Vectorised environment

    `gym.make_vec("llmsched/Dispatch-v0", num_envs=256)` is a native one, as with `DecisionEnv`. Its masks lie
    flat, (num_envs, L + 16).

    >>> import gymnasium as gym
    >>> env = gym.make("llmsched/Dispatch-v0", scenario="toy", length_info="oracle")
    >>> observation, info = env.reset(seed=0)
    >>> over = False
    >>> while not over:
    ...     *_, over, _, info = env.step([1, 3, 0, 0, 0])  # the shortest first, which is optimal here
    >>> info["metrics"]["latency_s"]
    20.0

    ## Version history

    * v0: first version

    ## References

    Those of `DecisionEnv`.
    """

    kind = DISPATCH

    def _say(self, waiting: NDArray[np.int32], running: NDArray[np.int32]) -> tuple[str, int | None]:
        levels = (*map(str, self.options.chunk_levels), "all")
        choices = (tuple(Queue), levels, tuple(Mixing), VICTIMS, tuple(Reserve))
        taken = np.unravel_index(self.fleet.bank.lane["last_action"][0], [len(words) for words in choices])
        said = [words[i] for words, i in zip(choices, taken, strict=True)]
        parts = ("order", "budget", "mixing", "victim", "reserve")
        pairs = zip(parts, (str(getattr(word, "name", word)).lower() for word in said), strict=True)
        return ", ".join(f"{part} {word}" for part, word in pairs), None
