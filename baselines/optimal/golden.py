"""The golden suite: 200 small instances with their optima, for checking solvers and environments."""

from __future__ import annotations

import json
from pathlib import Path

from baselines.optimal.instance import Instance

PATH = Path(__file__).parent / "data" / "golden.json"


def load() -> list[tuple[Instance, float]]:
    """Every instance with its optimum, proved by the exact search (`scripts/make_golden.py` made them)."""
    suite = []
    for text in json.loads(PATH.read_text(encoding="utf-8")):
        optimum = text.pop("optimum")
        suite.append((Instance.from_json(text), optimum))
    return suite
