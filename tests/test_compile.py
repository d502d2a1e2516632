"""The cache of compiled functions: found again by the next process, and never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROBE = """
from llmsched_env.core.compile import cache_dir, njit
from llmsched_env.core.cost import decode_line
import numpy as np
decode_line(np.array([1.0, 0, 0, 1, 1, 1, 1, 1]), 3)
print(cache_dir(), sum(decode_line.stats.cache_hits.values()))
"""


def probe(**environment: str) -> tuple[Path, int]:
    """Where a fresh process has its cache, and how often it found something there."""
    clean = {
        key: value for key, value in os.environ.items() if key not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
    }
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **environment})
    folder, hits = done.stdout.split()
    return Path(folder), int(hits)


def test_the_next_process_finds_what_was_compiled(tmp_path):
    folder, hits = probe(NUMBA_CACHE_DIR=str(tmp_path))
    assert folder.is_relative_to(tmp_path) and hits == 0
    assert probe(NUMBA_CACHE_DIR=str(tmp_path)) == (folder, 1)


def test_a_home_that_cannot_be_written(tmp_path):
    folder, _ = probe(HOME=os.devnull, TMPDIR=str(tmp_path))
    assert folder.is_relative_to(tmp_path)


def test_an_edited_callee_is_compiled_anew(tmp_path):
    head = "from llmsched_env.core.compile import njit\n"
    (tmp_path / "caller.py").write_text(
        f"{head}from callee import one\n@njit\ndef two():\n    return 2 * one()\nprint(two())\n"
    )
    for value in (1, 5):
        (tmp_path / "callee.py").write_text(f"{head}@njit\ndef one():\n    return {value}\n")
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, str(tmp_path / "caller.py")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert int(done.stdout) == 2 * value
