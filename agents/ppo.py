"""`SchedulingPPO`: MaskablePPO for decisions that take time, on requests that come as they come.

Three things are unlike MaskablePPO, each an option:

- **Time.** Steps of these environments take from no time at all (ADMIT) to seconds (RUN). So rewards are
  discounted by `exp(-discount_rate * dt)`, the time that passed, not by steps (a semi-Markov decision
  process, Bradtke and Duff 1994); and the trace of generalised advantage estimation fades only in steps in
  which time passes, so that the decisions that make one plan share what comes of it.
- **Luck.** Which requests arrive matters more to the return than what is decided. Lanes of one group are
  given the same requests, and from the advantage of a decision is taken the mean of what the other lanes of
  its group had at that time of that episode: an input-dependent baseline (Mao et al. 2019), leaving one out.
- **Scale.** Rewards can be divided, episode by episode, by what a reference policy gets on the same requests.

Without masks (`use_masks=False`) it is PPO, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer

from agents.sb3 import SB3VecEnv
from llmsched_env.errors import InputError


@numba.njit(cache=True)
def estimate(  # type: ignore[no-untyped-def]
    rewards, values, starts, last_values, last_starts, dt, rate: float, fade: float, advantages
) -> None:
    """Generalised advantage estimation where steps take time; all (T, n) but `last_*`, (n,).

    A step of `dt` seconds discounts what follows by exp(-rate * dt), and the estimate's trace by `fade` if it
    takes any time at all. `starts` tells which steps begin an episode.
    """
    steps, lanes = rewards.shape
    for i in range(lanes):
        trace = 0.0
        after, begins = last_values[i], last_starts[i]
        for t in range(steps - 1, -1, -1):
            goes_on = 0.0 if begins else 1.0
            discount = goes_on * np.exp(-rate * dt[t, i])
            error = rewards[t, i] + discount * after - values[t, i]
            trace = error + discount * (fade if dt[t, i] > 0.0 else 1.0) * trace
            advantages[t, i] = trace
            after, begins = values[t, i], starts[t, i] > 0.5


@numba.njit(cache=True)
def leave_one_out(advantages, episodes, clocks, group: int, out) -> None:  # type: ignore[no-untyped-def]
    """Advantages (T, n) less the mean of what the other lanes of the group had last, at that time (s) of the
    same episode. Who is alone in it keeps what it has.
    """
    steps, lanes = advantages.shape
    for first in range(0, lanes, group):
        for i in range(first, min(first + group, lanes)):
            for t in range(steps):
                out[t, i] = 0.0
        for i in range(first, min(first + group, lanes)):
            counts = np.zeros(steps, np.int64)
            for j in range(first, min(first + group, lanes)):
                if j == i:
                    continue
                at = 0
                for t in range(steps):
                    episode, clock = episodes[t, i], clocks[t, i]
                    while at + 1 < steps and (
                        episodes[at + 1, j] < episode
                        or (episodes[at + 1, j] == episode and clocks[at + 1, j] <= clock)
                    ):
                        at += 1
                    if episodes[at, j] == episode and clocks[at, j] <= clock:
                        out[t, i] += advantages[at, j]
                        counts[t] += 1
            for t in range(steps):
                mean = out[t, i] / counts[t] if counts[t] > 0 else 0.0
                out[t, i] = advantages[t, i] - mean


class Rollouts(MaskableRolloutBuffer):
    """sb3-contrib's buffer, with the time that steps take and the episodes they are of.

    Attributes:
        dt, clocks: (T, n) float64, s: that a step takes, and at which it is taken.
        episodes: (T, n) int64: which episode of its lane a step is of.
    """

    def __init__(self, *args: Any, discount_rate: float = 0.0, group: int = 1, **keywords: Any) -> None:
        self.discount_rate, self.group = discount_rate, group
        super().__init__(*args, **keywords)

    def reset(self) -> None:
        shape = (self.buffer_size, self.n_envs)
        self.dt, self.clocks = np.zeros(shape), np.zeros(shape)
        self.episodes = np.zeros(shape, np.int64)
        super().reset()

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: NDArray[np.bool_]) -> None:
        estimate(
            self.rewards,
            self.values,
            self.episode_starts,
            last_values.numpy().ravel(),
            dones.astype(np.bool_),
            self.dt,
            self.discount_rate,
            self.gae_lambda,
            self.advantages,
        )
        self.returns = self.advantages + self.values
        if self.group > 1:
            own = self.advantages.copy()
            leave_one_out(own, self.episodes, self.clocks, self.group, self.advantages)


class SchedulingPPO(MaskablePPO):
    """MaskablePPO for `SB3VecEnv`s of this package, see above.

    Attributes:
        scale: a function of episode seeds, (k,) int64, that returns by what the rewards of these episodes are
            divided, (k,) float64; None: by nothing.
        finished: metrics of the episodes that have ended since this was last cleared: name -> numbers.
        shares: how often each action was taken since; (A,) of Discrete actions, else of the choices of all
            entries.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        discount_rate: float = 0.0,
        group: int = 1,
        use_masks: bool = True,
        scale: Callable[[NDArray[np.int64]], NDArray[np.float64]] | None = None,
        **keywords: Any,
    ) -> None:
        """
        Args:
            policy, env: as for MaskablePPO; an `SB3VecEnv` with flat observations.
            discount_rate: 1/s, as the environment's option of that name, which this should equal.
            group: so many lanes, one after the other, share their requests and are each other's baseline;
                they have to be reset with the same seed.
            use_masks: whether illegal actions are kept from being chosen.
            scale: see the class.
            keywords: those of MaskablePPO; `gae_lambda` counts steps in which time passes.

        Raises:
            InputError: an environment of another kind, or lanes that do not make whole groups.
        """
        if not isinstance(env, SB3VecEnv) or isinstance(env.observation_space, spaces.Dict):
            raise InputError('SchedulingPPO needs SB3VecEnv.make(..., observation="flat")')
        if env.num_envs % group:
            raise InputError(f"{env.num_envs} environments cannot be shared out in groups of {group}")
        self.discount_rate, self.group, self.use_masks, self.scale = discount_rate, group, use_masks, scale
        self.finished: dict[str, list[float]] = {}
        self.shares: NDArray[np.int64] = np.zeros(0, np.int64)
        self._first: NDArray[np.int64] = np.zeros(env.num_envs, np.int64)  # episodes begun before `begin`
        self._scales: NDArray[np.float64] = np.ones(env.num_envs)
        super().__init__(
            policy,
            env,
            rollout_buffer_class=Rollouts,
            rollout_buffer_kwargs={"discount_rate": discount_rate, "group": group},
            gamma=1.0,
            **{"device": "cpu", **keywords},
        )

    def begin(self, seeds: Any, options: dict[str, Any] | None = None) -> None:
        """Begin an episode in all lanes, with these seeds, one for each group, and options of a reset."""
        env = self.env
        assert isinstance(env, SB3VecEnv)
        env.set_options(options or {})
        env._seeds = [int(seed) for seed in seeds for _ in range(self.group)]
        self._last_obs = env.reset()
        self._last_episode_starts = np.ones(env.num_envs, np.bool_)
        venv: Any = env.venv.unwrapped
        self._first = venv.episodes_begun.copy()
        self._rescale(np.ones(env.num_envs, np.bool_))

    def stagger(self, steps: int, rng: np.random.Generator) -> None:
        """Let the policy play so many steps, each lane beginning anew at a random one of them: episodes are
        long, and else all lanes would be at their beginnings at the same time."""
        env: Any = self.env
        venv = env.venv.unwrapped
        at = rng.integers(steps, size=env.num_envs)
        seen = self._last_obs
        for t in range(steps):
            masks = env.action_masks() if self.use_masks else None
            with th.no_grad():
                actions, _, _ = self.policy(th.as_tensor(seen), action_masks=masks)
            seen = env.step(actions.numpy())[0]
            now = at == t
            if now.any():
                seen = np.array(venv.reset(options={"reset_mask": now})[0])
        self._last_obs = seen
        self._last_episode_starts = np.zeros(env.num_envs, np.bool_)
        self._rescale(np.ones(env.num_envs, np.bool_))

    def go_on(self, seen: Any, lanes: Mapping[str, NDArray[Any]]) -> None:
        """Go on in the middle of episodes: what is seen, and `scales` and `starts` as they were."""
        self._last_obs = seen.copy()
        self._last_episode_starts = np.asarray(lanes["starts"], np.bool_)
        self._scales = np.array(lanes["scales"], np.float64)

    def _rescale(self, begun: NDArray[np.bool_]) -> None:
        if self.scale is not None:
            venv: Any = self.env.venv.unwrapped  # type: ignore[union-attr]
            self._scales[begun] = self.scale(venv.episode_seeds[begun])

    def collect_rollouts(
        self, env: Any, callback: Any, rollout_buffer: Any, n_rollout_steps: int, use_masking: bool = True
    ) -> bool:
        """Fill the buffer; as MaskablePPO does, and what time it was."""
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        discrete = isinstance(self.action_space, spaces.Discrete)
        venv = env.venv.unwrapped
        if len(self.shares) != rollout_buffer.mask_dims:
            self.shares = np.zeros(rollout_buffer.mask_dims, np.int64)
        offsets = 0 if discrete else np.cumsum([0, *self.action_space.nvec[:-1]])  # type: ignore[attr-defined]
        self._rescale(np.asarray(self._last_episode_starts, np.bool_))
        dones = self._last_episode_starts
        for t in range(n_rollout_steps):
            masks = env.action_masks() if use_masking and self.use_masks else None
            with th.no_grad():
                actions, values, log_probs = self.policy(th.as_tensor(self._last_obs), action_masks=masks)
            chosen = actions.numpy()
            if masks is not None:
                masks = masks.copy()  # the step writes over them
            rollout_buffer.clocks[t] = venv.clocks
            rollout_buffer.episodes[t] = venv.episodes_begun - self._first
            seen, rewards, dones, infos = env.step(chosen)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self.shares += np.bincount((chosen + offsets).ravel(), minlength=len(self.shares))
            rollout_buffer.dt[t] = env.dt
            rewards = rewards / self._scales
            if dones.any():
                if self.ep_info_buffer is not None:  # within `learn`
                    self._update_info_buffer(infos, dones)
                self._close(np.flatnonzero(dones), infos, rewards, env.dt)
                self._rescale(dones)
            rollout_buffer.add(
                self._last_obs,
                chosen[:, None] if discrete else chosen,
                rewards,
                self._last_episode_starts,
                values,
                log_probs,
                action_masks=masks,
            )
            self._last_obs, self._last_episode_starts = seen, dones
        with th.no_grad():
            values = self.policy.predict_values(th.as_tensor(self._last_obs))
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=np.asarray(dones))
        callback.on_rollout_end()
        return True

    def _close(self, ended: Any, infos: list[dict[str, Any]], rewards: Any, dt: Any) -> None:
        """Keep the metrics of episodes, and add what would have come of those that were cut."""
        for i in ended:
            for name, value in infos[i].get("metrics", {}).items():
                self.finished.setdefault(name, []).append(value)
            if infos[i]["TimeLimit.truncated"]:
                last = th.as_tensor(infos[i]["terminal_observation"])[None]
                with th.no_grad():
                    after = float(self.policy.predict_values(last))
                rewards[i] += np.exp(-self.discount_rate * dt[i]) * after
