"""The four batch compositions whose stability Dai, Deng, Li and Peng analyse (arXiv 2504.07347v3, section 4).

Their model has no KV-cache limit: give the engine more `kv_blocks` than the workload can fill (nobody is
preempted if you do not). A request with v_p prefill and v_d decode tokens there is one with v_p prompt and
v_d + 1 output tokens here, since the first token of an answer comes out of its prefill. The token budget is
their b_max, `max_batch_requests` their k_max.
"""

from __future__ import annotations

from baselines.registry import scheduler
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold
from llmsched_env.scheduling import Pass, Routine, Scheduler, Settings, Sort

_ENGINE = {"max_num_seqs": 1_000_000, "token_budget": 512}


def _composition(*passes: Pass, mixed: bool) -> Scheduler:
    settings = Settings(
        passes=passes, mixed=mixed, chunked=mixed, test=Hold.PEAK, hold=Hold.PEAK, sort=Sort.ARRIVAL
    )
    return Scheduler("", settings, _ENGINE)


@scheduler("dai-faster-transformer")
def dai_faster_transformer() -> Scheduler:
    """FasterTransformer: while anybody decodes, decodes only; else whole prompts only. Not work-conserving.

    Source: Dai, Deng, Li, Peng (arXiv 2504.07347v3, section 4), rule as restated in adolgert/Concourse.jl.
    """
    return _composition(Pass.DECODES, Pass.ADMIT, mixed=False)


@scheduler("dai-vllm")
def dai_vllm() -> Scheduler:
    """Vanilla vLLM: while any prompt waits, whole prompts only; else decodes only. Not work-conserving.

    Source: Dai, Deng, Li, Peng (arXiv 2504.07347v3, section 4), rule as restated in adolgert/Concourse.jl.
    """
    return _composition(Pass.ADMIT, Pass.DECODES, mixed=False)


@scheduler("dai-orca")
def dai_orca() -> Scheduler:
    """Orca: prefill tokens up to the budget, then decodes into what is left. Work-conserving.

    Source: Dai, Deng, Li, Peng (arXiv 2504.07347v3, section 4), rule as restated in adolgert/Concourse.jl.
    """
    return _composition(Pass.CHUNKS, Pass.ADMIT, Pass.DECODES, mixed=True)


@scheduler("dai-sarathi")
def dai_sarathi() -> Scheduler:
    """Sarathi-Serve: decodes first, then prefill chunks, oldest prompt first. Work-conserving.

    Source: Dai, Deng, Li, Peng (arXiv 2504.07347v3, section 4), rule as restated in adolgert/Concourse.jl.
    """
    return _composition(Pass.DECODES, Pass.CHUNKS, Pass.ADMIT, mixed=True)


@scheduler("dai-sarathi-priority")
def dai_sarathi_priority() -> Scheduler:
    """Sarathi-Serve's composition priority by priority: the lowest number takes its tokens first.

    Not preemptive beyond the iteration: who runs keeps its KV cache, and waits when others use up the budget.

    Source: the class priorities of Dai, Deng, Li, Peng (arXiv 2504.07347v3, section 5), as restated in
    adolgert/Concourse.jl.
    """
    settings = Settings(
        routine=Routine.LEVELS, order=Order.PRIORITY, resume=Place.KEY, test=Hold.PEAK, hold=Hold.PEAK
    )
    return Scheduler("", settings, _ENGINE)
