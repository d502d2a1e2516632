"""llmsched_env: schedulers for LLM inference, simulated, learned and judged.

>>> import baselines
>>> from llmsched_env import simulate, workloads
>>> workload = workloads.get("fixed-100-10", num_requests=5, rate=1.0, seed=0)
>>> result = simulate(workload, baselines.get("sarathi"))
>>> int(result.generated_tokens.sum())
50
"""

from __future__ import annotations

from llmsched_env import envs, profiles, workloads
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.requests import Requests
from llmsched_env.core.schedule import Schedule
from llmsched_env.errors import InputError
from llmsched_env.scheduling import Scheduler, Settings
from llmsched_env.simulation import Result, replay, simulate

__all__ = [
    "EngineConfig",
    "InputError",
    "Requests",
    "Result",
    "Schedule",
    "Scheduler",
    "Settings",
    "envs",
    "profiles",
    "replay",
    "simulate",
    "workloads",
]
__version__ = "0.1.0"
