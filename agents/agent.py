"""`Agent`: a learned policy as it is deployed, in NumPy alone.

An agent is a folder of two files that hold no code: `agent.json` says in which environment it acts, with
which network, and how it was made; `weights.npz` has the weights.

    agent = Agent.load("runs/slo/agent")
    actions = agent(observations, masks)  # (n, D) float32, (n, A) bool

PyTorch and Stable-Baselines3 are not needed for it; `agents.training` makes agents, and tests hold them
against the PyTorch networks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from llmsched_env.envs import IDS
from llmsched_env.envs.observation import NUM_GLOBAL, NUM_SLOT
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import writing

if TYPE_CHECKING:
    from agents.networks import Spec

FORMAT = 1
_FILES = ("agent.json", "weights.npz")
_ILLEGAL = np.float32(1e8)
Array = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Agent:
    """A policy with its weights.

    Attributes:
        name: for tables.
        env_id, env_options: the environment that it acts in, and the keywords it was trained with, without
            the scenario: what it sees and can do.
        entries: choices of each entry of an action; empty: actions are Discrete.
        scenario: that it was trained on. metric: that it was chosen by.
        network: the fields of the network's `Spec`.
        weights: float32 arrays by the names of the PyTorch network.
        about: how it was made: steps, seed, versions, scores.
    """

    name: str
    env_id: str
    env_options: dict[str, Any]
    entries: list[int]
    scenario: str
    metric: str
    network: dict[str, Any]
    weights: dict[str, Array] = dataclasses.field(repr=False)
    about: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        order = self.network.get("order") or ()
        object.__setattr__(self, "_positions", np.argsort(order) if len(order) else None)

    # ------------------------------------------------------------------ acting

    def __call__(self, seen: Array, masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The best legal actions, (n,) of Discrete actions, else (n, entries); seen (n, D), masks (n, A)."""
        logits, _ = self.forward(np.asarray(seen, np.float32))
        if np.shape(masks) != logits.shape:
            raise InputError(
                f"agent {self.name} has {logits.shape[1]} actions, and masks are of shape {np.shape(masks)}; "
                f"make the environment with {self.env_options}"
            )
        logits = np.where(np.asarray(masks, np.bool_), logits, -_ILLEGAL)
        if not self.entries:
            return logits.argmax(1)
        parts = np.split(logits, np.cumsum(self.entries)[:-1], axis=1)
        return np.stack([part.argmax(1) for part in parts], 1)

    def act(self, seen: Array, mask: NDArray[np.bool_]) -> int | NDArray[np.int64]:
        """The best legal action for one observation (D,) and its mask (A,)."""
        action = self(seen[None], mask[None])[0]
        return int(action) if np.ndim(action) == 0 else action

    def forward(self, seen: Array) -> tuple[Array, Array]:
        """Logits (n, A) in the order of the mask, and values (n,), of observations (n, D).

        Raises:
            InputError: observations of another length.
        """
        waiting, running = self.network["waiting"], self.network["running"]
        features = NUM_GLOBAL + NUM_SLOT * (waiting + running)
        if seen.ndim != 2 or seen.shape[1] != features:
            raise InputError(
                f"agent {self.name} reads flat observations of {features} numbers, not of shape "
                f"{seen.shape[1:]}; make the environment with {self.env_options}"
            )
        return self._mlp(seen) if self.network["kind"] == "mlp" else self._pointer(seen)

    def _linear(self, name: str, x: Array) -> Array:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _mlp(self, seen: Array) -> tuple[Array, Array]:
        chosen = np.tanh(self._linear("policy2", np.tanh(self._linear("policy1", seen))))
        worth = np.tanh(self._linear("value2", np.tanh(self._linear("value1", seen))))
        return self._linear("logits", chosen), self._linear("value", worth)[:, 0]

    def _pointer(self, seen: Array) -> tuple[Array, Array]:
        net = self.network
        general, of_waiting, of_running = net["actions"]
        engine = seen[:, :NUM_GLOBAL]
        slots = seen[:, NUM_GLOBAL:].reshape(len(seen), -1, NUM_SLOT)
        kinds = (
            ("waiting", slots[:, : net["waiting"]], of_waiting),
            ("running", slots[:, net["waiting"] :], of_running),
        )
        read = [
            _relu(self._linear(f"read_{kind}", rows) + self._linear(f"for_{kind}", engine)[:, None])
            * rows[:, :, :1]
            for kind, rows, _ in kinds
        ]
        if net["kind"] == "attention":
            read = self._look_around(read, slots[:, :, 0])
        context = np.concatenate([engine, *(rows.mean(1) for rows in read)], 1)
        context = _relu(self._linear("context2", _relu(self._linear("context1", context))))
        logits = [self._linear("general", context)] if general else []
        for (kind, _, count), rows in zip(kinds, read, strict=True):
            if count:
                guided = self._linear(f"point_{kind}", rows) + self._linear(f"guide_{kind}", context)[:, None]
                logits.append(self._linear(f"of_{kind}", _relu(guided)).reshape(len(seen), -1))
        every = np.concatenate(logits, 1)
        values = self._linear("value", _relu(self._linear("value1", context)))[:, 0]
        positions = self._positions  # type: ignore[attr-defined]
        return every if positions is None else every[:, positions], values

    def _look_around(self, read: list[Array], present: Array) -> list[Array]:
        rows = np.concatenate(read, 1)
        likeness = self._linear("query", rows) @ self._linear("key", rows).transpose(0, 2, 1)
        likeness = likeness / np.float32(math.sqrt(self.network["slot_width"]))
        likeness = likeness - np.float32(1e9) * (1 - present[:, None, :])
        share = np.exp(likeness - likeness.max(2, keepdims=True))
        share /= share.sum(2, keepdims=True)
        rows = (rows + _relu(self._linear("look", share @ rows))) * present[:, :, None]
        return [rows[:, : self.network["waiting"]], rows[:, self.network["waiting"] :]]

    def make(self, num_envs: int, scenario: Any = None, **keywords: Any) -> Any:
        """The vector environment that it acts in, for another scenario if one is given."""
        found = gym.make_vec(
            self.env_id,
            num_envs,
            vectorization_mode="vector_entry_point",
            scenario=self.scenario if scenario is None else scenario,
            **{**self.env_options, **keywords},
        )
        return found.unwrapped

    def untrained(self, seed: int = 0) -> Agent:
        """The same agent with fresh weights."""
        import torch as th

        from agents.networks import Spec, build

        with th.random.fork_rng():
            th.manual_seed(seed)
            fresh = weights_of(build(Spec(**self.network)))
        return dataclasses.replace(self, name=f"untrained-{self.name}", weights=fresh, about={})

    # ------------------------------------------------------------------ files

    @staticmethod
    def load(path: str | Path) -> Agent:
        """The agent in a folder, or the best one of a run's folder. Nothing in the files is executed.

        Raises:
            InputError: there is none, it is damaged, or it does not fit this version.
        """
        folder = Path(path)
        if folder.name == _FILES[0]:
            folder = folder.parent
        if not (folder / _FILES[0]).is_file() and (folder / "agent").is_dir():
            folder = folder / "agent"
        for name in _FILES:
            if not (folder / name).is_file():
                raise InputError(f"{path} is not an agent: there is no {name} in {folder}")
        try:
            said = json.loads((folder / _FILES[0]).read_text())
            # Opened here: numpy leaves a file that is damaged open.
            with open(folder / _FILES[1], "rb") as file, np.load(file, allow_pickle=False) as arrays:
                weights = {name: np.asarray(arrays[name], np.float32) for name in arrays.files}
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"agent {folder} cannot be read: {error}; take it from a copy") from None
        return Agent.of(said, weights, str(folder))

    @staticmethod
    def of(said: Mapping[str, Any], weights: dict[str, Array], where: str) -> Agent:
        """The agent that agent.json describes, everything checked.

        Raises:
            InputError: what does not fit, and where.
        """
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            had = said.get("format") if isinstance(said, dict) else type(said).__name__
            raise InputError(f"agent {where}: its format is {had!r}, and this version reads {FORMAT}")
        fields = {field.name for field in dataclasses.fields(Agent)} - {"weights"}
        missing = sorted(fields - set(said))
        if missing:
            raise InputError(f"agent {where}: agent.json lacks {', '.join(missing)}")
        if said["env_id"] not in IDS:  # other ids may name modules, which would be imported
            raise unknown(f"environment in agent {where}", said["env_id"], IDS)
        for name in ("env_options", "network", "about"):
            if not isinstance(said[name], dict):
                raise InputError(f"agent {where}: {name} in agent.json is {said[name]!r}")
        for name in ("scenario", "render_mode"):
            if name in said["env_options"]:
                raise InputError(f"agent {where}: env_options cannot have {name}")
        shapes = _shapes(said["network"], where)
        order = said["network"].get("order") or []
        if sorted(map(str, order)) != sorted(map(str, range(len(order)))):
            raise InputError(f"agent {where}: the order of its logits is not one")
        found = Agent(**{name: said[name] for name in fields}, weights=weights)
        for name, shape in shapes.items():
            if name not in weights or weights[name].shape != shape:
                has = weights[name].shape if name in weights else "nothing"
                raise InputError(f"agent {where}: weights.npz has {has} for {name}, not {shape}")
            if not np.isfinite(weights[name]).all():
                raise InputError(f"agent {where}: {name} in weights.npz is not finite; train it anew")
        return found

    def save(self, folder: str | Path) -> None:
        """Write the two files, weights first: whoever finds agent.json finds an agent.

        Raises:
            InputError: if they cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {folder}: {error.strerror or error}") from None
        with writing(folder / _FILES[1]) as path, open(path, "wb") as file:
            np.savez_compressed(file, **cast(Any, self.weights))
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["weights"]
        with writing(folder / _FILES[0]) as path:
            path.write_text(json.dumps({"format": FORMAT, **fields}, indent=1, sort_keys=True) + "\n")

    @staticmethod
    def pretrained(name: str) -> Agent:
        """An agent that ships with the package, see `pretrained_names`.

        Raises:
            InputError: an unknown name, with the nearest match.
        """
        if name not in pretrained_names():
            raise unknown("pretrained agent", name, pretrained_names())
        with resources.as_file(_SHIPPED / name) as folder:
            return Agent.load(folder)


_SHIPPED = resources.files("agents") / "pretrained"


def pretrained_names() -> list[str]:
    """The agents that ship with the package."""
    if not _SHIPPED.is_dir():
        return []
    return sorted(entry.name for entry in _SHIPPED.iterdir() if (entry / _FILES[0]).is_file())


def weights_of(network: Any) -> dict[str, Array]:
    """The weights of a PyTorch network as arrays."""
    return {name: value.detach().cpu().numpy().copy() for name, value in network.state_dict().items()}


def describe(spec: Spec) -> dict[str, Any]:
    """A network's `Spec` as agent.json has it."""
    said: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))
    return said


def _relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


def _shapes(net: dict[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """The weights that a network has: name -> shape."""
    try:
        general, of_waiting, of_running = map(int, net["actions"])
        slots, width, slot = net["waiting"] + net["running"], int(net["width"]), int(net["slot_width"])
        kind = net["kind"]
        logits = general + of_waiting * net["waiting"] + of_running * net["running"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"agent {where}: its network is not described as it should be: {error!r}") from None
    layers: dict[str, tuple[int, int, bool]] = {}  # name -> outputs, inputs, whether it has a bias
    if kind == "mlp":
        features = NUM_GLOBAL + NUM_SLOT * slots
        for tower in ("policy", "value"):
            layers[f"{tower}1"], layers[f"{tower}2"] = (width, features, True), (width, width, True)
        layers["logits"] = (logits, width, True)
    elif kind in ("pointer", "attention"):
        for of, count in (("waiting", of_waiting), ("running", of_running)):
            layers[f"read_{of}"], layers[f"for_{of}"] = (slot, NUM_SLOT, True), (slot, NUM_GLOBAL, False)
            layers[f"point_{of}"], layers[f"guide_{of}"] = (slot, slot, True), (slot, width, False)
            layers[f"of_{of}"] = (max(1, count), slot, True)
        if kind == "attention":
            layers["query"] = layers["key"] = (slot, slot, False)
            layers["look"] = (slot, slot, True)
        layers["context1"], layers["context2"] = (width, NUM_GLOBAL + 2 * slot, True), (width, width, True)
        layers["general"], layers["value1"] = (max(1, general), width, True), (width, width, True)
    else:
        raise unknown(f"network in agent {where}", kind, ("pointer", "attention", "mlp"))
    layers["value"] = (1, width, True)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs, bias) in layers.items():
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)
    return shapes
