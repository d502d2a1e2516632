"""The optimum: exact solvers, certified bounds and best known schedules.

>>> from baselines.optimal import Instance
>>> cost = {"form": "linear", "c0": 1.0}
>>> len(Instance.of([[0, 8, 4], [0, 8, 2]], kv_tokens=16, token_budget=64, cost=cost))
2
"""

from __future__ import annotations

from baselines.optimal.env import make_env, scenario_of
from baselines.optimal.instance import ALLOWANCES, OBJECTIVES, Instance
from baselines.optimal.methods import METHODS, solve
from baselines.optimal.solution import Solution, replay

__all__ = [
    "ALLOWANCES",
    "METHODS",
    "OBJECTIVES",
    "Instance",
    "Solution",
    "make_env",
    "replay",
    "scenario_of",
    "solve",
]
