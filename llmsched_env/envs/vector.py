"""The native vector environments: many environments advanced by one compiled call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from llmsched_env import scenarios
from llmsched_env.envs.crew import Crew
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
from llmsched_env.envs.frame import DISABLED, NEXT_STEP, SAME_STEP
from llmsched_env.envs.kinds import DT, REWARD, TERMINATED, Kind
from llmsched_env.envs.options import split, whole
from llmsched_env.envs.single import BatchEnv, DecisionEnv, DispatchEnv, SchedulingEnv
from llmsched_env.errors import InputError, unknown
from llmsched_env.scenarios import Problem, Scenario

_MODES = {
    AutoresetMode.NEXT_STEP: NEXT_STEP,
    AutoresetMode.SAME_STEP: SAME_STEP,
    AutoresetMode.DISABLED: DISABLED,
}
# Options of a reset, beside the scenario's settings.
_EPISODE = ("scenario", "seed", "requests", "reference", "reset_mask")


class SchedulingVectorEnv(VectorEnv[Any, Any, Any]):
    """Many environments of one kind, each as the scalar one with its seed, advanced together.

    All keywords are those of the scalar environment; beside them:

    - `num_envs`: how many.
    - `autoreset_mode`: an `AutoresetMode` or its name; "next-step" (the default), "same-step" or "disabled".
    - `num_threads`: threads that share a step.
    - `max_episode_steps`: as `max_steps`, by the name that Gymnasium has for it.
    - `copy`: whether `step` and `reset` return arrays of their own. If not, the next step writes over what
      they return, and nothing of the size of the environments is allocated in a step.

    Infos are arrays with a mask each: `action_mask` (num_envs, A) int8, `dt` float64, and where episodes have
    ended `metrics`, a dict of such arrays; where they begin or end, `reference` likewise, if there is one.
    "same-step" adds `final_obs` and `final_info`. Where an action has several entries, the choices of one lie
    behind those of the other in `action_mask`; only a scalar environment's info has them as a tuple.

    Attributes:
        options, problem: as those of the scalar environment.
        autoreset_mode: the `AutoresetMode`.
        episode_seeds: (num_envs,) int64: the seeds that the present episodes' requests were drawn from; -1:
            they were given.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012
    single: ClassVar[type[SchedulingEnv]]
    _crew: Crew | None = None

    def __init__(
        self,
        num_envs: int = 1,
        scenario: str | Path | Scenario = "azure-conv",
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        num_threads: int = 1,
        max_episode_steps: int | None = None,
        copy: bool = True,
        render_mode: None = None,
        **keywords: Any,
    ) -> None:
        """The arguments are described with the class and that of the scalar environment.

        Raises:
            InputError: an unknown keyword or scenario, with the nearest match, or a value that does not fit.
        """
        if render_mode is not None:
            raise InputError(f"render_mode={render_mode!r}: pictures are made by the scalar environment only")
        for name, value in (("num_envs", num_envs), ("num_threads", num_threads)):
            if not whole(value) or value < 1:
                raise InputError(f"{name} must be a whole number from 1, not {value!r}")
        if max_episode_steps is not None and not (
            whole(max_episode_steps) and (1 <= max_episode_steps < 2**63 or max_episode_steps == -1)
        ):
            raise InputError(f"max_episode_steps must be a whole number from 1, not {max_episode_steps!r}")
        self.options, found = split(keywords, scenarios.get(scenario))
        self.num_envs = int(num_envs)
        self.autoreset_mode = _mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.copy = bool(copy)
        self.single_observation_space = observation_space(self.options)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = self.kind.action_space(self.options)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        limits = (self.options.max_steps or 0, max(0, max_episode_steps or 0))
        self._max_steps = min((int(steps) for steps in limits if steps), default=0)
        self._threads = int(num_threads)
        self._rngs: list[np.random.Generator | None] = [None] * self.num_envs
        self._rng_seeds: list[int | None] = [None] * self.num_envs
        self.episode_seeds = np.full(self.num_envs, -1, np.int64)
        self._next_seeds = np.full(self.num_envs, -1, np.int64)  # of the episodes that are drawn; -1: none
        self._actions = np.zeros((self.num_envs, *(self.single_action_space.shape or ())), np.int64)
        self._out = np.zeros((4, self.num_envs))
        self._flags = np.zeros((2, self.num_envs), np.bool_)
        self._all = np.ones(self.num_envs, np.bool_)
        self._begun = False
        self.problem = found.resolve()
        self.fleet = self._fleet(self.problem)

    @property
    def kind(self) -> Kind:
        """The actions and the compiled code."""
        return self.single.kind

    def _fleet(self, problem: Problem) -> Fleet:
        """Memory for episodes of this problem."""
        return Fleet(self.kind, problem, self.options, self.num_envs, autoreset=_MODES[self.autoreset_mode])

    # ------------------------------------------------------------------ episodes

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
            options: as for the scalar environment, and `reset_mask`. A scenario or one of its settings can
                only be changed in all environments together; `requests` need to be as many as an episode has.

        Raises:
            InputError: as the scalar environment's, and if seeds or mask do not fit the number of
            environments.
        """
        asked = dict(options or {})
        chosen = self._chosen(asked.pop("reset_mask", None))
        seeds = self._seeds(seed)
        requests, episode_seed = take_episode(asked)
        reference = take_reference(asked)
        problem = take_problem(self.problem, asked, _EPISODE)
        if problem is not self.problem:
            if not chosen.all():
                raise InputError(
                    "the scenario can only be changed in all environments together; drop reset_mask"
                )
        fleet = self.fleet if problem is self.problem else self._fleet(problem)
        if not (self._begun or chosen.all()):
            raise gym.error.ResetNeeded("call reset without a reset_mask first")
        given = draw(problem, episode_seed) if episode_seed is not None else requests
        fresh = [None if seed is None else np_random(seed) for seed in seeds]
        before = [*self._rngs], [*self._rng_seeds], self._next_seeds.copy()
        try:
            for i in np.flatnonzero(chosen):
                if (new := fresh[i]) is not None:
                    self._rngs[i], self._rng_seeds[i] = new
                    self._next_seeds[i] = -1
                if given is not None:
                    fleet.put(i, given, problem.reference(episode_seed))
                elif self._next_seeds[i] < 0 or not fleet.bank.lane["drawn"][i]:
                    self._draw(i, fleet, problem)
        except Exception:  # all goes on as if nobody had asked
            self._rngs, self._rng_seeds, self._next_seeds = before
            raise
        if fleet is not self.fleet:
            self.close_extras()
            self.problem, self.fleet = problem, fleet
        if reference is not None:
            fleet.next_references[chosen] = reference
        self._out[:, chosen] = 0.0
        self._flags[:, chosen] = False
        self._begun = True
        self.fleet.reset(chosen)
        if given is None:
            self.episode_seeds[chosen] = self._next_seeds[chosen]
            self._next_seeds[chosen] = -1
        else:
            self.episode_seeds[chosen] = -1 if episode_seed is None else episode_seed
        self._draw_ahead(chosen)
        self._out[DT, chosen] = self.fleet.bank.s["clock"][chosen]
        infos = self._infos(chosen.copy())
        return self._observation(), self._tell(infos, chosen)

    def _draw_ahead(self, chosen: NDArray[np.bool_]) -> None:
        """Draw the next episode of these environments."""
        for i in np.flatnonzero(chosen):
            self._draw(i, self.fleet, self.problem)

    def _draw(self, i: int, fleet: Fleet, problem: Problem) -> None:
        """Draw the next episode of environment i, from the seed that it has for it or a new one."""
        if self._next_seeds[i] < 0:
            self._next_seeds[i] = self._rng(i).integers(2**63)
        seed = int(self._next_seeds[i])
        fleet.put(i, draw(problem, seed), problem.reference(seed))

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
        fleet, out = self.fleet, self._out
        if self._threads == 1:
            events = fleet.step(self._actions, out, self._max_steps)
        else:
            events = self._helped().step()
        if events:
            infos = self._after()
        else:
            infos = self._infos(self._all)
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                self._flags[:] = False
        rewards, (terminated, truncated) = out[REWARD], self._flags
        if self.copy:
            rewards, terminated, truncated = rewards.copy(), terminated.copy(), truncated.copy()
        return self._observation(), rewards, terminated, truncated, infos

    def _helped(self) -> Crew:
        """The threads that share a step."""
        if self._crew is None:
            work = (self.fleet.bank.table, self._actions, self._out, self._max_steps)
            self._crew = Crew(self._threads - 1, self.kind.share, self.num_envs, work)
        return self._crew

    def close_extras(self, **kwargs: Any) -> None:
        """Send the threads home."""
        if self._crew is not None:
            self._crew.stop()
            self._crew = None

    def _after(self) -> dict[str, Any]:
        """See to the episodes that have ended or begun in this step; returns the infos."""
        fleet, out, bank = self.fleet, self._out, self.fleet.bank
        were: NDArray[np.bool_] = np.logical_or(*self._flags)
        np.not_equal(out[TERMINATED:], 0.0, out=self._flags)
        ended: NDArray[np.bool_] = np.logical_or(*self._flags)
        begun = bank.lane["was_reset"] != 0
        more: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.DISABLED:
            ended &= ~were
        if ended.any():
            more = self._tell({"metrics": self._metrics(ended), "_metrics": ended}, ended)
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            more = self._final(ended, begun, more) if more else {}
            out[TERMINATED:, ended] = 0.0  # what they do from here on is the next episode
            fleet.begun(begun)
            cut = ended & ~begun
            if cut.any():
                fleet.reset(cut)
            begun = ended
        elif begun.any():
            fleet.begun(begun)
        if begun.any():
            self.episode_seeds[begun] = self._next_seeds[begun]
            self._next_seeds[begun] = -1
            self._draw_ahead(begun)
            out[DT, begun] = bank.s["clock"][begun]
        if begun.any():
            more = self._tell(more, begun)
        return {**self._infos(self._all), **more}

    def _tell(self, infos: dict[str, Any], lanes: NDArray[np.bool_]) -> dict[str, Any]:
        """The infos with what is known of the best schedules of these environments' episodes."""
        for i in np.flatnonzero(lanes & (self.fleet.references != None)):  # noqa: E711  (of an array)
            infos = self._add_info(infos, {"reference": self.fleet.references[i].summary()}, i)
        return infos

    def _final(
        self, ended: NDArray[np.bool_], begun: NDArray[np.bool_], info: dict[str, Any]
    ) -> dict[str, Any]:
        """What was seen, and the infos there were, when these episodes ended."""
        bank = self.fleet.bank
        cut = ended & ~begun  # they have not begun anew yet
        bank.final[cut] = bank.observation[cut]
        mask = np.zeros_like(bank.mask)
        mask[ended] = 1
        final = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            final[i] = present(bank.final[i].copy(), self.options)
        dt = np.where(ended, self._out[DT], 0.0)
        info = {"action_mask": mask, "_action_mask": ended, "dt": dt, "_dt": ended, **info}
        return {"final_obs": final, "_final_obs": ended, "final_info": info, "_final_info": ended}

    def _metrics(self, ended: NDArray[np.bool_]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, values in self.fleet.metrics(np.flatnonzero(ended)).items():
            found[name] = np.zeros(self.num_envs, values.dtype)
            found[name][ended] = values
            found[f"_{name}"] = ended
        return found

    def _observation(self) -> Any:
        rows = self.fleet.bank.observation
        return present(rows.copy() if self.copy else rows, self.options)

    def _infos(self, there: NDArray[np.bool_]) -> dict[str, Any]:
        mask, dt = self.fleet.bank.mask, self._out[DT]
        if self.copy:
            mask, dt, there = mask.copy(), dt.copy(), there.copy()
        return {"action_mask": mask, "_action_mask": there, "dt": dt, "_dt": there}

    def save_state(self) -> dict[str, NDArray[Any]]:
        """All that the future depends on, as arrays by name; for `load_state` of another such environment.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if not self._begun:
            raise gym.error.ResetNeeded("call reset before save_state")
        found = {name: _bytes(array).copy() for name, array in self._state().items()}
        found["generators"] = np.array([_words(self._rng(i)) for i in range(self.num_envs)], np.uint64)
        found["generator_seeds"] = np.array([-1 if s is None else s for s in self._rng_seeds], np.int64)
        return found

    def _state(self) -> dict[str, NDArray[Any]]:
        """The arrays that the future depends on."""
        parts = ((self.fleet.bank, _OF_BANK), (self.fleet, _OF_FLEET), (self, _OF_ENV))
        return {name: getattr(part, name) for part, names in parts for name in names}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> Any:
        """Go on from what `save_state` of an environment of the same problem, options and size gave; returns
        what is seen.

        Raises:
            InputError: if it is of another kind of environment, or damaged; this one is as it was then.
        """
        here = {name: _bytes(array) for name, array in self._state().items()}
        for name, array in here.items():
            raw = state.get(name)
            if raw is None or raw.shape != array.shape or raw.dtype != array.dtype:
                has = "nothing" if raw is None else f"{raw.dtype} of shape {raw.shape}"
                raise InputError(
                    f"the saved state does not fit this environment: {name} is {has}, not {array.dtype} of "
                    f"shape {array.shape}"
                )
        words, seeds = np.asarray(state.get("generators")), np.asarray(state.get("generator_seeds"))
        if words.shape != (self.num_envs, 6) or seeds.shape != (self.num_envs,):
            raise InputError("the saved state does not fit this environment: it lacks the generators")
        for name, array in here.items():
            array[...] = state[name]
        self._rngs = [_generator(row) for row in words.tolist()]
        self._rng_seeds = [None if seed < 0 else seed for seed in seeds.tolist()]
        for seeds, known in (
            (self.episode_seeds, self.fleet.references),
            (self._next_seeds, self.fleet.next_references),
        ):
            for i, seed in enumerate(seeds.tolist()):
                known[i] = self.problem.reference(seed if seed >= 0 else None)
        self._begun = True
        return self._observation()

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, (num_envs, A) bool; all of an environment whose episode is over."""
        legal: NDArray[np.bool_] = self.fleet.bank.mask.view(np.bool_)
        return legal.copy() if self.copy else legal

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


# What the future depends on.
_OF_BANK = ("s", "lane", "req", "lists", "bits", "work", "pool", "brief", "observation", "final", "mask")
_OF_FLEET = ("alone", "alone_next")
_OF_ENV = ("episode_seeds", "_next_seeds", "_out", "_flags")


def _bytes(array: NDArray[Any]) -> NDArray[Any]:
    """Records as bytes, which any array file can hold; a view."""
    return array.view(np.uint8) if array.dtype.names else array


_WORD = 2**64


def _words(rng: np.random.Generator) -> list[int]:
    """The state of a generator in words of 64 bits."""
    said: Any = rng.bit_generator.state
    state, increment = said["state"]["state"], said["state"]["inc"]
    return [
        *divmod(state, _WORD),
        *divmod(increment, _WORD),
        said["has_uint32"],
        said["uinteger"],
    ]


def _generator(words: list[int]) -> np.random.Generator:
    """The generator in this state."""
    rng = np_random(0)[0]
    rng.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": words[0] * _WORD + words[1], "inc": words[2] * _WORD + words[3]},
        "has_uint32": words[4],
        "uinteger": words[5],
    }
    return rng


def _mode(mode: str | AutoresetMode) -> AutoresetMode:
    """An autoreset mode by name: "next-step", "NEXT_STEP" and "NextStep" are the same."""
    if isinstance(mode, AutoresetMode):
        return mode
    names = {m.name.lower().replace("_", "-"): m for m in AutoresetMode}
    for name, found in names.items():
        if str(mode).lower().replace("_", "-") in (name, found.value.lower()):
            return found
    raise unknown("autoreset_mode", mode, names)


class DecisionVectorEnv(SchedulingVectorEnv):
    """`DecisionEnv`, many at a time; see `SchedulingVectorEnv`."""

    single = DecisionEnv


class BatchVectorEnv(SchedulingVectorEnv):
    """`BatchEnv`, many at a time; see `SchedulingVectorEnv`."""

    single = BatchEnv


class DispatchVectorEnv(SchedulingVectorEnv):
    """`DispatchEnv`, many at a time; see `SchedulingVectorEnv`."""

    single = DispatchEnv
