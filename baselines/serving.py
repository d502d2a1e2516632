"""Schedulers of real serving systems that need a routine of their own.

"Read" says of a version that its rules are known from reading, and not checked against decisions of the real
scheduler. What it does besides scheduling, such as tokenising or handing results over, takes no time here.
"""

from __future__ import annotations

import dataclasses

from baselines.registry import scheduler
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold, Listing
from llmsched_env.scheduling import Pass, Routine, Scheduler, Settings, Sort
from llmsched_env.scheduling.fastserve import FastServe, fastserve_size
from llmsched_env.scheduling.lightllm import LightLLM, lightllm_size
from llmsched_env.scheduling.ranked import LTR, ranked_size
from llmsched_env.scheduling.sglang import SGLANG_SIZE, SGLang
from llmsched_env.scheduling.simple_chunking import SIMPLE_CHUNKING_SIZE, SimpleChunking
from llmsched_env.scheduling.tgi import TGI
from llmsched_env.scheduling.trtllm import Capacity, TensorRT, trtllm_size
from llmsched_env.scheduling.vtc import VTC, vtc_size

# ---------------------------------------------------------------------------------------------- Sarathi-Serve


@scheduler("simple-chunking")
def simple_chunking() -> Scheduler:
    """Sarathi-Serve's simple chunking: prefill chunks and decodes take turns, never in one iteration.

    Source: Sarathi-Serve commit 96f9911790ec, scheduler simple_chunking (read).

    A turn in which there is nothing to do takes no time.
    """
    settings = Settings(
        routine=Routine.SIMPLE_CHUNKING,
        mixed=False,
        sort=Sort.ARRIVAL,
        limit_decodes=False,
        hold=Hold.KNOWN,
        free_block_for_decode=True,
        listing=Listing.PREFILLS_FIRST,
        x=SimpleChunking(),
    )
    engine = {"token_budget": 512, "max_num_seqs": 128, "watermark": 0.01}
    return Scheduler("", settings, engine, workspace=lambda requests, clients: SIMPLE_CHUNKING_SIZE)


# -------------------------------------------------------------------------------------------------- FastServe


@scheduler("fastserve")
def fastserve() -> Scheduler:
    """FastServe: skip-join multi-level feedback queue by attained time, whole prompts, swapping ahead.

    Source: FastServe (arXiv 2305.05920), commit 187a2742bd3e (read).

    It leaves the size of batches to the user: 256 requests and 16,384 prompt tokens are ours. Its second
    memory step, right after an iteration, is left out: it changes what is swapped ahead of need, not who
    runs. The first of a batch runs even if that takes the reserve, and requests that are passed over while
    the CPU tier is full keep their order.
    """
    settings = Settings(
        routine=Routine.FASTSERVE,
        chunked=False,
        limit_decodes=False,
        limit_prefills=False,
        max_batch_requests=256,
        x=FastServe(),
    )
    engine = {"token_budget": 16384, "max_num_seqs": 4096, "preemption": "swap"}
    return Scheduler("", settings, engine, workspace=fastserve_size)


@scheduler("fastserve-mlfq")
def fastserve_mlfq() -> Scheduler:
    """FastServe without skip-join: every request begins at the highest level.

    Source: FastServe, commit 187a2742bd3e, policy mlfq (read).
    """
    return fastserve().replace(skip_join=False)


# ----------------------------------------------------------------------------------------------------- SGLang


@scheduler("sglang")
def sglang() -> Scheduler:
    """SGLang: prefills before decodes, memory for a share of the declared outputs that adapts to retractions.

    Source: SGLang 0.4.6.post5, schedule policy fcfs (read).

    Chunks of 8,192 tokens, as a later version sets them for an 80 GB GPU; that at most 2,048 requests run
    is from memory, unverified. It counts memory in tokens, which block_size=1 gives. Prefix caching is off.
    An idle engine takes its first request whatever it declares.
    """
    settings = Settings(
        routine=Routine.SGLANG, mixed=False, limit_decodes=False, resume=Place.END, x=SGLang()
    )
    engine = {"token_budget": 8192, "max_num_seqs": 2048}
    return Scheduler("", settings, engine, workspace=lambda requests, clients: SGLANG_SIZE)


@scheduler("sglang-mixed")
def sglang_mixed() -> Scheduler:
    """SGLang with mixed chunks: decodes join every prefill batch.

    Source: SGLang 0.4.6.post5 with enable_mixed_chunk (read).

    Decodes for which memory is short are retracted in a mixed batch as in any other.
    """
    return sglang().replace(mixed=True, mixed_chunk=True)


# ----------------------------------------------------------------------------------------------- TensorRT-LLM

_TRTLLM_ENGINE = {"token_budget": 8192, "max_num_seqs": 2048}


@scheduler("trtllm-no-evict")
def trtllm_no_evict() -> Scheduler:
    """TensorRT-LLM, GUARANTEED_NO_EVICT: who starts has memory for its declared maximum, and is never paused.

    Source: TensorRT-LLM, capacityScheduler.cpp and microBatchScheduler.cpp of 2026 (read).

    Chunked context is off; 2,048 requests and 8,192 tokens are from memory, unverified.
    """
    settings = Settings(
        routine=Routine.TRTLLM,
        chunked=False,
        order=Order.ARRIVAL,
        sort=Sort.ARRIVAL,
        hold=Hold.DECLARED,
        test=Hold.DECLARED,
        x=TensorRT(),
    )
    return Scheduler("", settings, _TRTLLM_ENGINE, workspace=trtllm_size)


@scheduler("trtllm-max-utilization")
def trtllm_max_utilization() -> Scheduler:
    """TensorRT-LLM, MAX_UTILIZATION: memory for one step is enough; if it is short, the last started pauses.

    Source: TensorRT-LLM, capacityScheduler.cpp and microBatchScheduler.cpp of 2026 (read).

    Chunked context is on, so that a paused request can be prefilled again however long its answer is. 2,048
    requests, 8,192 tokens and chunks of multiples of 32 are from memory, unverified.
    """
    settings = dataclasses.replace(
        trtllm_no_evict().settings,
        chunked=True,
        resume=Place.KEY,
        hold=Hold.KNOWN,
        test=Hold.KNOWN,
        x=TensorRT(Capacity.MAX_UTILIZATION),
    )
    return Scheduler("", settings, _TRTLLM_ENGINE, workspace=trtllm_size)


@scheduler("trtllm-static-batch")
def trtllm_static_batch() -> Scheduler:
    """TensorRT-LLM, STATIC_BATCH: nobody starts before the whole batch is done.

    Source: TensorRT-LLM, capacityScheduler.cpp and microBatchScheduler.cpp of 2026 (read).

    It has no KV manager and only counts requests; here the declared maximum of a batch must fit, too.
    """
    return trtllm_no_evict().replace(capacity=Capacity.STATIC_BATCH)


# -------------------------------------------------------------------------------------------------------- TGI

_TGI_ENGINE = {"token_budget": 4096, "max_num_seqs": 128}


@scheduler("tgi")
def tgi() -> Scheduler:
    """TGI: memory for the declared maximum at admission, then decodes and chunks together; no preemption.

    Source: Text Generation Inference, backend v3, for models with chunking (read).
    """
    settings = Settings(
        passes=(Pass.DECODES, Pass.CHUNKS, Pass.ADMIT),
        limit_decodes=False,
        test=Hold.DECLARED,
        hold=Hold.DECLARED,
    )
    return Scheduler("", settings, _TGI_ENGINE)


@scheduler("tgi-nonchunked")
def tgi_nonchunked() -> Scheduler:
    """TGI without chunking: prompts run alone, when 0.3 wait for each that runs or 20 decodes have gone by.

    Source: Text Generation Inference, backend v3, for models without chunking (read).

    The ratio is what its launcher sets; its router alone has 1.2.
    """
    settings = Settings(
        routine=Routine.TGI,
        mixed=False,
        chunked=False,
        limit_decodes=False,
        test=Hold.DECLARED,
        hold=Hold.DECLARED,
        x=TGI(),
    )
    return Scheduler("", settings, _TGI_ENGINE)


# --------------------------------------------------------------------------------------------------- LightLLM


@scheduler("lightllm")
def lightllm() -> Scheduler:
    """LightLLM: admission if memory suffices at its peak, should all run to their declared maximum.

    Source: LightLLM, a commit of 2026, chunked prefill with the aggressive schedule (read).

    Its step, a decode and perhaps a prefill pass, is two iterations here. It counts memory in tokens, which
    block_size=1 gives; in larger blocks the peak allows for their last being partly empty. An idle engine
    takes its first request whatever it declares.
    """
    settings = Settings(routine=Routine.LIGHTLLM, mixed=False, limit_decodes=False, x=LightLLM())
    engine = {"token_budget": 2 * 4096 + 256, "max_num_seqs": 1000}
    return Scheduler("", settings, engine, workspace=lightllm_size)


@scheduler("lightllm-past-future")
def lightllm_past_future() -> Scheduler:
    """LightLLM's past-future scheduler: the peak for lengths sampled from those of the last 200 answers.

    Source: Past-Future (arXiv 2507.10150) as in LightLLM, a commit of 2026 (read).

    When memory runs short all the same, the last admitted is paused.
    """
    return lightllm().replace(past_future=True)


# --------------------------------------------------------------------------------------- fairness and ranking


@scheduler("vtc")
def vtc() -> Scheduler:
    """VTC: the client served least is next, by counters of prompt tokens and, twice as dear, answer tokens.

    Source: VTC (arXiv 2401.00588), its published code on S-LoRA (read).

    All clients weigh the same; the sizes of batches are LightLLM's.
    """
    settings = Settings(
        routine=Routine.VTC,
        mixed=False,
        chunked=False,
        limit_decodes=False,
        limit_prefills=False,
        x=VTC(),
    )
    engine = {"token_budget": 2 * 4096 + 256, "max_num_seqs": 1000}
    return Scheduler("", settings, engine, workspace=vtc_size)


@scheduler("vtc-lcf")
def vtc_lcf() -> Scheduler:
    """Least counter first: VTC without the lift, so that a client who was idle is served first for a while.

    Source: LCF, a variant in VTC's published code (read).
    """
    return vtc().replace(lift=False)


@scheduler("ltr")
def ltr() -> Scheduler:
    """LTR: the shortest predicted outputs run, preempting by swapping; who is idle for long comes first.

    Source: LTR (arXiv 2408.15792), vllm-ltr, a commit of 2026 (read).

    The predicted length takes the place of its ranking model's score, known at arrival and free of charge.
    The budget of 2,048 tokens is ours. A request in the CPU tier comes back only when it is selected.
    """
    settings = Settings(
        routine=Routine.RANKED,
        order=Order.OUTPUT,
        resume=Place.KEY,
        hold=Hold.KNOWN,
        watermark_when_idle=False,
        x=LTR(),
    )
    engine = {"token_budget": 2048, "max_num_seqs": 256, "watermark": 0.01, "preemption": "swap"}
    return Scheduler("", settings, engine, workspace=ranked_size)


@scheduler("ltr-srtf")
def ltr_srtf() -> Scheduler:
    """LTR by what is left of the predicted outputs: shortest remaining time first.

    Source: LTR (arXiv 2408.15792), vllm-ltr, a commit of 2026, type srtf (read).

    It knows the true lengths there; here it has the predicted ones.
    """
    return ltr().replace(order=Order.REMAINING, remaining=True)
