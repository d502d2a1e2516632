"""The native vector environments: many environments advanced by one compiled call."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from llmsched_env import scenarios
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
from llmsched_env.envs.kinds import DT, REWARD, TERMINATED, Kind
from llmsched_env.envs.native import AUTORESET, NativeVectorEnv, generator_of, words_of
from llmsched_env.envs.options import split
from llmsched_env.envs.single import BatchEnv, DecisionEnv, DispatchEnv, SchedulingEnv
from llmsched_env.errors import InputError
from llmsched_env.scenarios import Problem, Scenario

# Options of a reset, beside the scenario's settings.
_EPISODE = ("scenario", "seed", "requests", "reference", "reset_mask")


class SchedulingVectorEnv(NativeVectorEnv):
    """Many environments of one kind, each as the scalar one with its seed, advanced together.

    Keywords are those of the scalar environment, and those of `NativeVectorEnv`.

    Infos are described there; where episodes begin or end, they have `reference`, if there is one. Where an
    action has several entries, the choices of one lie behind those of the other in `action_mask`; only a
    scalar environment's info has them as a tuple.

    Attributes:
        options, problem: as those of the scalar environment.
    """

    single: ClassVar[type[SchedulingEnv]]

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
        super().__init__(num_envs, autoreset_mode, num_threads, max_episode_steps, copy, render_mode)
        self.options, found = split(keywords, scenarios.get(scenario))
        self.single_observation_space = observation_space(self.options)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = self.kind.action_space(self.options)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        limits = (self.options.max_steps or 0, self._most_steps)
        self._max_steps = min((int(steps) for steps in limits if steps), default=0)
        self._next_seeds = np.full(self.num_envs, -1, np.int64)  # of the episodes that are drawn; -1: none
        self._actions = np.zeros((self.num_envs, *(self.single_action_space.shape or ())), np.int64)
        self.problem = found.resolve()
        self.fleet = self._fleet(self.problem)

    @property
    def kind(self) -> Kind:
        """The actions and the compiled code."""
        return self.single.kind

    def _fleet(self, problem: Problem) -> Fleet:
        """Memory for episodes of this problem."""
        return Fleet(
            self.kind, problem, self.options, self.num_envs, autoreset=AUTORESET[self.autoreset_mode]
        )

    @property
    def clocks(self) -> NDArray[np.float64]:
        clocks: NDArray[np.float64] = self.fleet.bank.s["clock"]
        return clocks

    @property
    def episodes_begun(self) -> NDArray[np.int64]:
        begun: NDArray[np.int64] = self.fleet.bank.lane["begun"]
        return begun

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
        chosen, fresh, asked = self._take_reset(seed, options)
        requests, episode_seed = take_episode(asked)
        reference = take_reference(asked)
        problem = take_problem(self.problem, asked, _EPISODE)
        if problem is not self.problem:
            if not chosen.all():
                raise InputError(
                    "the scenario can only be changed in all environments together; drop reset_mask"
                )
        fleet = self.fleet if problem is self.problem else self._fleet(problem)
        given = draw(problem, episode_seed) if episode_seed is not None else requests
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
            work = (fleet.bank.table, self._actions, out, self._max_steps)
            events = self._helped(self.kind.share, work).step()
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
        return self._spread(self.fleet.metrics(np.flatnonzero(ended)), ended)

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
        found["layout"] = self._layout()
        found["generators"] = np.array([words_of(self._rng(i)) for i in range(self.num_envs)], np.uint64)
        found["generator_seeds"] = np.array([-1 if s is None else s for s in self._rng_seeds], np.int64)
        return found

    def _state(self) -> dict[str, NDArray[Any]]:
        """The arrays that the future depends on."""
        parts = ((self.fleet.bank, _OF_BANK), (self.fleet, _OF_FLEET), (self, _OF_ENV))
        return {name: getattr(part, name) for part, names in parts for name in names}

    def _layout(self) -> NDArray[np.uint8]:
        """(32,) what tells one layout of the records from another of the same size."""
        layouts = {name: str(array.dtype.descr) for name, array in self._state().items()}
        return np.frombuffer(hashlib.sha256(repr(layouts).encode()).digest(), np.uint8).copy()

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> Any:
        """Go on from what `save_state` of an environment of the same problem, options and size gave; returns
        what is seen. Only shapes and layouts are checked: what the arrays hold is memory of compiled code, so
        load none from a stranger.

        Raises:
            InputError: if it is of another kind of environment, of another version of this one, or damaged;
                this one is as it was then.
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
        if not np.array_equal(state.get("layout", ()), self._layout()):
            raise InputError("the saved state is of another version of llmsched_env; begin anew")
        words, seeds = np.asarray(state.get("generators")), np.asarray(state.get("generator_seeds"))
        if words.shape != (self.num_envs, 6) or seeds.shape != (self.num_envs,):
            raise InputError("the saved state does not fit this environment: it lacks the generators")
        for name, array in here.items():
            array[...] = state[name]
        self._rngs = [generator_of(row) for row in words.tolist()]
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


# What the future depends on.
_OF_BANK = ("s", "lane", "req", "lists", "bits", "work", "pool", "brief", "observation", "final", "mask")
_OF_FLEET = ("alone", "alone_next")
_OF_ENV = ("episode_seeds", "_next_seeds", "_out", "_flags")


def _bytes(array: NDArray[Any]) -> NDArray[Any]:
    """Records as bytes, which any array file can hold; a view."""
    return array.view(np.uint8) if array.dtype.names else array


class DecisionVectorEnv(SchedulingVectorEnv):
    """`DecisionEnv`, many at a time; see `SchedulingVectorEnv`."""

    single = DecisionEnv


class BatchVectorEnv(SchedulingVectorEnv):
    """`BatchEnv`, many at a time; see `SchedulingVectorEnv`."""

    single = BatchEnv


class DispatchVectorEnv(SchedulingVectorEnv):
    """`DispatchEnv`, many at a time; see `SchedulingVectorEnv`."""

    single = DispatchEnv
