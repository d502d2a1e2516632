"""Fit the tables in llmsched_env/workloads/data to public traces: python scripts/fit_workload.py FOLDER [NAME
...]

FOLDER has the traces as NAME.csv.gz with the columns timestamp, input_tokens, output_tokens[, client]
(seconds, tokens). Only statistics are written: distribution functions, dependence of ranks, counts per bin of
time, variation of gaps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmsched_env.workloads.arrivals import Gamma, Weibull
from llmsched_env.workloads.lengths import Cells, Table, rank_correlation

DATA = Path(__file__).resolve().parent.parent / "llmsched_env" / "workloads" / "data"
LEVELS = [0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1]
FEW = 40  # clients with fewer rows share a table


@dataclasses.dataclass(frozen=True)
class Trace:
    """Where a table comes from, and how it is fitted."""

    file: str
    summary: str
    source: str
    licence: str
    citation: str
    bin_s: float = 60.0
    jitter_s: float = 0.0
    by_client: bool = False


TRACES = {
    "azure-conv": Trace(
        "azure_llm_2023_conv",
        "one hour of a chat service, November 2023",
        "github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv at b469a113",
        "CC-BY 4.0",
        "Patel et al., Splitwise, ISCA 2024",
    ),
    "azure-code": Trace(
        "azure_llm_2023_code",
        "one hour of a code completion service, November 2023, in bursts with silences up to 217 s",
        "github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_code.csv at b469a113",
        "CC-BY 4.0",
        "Patel et al., Splitwise, ISCA 2024",
        bin_s=5.0,
    ),
    "mooncake-conversation": Trace(
        "mooncake_fast25_conversation",
        "one hour of Kimi's long-context chat",
        "github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl at 3b5a5941",
        "Apache-2.0",
        "Qin et al., Mooncake, FAST 2025",
        jitter_s=3.0,
    ),
    "deepseek-r1": Trace(
        "servegen_deepseek_r1_6h_sample",
        "the busiest six hours of DeepSeek-R1 serving, drawn from ServeGen's models of 73 clients",
        "github.com/alibaba/ServeGen, data/reason/deepseek-r1",
        "Apache-2.0",
        "Xiang et al., ServeGen, 2025",
    ),
    "chatbot-arena": Trace(
        "vtc_chatbot_arena_10min",
        "ten minutes of Chatbot Arena, its 27 models taken for tenants",
        "github.com/Ying1123/VTC-artifact, fair_bench/real_trace.pkl at 192c2e20",
        "Apache-2.0",
        "Sheng et al., Fairness in Serving Large Language Models, OSDI 2024",
        by_client=True,
    ),
    "arxiv-summarization": Trace(
        "arxiv_summarization_lengths",
        "summaries of arXiv papers, up to 4096 tokens each; lengths only, Poisson arrivals",
        "github.com/microsoft/vidur, data/processed_traces/arxiv_summarization_*.csv at 7d475133",
        "MIT",
        "Agrawal et al., Vidur, MLSys 2024",
    ),
}


def fit(name: str, folder: Path) -> dict[str, Any]:
    """The table of a trace, ready for JSON."""
    trace = TRACES[name]
    rows = pd.read_csv(folder / f"{trace.file}.csv.gz", usecols=lambda c: c != "hash_ids_512")
    about = {f.name: getattr(trace, f.name) for f in dataclasses.fields(trace)}
    keys = ("summary", "source", "licence", "citation")
    table: dict[str, Any] = {"name": name, **{k: about[k] for k in keys}, "requests": len(rows)}
    if "timestamp" in rows:
        times = np.sort(rows["timestamp"].to_numpy(dtype=float))
        times = times - times[0]
        if trace.jitter_s:
            times = np.sort(times + np.random.default_rng(0).uniform(0, trace.jitter_s, len(times)))
        table |= arrivals(times, trace.bin_s)
    return table | {"classes": by_client(rows) if trace.by_client else [lengths(rows, 0, 0.0005, cells=True)]}


def arrivals(times: np.ndarray, bin_s: float) -> dict[str, Any]:
    """Mean rate, counts in bins, and the gaps in the time in which the rate is constant within the bins."""
    end = float(times[-1]) * (1 + 1 / len(times))
    bins = int(np.ceil(end / bin_s))
    edges = np.minimum(np.arange(bins + 1) * bin_s, end)
    counts = np.histogram(times, edges)[0]
    work = np.interp(times, edges, np.concatenate(([0], np.cumsum(counts))))
    gaps = np.diff(work)
    cv = round(float(gaps.std() / gaps.mean()), 3)
    drawn = {
        kind: np.diff(p.unit_times(200_000, np.random.default_rng(0))) for kind, p in _renewals(cv).items()
    }
    kind = min(drawn, key=lambda k: _distance(gaps / gaps.mean(), drawn[k]))
    profile = {"bin_s": bin_s, "last_s": round(float(edges[-1] - edges[-2]), 3), "gaps": kind, "cv": cv}
    return {"rate_rps": round(len(times) / end, 4), "arrivals": profile | {"counts": counts.tolist()}}


def _renewals(cv: float) -> dict[str, Gamma | Weibull]:
    return {"gamma": Gamma(cv), "weibull": Weibull(cv)}


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """Kolmogorov-Smirnov."""
    x, y = np.sort(x), np.sort(y)
    at = np.concatenate((x, y))
    return float(
        np.abs(np.searchsorted(x, at, "right") / len(x) - np.searchsorted(y, at, "right") / len(y)).max()
    )


def by_client(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A class for each client; clients with few rows have the lengths of all of them."""
    sizes = rows["client"].value_counts().sort_index()
    few = rows[rows["client"].map(sizes) < FEW]
    return [
        lengths(rows[rows["client"] == c] if n >= FEW else few, int(c), 0.01) | {"share": int(n)}
        for c, n in sizes.items()
    ]


def lengths(rows: pd.DataFrame, client: int, tolerance: float, cells: bool = False) -> dict[str, Any]:
    """A class: two distribution functions and how their ranks go together."""
    prompt, output = rows["input_tokens"].to_numpy(), rows["output_tokens"].to_numpy()
    table: dict[str, Any] = {"share": len(rows), "client": client}
    table |= {
        k: dataclasses.asdict(Table.of(v, tolerance)) for k, v in (("prompt", prompt), ("output", output))
    }
    table["rank_correlation"] = round(rank_correlation(prompt, output), 4)
    if cells:
        table["cells"] = dataclasses.asdict(Cells.of(prompt, output, LEVELS))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(TRACES)}")
    options = parser.parse_args()
    for name in options.names or TRACES:
        if name not in TRACES:
            sys.exit(f"no trace {name!r}; known: {', '.join(TRACES)}")
        path = DATA / f"{name}.json"
        path.write_text(json.dumps(fit(name, options.folder), separators=(",", ":")) + "\n")
        print(f"{path.name}: {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
