"""`Instance`: a scheduling problem small enough to ask for its optimum, and the JSON it is kept in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsched_env import profiles, scenarios
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.cost import PARAMETERS
from llmsched_env.core.requests import Requests
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import writing
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import Scheduler
from llmsched_env.simulation import Result, resolve
from llmsched_env.theory.capacity import capacity
from llmsched_env.workloads import Workload

OBJECTIVES: dict[str, str] = {
    "total_latency": "sum over the requests of finish less arrival, seconds",
    "gpu_time": "seconds in which an iteration runs",
    "makespan": "second at which the last request finishes",
    "mean_ttft": "mean over the requests of first token less arrival, seconds",
    "slo_goodput": "requests that meet both of their targets, TTFT and TPOT; the more the better",
}
ALLOWANCES: dict[str, str] = {
    "chunk": "prompts may be cut into chunks of any size",
    "pause": "a decoding request may sit out an iteration and keep its KV cache",
    "preempt": "KV caches may be dropped, to be recomputed later (prompt and answer so far)",
    "idle": "the engine may wait although requests are there",
}
_KEYS = {
    "requests",
    "kv_tokens",
    "token_budget",
    "cost",
    "allow",
    "objective",
    "name",
    "block_size",
    "max_num_seqs",
    "ttft_target_s",
    "tpot_target_s",
}
_SLACK = 1e-9  # of a target, relative: sums of iteration times are rounded


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    """Requests, an engine, a cost model, and what a schedule may do. Build with `of`, `load`, `from_json` or
    `of_scenario`, which validate.

    The engine is the simulator's. Each iteration gives requests tokens: one to a request that decodes, a
    chunk to one that prefills (without "chunk" the whole of it). A request with g tokens of its answer out
    holds I + g tokens of KV cache after its next iteration and reads I + g in it; its cache is freed when its
    last token is out. Prefills and decodes may always share an iteration. Without "pause" every request that
    decodes gets its token in every iteration. Without "idle" an iteration starts whenever a request is there;
    it has to give some tokens, but it may leave requests waiting.

    Attributes:
        requests: N of them, in order of arrival.
        engine: every limit that holds: kv_blocks, block_size, token_budget, max_num_seqs, max_model_len.
        profile: the cost model.
        allow: of `ALLOWANCES`.
        objective: of `OBJECTIVES`.
        name: for tables.
    """

    requests: Requests
    engine: EngineConfig
    profile: Profile
    allow: frozenset[str] = frozenset()
    objective: str = "total_latency"
    name: str = ""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        for what in self.allow:
            if what not in ALLOWANCES:
                raise unknown("allowance", what, ALLOWANCES)
        if (
            self.objective == "slo_goodput"
            and not (
                np.isfinite(self.requests.ttft_target_s) | np.isfinite(self.requests.tpot_target_s)
            ).any()
        ):
            raise InputError(
                f"{self._called()}: objective slo_goodput needs targets; give ttft_target_s or tpot_target_s"
            )
        engine, longest = self.engine, self.requests.prompt_tokens + self.requests.output_tokens
        assert engine.kv_blocks and engine.token_budget and engine.max_num_seqs and engine.max_model_len
        needed = -(-(longest - 1) // engine.block_size)
        i = int(np.argmax(needed))
        if needed[i] > engine.kv_blocks:
            raise InputError(
                f"{self._called()}: request {i} can never fit: it needs {longest[i] - 1} tokens of KV cache "
                f"({needed[i]} blocks of {engine.block_size}), there are {engine.kv_blocks} blocks; raise "
                "kv_tokens or drop it"
            )
        i = int(np.argmax(self.requests.prompt_tokens))
        if "chunk" not in self.allow and self.requests.prompt_tokens[i] > engine.token_budget:
            raise InputError(
                f"{self._called()}: request {i} can never fit: its prompt of "
                f"{self.requests.prompt_tokens[i]} tokens exceeds the token budget of {engine.token_budget}; "
                'allow "chunk" or raise token_budget'
            )

    def _called(self) -> str:
        return f"instance {self.name}" if self.name else "instance"

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.requests)

    @property
    def kv_tokens(self) -> int:
        """KV capacity in tokens."""
        return self.engine.kv_tokens

    @property
    def token_budget(self) -> int:
        """Most tokens of an iteration."""
        assert self.engine.token_budget is not None
        return self.engine.token_budget

    @property
    def maximise(self) -> bool:
        """Whether more of the objective is better."""
        return self.objective == "slo_goodput"

    def allows(self, what: str) -> bool:
        """Whether `what` of `ALLOWANCES` is allowed."""
        return what in self.allow

    def replace(self, **changes: Any) -> Instance:
        """A copy with attributes changed; `allow` may be any iterable of names."""
        if "allow" in changes:
            changes["allow"] = frozenset(changes["allow"])
        return dataclasses.replace(self, **changes)

    def value(self, result: Result) -> float:
        """The objective of a run of these requests that served them all."""
        arrival = self.requests.arrival_s
        if self.objective == "total_latency":
            return math.fsum(result.finish_s - arrival)
        if self.objective == "gpu_time":
            return result.busy_s
        if self.objective == "makespan":
            return float(result.finish_s.max())
        ttft = result.first_token_s - arrival
        if self.objective == "mean_ttft":
            return math.fsum(ttft) / len(self)
        left = np.maximum(self.requests.output_tokens - 1, 1)
        tpot = (result.finish_s - result.first_token_s) / left
        met = (ttft <= self.requests.ttft_target_s * (1 + _SLACK)) & (
            tpot <= self.requests.tpot_target_s * (1 + _SLACK)
        )
        return float(met.sum())

    # ------------------------------------------------------------------ making

    @staticmethod
    def of(
        requests: Sequence[Sequence[float]] | Requests,
        kv_tokens: int,
        token_budget: int,
        cost: Mapping[str, Any] | Profile | str,
        *,
        allow: Iterable[str] = (),
        objective: str = "total_latency",
        name: str = "",
        block_size: int = 1,
        max_num_seqs: int | None = None,
        ttft_target_s: ArrayLike = math.inf,
        tpot_target_s: ArrayLike = math.inf,
    ) -> Instance:
        """An instance from plain numbers.

        Args:
            requests: rows of arrival (s), prompt tokens I, output tokens O, in order of arrival.
            kv_tokens: capacity M of the KV cache, tokens; rounded down to whole blocks.
            token_budget: most tokens C of an iteration, decodes included.
            cost: a profile, its name, or its form and parameters: {"form": "linear", "c0": ..., ...}.
            allow: names of `ALLOWANCES`.
            objective: one of `OBJECTIVES`.
            block_size: tokens of a KV block.
            max_num_seqs: most requests that hold KV cache at once; None: as many as there are.
            ttft_target_s, tpot_target_s: seconds, one for all or one for each.

        Raises:
            InputError: says which value of which request is wrong, or which request can never fit.
        """
        where = f"instance {name}" if name else "instance"
        if not isinstance(requests, Requests):
            rows = list(requests)
            for i, row in enumerate(rows):
                if not isinstance(row, Sequence | np.ndarray) or isinstance(row, str) or len(row) != 3:
                    raise InputError(f"{where}: request {i} must be [arrival, prompt, output], not {row!r}")
            try:
                columns = np.array(rows, np.float64).reshape(-1, 3)
            except (TypeError, ValueError) as error:
                raise InputError(f"{where}: a request is not three numbers: {error}") from None
            try:
                requests = Requests.of(
                    columns[:, 0],
                    _whole(columns[:, 1], "prompt"),
                    _whole(columns[:, 2], "output"),
                    ttft_target_s=ttft_target_s,
                    tpot_target_s=tpot_target_s,
                )
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        sizes = {"kv_tokens": kv_tokens, "token_budget": token_budget, "block_size": block_size}
        for key, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise InputError(f"{where}: {key} must be a whole number of tokens, not {value!r}")
        for key, text in (("objective", objective), ("name", name)):
            if not isinstance(text, str):
                raise InputError(f"{where}: {key} must be a text, not {text!r}")
        allow = allow if isinstance(allow, str) or not isinstance(allow, Iterable) else list(allow)
        if not isinstance(allow, list) or not all(isinstance(what, str) for what in allow):
            raise InputError(f"{where}: allow must be a list of names, not {allow!r}")
        return Instance(
            requests,
            EngineConfig(
                kv_blocks=int(kv_tokens) // int(block_size),
                block_size=int(block_size),
                token_budget=int(token_budget),
                max_num_seqs=len(requests) if max_num_seqs is None else max_num_seqs,
                max_model_len=int((requests.prompt_tokens + requests.output_tokens).max()),
                watermark=0.0,
                async_scheduling=False,
            ),
            _profile(cost, where),
            frozenset(allow),
            objective,
            name,
        )

    @staticmethod
    def of_scenario(
        scenario: str | scenarios.Scenario,
        seed: int = 0,
        *,
        num_requests: int | None = None,
        allow: Iterable[str] = ("chunk", "pause", "preempt"),
        objective: str = "total_latency",
    ) -> Instance:
        """The instance of the episode that `reset(seed=seed)` of an environment draws.

        Args:
            num_requests: keep the first so many.

        Raises:
            InputError: an unknown scenario.
        """
        problem = scenarios.get(scenario).resolve()
        requests = problem.first_episode(seed)
        if num_requests is not None:
            requests = requests.take(np.arange(min(num_requests, len(requests))))
        return Instance(
            requests,
            problem.engine.replace(watermark=0.0),
            problem.profile,
            frozenset(allow),
            objective,
            f"{problem.scenario.name}-{seed}",
        )

    @staticmethod
    def of_workload(
        workload: Requests | Workload,
        profile: str | Profile,
        engine: EngineConfig = EngineConfig(),
        *,
        allow: Iterable[str] = ("chunk", "pause", "preempt"),
        objective: str = "total_latency",
        name: str = "",
    ) -> Instance:
        """The instance that `simulate(workload, ..., profile, engine)` serves, on an engine that keeps no KV
        blocks free and is not asynchronous.

        Raises:
            InputError: as `simulate`, and for a request that can never fit.
        """
        found, anybody = profiles.get(profile), Scheduler("instance")
        if isinstance(workload, Workload):
            name = name or workload.name
            settled = resolve(engine, anybody, found)
            rps = None
            if workload.load is not None:
                rps = capacity(workload.moments(), found.time, settled).rps
            workload = workload.draw(rps)
        longest = int((workload.prompt_tokens.astype(np.int64) + workload.output_tokens).max())
        engine = engine.or_else(max_model_len=longest).replace(watermark=0.0, async_scheduling=False)
        return Instance(workload, resolve(engine, anybody, found), found, frozenset(allow), objective, name)

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; plain numbers, texts and lists.

        Raises:
            InputError: the cost model is a function.
        """
        if self.profile.form == "custom":
            raise InputError(
                f"{self._called()}: a cost model that is code cannot be written; measure it into a table"
            )
        r, engine = self.requests, self.engine
        cost: dict[str, Any] = {"form": self.profile.form}
        cost |= {key: np.asarray(value).tolist() for key, value in self.profile.params.items()}
        for key in ("cpu_s", "cpu_s_per_request"):
            if getattr(self.profile, key):
                cost[key] = getattr(self.profile, key)
        text: dict[str, Any] = {"name": self.name} if self.name else {}
        rows = zip(r.arrival_s.tolist(), r.prompt_tokens.tolist(), r.output_tokens.tolist(), strict=True)
        text |= {
            "requests": [list(row) for row in rows],
            "kv_tokens": engine.kv_tokens,
            "token_budget": engine.token_budget,
            "cost": cost,
            "allow": sorted(self.allow),
            "objective": self.objective,
        }
        if engine.block_size != 1:
            text["block_size"] = engine.block_size
        if engine.max_num_seqs != len(r):
            text["max_num_seqs"] = engine.max_num_seqs
        for key in ("ttft_target_s", "tpot_target_s"):
            targets = getattr(r, key)
            if np.isfinite(targets).any():
                text[key] = [t if math.isfinite(t) else None for t in targets.tolist()]
        return text

    @staticmethod
    def from_json(text: Mapping[str, Any], name: str = "") -> Instance:
        """The instance of a JSON object; see `Instance.of` for the keys.

        Raises:
            InputError: names the key that is missing, unknown or wrong.
        """
        where = f"instance {name}" if name else "instance"
        if not isinstance(text, Mapping):
            raise InputError(
                f"{where}: must be a JSON object with requests, kv_tokens, ..., not {text!r:.60}"
            )
        for key in text:
            if key not in _KEYS:
                raise unknown(f"key of {where}", key, _KEYS)
        missing = [k for k in ("requests", "kv_tokens", "token_budget", "cost") if k not in text]
        if missing:
            raise InputError(f"{where}: {', '.join(missing)} missing")
        given = dict(text)
        given.setdefault("name", name)
        for key in ("ttft_target_s", "tpot_target_s"):
            value = given.get(key)
            if isinstance(value, Sequence):
                given[key] = [math.inf if t is None else t for t in value]
            elif key in given and value is None:
                del given[key]
        if not isinstance(given["requests"], Sequence) or isinstance(given["requests"], str):
            raise InputError(f"{where}: requests must be a list of [arrival, prompt, output]")
        return Instance.of(**given)

    @staticmethod
    def load(path: str | Path) -> Instance:
        """The instance of a JSON file.

        Raises:
            InputError: names the file and what is wrong with it.
        """
        try:
            text = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from None
        try:
            return Instance.from_json(text)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        text = json.dumps(self.to_json())
        with writing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _whole(column: NDArray[np.float64], what: str) -> NDArray[np.int64]:
    wrong = ~(np.isfinite(column) & (column == np.floor(column)) & (np.abs(column) < 2**31))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise InputError(f"request {i}: {what} must be a whole number of tokens, not {column[i]}")
    return column.astype(np.int64)


def _profile(cost: Mapping[str, Any] | Profile | str, where: str) -> Profile:
    if isinstance(cost, str | Profile):
        return profiles.get(cost)
    if not isinstance(cost, Mapping) or "form" not in cost:
        raise InputError(
            f'{where}: cost must name a form: {{"form": "linear", "c0": ..., ...}}, not {cost!r}'
        )
    if cost["form"] == "custom":
        raise InputError(f"{where}: a cost model that is code cannot be read from JSON")
    own = ("cpu_s", "cpu_s_per_request")
    params = {key: value for key, value in cost.items() if key != "form" and key not in own}
    if cost["form"] == "linear":  # what is left out costs nothing
        params = {**dict.fromkeys(PARAMETERS["linear"], 0.0), **params}
    try:
        return Profile("instance", cost["form"], params, **{k: cost[k] for k in own if k in cost})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


# ---------------------------------------------------------------------- suites


def mixed(
    num_requests: int,
    seed: int,
    *,
    load: float | None = None,
    allow: Iterable[str] = (),
    objective: str = "total_latency",
) -> Instance:
    """Short requests of mixed sizes and a KV cache that holds a handful of them: prompts of 4 to 24 tokens,
    answers of 2 to 8, M = 120, C = 64, an iteration takes 100 + 2 a token + 1 a token of KV read.

    Args:
        load: mean arrivals in units of what the area bound on GPU time can serve; None: all at once.
    """
    rng = np.random.default_rng(seed)
    prompt, output = rng.integers(4, 25, num_requests), rng.integers(2, 9, num_requests)
    arrival: NDArray[np.float64] = np.zeros(num_requests)
    if load is not None:
        kv, tokens = 120, prompt + output - 1
        area = prompt * output + output * (output - 1) / 2
        seconds = float((100 * area / kv + 2 * tokens + area - prompt).mean())
        gaps = rng.exponential(seconds / load, num_requests)
        gaps[0] = 0.0
        arrival = np.floor(gaps.cumsum()).astype(np.float64)
    return Instance.of(
        np.stack([arrival, prompt, output], axis=1).tolist(),
        120,
        64,
        {"form": "linear", "c0": 100, "c1": 2, "c2": 2, "c3": 1, "c4": 0},
        allow=allow,
        objective=objective,
        name=f"mixed-{num_requests}-{seed}" + ("" if load is None else f"-load{load:g}"),
    )


def unit_time(
    num_requests: int, seed: int, *, objective: str = "total_latency", kv_tokens: int = 120
) -> Instance:
    """The requests of `mixed` all at once on an engine whose iterations take a second each, whatever is in
    them: the setting of MC-SF (Jaillet et al., arXiv 2502.07115)."""
    made = mixed(num_requests, seed, objective=objective)
    profile = _profile({"form": "linear", "c0": 1.0}, "unit")
    return made.replace(profile=profile, name=f"unit-{num_requests}-{seed}")


def infermax(
    prompt_tokens: int,
    kv_tokens: int,
    *,
    token_budget: int = 4096,
    allow: Iterable[str] = ("preempt",),
    objective: str = "gpu_time",
    profile: str | Profile = "infermax-7b",
) -> Instance:
    """INFERMAX's instance: four requests at once, four output tokens each (Kim et al., arXiv 2411.07447; its
    M and C are not published)."""
    return Instance.of(
        [[0.0, prompt_tokens, 4]] * 4,
        kv_tokens,
        token_budget,
        profile,
        allow=allow,
        objective=objective,
        name=f"infermax-{prompt_tokens}-{kv_tokens}",
    )
