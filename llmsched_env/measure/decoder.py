"""A decoder with random weights that runs one iteration as a serving engine does.

Projections of queries, keys and values in one matrix, gate and up in another; keys and values go to a paged
cache; the head works on the one row of each request that has logits, and the likeliest token is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from llmsched_env.measure import attention
from llmsched_env.measure.attention import Part, Tensor
from llmsched_env.measure.device import Device
from llmsched_env.measure.grid import Batch
from llmsched_env.measure.memory import PAGE
from llmsched_env.measure.settings import Settings
from llmsched_env.measure.shapes import DTYPES
from llmsched_env.profiles.roofline import DecoderShape

_EPSILON = 1e-5
_THETA = 500_000.0  # of rotary embeddings: Llama 3's


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights, each (outputs, inputs); of norms (hidden,)."""

    norm_attention: Tensor
    qkv: Tensor
    out: Tensor
    norm_ffn: Tensor
    gate_up: Tensor
    down: Tensor


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch as tensors: rows of decodes first, then those of the chunks.

    Attributes:
        tokens, positions, slots: int64 (b,): ids, places in the sequence, places in the cache.
        last: int64 (requests,): the row of each request that has logits.
        parts: decodes and prefills, those that there are.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    last: Tensor
    parts: tuple[Part, ...]


class Decoder:
    """The decoder on a device.

    Attributes:
        shape, layers: of the decoder, and the weights of the layers that are built.
        embedding, norm, head: weights (vocab, hidden), (hidden,), (vocab, hidden).
        keys, values: the KV cache, of each layer (pages, PAGE, KV heads, head_dim).
        notes: what was chosen: the kernels of attention, whether small operations are fused.
    """

    def __init__(
        self,
        settings: Settings,
        on: Device,
        pages: int,
        *,
        kernels: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build it, fill weights and cache at random, and choose the kernels.

        Args:
            pages: of the KV cache.
            kernels: of attention, by use; None: the fastest of those that the settings allow.
            dtype: another than that of the settings, for tests.

        Raises:
            InputError: no kernel for its attention.
        """
        self.shape: DecoderShape = settings.shape
        self._on, self._dtype = on, dtype or getattr(torch, DTYPES[settings.dtype][0])
        self._random = torch.Generator(on.torch).manual_seed(settings.seed)
        shape = self.shape
        widths = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim)
        self._widths = (widths[0], widths[1], widths[1])

        def ones() -> Tensor:
            return torch.ones(shape.hidden, dtype=self._dtype, device=on.torch)

        self.layers = [
            Layer(
                norm_attention=ones(),
                qkv=self._normal(sum(self._widths), shape.hidden),
                out=self._normal(shape.hidden, widths[0]),
                norm_ffn=ones(),
                gate_up=self._normal(2 * shape.ffn, shape.hidden),
                down=self._normal(shape.hidden, shape.ffn),
            )
            for _ in range(settings.built_layers)
        ]
        self.embedding = self._normal(shape.vocab, shape.hidden)
        self.norm = ones()
        self.head = self.embedding if shape.tied else self._normal(shape.vocab, shape.hidden)
        cache = (pages, PAGE, shape.kv_heads, shape.head_dim)
        self.keys = [self._normal(*cache, scale=1.0) for _ in self.layers]
        self.values = [self._normal(*cache, scale=1.0) for _ in self.layers]
        self._cos, self._sin = self._rotary(settings.max_context)
        self.notes: dict[str, Any] = {}
        fused = settings.fuse if settings.fuse is not None else on.kind == "cuda"
        self._small = self._fused() if fused else _EAGER
        self.notes.setdefault("small operations", "eager")
        self._kernels, self.notes["attention"] = attention.choose(
            on, self._samples(settings, pages), kernels or settings.attention
        )

    # ------------------------------------------------------------------ one iteration

    def inputs(self, batch: Batch) -> Inputs:
        """A batch as tensors, its pages from the beginning of the cache, its tokens at random."""
        parts: list[Part] = []
        row = page = 0
        decodes = [(n, 1, context - 1) for n, context in batch.decodes]
        behind = any(cached for _, _, cached in batch.chunks)
        for use, requests in (("decode", decodes), ("chunk" if behind else "prefill", batch.chunks)):
            if requests:
                made, page = attention.part(use, requests, row, page, PAGE, self._on)
                parts.append(made)
                row = made.rows.stop
        positions: list[Tensor] = []
        slots: list[Tensor] = []
        for made in parts:
            for group in made.groups:
                place = torch.arange(group.total - group.new, group.total)
                for i in range(group.count):
                    positions.append(place)
                    slots.append(place + (group.page + i * group.pages) * PAGE)
        last = torch.cat([made.starts[1:].cpu() - 1 + made.rows.start for made in parts])
        tokens = torch.randint(
            self.shape.vocab, (row,), generator=self._random, device=self._on.torch, dtype=torch.int64
        )
        on = self._on.torch
        return Inputs(
            tokens, torch.cat(positions).to(on), torch.cat(slots).to(on), last.long().to(on), tuple(parts)
        )

    def step(self, inputs: Inputs) -> Tensor:
        """Run one iteration: the next token of each request, int64 (requests,)."""
        return self.logits(inputs).argmax(-1)

    @torch.inference_mode()
    def logits(self, inputs: Inputs) -> Tensor:
        """Run one iteration: the logits of each request, (requests, vocab)."""
        residual = F.embedding(inputs.tokens, self.embedding)
        normed = F.rms_norm(residual, residual.shape[1:], self.layers[0].norm_attention, _EPSILON)
        cos, sin = self._cos[inputs.positions], self._sin[inputs.positions]
        following = [*(layer.norm_attention for layer in self.layers[1:]), self.norm]
        for layer, keys, values, norm in zip(self.layers, self.keys, self.values, following, strict=True):
            mixed = F.linear(normed, layer.qkv)
            q, k, v = self._small.rotate(mixed, cos, sin, self._widths, self.shape.head_dim)
            keys.view(-1, *k.shape[1:]).index_copy_(0, inputs.slots, k)
            values.view(-1, *v.shape[1:]).index_copy_(0, inputs.slots, v)
            seen = self._attention(q, keys, values, inputs).flatten(1)
            residual, normed = self._small.add_norm(F.linear(seen, layer.out), residual, layer.norm_ffn)
            gated = self._small.gate(F.linear(normed, layer.gate_up))
            residual, normed = self._small.add_norm(F.linear(gated, layer.down), residual, norm)
        return F.linear(normed[inputs.last], self.head)

    @torch.inference_mode()
    def ends(self, inputs: Inputs) -> Tensor:
        """An iteration without its layers: embedding, last norm, head."""
        residual = F.embedding(inputs.tokens, self.embedding)
        normed = F.rms_norm(residual, residual.shape[1:], self.norm, _EPSILON)
        return F.linear(normed[inputs.last], self.head).argmax(-1)

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor, inputs: Inputs) -> Tensor:
        found = [self._kernels[made.use](q[made.rows], keys, values, made) for made in inputs.parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    # ------------------------------------------------------------------ building

    def _normal(self, *size: int, scale: float | None = None) -> Tensor:
        """Numbers at random, such that what goes through stays of size 1.

        With zeros a GPU would draw less power, and run faster than it ever does at work.
        """
        empty = torch.empty(size, dtype=self._dtype, device=self._on.torch)
        return empty.normal_(0.0, size[-1] ** -0.5 if scale is None else scale, generator=self._random)

    def _rotary(self, longest: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (longest, 1, head_dim / 2)."""
        half = self.shape.head_dim // 2
        frequencies = _THETA ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(longest, dtype=torch.float64)[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        return cos.to(self._on.torch, self._dtype), sin.to(self._on.torch, self._dtype)

    def _samples(self, settings: Settings, pages: int) -> dict[str, tuple[Tensor, Tensor, Tensor, Part]]:
        """What attention kernels are tried on, of the sizes that matter most, as far as the cache goes."""
        context = min(2048, settings.max_context, pages * PAGE)
        new = min(1024, settings.max_tokens, context // 2)
        # Decodes of several lengths, as engines have them: some kernels need a call for each.
        each = max(1, min(32, settings.max_decodes, pages // -(-context // PAGE)) // 4)
        decodes = [(each, 1, max(1, context // part) - 1) for part in (1, 2, 3, 4)]
        while sum(n * -(-(cached + 1) // PAGE) for n, _, cached in decodes) > pages:
            decodes.pop()
        found = {}
        for use, requests in (
            ("decode", decodes),
            ("prefill", [(1, new, 0)]),
            ("chunk", [(1, new, context - new)]),
        ):
            made, _ = attention.part(use, requests, 0, 0, PAGE, self._on)
            query = self._normal(made.rows.stop, self.shape.heads, self.shape.head_dim, scale=1.0)
            found[use] = (query, self.keys[0], self.values[0], made)
        return found

    def _fused(self) -> _Small:
        """The small operations, each compiled to one kernel; eager, and a note why, where that fails."""
        try:
            small = _compiled()
            width, dim = sum(self._widths), self.shape.head_dim
            with torch.inference_mode():
                for rows in (2, 3):  # two numbers of them: see `_compiled`
                    x, residual = (self._normal(rows, self.shape.hidden, scale=1.0) for _ in range(2))
                    gates, mixed = self._normal(rows, 2 * self.shape.ffn), self._normal(rows, width)
                    positions = torch.arange(rows, device=self._on.torch)
                    cos, sin = self._cos[positions], self._sin[positions]
                    for got, expected in (
                        (small.add_norm(x, residual, self.norm), _EAGER.add_norm(x, residual, self.norm)),
                        ((small.gate(gates),), (_EAGER.gate(gates),)),
                        (
                            small.rotate(mixed, cos, sin, self._widths, dim),
                            _EAGER.rotate(mixed, cos, sin, self._widths, dim),
                        ),
                    ):
                        for a, b in zip(got, expected, strict=True):
                            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
        except Exception as error:  # no compiler, no Triton, ...: it says so in many ways
            self.notes["small operations"] = f"eager: {' '.join(str(error).split())[:120]}"
            return _EAGER
        self.notes["small operations"] = "fused"
        return small


# ---------------------------------------------------------------------- small operations


@dataclasses.dataclass(frozen=True)
class _Small:
    """Operations between the matrix products, each of which reads and writes its rows once where fused."""

    add_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor, tuple[int, int, int], int], tuple[Tensor, Tensor, Tensor]]
    gate: Callable[[Tensor], Tensor]


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and its RMS norm."""
    total = x + residual
    return total, F.rms_norm(total, total.shape[1:], weight, _EPSILON)


def _rotate(
    mixed: Tensor, cos: Tensor, sin: Tensor, widths: tuple[int, int, int], head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (b, heads, head_dim), rotary embeddings applied to the first two."""
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in mixed.split(widths, dim=1))

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return turn(q), turn(k), v


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


_EAGER = _Small(_add_norm, _rotate, _gate)


def _compiled() -> _Small:
    import torch._dynamo

    # For any number of rows; one, and numbers that are no multiples of 16, may have versions of their own.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def fuse(function: Any) -> Any:
        # What differs between the first two calls becomes variable, and nothing else: that is the rows.
        # Widths that the compiler knows make kernels that read a row once, and calls that check less.
        return torch.compile(function, fullgraph=True)

    return _Small(fuse(_add_norm), fuse(_rotate), fuse(_gate))
