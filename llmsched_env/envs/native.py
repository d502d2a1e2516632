"""What the native vector environments share: generators and seeds, threads, autoreset."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from llmsched_env.envs.crew import Crew
from llmsched_env.envs.frame import DISABLED, NEXT_STEP, SAME_STEP
from llmsched_env.envs.options import whole
from llmsched_env.errors import InputError, unknown

AUTORESET = {
    AutoresetMode.NEXT_STEP: NEXT_STEP,
    AutoresetMode.SAME_STEP: SAME_STEP,
    AutoresetMode.DISABLED: DISABLED,
}


class NativeVectorEnv(VectorEnv[Any, Any, Any]):
    """Many environments advanced by one compiled call.

    - `num_envs`: how many.
    - `autoreset_mode`: an `AutoresetMode` or its name; "next-step" (the default), "same-step" or "disabled".
    - `num_threads`: threads that share a step.
    - `max_episode_steps`: as `max_steps`, by the name that Gymnasium has for it.
    - `copy`: whether `step` and `reset` return arrays of their own. If not, the next step writes over what
      they return, and nothing of the size of the environments is allocated in a step.

    Infos are arrays with a mask each: `action_mask` (num_envs, A) int8, `dt` float64, and where episodes have
    ended `metrics`, a dict of such arrays. "same-step" adds `final_obs` and `final_info`.

    Attributes:
        autoreset_mode: the `AutoresetMode`.
        episode_seeds: (num_envs,) int64: the seeds that the present episodes were drawn from; -1: they were
            given.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012
    _crew: Crew | None = None

    def __init__(
        self,
        num_envs: int,
        autoreset_mode: str | AutoresetMode,
        num_threads: int,
        max_episode_steps: int | None,
        copy: bool,
        render_mode: None,
    ) -> None:
        if render_mode is not None:
            raise InputError(f"render_mode={render_mode!r}: pictures are made by the scalar environment only")
        for name, value in (("num_envs", num_envs), ("num_threads", num_threads)):
            if not whole(value) or value < 1:
                raise InputError(f"{name} must be a whole number from 1, not {value!r}")
        if max_episode_steps is not None and not (
            whole(max_episode_steps) and (1 <= max_episode_steps < 2**63 or max_episode_steps == -1)
        ):
            raise InputError(f"max_episode_steps must be a whole number from 1, not {max_episode_steps!r}")
        self.num_envs = int(num_envs)
        self.autoreset_mode = _mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.copy = bool(copy)
        self._threads = int(num_threads)
        self._most_steps = max(0, max_episode_steps or 0)  # 0: no limit
        self._rngs: list[np.random.Generator | None] = [None] * self.num_envs
        self._rng_seeds: list[int | None] = [None] * self.num_envs
        self.episode_seeds: NDArray[np.int64] = np.full(self.num_envs, -1, np.int64)
        self._out = np.zeros((4, self.num_envs))
        self._flags: NDArray[np.bool_] = np.zeros((2, self.num_envs), np.bool_)
        self._all: NDArray[np.bool_] = np.ones(self.num_envs, np.bool_)
        self._begun = False

    @property
    @abc.abstractmethod
    def clocks(self) -> NDArray[np.float64]:
        """(num_envs,) what time it is in each episode, s; a view, or a copy."""

    @property
    @abc.abstractmethod
    def episodes_begun(self) -> NDArray[np.int64]:
        """(num_envs,) episodes that each environment has begun so far; a view, or a copy."""

    def _take_reset(
        self, seed: int | Sequence[int | None] | None, options: dict[str, Any] | None
    ) -> tuple[NDArray[np.bool_], list[tuple[np.random.Generator, int] | None], dict[str, Any]]:
        """What a reset asks for: (num_envs,) which environments, their new generators with the seeds of
        these, and the options that are left. Nothing has changed yet.
        """
        asked = dict(options or {})
        chosen = self._chosen(asked.pop("reset_mask", None))
        fresh = [None if one is None else np_random(one) for one in self._seeds(seed)]
        if not (self._begun or chosen.all()):
            raise gym.error.ResetNeeded("call reset without a reset_mask first")
        return chosen, fresh, asked

    def _spread(self, found: dict[str, NDArray[Any]], there: NDArray[np.bool_]) -> dict[str, Any]:
        """Values of some environments as infos have them: arrays of all, and whose they are."""
        infos: dict[str, Any] = {}
        for name, values in found.items():
            infos[name] = np.zeros(self.num_envs, values.dtype)
            infos[name][there] = values
            infos[f"_{name}"] = there
        return infos

    def _chosen(self, mask: Any) -> NDArray[np.bool_]:
        if mask is None:
            return self._all
        if not (
            isinstance(mask, np.ndarray)
            and mask.dtype == np.bool_
            and mask.shape == (self.num_envs,)
            and mask.any()
        ):
            raise InputError(f"reset_mask must be a bool array of shape ({self.num_envs},) with a True in it")
        return mask

    def _seeds(self, seed: Any) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if whole(seed):
            return [int(seed) + i for i in range(self.num_envs)]
        if not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str):
            raise InputError(f"seed must be a whole number, or one for each environment, not {seed!r}")
        if len(seed) != self.num_envs:
            raise InputError(f"give {self.num_envs} seeds, one for each environment, not {len(seed)}")
        for s in seed:
            if s is not None and not whole(s):
                raise InputError(f"seeds must be whole numbers or None, not {s!r}")
        return [None if s is None else int(s) for s in seed]

    def _helped(self, share: Callable[..., None], work: tuple[Any, ...]) -> Crew:
        """The threads that share a step, by the compiled function `share` (see `crew`) on `work`."""
        if self._crew is None:
            self._crew = Crew(self._threads - 1, share, self.num_envs, work)
        return self._crew

    def close_extras(self, **kwargs: Any) -> None:
        """Send the threads home."""
        if self._crew is not None:
            self._crew.stop()
            self._crew = None

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each environment."""
        return tuple(self._rng(i) for i in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each generator."""
        for i in range(self.num_envs):
            self._rng(i)
        return tuple(self._rng_seeds)  # type: ignore[arg-type]

    def _rng(self, i: int) -> np.random.Generator:
        rng = self._rngs[i]
        if rng is None:
            rng, self._rng_seeds[i] = np_random(None)
            self._rngs[i] = rng
        return rng

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_crew": None}  # threads are made anew when they are needed


def _mode(mode: str | AutoresetMode) -> AutoresetMode:
    """An autoreset mode by name: "next-step", "NEXT_STEP" and "NextStep" are the same."""
    if isinstance(mode, AutoresetMode):
        return mode
    names = {m.name.lower().replace("_", "-"): m for m in AutoresetMode}
    for name, found in names.items():
        if str(mode).lower().replace("_", "-") in (name, found.value.lower()):
            return found
    raise unknown("autoreset_mode", mode, names)


_WORD = 2**64


def words_of(rng: np.random.Generator) -> list[int]:
    """The state of a generator in words of 64 bits."""
    said: Any = rng.bit_generator.state
    state, increment = said["state"]["state"], said["state"]["inc"]
    return [
        *divmod(state, _WORD),
        *divmod(increment, _WORD),
        said["has_uint32"],
        said["uinteger"],
    ]


def generator_of(words: list[int]) -> np.random.Generator:
    """The generator in this state."""
    rng = np_random(0)[0]
    rng.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": words[0] * _WORD + words[1], "inc": words[2] * _WORD + words[3]},
        "has_uint32": words[4],
        "uinteger": words[5],
    }
    return rng
