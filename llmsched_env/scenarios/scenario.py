"""`Scenario`, a scheduling problem as it is described, and `Problem`, the same with everything settled."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env import profiles
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.requests import Requests
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import writing
from llmsched_env.profiles import Profile
from llmsched_env.scenarios.reference import Reference
from llmsched_env.scheduling import Scheduler
from llmsched_env.simulation import resolve
from llmsched_env.theory.capacity import Capacity, capacity
from llmsched_env.workloads import Moments, Synthetic, Workload

_ANYBODY = Scheduler("scenario")  # engine settings of no system in particular
_SAMPLE = 4096  # requests, at least, whose mean lengths stand for those of a recipe that does not tell
# A change of these leaves the problem as it is.
_NAMING = {"name", "summary", "source", "optimum", "references"}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A named scheduling problem: which requests arrive at which engine.

    Attributes:
        name: for tables and `scenarios.get`.
        workload: the recipe of one episode: how many requests, and their rate, their load as a share of the
            engine's capacity, or all at once.
        profile: a cost profile or its name; it also says how many GPUs there are.
        engine: engine settings; what is None is as in `simulate` (KV capacity of the profile, a token budget
            of 2,048, 256 running requests).
        horizon_s: an episode is cut at this time, which makes it a window of an endless stream; inf: it ends
            when all requests are served (environments cut it where that would take for ever).
        summary, source: what it is, and the paper or trace behind it.
        optimum: mean latency in seconds of an optimal schedule, over the episodes, where it is known.
        references: what is known of the best schedules of some episodes, or of each.
    """

    name: str
    workload: Workload
    profile: str | Profile
    engine: EngineConfig = EngineConfig()  # noqa: RUF009  (frozen)
    horizon_s: float = math.inf
    summary: str = ""
    source: str = ""
    optimum: float | None = None
    references: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        for field, kinds in (
            ("name", str),
            ("workload", Workload),
            ("profile", (str, Profile)),
            ("engine", EngineConfig),
            ("summary", str),
            ("source", str),
            ("references", tuple),
        ):
            if not isinstance(getattr(self, field), kinds):
                raise InputError(f"scenario {self.name!r}: {field} cannot be {getattr(self, field)!r}")
        for reference in self.references:
            if not isinstance(reference, Reference):
                raise InputError(f"scenario {self.name!r}: {reference!r} is not a Reference")
        for field in ("horizon_s", "optimum"):
            value = getattr(self, field)
            if field == "optimum" and value is None:
                continue
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not (number and value > 0):
                raise InputError(f"scenario {self.name!r}: {field} must be positive seconds, not {value!r}")

    @property
    def num_requests(self) -> int:
        """Requests of an episode."""
        counted = getattr(self.workload, "num_requests", None)
        return int(counted) if counted is not None else len(self.workload.draw(1.0))

    def replace(self, **changes: Any) -> Scenario:
        """A copy with some settings changed.

        Args:
            changes: attributes of a scenario, engine settings such as `kv_blocks`, and options of the
                workload such as `load`, `rate`, `num_requests`, `arrivals` (`Workload.replace`). With the
                problem its `optimum` and `references` are forgotten, unless they are given anew.

        Raises:
            InputError: an unknown setting, with the nearest match, or a value that does not fit.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        engine = [field.name for field in dataclasses.fields(EngineConfig)]
        workload = changes.get("workload", self.workload)
        options = workload.options() if isinstance(workload, Workload) else ()
        for name in changes:
            if name not in (*fields, *engine, *options):
                raise unknown(f"setting of scenario {self.name}", name, [*fields, *engine, *options])
        own = {name: value for name, value in changes.items() if name in fields}
        for_engine = {name: value for name, value in changes.items() if name in engine}
        for_workload = {k: v for k, v in changes.items() if k not in own and k not in for_engine}
        if not _NAMING.issuperset(changes):
            own = {"optimum": None, "references": (), **own}
        if for_engine:
            own["engine"] = own.get("engine", self.engine).replace(**for_engine)
        if for_workload:
            own["workload"] = workload.replace(**for_workload)
        return dataclasses.replace(self, **own)

    def resolve(self) -> Problem:
        """Settle everything that episodes have in common.

        Raises:
            InputError: an unknown profile, settings that contradict each other, or requests that could never
                fit and cannot be cut.
        """
        profile = profiles.get(self.profile)
        engine = resolve(self.engine, _ANYBODY, profile)
        assert engine.kv_blocks is not None and engine.max_model_len is not None
        assert engine.token_budget is not None and engine.watermark is not None
        # Some systems keep the watermark free even of an only request, and a block for its next token.
        usable = engine.kv_blocks - int(engine.watermark * engine.kv_blocks) - 1
        workload = self.workload.fit(min(engine.max_model_len, usable * engine.block_size))
        token_budget = engine.token_budget
        if self.engine.max_model_len is None:
            engine = engine.replace(max_model_len=workload.longest())
        moments = workload.moments()
        limit = capacity(moments, profile.time, engine)
        episode = workload.draw(limit.rps, np.random.default_rng(0))
        class_means, num_clients = _classes(workload, limit.rps)
        return Problem(
            scenario=self,
            profile=profile,
            engine=engine,
            workload=workload,
            capacity=limit,
            rate_rps=workload.rate_rps(limit.rps),
            num_requests=len(episode),
            class_means=class_means,
            num_clients=num_clients,
            kv_bytes_per_token=profile.kv_bytes_per_token or 0.0,
            time_scale_s=_alone_s(moments, profile, token_budget),
        )

    def to_yaml(self) -> str:
        """The scenario as the text of a YAML file that `scenarios.load` reads.

        Raises:
            InputError: if it has parts that are code or data, such as a custom profile or a trace.
        """
        from llmsched_env.scenarios import form

        return form.write(self)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml()` to a file, whole or not at all."""
        text = self.to_yaml()
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A scenario with everything settled that its episodes have in common.

    Attributes:
        scenario: what it is made from; its horizon and its optimum hold.
        profile: the cost profile.
        engine: the engine settings, none of them None but `cpu_blocks`. Every request that can be drawn fits
            in the model length and, alone, in the KV cache.
        workload: the recipe, lengths cut to what fits. `simulate(workload, scheduler, profile, engine)`
            serves the episode of its own seed.
        capacity: what the engine could sustain.
        rate_rps: mean requests/s; inf where all arrive at once.
        num_requests: of each episode.
        class_means: float64 (K,), mean output tokens of the requests with `class_id` 0 .. K - 1; the mean of
            all where there is none with it.
        num_clients: one more than the largest `client`.
        kv_bytes_per_token: bytes of a token's KV cache; 0: unknown, swaps are free.
        time_scale_s: seconds that a request of mean size takes when it is alone, for normalising times.
    """

    scenario: Scenario
    profile: Profile
    engine: EngineConfig
    workload: Workload
    capacity: Capacity
    rate_rps: float
    num_requests: int
    class_means: NDArray[np.float64]
    num_clients: int
    kv_bytes_per_token: float
    time_scale_s: float

    def draw(self, rng: np.random.Generator) -> Requests:
        """The requests of one episode. Drawing k episodes with one generator gives the same k each time."""
        return self.workload.draw(self.capacity.rps, rng)

    def reference(self, episode_seed: int | None) -> Reference | None:
        """What is known of the episode whose requests are drawn with this seed; None: nothing, as of requests
        that are not drawn."""
        if episode_seed is None:
            return None
        return self._references.get(episode_seed) or self._references.get(None)

    @cached_property
    def _references(self) -> dict[int | None, Reference]:
        """By the seed of the episode; None: each."""
        rows = self.scenario.references
        return {None if r.seed is None else first_episode_seed(r.seed): r for r in rows}

    def first_episode(self, seed: int) -> Requests:
        """The requests of the first episode of an environment after `reset(seed=seed)`."""
        return self.draw(np.random.default_rng(first_episode_seed(seed)))


def first_episode_seed(seed: int) -> int:
    """The `episode_seed` of an environment after `reset(seed=seed)`."""
    return int(np.random.default_rng(seed).integers(2**63))


def _classes(workload: Workload, capacity_rps: float) -> tuple[NDArray[np.float64], int]:
    """Mean output tokens by class_id, and the number of clients."""
    if isinstance(workload, Synthetic):
        kinds = workload.classes
        means = np.full(1 + max(c.class_id for c in kinds), workload.moments().output)
        for i in range(len(means)):
            of_class = tuple(c for c in kinds if c.class_id == i)
            if sum(c.share for c in of_class) > 0:
                means[i] = dataclasses.replace(workload, classes=of_class).moments().output
        return means, 1 + max(c.client for c in kinds)
    rng = np.random.default_rng(0)
    drawn = [workload.draw(capacity_rps, rng)]
    drawn += [workload.draw(capacity_rps, rng) for _ in range(_SAMPLE // len(drawn[0]))]
    kind, output, client = (
        np.concatenate([getattr(r, name) for r in drawn]) for name in ("class_id", "output_tokens", "client")
    )
    means = np.full(1 + kind.max(), output.mean())
    for i in np.unique(kind):
        means[i] = output[kind == i].mean()
    return means, 1 + int(client.max())


def _alone_s(moments: Moments, profile: Profile, token_budget: int) -> float:
    """Seconds for a request of mean size alone: its prompt in chunks, a decode for each further token."""
    chunks = max(1.0, moments.prompt / token_budget)
    chunk = moments.prompt / chunks
    cached = 0.5 * (moments.prompt - chunk)
    prefill = chunks * profile.time(chunk, 1, moments.prefill_context / chunks, cached, 0, 0)
    decode = profile.time(0, 0, 0, 0, 1, moments.kv_held + 1)
    return float(prefill + max(0.0, moments.output - 1) * decode)
