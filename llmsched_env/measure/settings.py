"""What to measure, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmsched_env.errors import InputError, unknown
from llmsched_env.measure import shapes
from llmsched_env.profiles.roofline import DecoderShape

DEVICES = ("cuda", "cpu")
KERNELS = ("auto", "paged-flash", "paged-flash3", "sdpa-cudnn", "sdpa-flash", "sdpa")
"""Attention: the fastest of the others, or one of them; see `measure.attention`."""

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure, and how. Validated when made.

    Attributes:
        model: one of `shapes.names()`, or the path of a config.json.
        dtype: of weights, activations and KV cache: bf16, fp16 or fp32.
        device: "cuda", or "cpu" to try the program.
        layers: how many are built and timed; the times are scaled to all of the model. None: all, and nothing
            is scaled.
        quick: a coarser grid, for a first look.
        max_tokens: most tokens of an iteration.
        max_context: longest sequence.
        max_decodes: most decodes of an iteration.
        seed: of weights, of the batches that judge the fits, and of the order.
        warmup: repetitions that are not timed, of each batch.
        repeats: repetitions that are timed, at least.
        seconds: of which more are made, up to so long for a batch (or 100 of them).
        graph_tokens: batches of at most so many tokens are replayed as a CUDA graph, as engines do. 0: none.
        fuse: compile norms, rotary embeddings and activations to one kernel each. None: on a GPU.
        attention: one of `KERNELS`.
        flash: another implementation of flash attention that is installed, such as "FA3"; None: PyTorch's.
        utilization: part of the memory for weights, activations and KV cache, as vLLM's
            gpu_memory_utilization.
        memory_gib: of the device; None: what it has.
    """

    model: str
    dtype: str = "bf16"
    device: str = "cuda"
    layers: int | None = None
    quick: bool = False
    max_tokens: int = 8192
    max_context: int = 16384
    max_decodes: int = 256
    seed: int = 0
    warmup: int = 3
    repeats: int = 10
    seconds: float = 1.0
    graph_tokens: int = 512
    fuse: bool | None = None
    attention: str = "auto"
    flash: str | None = None
    utilization: float = 0.9
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        shape = self.shape
        if self.device not in DEVICES:
            raise unknown("device", self.device, DEVICES)
        if self.attention not in KERNELS:
            raise unknown("attention", self.attention, KERNELS)
        least = {"max_tokens": 32, "max_context": 64, "max_decodes": 4, "warmup": 1, "repeats": 3}
        for name, value in {**least, "seed": 0, "graph_tokens": 0}.items():
            if getattr(self, name) < value:
                raise InputError(f"{name} {getattr(self, name)} must be at least {value}")
        if self.layers is not None and not 1 <= self.layers <= shape.layers:
            raise InputError(f"layers {self.layers} must be from 1 to {shape.layers}, those of {shape.name}")
        if self.max_decodes > self.max_tokens:
            raise InputError(
                f"max_decodes {self.max_decodes} is more than max_tokens {self.max_tokens}, and a decode is "
                "one token"
            )
        if not self.seconds >= 0:
            raise InputError(f"seconds {self.seconds} must be at least 0")
        if not 0 < self.utilization <= 1:
            raise InputError(f"utilization {self.utilization} must be above 0 and at most 1")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise InputError(f"memory_gib {self.memory_gib} must be above 0")

    @property
    def shape(self) -> DecoderShape:
        """The decoder, with the bytes of the dtype."""
        return shapes.get(self.model, self.dtype)

    @property
    def built_layers(self) -> int:
        """How many layers are built and timed."""
        return self.layers or self.shape.layers

    def facts(self) -> dict[str, Any]:
        """What the measured times depend on; a session goes on only where these are the same."""
        found = dataclasses.asdict(self)
        # Another model's file may have the same name.
        return {**found, "layers": self.built_layers, "shape": dataclasses.asdict(self.shape)}
