"""The networks of agents: what is read from an observation, and how actions and a value come of it.

Both take the flat observation of the environments and return the logits of all actions, in the order of the
mask, and a value. A `Spec` describes one completely; `agents.agent` computes the same in NumPy.

- **pointer**: one small network reads every waiting request, another every running one; the means over the
  slots, with the features of the engine, make a context; and from the context and what was read of a
  request come the logits of the actions that concern it (admit, continue, preempt). The same weights serve
  every slot, so that what is learned of one request holds for all (DeepSets, Zaheer et al. 2017; pointing as
  in Vinyals et al. 2015).
- **attention**: the same, but requests first look at each other (one head, Vaswani et al. 2017).
- **mlp**: two hidden layers on all features, as Stable-Baselines3 has it; a control.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch import nn

from llmsched_env.envs.observation import NUM_GLOBAL, NUM_SLOT
from llmsched_env.errors import InputError, unknown

NETWORKS = ("pointer", "attention", "mlp")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network.

    Attributes:
        kind: "pointer", "attention" or "mlp".
        waiting, running: visible slots.
        actions: (general, per waiting slot, per running slot): how many logits there are of each kind.
        order: where the logits, general ones first, then slot by slot those waiting and those running, stand
            in the mask; empty: as they are.
        width: units of the context, and of the hidden layers of an mlp. slot_width: units for each request.
    """

    kind: str
    waiting: int
    running: int
    actions: tuple[int, int, int]
    order: tuple[int, ...] = ()
    width: int = 64
    slot_width: int = 32

    def __post_init__(self) -> None:
        if self.kind not in NETWORKS:
            raise unknown("network", self.kind, NETWORKS)
        for name in ("waiting", "running", "width", "slot_width"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise InputError(f"{name} must be a whole number from 1, not {getattr(self, name)!r}")

    @property
    def num_features(self) -> int:
        """Numbers of an observation."""
        return NUM_GLOBAL + NUM_SLOT * (self.waiting + self.running)

    @property
    def num_logits(self) -> int:
        """Actions, or choices of all entries of an action."""
        general, waiting, running = self.actions
        return general + waiting * self.waiting + running * self.running

    @staticmethod
    def of(env: Any, kind: str = "pointer", **sizes: Any) -> Spec:
        """The network for an environment, scalar or vector, with flat observations.

        Raises:
            InputError: observations that are not flat, or an unknown kind.
        """
        env = env.unwrapped
        options = env.options
        if options.observation != "flat":
            raise InputError('agents read flat observations; make the environment with observation="flat"')
        space = getattr(env, "single_action_space", env.action_space)
        waiting, running = options.waiting_slots, options.running_slots
        levels = len(options.chunk_levels) + 1
        if env.kind.name == "DECISION":  # RUN, HOLD, ADMIT, CHUNK, PREEMPT
            actions = (2, levels, levels + 1)
            admit = np.arange(2 + waiting * levels)
            chunk = admit.size + np.arange(running * levels).reshape(running, levels)
            preempt = admit.size + chunk.size + np.arange(running)[:, None]
            order = np.concatenate([admit, np.hstack([chunk, preempt]).ravel()])
            return Spec(kind, waiting, running, actions, tuple(map(int, order)), **sizes)
        if env.kind.name == "BATCH":  # choices of each slot
            return Spec(kind, waiting, running, (0, int(space.nvec[0]), int(space.nvec[-1])), **sizes)
        return Spec(kind, waiting, running, (int(space.nvec.sum()), 0, 0), **sizes)

    def positions(self) -> NDArray[np.int64]:
        """(A,) int64: which logit, as the network computes them, stands in each place of the mask."""
        order = np.array(self.order or range(self.num_logits), np.int64)
        return np.argsort(order)


def build(spec: Spec) -> nn.Module:
    """The network with fresh weights, from torch's generator."""
    return Mlp(spec) if spec.kind == "mlp" else Pointer(spec)


def _linear(inputs: int, outputs: int, gain: float, bias: bool = True) -> nn.Linear:
    """A layer whose weights begin orthogonal, as is usual with PPO (Andrychowicz et al. 2021)."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.orthogonal_(layer.weight, gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


_RELU, _TANH = math.sqrt(2.0), 5.0 / 3.0
_HEAD = 0.01  # of the logits: an untrained policy chooses nearly evenly


class Mlp(nn.Module):
    """Two hidden layers for the logits, and two for the value."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        width = spec.width
        self.policy1, self.policy2 = (_linear(n, width, _TANH) for n in (spec.num_features, width))
        self.value1, self.value2 = (_linear(n, width, _TANH) for n in (spec.num_features, width))
        self.logits = _linear(width, spec.num_logits, _HEAD)
        self.value = _linear(width, 1, 1.0)

    def forward(self, seen: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Logits (n, A) and values (n,) of observations (n, D); the logits are in the order of the mask."""
        chosen = th.tanh(self.policy2(th.tanh(self.policy1(seen))))
        worth = th.tanh(self.value2(th.tanh(self.value1(seen))))
        return self.logits(chosen), self.value(worth).squeeze(1)


class Pointer(nn.Module):
    """Shared networks over the slots, see above."""

    positions: th.Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        general, of_waiting, of_running = spec.actions
        slot, width = spec.slot_width, spec.width
        self.read_waiting, self.read_running = (_linear(NUM_SLOT, slot, _RELU) for _ in range(2))
        self.for_waiting, self.for_running = (_linear(NUM_GLOBAL, slot, 1.0, bias=False) for _ in range(2))
        if spec.kind == "attention":
            self.query, self.key = (_linear(slot, slot, 1.0, bias=False) for _ in range(2))
            self.look = _linear(slot, slot, 1.0)
        self.context1 = _linear(NUM_GLOBAL + 2 * slot, width, _RELU)
        self.context2 = _linear(width, width, _RELU)
        self.point_waiting, self.point_running = (_linear(slot, slot, _RELU) for _ in range(2))
        self.guide_waiting, self.guide_running = (_linear(width, slot, 1.0, bias=False) for _ in range(2))
        self.general = _linear(width, max(1, general), _HEAD)
        self.of_waiting = _linear(slot, max(1, of_waiting), _HEAD)
        self.of_running = _linear(slot, max(1, of_running), _HEAD)
        self.value1 = _linear(width, width, _RELU)
        self.value = _linear(width, 1, 1.0)
        self.register_buffer("positions", th.as_tensor(spec.positions()), persistent=False)

    def forward(self, seen: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Logits (n, A) and values (n,) of observations (n, D); the logits are in the order of the mask."""
        spec = self.spec
        engine = seen[:, :NUM_GLOBAL]
        slots = seen[:, NUM_GLOBAL:].view(len(seen), spec.waiting + spec.running, NUM_SLOT)
        waiting, running = slots[:, : spec.waiting], slots[:, spec.waiting :]
        read = [
            th.relu(own(rows) + shared(engine)[:, None]) * rows[:, :, :1]  # nothing where there is nobody
            for own, shared, rows in (
                (self.read_waiting, self.for_waiting, waiting),
                (self.read_running, self.for_running, running),
            )
        ]
        if spec.kind == "attention":
            read = self._look_around(read, slots[:, :, 0])
        context = th.cat([engine, *(rows.mean(1) for rows in read)], 1)
        context = th.relu(self.context2(th.relu(self.context1(context))))
        logits = [self.general(context)] if spec.actions[0] else []
        for rows, point, guide, out, count in (
            (read[0], self.point_waiting, self.guide_waiting, self.of_waiting, spec.actions[1]),
            (read[1], self.point_running, self.guide_running, self.of_running, spec.actions[2]),
        ):
            if count:
                logits.append(out(th.relu(point(rows) + guide(context)[:, None])).flatten(1))
        value = self.value(th.relu(self.value1(context))).squeeze(1)
        every = th.cat(logits, 1)
        return every[:, self.positions] if spec.order else every, value

    def _look_around(self, read: list[th.Tensor], present: th.Tensor) -> list[th.Tensor]:
        """What was read of each request, with what those that it looks at are like."""
        rows = th.cat(read, 1)
        likeness = self.query(rows) @ self.key(rows).transpose(1, 2) / math.sqrt(self.spec.slot_width)
        share = th.softmax(likeness - 1e9 * (1.0 - present[:, None, :]), 2)
        rows = (rows + th.relu(self.look(share @ rows))) * present[:, :, None]
        return [rows[:, : self.spec.waiting], rows[:, self.spec.waiting :]]
