"""Networks of engines that serve programs of agents: several stations, routing, workflows, disciplines.

`networks.core` is compiled: `core.state` has the arrays, `core.loop` what happens when, `core.route` routing,
`core.keys` disciplines, `core.assemble` makes the arrays.
"""

from __future__ import annotations

from llmsched_env.networks import disciplines
from llmsched_env.networks.jobs import Jobs

__all__ = ["Jobs", "disciplines"]
