"""Two runs of the Vidur simulator, re-simulated: python scripts/check_vidur.py FOLDER

Llama-3-8B on one A100, 2,000 requests, 30,208 blocks of 16, at most 128 requests at once, watermark 1 %;
FOLDER holds the per-request and per-batch results of Vidur under Sarathi (chunk 512) and vLLM:
conv_q6.45_{sarathi512,vllm}{,_batches}.csv.gz. Prints mean TTFT, TPOT and end-to-end latency of Vidur and of
ours, with three cost models:

    hinge        the profile a100-llama3-8b as it stands
    replayed     Vidur's own batches, priced by the hinge: what the cost model alone does to the busy time
    refitted     a hinge fitted to the batches of this very run: what is left once the cost model is set right
    padded       for vLLM, the refitted hinge and one more rule: Vidur lets prompts share a batch only while
    their number times the longest
                 is within the token budget (in none of its batches of several prompts is it above), vLLM
                 while their sum is
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

import baselines
from llmsched_env import EngineConfig, Requests, Result, profiles, simulate
from llmsched_env.profiles import Profile
from llmsched_env.profiles.fit import fit
from llmsched_env.scheduling import Scheduler
from llmsched_env.scheduling.own import first, grant, known_tokens

PROFILE = "a100-llama3-8b"
RUNS = {"sarathi512": ("sarathi", 512), "vllm": ("vllm-v0", 4096)}


@numba.njit
def vllm_with_padding(e):  # type: ignore[no-untyped-def]
    """vLLM v0's default scheduler as in Vidur, for a run without preemptions: prompts are charged as if
    padded to the longest.
    """
    longest = 0
    r = first(e)
    while r >= 0 and e.s.num_running < e.s.max_num_seqs:
        prompt = known_tokens(e.req[r])
        longest = max(longest, prompt)
        if (e.s.num_planned + 1) * longest > e.s.token_budget or e.req[
            r
        ].need + e.s.watermark_blocks > e.s.free:
            break
        grant(e, r, prompt)
        r = first(e)
    if e.s.num_planned == 0:
        for k in range(e.s.num_running):
            grant(e, e.running[k], 1)


def requests_of(rows: pd.DataFrame) -> Requests:
    """The requests of a run; Vidur's decode tokens are the answer's tokens."""
    rows = rows.sort_values("arrived_at", kind="stable")
    return Requests.of(rows["arrived_at"], rows["num_prefill_tokens"], rows["num_decode_tokens"])


def features(batches: pd.DataFrame) -> NDArray[np.float64]:
    """The cost features of Vidur's batches, (n, 6); its columns hold sums of c*k and c^2 over chunks."""
    return np.column_stack(
        [
            batches["prefill_tokens"],
            batches["n_prefill_reqs"],
            batches["prefill_sum_chunk_x_ctx"] + 0.5 * batches["prefill_sum_chunk_sq"],
            batches["prefill_kv"],
            batches["n_decode"],
            batches["decode_kv_tokens"],
        ]
    ).astype(np.float64)


def vidur_times(rows: pd.DataFrame) -> dict[str, float]:
    """Vidur's means, seconds; TPOT over the tokens after the first."""
    later = np.maximum(rows["num_decode_tokens"] - 1, 1)
    return {
        "TTFT": rows["ttft"].mean(),
        "TPOT": ((rows["completed_at"] - rows["prefill_completed_at"]) / later)[
            rows["num_decode_tokens"] > 1
        ].mean(),
        "E2E": rows["e2e"].mean(),
    }


def our_times(result: Result) -> dict[str, float]:
    metrics = result.metrics()
    return {
        "TTFT": metrics["ttft"]["mean"],
        "TPOT": metrics["tpot"]["mean"],
        "E2E": metrics["latency"]["mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for run, (scheduler, budget) in RUNS.items():
        rows = pd.read_csv(folder / f"conv_q6.45_{run}.csv.gz")
        batches = pd.read_csv(folder / f"conv_q6.45_{run}_batches.csv.gz")
        requests = requests_of(rows)
        engine = EngineConfig(
            kv_blocks=30208, block_size=16, token_budget=budget, max_num_seqs=128, watermark=0.01
        )
        measured = features(batches)
        seconds = (batches["completed_at"] - batches["scheduled_at"]).to_numpy(float)
        hinge = profiles.get(PROFILE)
        refitted: Profile = fit(measured, seconds, "hinge", name=f"vidur-{run}", kv_tokens=30208 * 16)
        table = {"Vidur": vidur_times(rows)}
        busy = {"Vidur": seconds.sum(), "hinge on Vidur's batches": hinge.time(*measured.T).sum()}
        count = {"Vidur": (len(batches), int((batches["prefill_tokens"] > 0).sum()))}
        ours = baselines.get(scheduler)
        variants = [("hinge", ours, hinge), ("refitted", ours, refitted)]
        if run == "vllm":
            variants.append(("padded", Scheduler("vidur-vllm", plan=vllm_with_padding), refitted))
        for name, decides, profile in variants:
            result = simulate(requests, decides, profile, engine, record="iterations")
            assert result.iterations is not None
            table[name] = our_times(result)
            busy[name] = result.busy_s
            count[name] = (result.iterations_total, int((result.iterations["prefill_tokens"] > 0).sum()))
        print(f"{run}: {scheduler}, token budget {budget}")
        print(
            f"  {'':10s}"
            + "".join(f"{key:>12s}{'':9s}" for key in table["Vidur"])
            + f"{'iterations':>12s}{'with prefill':>14s}"
        )
        for name, times in table.items():
            cells = [
                f"{value:12.4f}{100 * (value / table['Vidur'][key] - 1):+7.1f} %"
                for key, value in times.items()
            ]
            print(f"  {name:10s}" + "".join(cells) + f"{count[name][0]:12d}{count[name][1]:14d}")
        print("  busy seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in busy.items()))


if __name__ == "__main__":
    main()
