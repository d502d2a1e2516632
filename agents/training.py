"""Training an agent: `train(config, folder)`, and `resume(folder)` after whatever ended it.

The training goes in segments. Each begins with fresh random numbers that depend only on the seed and on the
segment's number, and ends with a checkpoint that holds the network, its optimizer and the lanes: so a
training that was killed and resumed is, weight by weight, the one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import baselines
from agents.agent import Agent, describe, weights_of
from agents.comparison import METRICS
from agents.config import COSTS, Config
from agents.evaluation import MOST_STEPS, VALIDATION_SEED, evaluate
from agents.runs import Checkpoint, Run, versions
from agents.watching import play
from llmsched_env import scenarios, simulate
from llmsched_env.errors import InputError

try:
    import torch as th
    from stable_baselines3.common.callbacks import ConvertCallback
    from stable_baselines3.common.logger import Logger
    from torch.utils.tensorboard.writer import SummaryWriter

    from agents.imitation import Demonstrations, best_actions, demonstrate, imitate
    from agents.networks import Spec
    from agents.ppo import SchedulingPPO
    from agents.sb3 import SB3VecEnv
    from agents.sb3_policies import NetPolicy
except ImportError as error:
    raise ImportError(f'training needs "llmsched-env[train]" ({error})') from None

_SEEDS = 2**40  # reset seeds of training are above it, those of evaluation below
_ENTROPY, _PATIENCE = 1e-4, 10  # nats; updates in a row with less: nothing more will be learned
_PICTURES = 8  # of the schedule, over a training
_LOST = 2  # steps after which a student's episode is cut while it is taught, in the mean of its teacher's
# Decisions after which an episode of a validation is cut: who needs so many more than vLLM V1 is lost.
_LONG, _LONGER = 10_000, 20


class Diverged(RuntimeError):
    """A training went wrong: what happened, when, and which checkpoint is good."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How a training stands, after each update.

    Attributes:
        steps, total: decisions so far, and in all.
        rate: decisions a second. left_s: seconds left at that rate.
        metric: mean of the chosen metric over the episodes that ended in the update; nan: none did.
        validated: of the best agent so far on the validation episodes; nan: none yet.
        baseline: of vLLM V1 on these.
    """

    steps: int
    total: int
    rate: float
    left_s: float
    metric: float
    validated: float
    baseline: float


def train(
    config: Config,
    folder: str | Path,
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Train an agent.

    Args:
        config: what to train and how.
        folder: of the run, new; see `agents.runs`. The best agent is in its folder `agent`.
        progress: called after each update.
        stop: asked after each segment whether to end there; what is there can be resumed.

    Raises:
        InputError: a configuration that does not fit, or a folder that has a run or cannot be written.
        Diverged: numbers that are not finite, or a policy that has ceased to explore.
    """
    trainer = Trainer(config)  # which refuses what does not fit, before there is a folder
    return trainer.run(Run.create(folder, config), progress, stop)


def resume(
    folder: str | Path,
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Go on with the run in a folder, from its last checkpoint; arguments and errors as for `train`.

    A checkpoint holds the state of the environments, of which only the shapes are checked: go on with runs of
    your own only. Agents (`agents.agent`) are safe to load from anybody.
    """
    run = Run.open(folder)
    return Trainer(run.config).run(run, progress, stop)


class Trainer:
    """A model and its environments, as a configuration has them.

    Attributes:
        config: as given. env: the lanes. model: what is trained. spec: its network.
    """

    def __init__(self, config: Config) -> None:
        th.set_num_threads(1)  # networks of this size get slower with more
        self.config = config
        scenario = scenarios.get(config.scenario)
        options = dict(config.env_options)
        rate = 0.0
        if math.isfinite(config.horizon):
            from llmsched_env.envs.options import split

            rate = 1.0 / (config.horizon * split(options, scenario)[1].resolve().time_scale_s)
        self.options = {"observation": "flat", "objective": config.objective, **options}
        self.rate = rate
        self.env = SB3VecEnv.make(
            config.env,
            config.num_envs,
            scenario=config.scenario,
            num_threads=config.num_threads,
            discount_rate=rate,
            **self.options,
        )
        if config.teacher not in ("", "optimum"):
            baselines.expert(config.teacher, strict=False).bind(self.env.venv)  # refuses what does not fit
        self.spec = Spec.of(self.env.venv, config.network, width=config.width, slot_width=config.slot_width)
        self._seed(-1)
        self.model = SchedulingPPO(
            NetPolicy,
            self.env,
            discount_rate=rate,
            group=config.lanes_per_trace,
            use_masks=config.algo == "maskable-ppo",
            scale=self._scale if config.reward_scale == "trace" else None,
            learning_rate=self._learning_rate,
            n_steps=config.n_steps,
            batch_size=min(config.batch_size, config.rollout),
            n_epochs=config.epochs,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            ent_coef=config.entropy,
            vf_coef=config.value_weight,
            max_grad_norm=config.max_grad_norm,
            target_kl=config.target_kl or None,
            policy_kwargs={"spec": self.spec},
            device="cpu",
        )
        self.model.set_logger(Logger(None, []))
        self.policy: Any = self.model.policy
        self.lanes: Any = self.env.venv.unwrapped
        self._costs = config.metric in COSTS
        # Episodes that are windows of a stream are whole when they are cut.
        self._window = math.isfinite(self.lanes.problem.scenario.horizon_s)
        self._best = math.nan
        self._updates = self._collapsed = 0
        self._loaded: dict[str, Any] | None = None  # what the lanes were begun with last

    # ------------------------------------------------------------------ the course of it

    def run(
        self,
        run: Run,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Run:
        """From its last checkpoint, or the beginning, to the end."""
        with contextlib.closing(self.env), run.claimed():
            checkpoint = run.load()
            if checkpoint is not None:
                self._restore(checkpoint)
            steps = self.model.num_timesteps
            for table in ("metrics", "validation"):
                run.drop_rows(table, steps if checkpoint else -1)
            board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=steps + 1 if checkpoint else 0)
            with contextlib.closing(board):
                if checkpoint is None:
                    self._begin(run, board)
                while self._updates < self.config.updates:
                    self._segment(run, board, progress)
                    if stop is not None and stop():
                        break
        return run

    def _begin(self, run: Run, board: Any) -> None:
        """The warm start, and the first checkpoint."""
        config = self.config
        shown: Demonstrations | None = None
        longest = MOST_STEPS
        for turn in range(config.teacher_rounds + 1 if config.teacher else 0):
            seen = demonstrate(
                config.teacher,
                config.env,
                config.scenario,
                config.teacher_episodes,
                seed=_SEEDS + 2**20 * config.seed + turn * config.teacher_episodes,
                discount_rate=self.rate,
                scale=self.model.scale,
                student=best_actions(self.policy) if turn > 0 else None,
                share=0.5 if turn == 1 else 1.0,  # left alone at first it would soon be lost
                most_steps=longest,
                **self.options,
            )
            if shown is None:  # a student that is lost takes far longer, and all in the same place
                longest = _LOST * -(-len(seen.seen) // config.teacher_episodes)
            shown = seen if shown is None else shown + seen
            same = imitate(
                self.policy,
                shown,
                epochs=config.teacher_epochs,
                batch_size=min(config.batch_size, 1024),
                seed=config.seed + 2**20 * turn,
            )
            board.add_scalar("imitation/same_actions", same, turn)
        self._validate(run, board)
        run.save(self._checkpoint())

    def _segment(self, run: Run, board: Any, progress: Callable[[Progress], None] | None) -> None:
        """Some updates, a validation and a checkpoint."""
        config, model = self.config, self.model
        rng = self._seed(self._updates)
        load = self._load()
        if config.fresh or load != self._loaded:
            groups = config.num_envs // config.lanes_per_trace
            model.begin(_SEEDS + rng.integers(_SEEDS, size=groups), load)
            self._loaded = load
            if config.stagger and not config.fresh:
                model.stagger(config.stagger, rng)
        callback = ConvertCallback(None)
        callback.init_callback(model)
        for _ in range(min(config.segment, config.updates - self._updates)):
            start = time.perf_counter()
            model.finished.clear()
            model.shares[:] = 0
            model.collect_rollouts(self.env, callback, model.rollout_buffer, config.n_steps)
            collected = time.perf_counter()
            before = model.num_timesteps - config.rollout  # a rate of 0 would waste the last update
            model._update_current_progress_remaining(before, config.updates * config.rollout)
            model.train()
            self._updates += 1
            passed = time.perf_counter() - start
            row = self._row(passed, collected - start)
            run.write_row("metrics", row)
            for name, value in row.items():
                if name != "steps" and value != "":
                    board.add_scalar(name, value, model.num_timesteps)
            self._add_shares(board)
            if progress is not None:
                progress(self._progress(passed, row))
            self._check(run)
        self._validate(run, board)
        run.save(self._checkpoint())
        board.flush()

    def _seed(self, segment: int) -> np.random.Generator:
        """Make all random numbers from here on those of a segment."""
        sequence = np.random.SeedSequence([self.config.seed, segment + 1])
        of_torch, of_numpy = (int(x) for x in sequence.generate_state(2))
        th.manual_seed(of_torch)
        np.random.seed(of_numpy)  # noqa: NPY002  (Stable-Baselines3 shuffles with it)
        return np.random.default_rng(sequence)

    def _load(self) -> dict[str, Any]:
        """Options of the segment's episodes: the load that the curriculum has now."""
        share = self._updates / self.config.updates
        loads = [load for since, load in self.config.curriculum if since <= share]
        return {"load": loads[-1]} if loads else {}

    def _learning_rate(self, left: float) -> float:
        return self.config.learning_rate * (left if self.config.schedule == "linear" else 1.0)

    def _scale(self, seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean latencies of vLLM V1 in these episodes, in the scenario's time scale."""
        problem = self.lanes.problem
        return np.array([_vllm_latency(problem, int(seed)) / problem.time_scale_s for seed in seeds])

    # ------------------------------------------------------------------ what is seen of it

    def _row(self, passed: float, collecting: float) -> dict[str, Any]:
        model, config = self.model, self.config
        said = {
            name.removeprefix("train/"): float(value) for name, value in model.logger.name_to_value.items()
        }
        known = {name: [x for x in values if x == x] for name, values in model.finished.items()}
        finished = {name: float(np.mean(values)) if values else math.nan for name, values in known.items()}
        row: dict[str, Any] = {
            "steps": model.num_timesteps,
            "time/decisions_per_s": config.rollout / passed,
            "time/collecting_share": collecting / passed,
            "train/learning_rate": model.policy.optimizer.param_groups[0]["lr"],
            "train/entropy": -said["entropy_loss"],
        }
        for name in (
            "policy_gradient_loss",
            "value_loss",
            "approx_kl",
            "clip_fraction",
            "explained_variance",
        ):
            row[f"train/{name}"] = said[name]
        row["episodes/ended"] = len(model.finished.get("latency_s", ()))
        for name in _EPISODE:
            row[f"episodes/{name}"] = finished.get(name, "")
        return row

    def _add_shares(self, board: Any) -> None:
        """How often which action was taken."""
        shares = self.model.shares / max(1, self.config.rollout)
        for name, part in _kinds(self.spec, self.config.env).items():
            board.add_scalar(f"actions/{name}", float(shares[part].sum()), self.model.num_timesteps)

    def _progress(self, passed: float, row: dict[str, Any]) -> Progress:
        total = self.config.updates * self.config.rollout
        rate = self.config.rollout / passed
        metric = row.get(f"episodes/{self.config.metric}", "")
        return Progress(
            self.model.num_timesteps,
            total,
            rate,
            (total - self.model.num_timesteps) / rate,
            math.nan if metric == "" else float(metric),
            self._best,
            self._baseline,
        )

    def _validate(self, run: Run, board: Any) -> None:
        """Judge the policy on the validation episodes, and keep it if it is the best."""
        config = self.config
        agent = self._agent(run)
        found = evaluate(
            agent,
            config.env,
            num_episodes=config.validation_episodes,
            seed=VALIDATION_SEED,
            scenario=config.scenario,
            max_episode_steps=max(_LONG, _LONGER * int(self._vllm["decisions"].max())),
            **self.options,
        )
        value = float(found[config.metric].mean())
        served = float(found["finished"].mean()) / self.lanes.fleet.num_requests
        row: dict[str, Any] = {"steps": self.model.num_timesteps, "served": served}
        row |= {name: float(found[name].mean()) for name in _EPISODE}
        row |= {"vllm_v1": self._baseline, "gain": self._gain(value)}
        run.write_row("validation", row)
        for name, number in row.items():
            if name != "steps":
                board.add_scalar(f"validation/{name}", number, self.model.num_timesteps)
        # What most metrics say of episodes that were cut before all was served cannot be compared.
        counts = served == 1.0 or not METRICS[config.metric].whole or self._window
        better = math.isnan(self._best) or (value < self._best if self._costs else value > self._best)
        if counts and better:
            self._best = value
        if (counts and better) or math.isnan(self._best):  # in want of a better one
            agent.save(run.folder / "agent")
        self._picture(agent, board)

    def _gain(self, value: float) -> float:
        """Improvement over vLLM V1, as a share of what that has."""
        change = (value - self._baseline) / abs(self._baseline) if self._baseline else value
        return -change if self._costs else change

    @functools.cached_property
    def _vllm(self) -> dict[str, NDArray[Any]]:
        """The metrics of vLLM V1 on the validation episodes."""
        config = self.config
        own = {name: value for name, value in config.env_options.items() if name not in _ACTING}
        return evaluate(
            "vllm-v1",
            num_episodes=config.validation_episodes,
            seed=VALIDATION_SEED,
            scenario=config.scenario,
            objective=config.objective,
            **own,
        )

    @property
    def _baseline(self) -> float:
        """The metric of vLLM V1."""
        return float(self._vllm[self.config.metric].mean())

    def _picture(self, agent: Agent, board: Any) -> None:
        """The schedule of one episode, a few times over the training."""
        config = self.config
        every = max(config.segment, config.updates // _PICTURES)
        if self._updates % every >= config.segment and self._updates < config.updates:
            return
        frames, _ = play(agent, config.scenario, VALIDATION_SEED, lambda step: False)
        board.add_image("schedule", frames[-1], self.model.num_timesteps, dataformats="HWC")

    def _agent(self, run: Run) -> Agent:
        """The policy as it is now."""
        config = self.config
        nvec = getattr(self.env.action_space, "nvec", [])
        return Agent(
            name=run.folder.resolve().name,
            env_id=config.env,
            env_options={"observation": "flat", **config.to_dict()["env_options"]},
            entries=[int(n) for n in nvec],
            scenario=config.scenario,
            metric=config.metric,
            network=describe(self.spec),
            weights=weights_of(self.policy.net),
            about={
                "steps": self.model.num_timesteps,
                "seed": config.seed,
                "config": config.to_dict(),
                "versions": {
                    name: of for name, of in versions().items() if name not in ("command", "machine")
                },
            },
        )

    # ------------------------------------------------------------------ files

    def _checkpoint(self) -> Checkpoint:
        arrays: dict[str, NDArray[Any]] = {}
        for key, values in self.model.policy.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                arrays[f"{key}/{name}"] = np.asarray(value)
        state: dict[str, Any] = {
            "steps": self.model.num_timesteps,
            "updates": self._updates,
            "best": None if math.isnan(self._best) else self._best,
            "collapsed": self._collapsed,
        }
        going = self._loaded is not None and not self.config.fresh
        lanes = self.lanes.save_state() if going else {}
        if going:
            state["load"] = self._loaded
            lanes["scales"], lanes["starts"] = self.model._scales, self.model._last_episode_starts
        return Checkpoint(weights_of(self.policy.net), arrays, lanes, state)

    def _restore(self, checkpoint: Checkpoint) -> None:
        policy: Any = self.model.policy
        optimizer = policy.optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for key, value in checkpoint.optimizer.items():
            number, name = key.split("/")
            state.setdefault(int(number), {})[name] = th.as_tensor(value)
        try:
            policy.net.load_state_dict({name: th.as_tensor(x) for name, x in checkpoint.weights.items()})
            policy.optimizer.load_state_dict({"state": state, "param_groups": optimizer["param_groups"]})
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"the checkpoint does not fit the network of config.yaml: {' '.join(str(error).split())}"
            ) from None
        said = checkpoint.state
        if checkpoint.lanes:
            self._loaded = said["load"]
            self.model.begin([0] * self.config.num_envs, self._loaded)
            self.model.go_on(self.lanes.load_state(checkpoint.lanes), checkpoint.lanes)
        self.model.num_timesteps, self._updates = int(said["steps"]), int(said["updates"])
        self._best = math.nan if said["best"] is None else float(said["best"])
        self._collapsed = int(said["collapsed"])

    def _check(self, run: Run) -> None:
        """Stop a training that has gone wrong."""
        said = self.model.logger.name_to_value
        finite = math.isfinite(said["train/loss"]) and all(
            bool(th.isfinite(p).all()) for p in self.model.policy.parameters()
        )
        entropy = -said["train/entropy_loss"]
        self._collapsed = self._collapsed + 1 if entropy < _ENTROPY else 0
        if finite and self._collapsed < _PATIENCE:
            return
        last = run.checkpoints()
        what = (
            f"entropy has been below {_ENTROPY:g} nats for {_PATIENCE} updates: it tries nothing else any "
            "more; raise entropy or lower learning_rate if it should"
            if finite
            else "its loss or weights are not finite; lower learning_rate"
        )
        raise Diverged(
            f"training stopped at {self.model.num_timesteps:,} decisions: {what}. The last good checkpoint "
            f"is {last[-1] if last else 'none'}, the best agent {run.folder / 'agent'}"
        )


_EPISODE = [
    *("latency_s", "goodput", "ttft_s", "tpot_s", "throughput_tps", "gpu_s", "makespan_s", "fairness"),
    *("preemptions", "finished", "score", "return"),
]
# Options of the environment that say how an agent acts; vLLM V1 acts as it does.
_ACTING = {"waiting_slots", "running_slots", "waiting_order", "running_order", "chunk_levels", "skip_forced"}
_ACTING |= {
    "work_conserving",
    "preempt",
    "readmit",
    "idle",
    "hold",
    "rate_window_s",
    "max_steps",
    "most_tokens",
}


@functools.lru_cache(maxsize=65536)
def _vllm_latency(problem: Any, seed: int) -> float:
    """Mean latency (s) of vLLM V1 in the episode with this seed."""
    requests = problem.draw(np.random.default_rng(seed))
    run = simulate(requests, baselines.get("vllm-v1"), problem.profile, problem.engine)
    return float((run.finish_s - requests.arrival_s).mean())


def _kinds(spec: Spec, env_id: str) -> dict[str, NDArray[np.int64] | slice]:
    """The actions by what they are."""
    if not env_id.startswith("llmsched/Decision"):
        return {}
    levels = spec.actions[1]
    admit = 2 + spec.waiting * levels
    chunk = admit + spec.running * levels
    return {
        "run": slice(0, 1),
        "hold": slice(1, 2),
        "admit": slice(2, admit),
        "chunk": slice(admit, chunk),
        "preempt": slice(chunk, None),
    }
