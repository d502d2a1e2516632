"""Schedulers from papers, and the classics: settings of the one routine, or a routine of their own.

They are run on one engine, so that they differ in their rule alone: every decode, then chunks up to a token
budget of 2,048, then admissions, whose prompt is reserved at once; at most 256 requests. Where a paper's
model is simpler (unit steps, prompts that take no time), this is our online adaptation of its rule, and
"adapted" says so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from baselines.registry import scheduler
from baselines.systems import vllm_v1
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold
from llmsched_env.scheduling import Budget, Pass, Peak, Routine, Scheduler, Settings, Victim
from llmsched_env.scheduling.slai import SlaiSettings
from llmsched_env.scheduling.sorted_f import sorted_f_size
from llmsched_env.scheduling.wait import WAIT_SIZE, WaitSettings

_PLAIN = Settings(
    passes=(Pass.DECODES, Pass.CHUNKS, Pass.ADMIT),
    hold=Hold.KNOWN,
    admit_after_preemption=False,
    watermark_when_idle=False,
)
_BACKFILL = 64


def _policy(**changes: Any) -> Scheduler:
    return Scheduler("", dataclasses.replace(_PLAIN, **changes))


# ------------------------------------------------------------------------------ orders


@scheduler("fcfs-backfill")
def fcfs_backfill() -> Scheduler:
    """First come first served; behind a request that does not fit, up to 64 later ones are tried.

    Source: backfilling, a classic of parallel job scheduling.
    """
    return _policy(backfill=_BACKFILL)


@scheduler("sjf")
def sjf() -> Scheduler:
    """Shortest predicted output first, without preemption for it.

    Source: shortest job first, as in Mitzenmacher and Shahout's survey (arXiv 2503.07545).
    """
    return _policy(order=Order.OUTPUT)


@scheduler("sjf-prompt")
def sjf_prompt() -> Scheduler:
    """Shortest prompt first; needs no prediction.

    Source: shortest job first, with the part of the job that is known.
    """
    return _policy(order=Order.PROMPT)


@scheduler("sjf-backfill")
def sjf_backfill() -> Scheduler:
    """Shortest predicted output first; behind a request that does not fit, up to 64 others are tried.

    Source: shortest job first with backfilling.
    """
    return _policy(order=Order.OUTPUT, backfill=_BACKFILL)


@scheduler("area-backfill")
def area_backfill() -> Scheduler:
    """Least predicted KV area O*I + O^2/2 first, if memory suffices at coming completions; some backfilling.

    Behind the first that does not fit, only requests of up to twice its area are tried: larger ones would
    take the memory that small ones which arrive later could use at once, and unbounded backfilling is up to
    40 % worse than none when memory is tight.

    Source: ours. The order is that of SVF (arXiv 2606.22327), the test that of MC-SF (arXiv 2502.07115).
    """
    return _policy(
        order=Order.AREA, resume=Place.KEY, backfill=_BACKFILL, backfill_within=2.0, peak=Peak.PREDICTED
    )


@scheduler("edf")
def edf() -> Scheduler:
    """Earliest deadline of the first token first; requests without one come last, in order of arrival.

    Source: earliest deadline first (Liu and Layland, 1973), on the deadline arrival + TTFT target, without
    preemption for it.
    """
    return _policy(order=Order.DEADLINE, resume=Place.KEY)


@scheduler("uniboost")
def uniboost() -> Scheduler:
    """vLLM V1, earliest arrival - ln(1 / (1 - exp(-gamma w))) / gamma first, w the seconds of the prefill.

    Source: "Beyond Prediction: Tail-Aware Scheduling for LLM Inference" (ICML 2026), rule as in the
    description of SGLang PR #35637. Values of gamma (1/s) and of the seconds per token (1e-4) are ours; the
    paper's online choice of gamma is left out.
    """
    made = vllm_v1()
    settings = dataclasses.replace(
        made.settings, order=Order.BOOST, resume=Place.KEY, boost_gamma=1.0, boost_s_per_token=1e-4
    )
    return dataclasses.replace(made, settings=settings)


# ------------------------------------------------------------------------------ preemptive


@scheduler("srpt")
def srpt() -> Scheduler:
    """Least predicted remaining output first; a waiting request preempts running ones that have more left.

    Source: SRPT with predictions (SPRPT), Mitzenmacher and Shahout's survey (arXiv 2503.07545), adapted.
    """
    return _policy(order=Order.REMAINING, resume=Place.KEY, victim=Victim.KEY, admission_preempts=True)


@scheduler("trail")
def trail() -> Scheduler:
    """SRPT in which a request that has put out 0.8 of its predicted output is not preempted any more.

    Source: TRAIL (Shahout et al., arXiv 2410.01035), rule and c = 0.8 as restated in SGLang PR #23688;
    adapted: the prediction is made once, at arrival, not again after every token.
    """
    return _policy(
        order=Order.REMAINING, resume=Place.KEY, victim=Victim.KEY, admission_preempts=True, protect_after=0.8
    )


@scheduler("las")
def las() -> Scheduler:
    """Least attained service: a waiting request preempts running ones that have put out far more tokens.

    Source: least attained service (foreground-background); the levels, which keep requests from preempting
    each other in turn, as in multi-level feedback queues and Autellix's PLAS (arXiv 2502.13965); where they
    lie is ours.
    """
    return _policy(order=Order.ATTAINED, resume=Place.KEY, victim=Victim.KEY, admission_preempts=True)


# ------------------------------------------------------------------------------ papers


@scheduler("mc-sf")
def mc_sf() -> Scheduler:
    """MC-SF: shortest predicted output first, until memory would not suffice at some coming completion.

    Source: Jaillet et al. (arXiv 2502.07115), Memory-Constrained Shortest-First, adapted (prompts take time
    here).
    """
    return _policy(order=Order.OUTPUT, peak=Peak.PREDICTED)


@scheduler("mc-benchmark")
def mc_benchmark() -> Scheduler:
    """MC-SF's admission test in order of arrival.

    Source: Jaillet et al. (arXiv 2502.07115), MC-Benchmark, adapted; known at second hand.
    """
    return _policy(order=Order.ARRIVAL, peak=Peak.PREDICTED)


@scheduler("svf")
def svf() -> Scheduler:
    """Smallest volume first: least predicted KV area, until memory would not suffice at a coming completion.

    Source: Kong, Qi, Ye, Zhou (arXiv 2606.22327), rule as restated in servingQ/serQ docs/use-cases/kong.md;
    adapted: the volume is O*I + O^2/2, without their O/2.
    """
    return _policy(order=Order.AREA, peak=Peak.PREDICTED)


@scheduler("sorted-f")
def sorted_f() -> Scheduler:
    """Sorted-F: batches that fit, of the least sum of outputs / size^2, one after the other.

    Source: Wang, Ye, Zhou (arXiv 2508.06133), metric as in its abstracts. Adapted: a batch is chosen greedily
    among the 256 shortest outputs under eight limits on the prompt, when the last of the batch before has
    been admitted; admissions pass MC-SF's test.
    """
    made = _policy(routine=Routine.SORTED_F, order=Order.OUTPUT, peak=Peak.PREDICTED)
    return dataclasses.replace(made, workspace=lambda requests, clients: sorted_f_size(requests))


@scheduler("a-min")
def a_min() -> Scheduler:
    """A_min: takes outputs at a lower bound, least first, and on overflow preempts the least.

    A bound is raised to what has come out.

    Source: Chen, Ye, Zhou (arXiv 2508.14544), rule as restated in summaries (which bound is evicted first:
    from memory). Adapted: the lower bound is the share `lower_bound` (0.5) of the predicted length; a victim
    keeps the tokens that it has put out.
    """
    return _policy(
        order=Order.LOWER_BOUND,
        resume=Place.KEY,
        victim=Victim.LEAST_KEY,
        peak=Peak.LOWER_BOUND,
        lower_bound=0.5,
    )


@scheduler("wait")
def wait() -> Scheduler:
    """WAIT: a class (`class_id`) runs while `threshold` (8) of its requests wait; so many are admitted.

    Source: Ao, Luo, Simchi-Levi, Wang (arXiv 2504.11320), rule as restated in summaries. Adapted: one
    threshold for all classes; if no class is due, running requests go on; one request is enough when nothing
    more arrives; the predicted peak is reserved.
    """
    made = _policy(routine=Routine.WAIT, test=Hold.PREDICTED, hold=Hold.PREDICTED, x=WaitSettings())
    return dataclasses.replace(made, workspace=lambda requests, clients: WAIT_SIZE)


@scheduler("rad")
def rad() -> Scheduler:
    """RAD: only decodes while 128 requests decode or no prefill is left, else a tile of 128 prefill tokens.

    Source: Bari, Hegde, de Veciana (arXiv 2508.01002), Algorithm 1 with N = infinity and b_col = b_lcm = 128,
    as restated in servingQ/serQ docs/use-cases/bari.md. Adapted: a tile may hold the end of one prompt and
    the beginning of the next; memory can run out.
    """
    made = _policy(passes=(Pass.CHUNKS, Pass.ADMIT, Pass.DECODES), mixed=False)
    return dataclasses.replace(made, engine={"token_budget": 128, "max_num_seqs": 128})


@scheduler("slai")
def slai() -> Scheduler:
    """SLAI: decodes that would miss their time between tokens, then short prompts, then the other decodes.

    Source: after the idea of Bari, Hegde, de Veciana (arXiv 2508.01002), read in the abstract only. What
    "would miss" means is ours: due within two full iterations, as the cost model times them; requests without
    a target get `tpot_target_s` (0.1 s).
    """
    made = _policy(routine=Routine.SLAI, order=Order.PROMPT, x=SlaiSettings())
    return dataclasses.replace(made, engine={"token_budget": 512})


@scheduler("p-pas")
def p_pas() -> Scheduler:
    """P-PAS: vLLM V1 whose token budget falls while two prefills are present and somebody decodes.

    Source: Sämann (arXiv 2608.15171), rule as in the author's patch of vLLM 0.27.1 (TimoSaemann/ppas-vllm);
    the budgets are those of its Nemotron set-up.
    """
    made = vllm_v1()
    settings = dataclasses.replace(made.settings, budget_rule=Budget.PRESSURE, budget_low=1280)
    return dataclasses.replace(made, settings=settings, engine={**made.engine, "token_budget": 16384})


# ------------------------------------------------------------------------------ control


@scheduler("random-feasible")
def random_feasible() -> Scheduler:
    """The control: admissions, chunks and who decodes drawn at random, within what fits; no preemption.

    Source: ours. It reserves true peaks; the draws come from the engine's own generator (`seed`).
    """
    return _policy(routine=Routine.RANDOM, order=Order.RANDOM, test=Hold.PEAK, hold=Hold.PEAK)
