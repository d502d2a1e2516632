"""Stable-Baselines3 on the native vector environments.

    from sb3_contrib import MaskablePPO
    from agents.sb3 import SB3VecEnv

    env = SB3VecEnv.make("llmsched/Decision-v0", num_envs=256, scenario="toy")
    model = MaskablePPO("MultiInputPolicy", env).learn(1_000_000)

Set `torch.set_num_threads(1)` for training on a few cores: networks of this size get slower with more.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from llmsched_env.errors import InputError

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import VecEnv
except ImportError:
    raise ImportError('agents.sb3 needs Stable-Baselines3; pip install "llmsched-env[train]"') from None

# Attributes of a vector environment of which each of its environments has one of its own.
_OF_EACH = ("episode_seeds", "np_random", "np_random_seed")
_OF_ONE = {"action_space": "single_action_space", "observation_space": "single_observation_space"}


class SB3VecEnv(VecEnv):
    """A Gymnasium vector environment, with autoreset in the same step, as Stable-Baselines3 wants it.

    Infos of rows whose episode has ended hold `terminal_observation`, `TimeLimit.truncated`, `episode` (`r`,
    `l`, `t` as SB3's Monitor has them, so that `rollout/ep_rew_mean` is logged) and `metrics`; all others are
    one and the same empty dict, which cannot be written to.

    Attributes:
        venv: the vector environment.
        monitor: as given.
        dt: (num_envs,) float64: seconds that passed in the last step; the next may write over it.
    """

    def __init__(self, venv: VectorEnv[Any, Any, Any], *, monitor: bool = True) -> None:
        """
        Args:
            venv: for example `gym.make_vec("llmsched/Decision-v0", 256, autoreset_mode="same-step")`; or see
                `make`.
            monitor: whether to keep statistics of episodes. A `VecMonitor` around this environment, which
                keeps its own, warns of it; tell them apart with False.

        Raises:
            InputError: if the environment does not reset in the same step.
        """
        mode = venv.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise InputError(
                "Stable-Baselines3 needs environments that begin anew in the step in which they end; make "
                f'it with autoreset_mode="same-step", not {getattr(mode, "value", mode)}'
            )
        self.venv = venv
        self.monitor = bool(monitor)
        super().__init__(venv.num_envs, venv.single_observation_space, venv.single_action_space)
        self.reset_infos = [_NOTHING] * self.num_envs
        self._nothing = [_NOTHING] * self.num_envs
        self._views = not getattr(venv.unwrapped, "copy", True)  # each step writes over the last
        self._actions: Any = None
        self.dt: NDArray[np.float64] = np.zeros(self.num_envs)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._start = time.time()

    @classmethod
    def make(cls, env_id: str, num_envs: int, *, monitor: bool = True, **keywords: Any) -> SB3VecEnv:
        """`num_envs` environments of an id such as "llmsched/Decision-v0"; keywords are those of the vector
        environment (`llmsched_env.envs.vector.SchedulingVectorEnv`).

        Raises:
            InputError: as the environment's.
        """
        import llmsched_env.envs  # noqa: F401  (registers the ids)

        options = {"autoreset_mode": "same-step", "copy": False, **keywords}
        return cls(
            gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **options),
            monitor=monitor,
        )

    # ------------------------------------------------------------------ episodes

    def reset(self) -> Any:
        """Begin an episode in all environments, with the seeds and options that were set; returns what is
        seen.

        Raises:
            InputError: if the environments were given different options.
        """
        options = self._options[0] if self._options else {}
        if any(other != options for other in self._options):
            raise InputError("all environments share their options; call set_options with one dict")
        seeds: Any = self._seeds if any(seed is not None for seed in self._seeds) else None
        seen, _ = self.venv.reset(seed=seeds, options=options or None)
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self._reset_seeds()
        self._reset_options()
        return self._own(seen)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Take the step; what it returns stays as it is."""
        seen, rewards, terminated, truncated, info = self.venv.step(self._actions)
        done: NDArray[np.bool_] = np.logical_or(terminated, truncated)
        if self.monitor:
            self._returns += rewards
            self._lengths += 1
        infos = self._nothing.copy()
        self.dt = info.get("dt", self.dt)
        if done.any():
            if "dt" in info.get("final_info", {}):
                self.dt = np.where(done, info["final_info"]["dt"], self.dt)
            self._end(done, terminated, info, infos)
        return self._own(seen), np.asarray(rewards).astype(np.float32), done, infos

    def _end(
        self,
        done: NDArray[np.bool_],
        terminated: NDArray[np.bool_],
        info: dict[str, Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Put into `infos` what is to be said of the episodes that have ended."""
        rows = np.flatnonzero(done).tolist()
        final, ended = info["final_obs"], terminated.tolist()
        metrics = info.get("final_info", {}).get("metrics", {})
        names = [name for name in metrics if not name.startswith("_")]
        columns = [metrics[name][done].tolist() for name in names]
        values = list(zip(*columns, strict=True)) or [()] * len(rows)
        passed = round(time.time() - self._start, 6)
        for i, of_row in zip(rows, values, strict=True):
            infos[i] = {"terminal_observation": final[i], "TimeLimit.truncated": not ended[i]}
            if names:
                infos[i]["metrics"] = dict(zip(names, of_row, strict=True))
            if self.monitor:
                total, length = round(float(self._returns[i]), 6), int(self._lengths[i])
                infos[i]["episode"] = {"r": total, "l": length, "t": passed}
        self._returns[done] = 0.0
        self._lengths[done] = 0

    def _own(self, seen: Any) -> Any:
        """Observations that the next step does not write over."""
        if not self._views:
            return seen
        if isinstance(seen, dict):
            return {name: part.copy() for name, part in seen.items()}
        return seen.copy()

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, (num_envs, A)."""
        masks: NDArray[np.bool_] = self.venv.unwrapped.action_masks()
        return masks

    # ------------------------------------------------------------------ what SB3 asks of the environments

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        """Call `action_masks`, whose rows come as one array: which is what makes MaskablePPO fast.

        Raises:
            AttributeError: for another method; the environments have none of their own.
        """
        if method_name != "action_masks":
            _no_method(method_name)
        masks = self.action_masks(*args, **kwargs)
        return masks if indices is None else masks[self._indices(indices)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the environments: that of the vector environment for each, or its part of it."""
        value = getattr(self.venv, _OF_ONE.get(attr_name, attr_name))
        chosen = self._indices(indices)
        return [value[i] for i in chosen] if attr_name in _OF_EACH else [value] * len(chosen)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment.

        Raises:
            InputError: if it is to be set for some of the environments only.
        """
        if len(self._indices(indices)) != self.num_envs:
            raise InputError(f"all environments share {attr_name}; set it without indices")
        setattr(self.venv.unwrapped, attr_name, value)

    def has_attr(self, attr_name: str) -> bool:
        """Whether the environments have such an attribute."""
        return hasattr(self.venv, _OF_ONE.get(attr_name, attr_name))

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """False, but that what SB3's Monitor does is done here, if `monitor`."""
        return [self.monitor and wrapper_class is Monitor] * len(self._indices(indices))

    def get_images(self) -> Sequence[Any]:
        """Refuse.

        Raises:
            InputError: always; the scalar environment makes pictures.
        """
        raise InputError(
            'pictures are made by the scalar environment only: gym.make(..., render_mode="rgb_array")'
        )

    @property
    def spec(self) -> Any:
        """The registered environment's."""
        return self.venv.spec

    def close(self) -> None:
        """Close the environments; again does nothing."""
        self.venv.close()

    def _indices(self, indices: int | Iterable[int] | None) -> list[int]:
        return [int(i) for i in self._get_indices(indices)]


class StopAfter(BaseCallback):
    """Stop training after some seconds, for `learn(..., callback=StopAfter(60))`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self._until = 0.0

    def _on_training_start(self) -> None:
        self._until = time.perf_counter() + self.seconds

    def _on_step(self) -> bool:
        return time.perf_counter() < self._until


class _Nothing(dict[str, Any]):
    """What there is to say of an episode that goes on; shared, so that nobody can add to it."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("infos of rows that go on are one shared dict; put a copy in its place to add to it")

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = __ior__ = _refuse

    def __copy__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return {}

    def __reduce__(self) -> Any:
        return dict, ()


_NOTHING: dict[str, Any] = _Nothing()


def _no_method(name: str) -> NoReturn:
    raise AttributeError(f"the environments are stepped together and have no method {name!r} each")
