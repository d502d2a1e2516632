"""Schedulers of INFERMAX (Kim et al., arXiv 2411.07447) beyond those of `systems`.

Eviction-free variants, replacement policies, ranks.

The paper's text was not at hand: rules are those of its public simulator and patches. The three named
`infermax-...` follow the simulator's own rules; run them with `block_size=1`, its token-granular cache.
"""

from __future__ import annotations

import dataclasses

from baselines.registry import scheduler
from baselines.systems import sarathi, vllm_v0, vllm_v1
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold
from llmsched_env.scheduling import Pass, Scheduler, Settings, Sort, Victim

# ------------------------------------------------------------------------------ what may share a batch


@scheduler("vllm-hybrid")
def vllm_hybrid() -> Scheduler:
    """vLLM v0 with hybrid batches: new prompts first, whole, then the decodes in the same iteration.

    Source: INFERMAX (arXiv 2411.07447), variant vllm_hy, on the rules of vLLM 0.6.3.
    """
    made = vllm_v0()
    return dataclasses.replace(made, settings=dataclasses.replace(made.settings, mixed=True))


# ------------------------------------------------------------------------------ eviction-free


def _reserving(made: Scheduler) -> Scheduler:
    """With prompt + output - 1 tokens reserved at admission."""
    settings = dataclasses.replace(made.settings, test=Hold.PEAK, hold=Hold.PEAK, free_block_for_decode=False)
    return dataclasses.replace(made, settings=settings)


@scheduler("vllm-v0-no-evict")
def vllm_v0_no_evict() -> Scheduler:
    """vLLM v0 that knows all lengths and reserves the peak at admission, so that nobody is preempted.

    Source: INFERMAX (arXiv 2411.07447), variant vllm_noe (hypothetical: it needs the true output length), on
    the rules of vLLM 0.6.3.
    """
    return _reserving(vllm_v0())


@scheduler("sarathi-no-evict")
def sarathi_no_evict() -> Scheduler:
    """Sarathi-Serve that knows all lengths and reserves the peak at admission, so that nobody is preempted.

    Source: INFERMAX (arXiv 2411.07447), variant sarathi_noe (hypothetical: it needs the true output length),
    on the rules of Sarathi-Serve.
    """
    return _reserving(sarathi())


# ------------------------------------------------------------------------------ replacement policies


@scheduler("srf")
def srf() -> Scheduler:
    """Shortest request first: vLLM V1 that preempts the running request with the fewest KVs, not the newest.

    Source: INFERMAX (arXiv 2411.07447v5), SRF as its vLLM patch has it: among those not scheduled yet; ties
    to the newest are ours.
    """
    made = vllm_v1()
    return dataclasses.replace(made, settings=dataclasses.replace(made.settings, victim=Victim.SHORTEST))


@scheduler("srf-hist")
def srf_hist() -> Scheduler:
    """SRF that admits a prompt only if the mean total of finished requests of its length class would fit.

    Source: INFERMAX (arXiv 2411.07447v5), SRF+Hist: classes by floor(log2 prompt). Its threshold was not
    found; ours is 0, all prompts.
    """
    made = srf()
    return dataclasses.replace(made, settings=dataclasses.replace(made.settings, length_classes=True))


@scheduler("lrf")
def lrf() -> Scheduler:
    """Longest request first: vLLM V1 that preempts the running request with the most KVs.

    Source: INFERMAX (arXiv 2411.07447), a remark in its notebooks; the opposite of SRF, for comparison.
    """
    made = vllm_v1()
    return dataclasses.replace(made, settings=dataclasses.replace(made.settings, victim=Victim.LONGEST))


# -------------------------------------------------------------------------------- its simulator's rules

_SIMULATED_SARATHI = Settings(
    passes=(Pass.DECODES, Pass.CHUNKS, Pass.ADMIT),
    limit_decodes=False,
    hold=Hold.KNOWN,
    free_block_for_decode=True,
)
_SIMULATED = {"max_num_seqs": 1_000_000}


@scheduler("infermax-vllm")
def infermax_vllm() -> Scheduler:
    """INFERMAX's vLLM: whole prompts first and alone, then decodes; the latest arrival is preempted.

    Source: the public simulator of INFERMAX (arXiv 2411.07447): prompt reserved at admission, no watermark,
    no limit on requests.
    """
    settings = Settings(
        passes=(Pass.ADMIT, Pass.DECODES),
        mixed=False,
        chunked=False,
        hold=Hold.KNOWN,
        free_block_for_decode=True,
        sort=Sort.ARRIVAL,
    )
    return Scheduler("", settings, {**_SIMULATED, "token_budget": 16384})


@scheduler("infermax-sarathi")
def infermax_sarathi() -> Scheduler:
    """INFERMAX's Sarathi: every decode, then chunks up to 512 tokens; the request admitted last is preempted.

    Source: the public simulator of INFERMAX (arXiv 2411.07447): prompt reserved at admission, no watermark,
    no limit on requests.
    """
    return Scheduler("", _SIMULATED_SARATHI, {**_SIMULATED, "token_budget": 512})


@scheduler("infermax-vllm-no-evict")
def infermax_vllm_no_evict() -> Scheduler:
    """INFERMAX's vLLM that knows all lengths and reserves the peak at admission: nobody is preempted.

    Source: the public simulator of INFERMAX (arXiv 2411.07447), variant _noe.
    """
    return _reserving(infermax_vllm())


@scheduler("infermax-sarathi-no-evict")
def infermax_sarathi_no_evict() -> Scheduler:
    """INFERMAX's Sarathi that knows all lengths and reserves the peak at admission: nobody is preempted.

    Source: the public simulator of INFERMAX (arXiv 2411.07447), variant _noe.
    """
    return _reserving(infermax_sarathi())


@scheduler("infermax-sarathi-srf")
def infermax_sarathi_srf() -> Scheduler:
    """INFERMAX's Sarathi with SRF: the most KVs are served first, the fewest preempted.

    Source: the public simulator of INFERMAX (arXiv 2411.07447), scheduler "test" with sortI.
    """
    settings = dataclasses.replace(_SIMULATED_SARATHI, sort=Sort.LONGEST_KV)
    return Scheduler("", settings, {**_SIMULATED, "token_budget": 512})


def _ranked(order: Order) -> Scheduler:
    settings = Settings(
        passes=(Pass.MERGED,),
        order=order,
        resume=Place.KEY,
        hold=Hold.KNOWN,
        victim=Victim.KEY,
        sort=Sort.KEY,
    )
    return Scheduler("", settings, {**_SIMULATED, "token_budget": 4096})


@scheduler("rank-i")
def rank_i() -> Scheduler:
    """Running and waiting requests together, shortest prompt first; the last is preempted.

    Source: the public simulator of INFERMAX (arXiv 2411.07447), rank by I. The token budget is ours.
    """
    return _ranked(Order.PROMPT)


@scheduler("rank-o")
def rank_o() -> Scheduler:
    """Running and waiting requests together, shortest predicted output first; the last is preempted.

    Source: the public simulator of INFERMAX (arXiv 2411.07447), rank by O. The token budget is ours.
    """
    return _ranked(Order.OUTPUT)


@scheduler("rank-id")
def rank_id() -> Scheduler:
    """Running and waiting requests together, earliest arrival first; the last is preempted.

    Source: the public simulator of INFERMAX (arXiv 2411.07447), rank by id. The token budget is ours.
    """
    return _ranked(Order.ARRIVAL)
