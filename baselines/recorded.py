"""Recorded decisions of real schedulers, held against ours iteration by iteration.

A case is a JSON file: `engine` (which system), `config` (its settings), `requests` (arrival_iter, prompt_len,
output_len, priority) and `iterations` (scheduled tokens in batch order, preempted and finished requests, free
blocks). `check` replays it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from baselines import get
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.lanes import LaneSpec, make_lanes
from llmsched_env.core.requests import Requests
from llmsched_env.core.run import EVICTED, ITERATION, SWAPPED_OUT, Log
from llmsched_env.core.state import Hold, Status
from llmsched_env.errors import InputError
from llmsched_env.scheduling import ENGINE, Scheduler, Sort, Victim, run_iteration


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a case is reproduced: `difference` is empty, or says where ours departs first."""

    name: str
    iterations: int
    difference: str

    @property
    def reproduced(self) -> bool:
        return not self.difference


def check(path: str | Path) -> Outcome:
    """Replay one recorded case.

    Raises:
        InputError: if the file is not a recorded case of a system that we know.
    """
    try:
        return _replay(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path}: not a recorded case ({type(error).__name__}: {what})") from None


def _replay(case: dict[str, Any]) -> Outcome:
    name, iterations = str(case["name"]), case["iterations"]
    lanes, names = _engine_of(case)
    for number, recorded in enumerate(iterations):
        ours = _iterate(lanes, float(recorded["iter"]))
        difference = _compare(recorded, ours, names)
        if difference:
            return Outcome(name, number, f"iteration {recorded['iter']}: {difference}")
    return Outcome(name, len(iterations), "")


def _engine_of(case: dict[str, Any]) -> tuple[Any, list[str]]:
    """The engine of a case, at its beginning, and the requests' ids in order of arrival."""
    # A version is given settings that it does not know, too: they are listed, and change nothing.
    unused = case.get("ignored_by_this_version") or {}
    settings = {name: value for name, value in case["config"].items() if name not in unused}
    scheduler, config = _system(case["engine"], case.get("vllm_version") or "", settings)
    # The recorded systems rank requests by when they were made, which is their order in the file.
    order = sorted(range(len(case["requests"])), key=lambda i: case["requests"][i]["arrival_iter"])
    ordered = [case["requests"][i] for i in order]
    requests = Requests.of(
        [float(r["arrival_iter"]) for r in ordered],
        [r["prompt_len"] for r in ordered],
        [r["output_len"] for r in ordered],
        priority=[r.get("priority", 0) for r in ordered],
        names=[r["id"] for r in ordered],
    )
    config = scheduler.resolve(config.replace(kv_blocks=case["usable_blocks"]))
    assert config.max_model_len is not None
    longest = config.max_model_len - requests.prompt_tokens + (1 if scheduler.settings.stop_one_later else 0)
    limit = np.clip(requests.declared_tokens, 1, np.maximum(1, longest))
    watermark = case.get("watermark_blocks")
    if watermark is None:
        watermark = int((settings.get("watermark") or 0.0) * settings["num_gpu_blocks"])
    dropped = requests.prompt_tokens > _prompt_limit(case["engine"], settings)
    spec = LaneSpec(
        requests=requests,
        config=config,
        pack=scheduler.pack,
        cost=_unit_cost(),
        kv_bytes_per_token=0.0,
        stop_tokens=limit.astype(np.int32),
        limit_tokens=limit.astype(np.int32),
        dropped=dropped,
        workspace=scheduler.work_size(len(requests), 1),
        histogram=False,
    )
    lanes = make_lanes([spec], ENGINE)
    lanes.s["watermark_blocks"] = watermark
    lanes.req["rank"] = order
    return lanes, [r["id"] for r in ordered]


def _unit_cost() -> Any:
    """The packed cost of an engine whose iterations all take a second."""
    from llmsched_env.profiles import Profile

    return Profile(name="unit", form="staircase", params={"c": 1.0, "a": 0.0, "b0": 1.0}).pack()


def _prompt_limit(engine: str, settings: dict[str, Any]) -> int:
    """The longest prompt that the system does not drop."""
    if "vllm.v1" in engine:
        return int(settings["max_model_len"]) - 1
    budget = settings.get("max_num_batched_tokens") or settings.get("max_batched_tokens")
    if budget is None:
        return int(settings["max_model_len"])
    if settings.get("enable_chunked_prefill") and budget <= settings["max_model_len"]:
        # The chunk is held against the limit, not the prompt (from memory of 0.6.3, in no recording).
        return 2**31 - 1
    return min(int(budget), int(settings["max_model_len"]))


def _system(engine: str, version: str, settings: dict[str, Any]) -> tuple[Scheduler, EngineConfig]:
    """The scheduler that a case was recorded from, with its settings."""
    common = {
        "block_size": settings["block_size"],
        "max_num_seqs": settings["max_num_seqs"],
        "max_model_len": settings["max_model_len"],
        "watermark": 0.0,
    }
    if "vllm.v1" in engine:
        return _vllm_v1(version, settings, common)
    if engine.startswith("vllm.core.scheduler"):
        return _vllm_v0(settings, common)
    if engine.startswith("sarathi-serve"):
        return _sarathi(settings, common)
    raise InputError(f"unknown system {engine!r}; known: vLLM V1, vLLM v0, Sarathi-Serve")


def _vllm_v1(
    version: str, settings: dict[str, Any], common: dict[str, Any]
) -> tuple[Scheduler, EngineConfig]:
    old = version.startswith("0.11")
    scheduler = get("vllm-v1-0.11" if old else "vllm-v1")
    changes: dict[str, Any] = {
        "chunked": settings.get("enable_chunked_prefill", True),
        "chunk_cap": settings.get("long_prefill_token_threshold") or 0,
    }
    if not old:
        changes["chunk_cap_adaptive"] = settings.get("long_prefill_token_threshold_adaptive", False)
        changes["prefill_interval"] = settings.get("prefill_schedule_interval") or 1
        changes["test"] = Hold.KNOWN if settings.get("scheduler_reserve_full_isl", True) else Hold.CHUNK
    if settings.get("policy") == "priority":
        changes.update(order=Order.PRIORITY, resume=Place.KEY, victim=Victim.PRIORITY)
    if not old and settings.get("max_num_active_seqs"):
        common["max_num_seqs"] = min(common["max_num_seqs"], settings["max_num_active_seqs"])
    config = EngineConfig(
        **common,
        token_budget=settings["max_num_batched_tokens"],
        async_scheduling=bool(settings.get("async_scheduling", False)),
    )
    return scheduler.replace(**changes), config


def _vllm_v0(settings: dict[str, Any], common: dict[str, Any]) -> tuple[Scheduler, EngineConfig]:
    if settings.get("enable_chunked_prefill"):
        scheduler = get("vllm-v0-chunked")  # which has no priority policy
    else:
        scheduler = get("vllm-v0-priority" if settings.get("policy") == "priority" else "vllm-v0")
    config = EngineConfig(
        **common,
        token_budget=settings["max_num_batched_tokens"],
        preemption="swap" if settings.get("preemption_mode") == "swap" else "recompute",
        cpu_blocks=settings.get("num_cpu_blocks"),
    )
    return scheduler, config


def _sarathi(settings: dict[str, Any], common: dict[str, Any]) -> tuple[Scheduler, EngineConfig]:
    name = settings["scheduler"]
    if name == "vllm":
        longest = settings["max_model_len"]
        budget = min(settings.get("max_batched_tokens") or longest, longest)
        scheduler = get("vllm-v0", sort=Sort.ARRIVAL, drop_unfit=False)
        return scheduler, EngineConfig(**common, token_budget=budget)
    known = {
        "sarathi": "sarathi",
        "orca": "orca",
        "faster_transformer": "faster-transformer",
        "simple_chunking": "simple-chunking",
    }
    if name not in known:
        raise InputError(f"unknown scheduler {name!r} of Sarathi-Serve; known: {', '.join(known)}, vllm")
    scheduler = get(known[name], **({"empty_turns": True} if name == "simple_chunking" else {}))
    return scheduler, EngineConfig(**common, token_budget=settings.get("chunk_size"))


def _iterate(lanes: Any, until: float) -> dict[str, Any]:
    """Run one iteration; what was decided, in the vocabulary of the recordings, with requests by index."""
    n = len(lanes.req)
    log = Log(
        np.zeros(1, ITERATION), np.zeros(2 * n, np.int32), np.zeros(2 * n, np.int32), np.zeros(2, np.int64)
    )
    done = lanes.req["status"] == Status.FINISHED
    before = int(lanes.s[0]["free"])
    planned = run_iteration(lanes, 0, log, until)
    used = int(log.used[1])
    entries = list(zip(log.requests[:used].tolist(), log.tokens[:used].tolist(), strict=True))
    finished = np.flatnonzero((lanes.req["status"] == Status.FINISHED) & ~done).tolist()
    return {
        "scheduled": [(r, t) for r, t in entries if t > 0],
        "preempted": [
            (r, "swap" if t == SWAPPED_OUT else "recompute")
            for r, t in entries
            if t in (EVICTED, SWAPPED_OUT)
        ],
        "finished": finished,
        "free_blocks_before": before,
        "free_blocks_after_schedule": planned,
        "free_blocks_after_update": int(lanes.s[0]["free"]),
    }


def _compare(recorded: dict[str, Any], ours: dict[str, Any], names: list[str]) -> str:
    """The first difference between a recorded iteration and ours, in words; empty if there is none."""
    scheduled = [[names[r], t] for r, t in ours["scheduled"]]
    if scheduled != [list(x) for x in recorded["scheduled"]]:
        return f"scheduled {scheduled}, recorded {recorded['scheduled']}"
    modes = bool(recorded["preempted"]) and isinstance(recorded["preempted"][0], list)
    preempted = [[names[r], mode] if modes else names[r] for r, mode in ours["preempted"]]
    if preempted != recorded["preempted"]:
        return f"preempted {preempted}, recorded {recorded['preempted']}"
    finished = sorted(names[r] for r in ours["finished"])
    if finished != sorted(recorded["finished"]):
        return f"finished {finished}, recorded {sorted(recorded['finished'])}"
    for key in ("free_blocks_before", "free_blocks_after_schedule", "free_blocks_after_update"):
        if ours[key] != recorded[key]:
            return f"{key} {ours[key]}, recorded {recorded[key]}"
    return ""


__all__ = ["Outcome", "check"]
