"""Engine settings: one frozen dataclass, validated, resolved against a profile and a scheduler's own
defaults.
"""

from __future__ import annotations

import dataclasses
import math

from llmsched_env.errors import InputError, unknown

PREEMPTIONS = ("recompute", "swap")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What the engine can hold and do. `None` means: as the cost profile (KV capacity) or the scheduler's
    system (the rest) has it.

    Attributes:
        kv_blocks: usable KV-cache blocks (vLLM V1 counts one more, its null block).
        block_size: tokens per block; 1 makes the cache token granular.
        token_budget: most tokens of one iteration (vLLM: max_num_batched_tokens; Sarathi-Serve: chunk_size).
        max_num_seqs: most requests running at once.
        max_model_len: longest sequence, prompt and answer, in tokens; an answer that reaches it ends there.
            None: the KV capacity, or the longest that the workload declares if that is less.
        watermark: share of the blocks that an admission must leave free, in [0, 1).
        preemption: what happens to a victim's KV cache: dropped and recomputed, or swapped to a CPU tier.
        cpu_blocks: blocks of that CPU tier; None: unlimited.
        swap_bandwidth: bytes per second between GPU and CPU tier; inf: free of charge.
        swap_overlap: whether a transfer hides behind the iteration that it accompanies (max) or adds to it
            (sum).
        async_scheduling: whether an iteration is planned while the one before it runs, so that its
            completions and the arrivals during it are seen one iteration late (vLLM's default since 2026).
    """

    kv_blocks: int | None = None
    block_size: int = 16
    token_budget: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    watermark: float | None = None
    preemption: str | None = None
    cpu_blocks: int | None = None
    swap_bandwidth: float = 32e9
    swap_overlap: bool = False
    async_scheduling: bool | None = None

    def __post_init__(self) -> None:
        for name in ("kv_blocks", "block_size", "token_budget", "max_num_seqs", "max_model_len"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31
            ):
                raise InputError(f"{name} must be a whole number from 1 to 2147483647, not {value!r}")
        if self.cpu_blocks is not None and (
            not isinstance(self.cpu_blocks, int) or not 0 <= self.cpu_blocks < 2**31
        ):
            raise InputError(f"cpu_blocks must be a whole number, at least 0, not {self.cpu_blocks!r}")
        if self.watermark is not None and not 0 <= self.watermark < 1:
            raise InputError(f"watermark must be in [0, 1), not {self.watermark!r}")
        if self.preemption is not None and self.preemption not in PREEMPTIONS:
            raise unknown("preemption", self.preemption, PREEMPTIONS)
        if math.isnan(self.swap_bandwidth) or self.swap_bandwidth <= 0:
            raise InputError(
                f"swap_bandwidth must be positive bytes per second (inf: free), not {self.swap_bandwidth!r}"
            )

    @property
    def kv_tokens(self) -> int:
        """KV capacity in tokens of a resolved configuration."""
        assert self.kv_blocks is not None, "resolve the configuration first"
        return self.kv_blocks * self.block_size

    def replace(self, **changes: object) -> EngineConfig:
        """A copy with some settings changed; an unknown name is an `InputError`."""
        fields = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in fields:
                raise unknown("engine setting", name, fields)
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def or_else(self, **defaults: object) -> EngineConfig:
        """A copy in which settings that are None take the given default."""
        return self.replace(**{k: v for k, v in defaults.items() if getattr(self, k) is None})
