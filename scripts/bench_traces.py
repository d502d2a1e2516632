"""Seconds and peak memory (MB) of reading a trace of a million rows: python scripts/bench_traces.py"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from memory import peak_rss_mb

ROWS = 1_000_000


def write(path: Path) -> None:
    """A plain trace; in blocks, so that making it does not count in the peak."""
    rng = np.random.default_rng(0)
    start = 0.0
    with open(path, "w") as file:
        file.write("timestamp,input_tokens,output_tokens\n")
        for _ in range(ROWS // 10_000):
            times = start + np.cumsum(rng.exponential(0.1, 10_000))
            start = times[-1]
            rows = zip(times, rng.integers(1, 5000, 10_000), rng.integers(1, 1000, 10_000), strict=True)
            file.writelines(f"{t:.4f},{i},{o}\n" for t, i, o in rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "million.csv")
        write(path)
        begin = time.perf_counter()
        from llmsched_env.workloads import traces  # its imports, pandas among them, are part of the time

        count = len(traces.read(path))
        seconds = time.perf_counter() - begin
    print(f"{seconds:.2f} {peak_rss_mb():.0f} (s and MB for {count} rows)")


if __name__ == "__main__":
    main()
