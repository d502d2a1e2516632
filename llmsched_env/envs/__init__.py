"""Environments for Gymnasium; importing the package registers them.

Ids: llmsched/Decision-v0, llmsched/Batch-v0, llmsched/Dispatch-v0. From a process that has not imported the
package, `gymnasium.make("llmsched_env:llmsched/Decision-v0")`.
"""

from __future__ import annotations

import gymnasium

IDS = {
    "llmsched/Decision-v0": "DecisionEnv",
    "llmsched/Batch-v0": "BatchEnv",
    "llmsched/Dispatch-v0": "DispatchEnv",
}


def register() -> None:
    """Register the environments, scalar and native vector; again does nothing."""
    for name, scalar in IDS.items():
        if name not in gymnasium.registry:
            gymnasium.register(
                id=name,
                entry_point=f"llmsched_env.envs.single:{scalar}",
                vector_entry_point=f"llmsched_env.envs.vector:{scalar.replace('Env', 'VectorEnv')}",
            )


register()
