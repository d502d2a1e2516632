"""Reference schedulers: every one that matters, by name.

>>> import baselines
>>> baselines.get("sarathi").settings.chunked
True
"""

from __future__ import annotations

from baselines import infermax, policies, serving, systems, theory, tuned  # noqa: F401  (they register schedulers)
from baselines.experts import Expert, expert
from baselines.registry import get, has, names, scheduler

__all__ = ["Expert", "expert", "get", "has", "names", "scheduler"]
