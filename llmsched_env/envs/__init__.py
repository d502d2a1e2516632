"""Environments for Gymnasium; importing the package registers them.

Ids: llmsched/Decision-v0, llmsched/Batch-v0, llmsched/Dispatch-v0, llmsched/AgentNetwork-v0. From a process
that has not imported the package, `gymnasium.make("llmsched_env:llmsched/Decision-v0")`.
"""

from __future__ import annotations

import gymnasium

IDS = {
    "llmsched/Decision-v0": ("single:DecisionEnv", "vector:DecisionVectorEnv"),
    "llmsched/Batch-v0": ("single:BatchEnv", "vector:BatchVectorEnv"),
    "llmsched/Dispatch-v0": ("single:DispatchEnv", "vector:DispatchVectorEnv"),
}
"""Environments of one engine: modules and classes, scalar and native vector."""
NETWORK_IDS = {
    "llmsched/AgentNetwork-v0": ("agent_network:AgentNetworkEnv", "agent_network:AgentNetworkVectorEnv"),
}
"""Likewise those of networks of engines."""


def register() -> None:
    """Register the environments, scalar and native vector; again does nothing."""
    for name, (scalar, vector) in {**IDS, **NETWORK_IDS}.items():
        if name not in gymnasium.registry:
            gymnasium.register(
                id=name,
                entry_point=f"llmsched_env.envs.{scalar}",
                vector_entry_point=f"llmsched_env.envs.{vector}",
            )


register()
