"""What measuring takes of a device's memory, and how much KV cache an engine would have there."""

from __future__ import annotations

import dataclasses

from llmsched_env.errors import InputError
from llmsched_env.measure.settings import GIB, Settings
from llmsched_env.profiles.roofline import DecoderShape

PAGE = 256
"""Tokens of a page of the KV cache: the smallest that flash attention 2 takes."""

SPARE = {"cuda": 1.0 * GIB, "cpu": 0.25 * GIB}
"""Bytes that libraries take: context, workspaces, graphs."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """In bytes, where nothing else is said.

    Attributes:
        total: of the device, as far as it is to be used (`Settings.utilization`).
        weights: of the layers that are built, embedding and head.
        activations: estimate for an iteration of the most tokens.
        page: of a page of the KV cache, in the layers that are built.
        pages: of the KV cache that batches may fill: what the engine would have, and what fits here.
        capacity_tokens: of the engine's KV cache with all layers; None: its weights do not fit.
    """

    total: float
    weights: float
    activations: float
    page: float
    pages: int
    capacity_tokens: int | None

    @property
    def needed(self) -> float:
        """Together, with the whole of the KV cache."""
        return self.weights + self.activations + self.pages * self.page


def weights(shape: DecoderShape, layers: int) -> float:
    """Bytes of so many layers, embedding and head."""
    rest = shape.parameters - shape.layer_parameters
    return (shape.layer_parameters * layers / shape.layers + rest) * shape.dtype_bytes


def activations(shape: DecoderShape, settings: Settings) -> float:
    """Bytes that an iteration of the most tokens takes beside weights and KV cache: an estimate.

    What lives at once is at most the residual, a normed copy, and either the projections of attention or the
    gated layer's two matrices and their product; the logits of the most requests come later.
    """
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    row = 3 * shape.hidden + max(2 * attention, 4 * shape.ffn)
    rows = settings.max_decodes + 64
    bytes_ = (settings.max_tokens * row + 2 * rows * shape.vocab) * shape.dtype_bytes
    return bytes_ + SPARE[settings.device]


def capacity(shape: DecoderShape, total: float, activations: float) -> int | None:
    """Tokens of KV cache that `total` bytes leave beside all weights and activations; None: not one page."""
    tokens = int((total - weights(shape, shape.layers) - activations) // shape.kv_bytes_per_token)
    return tokens if tokens >= PAGE else None


def of(settings: Settings, device_bytes: float) -> Memory:
    """The plan for a device with so much memory.

    Raises:
        InputError: it does not suffice; says how many layers it would suffice for.
    """
    shape, layers = settings.shape, settings.built_layers
    total = device_bytes * settings.utilization
    used = activations(shape, settings)
    page = PAGE * shape.kv_bytes_per_token * layers / shape.layers
    least = -(-settings.max_context // PAGE) + 4
    free = total - weights(shape, layers) - used
    if free < least * page:
        raise InputError(_too_little(settings, total, used, least))
    held = capacity(shape, total, used)
    pages = int(free // page)
    if held is not None:
        pages = min(pages, max(held // PAGE, least))
    largest = settings.max_decodes * -(-settings.max_context // PAGE) + settings.max_tokens // PAGE + 64
    return Memory(total, weights(shape, layers), used, page, min(pages, largest), held)


def _too_little(settings: Settings, total: float, used: float, least: int) -> str:
    shape, layers = settings.shape, settings.built_layers
    page = PAGE * shape.kv_bytes_per_token / shape.layers  # of a layer
    layer = shape.layer_parameters / shape.layers * shape.dtype_bytes + least * page
    fit = int((total - weights(shape, 0) - used) // layer)
    what = (
        f"{layers} layers of {shape.name} in {settings.dtype} take {weights(shape, layers) / GIB:.1f} GiB, "
        f"an iteration of {settings.max_tokens} tokens {used / GIB:.1f} GiB and one sequence of "
        f"{settings.max_context} tokens {least * page * layers / GIB:.1f} GiB, but {total / GIB:.1f} GiB are "
        "to be used"
    )
    if fit >= 1:
        return f"{what}; --layers {min(fit, shape.layers)} fits, the times are then scaled to {shape.layers}"
    return f"{what}; take a smaller decoder, or smaller --max-tokens and --max-context"
