"""Schedulers of real serving systems, each as in the version named, as settings of the one routine.

What "recorded" says of a version: the decisions of the real scheduler, recorded iteration by iteration, are
reproduced token by token (`scripts/check_recorded.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from baselines.registry import scheduler
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold, Listing
from llmsched_env.scheduling import Pass, Scheduler, Settings, Sort, Victim

# ---------------------------------------------------------------------- Sarathi-Serve family

_SARATHI = Settings(
    passes=(Pass.DECODES, Pass.CHUNKS, Pass.ADMIT),
    sort=Sort.ARRIVAL,
    limit_decodes=False,
    hold=Hold.KNOWN,
    free_block_for_decode=True,
    listing=Listing.PREFILLS_FIRST,
)
_SARATHI_ENGINE = {"token_budget": 512, "max_num_seqs": 128, "watermark": 0.01}


@scheduler("faster-transformer")
def faster_transformer() -> Scheduler:
    """Static batches: whole prompts together, then decodes until all of the batch are done; memory for the
    longest sequence each.

    Source: Sarathi-Serve commit 96f9911790ec, scheduler faster_transformer (recorded); it does not pad
    finished rows.
    """
    settings = Settings(
        passes=(Pass.DECODES, Pass.ADMIT),
        mixed=False,
        chunked=False,
        limit_decodes=False,
        limit_prefills=False,
        test=Hold.MODEL_LEN,
        hold=Hold.MODEL_LEN,
        listing=Listing.PREFILLS_FIRST,
    )
    return Scheduler("", settings, {"max_num_seqs": 128})


@scheduler("orca")
def orca() -> Scheduler:
    """Iteration-level batching: all decodes and whole prompts together, memory for the longest sequence
    reserved at admission.

    Source: Orca (OSDI 2022) as in Sarathi-Serve commit 96f9911790ec, scheduler orca (recorded).
    """
    return Scheduler(
        "",
        dataclasses.replace(faster_transformer().settings, mixed=True, sort=Sort.ARRIVAL),
        {"max_num_seqs": 128},
    )


@scheduler("sarathi")
def sarathi() -> Scheduler:
    """Sarathi-Serve: every decode, then prefill chunks up to a token budget (chunk size 512): stall-free
    batches.

    Source: Sarathi-Serve (OSDI 2024), commit 96f9911790ec, scheduler sarathi (recorded).
    """
    return Scheduler("", _SARATHI, _SARATHI_ENGINE)


@scheduler("sarathi-nocp")
def sarathi_nocp() -> Scheduler:
    """Sarathi-Serve without chunked prefills: decodes and whole prompts share an iteration.

    Source: INFERMAX (arXiv 2411.07447), variant sarathi_nocp, on the rules of Sarathi-Serve.
    """
    return Scheduler(
        "", dataclasses.replace(_SARATHI, chunked=False), {**_SARATHI_ENGINE, "token_budget": 4096}
    )


@scheduler("sarathi-nohy")
def sarathi_nohy() -> Scheduler:
    """Sarathi-Serve without hybrid batches: prefills only in iterations without a decode.

    Source: INFERMAX (arXiv 2411.07447), variant sarathi_nohy, on the rules of Sarathi-Serve.
    """
    return Scheduler(
        "", dataclasses.replace(_SARATHI, mixed=False), {**_SARATHI_ENGINE, "token_budget": 4096}
    )


@scheduler("sarathi-unlimited")
def sarathi_unlimited() -> Scheduler:
    """Sarathi-Serve with chunks as large as the whole token budget (4,096).

    Source: INFERMAX (arXiv 2411.07447), variant sarathi_unlimitedP.
    """
    return Scheduler("", _SARATHI, {**_SARATHI_ENGINE, "token_budget": 4096})


# ---------------------------------------------------------------------- vLLM v0

_V0 = Settings(
    passes=(Pass.ADMIT, Pass.DECODES, Pass.SWAP_IN),
    mixed=False,
    chunked=False,
    hold=Hold.KNOWN,
    free_block_for_decode=True,
    drop_unfit=True,
    stop_one_later=True,
)


def _whole_prompts(config: EngineConfig) -> int:
    """vLLM v0's token budget without chunking: the longest sequence, and at least 2,048."""
    return max(2048, config.max_model_len or 0)


_V0_ENGINE: dict[str, Any] = {"token_budget": _whole_prompts, "max_num_seqs": 256, "watermark": 0.01}


@scheduler("vllm-v0")
def vllm_v0() -> Scheduler:
    """vLLM v0: prefills first, alone; else all decodes. Preempts the newest by recomputation.

    Source: vLLM 0.6.3, default scheduler (recorded). Its token budget is the longest sequence, or 2,048.
    """
    return Scheduler("", _V0, _V0_ENGINE)


@scheduler("vllm-v0-swap")
def vllm_v0_swap() -> Scheduler:
    """vLLM v0 with swapping: victims move to the CPU tier, and nobody is admitted while one is there.

    Source: vLLM 0.6.3 with preemption_mode=swap (recorded).
    """
    return Scheduler("", _V0, {**_V0_ENGINE, "preemption": "swap"})


@scheduler("vllm-v0-priority")
def vllm_v0_priority() -> Scheduler:
    """vLLM v0 with the priority policy: a waiting request of higher priority preempts running ones.

    Source: vLLM 0.6.3 with scheduling policy "priority" (recorded).
    """
    settings = dataclasses.replace(_V0, order=Order.PRIORITY, preempt_for_priority=True)
    return Scheduler("", settings, _V0_ENGINE)


@scheduler("vllm-v0-chunked")
def vllm_v0_chunked() -> Scheduler:
    """vLLM v0 with chunked prefill: decodes and chunks in queue order, then admissions, budget 512.

    Source: vLLM 0.6.3 with enable_chunked_prefill (recorded). Not seen in a recording but from memory: among
    those swapped in, decodes stand before prefills in the running list.
    """
    settings = dataclasses.replace(
        _V0,
        passes=(Pass.RUNNING, Pass.SWAP_IN, Pass.ADMIT),
        mixed=True,
        chunked=True,
        admit_while_swapped=True,
        defer_victims=True,
        free_block_for_chunk=True,
        reorder_chunked=True,
        listing=Listing.NEW_FIRST,
    )
    return Scheduler("", settings, {**_V0_ENGINE, "token_budget": 512})


# ---------------------------------------------------------------------- vLLM V1

_V1 = Settings(admit_after_preemption=False, watermark_when_idle=False)
_V1_ENGINE = {"token_budget": 2048, "max_num_seqs": 256}


@scheduler("vllm-v1")
def vllm_v1() -> Scheduler:
    """vLLM V1: one token budget for decodes and chunks, a request admitted when its whole known sequence
    fits.

    Source: vLLM 0.33.0, Scheduler, synchronous (recorded); budget and slots as its server sets them on an 80
    GB A100.
    """
    return Scheduler("", _V1, _V1_ENGINE)


@scheduler("vllm-v1-async")
def vllm_v1_async() -> Scheduler:
    """vLLM V1 as it runs by default: an iteration is planned while the one before it runs.

    Source: vLLM 0.33.0, AsyncScheduler (recorded).
    """
    return Scheduler("", _V1, {**_V1_ENGINE, "async_scheduling": True})


@scheduler("vllm-v1-priority")
def vllm_v1_priority() -> Scheduler:
    """vLLM V1 with the priority policy: it orders the queue and picks the victims, but nobody is preempted
    for the queue.

    Source: vLLM 0.33.0 with scheduling policy "priority" (recorded).
    """
    settings = dataclasses.replace(_V1, order=Order.PRIORITY, resume=Place.KEY, victim=Victim.PRIORITY)
    return Scheduler("", settings, _V1_ENGINE)


_V1_011 = dataclasses.replace(_V1, test=Hold.CHUNK, chunk_cap_alone=True, pass_over=True)


@scheduler("vllm-v1-0.11")
def vllm_v1_011() -> Scheduler:
    """vLLM V1 of 2025: a request is admitted when its first chunk fits.

    Source: vLLM 0.11.0 (known from its rules). Its bug that a priority victim keeps its tokens in the plan is
    left out.
    """
    return Scheduler("", _V1_011, _V1_ENGINE)
