"""Attention of a batch over a paged KV cache, by whichever kernel of PyTorch is fastest on the device.

The pages of a request lie one after the other. So the same cache is read through a block table by flash
attention, all requests in one call as engines do, and as plain tensors by `scaled_dot_product_attention`, one
call for the requests that are alike. Which is faster depends on the GPU and on what is asked: each is tried
for decodes, for prompts and for chunks behind a context, checked against plain float32, and timed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from llmsched_env.errors import InputError
from llmsched_env.measure.device import Device, cause, out_of_memory, warm

USES = ("decode", "prefill", "chunk")
"""One new token; new tokens with nothing before them; new tokens behind a context."""

Tensor = torch.Tensor
Kernel = Callable[[Tensor, Tensor, Tensor, "Part"], Tensor]
"""kernel(query (rows, heads, head_dim), keys, values (pages, page, KV heads, head_dim), part) -> as query."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Of the norm. In bfloat16 it is 2e-3; a decode that misses its newest token would be off by 3e-2."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Requests of a batch that are alike.

    Attributes:
        count: how many.
        new: tokens of each in this iteration.
        total: tokens of each afterwards.
        row: the first of their rows, which follow one another.
        page: the first of their pages, likewise; each request has `pages`.
        mask: bool (new, total), what each new token sees, for kernels that want it; None: as `bias`.
        bias: causal, ending with the last token; None: a decode, which sees all.
    """

    count: int
    new: int
    total: int
    row: int
    page: int
    pages: int
    mask: Tensor | None
    bias: Any


@dataclasses.dataclass(frozen=True)
class Part:
    """The decodes of a batch, or its prefills, that one kernel serves.

    Attributes:
        use: one of `USES`.
        groups: of requests; `rows`: rows of all.
        starts, lengths, offsets: int32 of the requests: first row of each and the end (n + 1,), tokens of
            each (n,), their sums (n + 1,).
        table: int32 (n, most pages), the block table.
        most_new, most_total: over the requests.
    """

    use: str
    groups: tuple[Group, ...]
    rows: slice
    starts: Tensor
    lengths: Tensor
    offsets: Tensor
    table: Tensor
    most_new: int
    most_total: int


def part(
    use: str, requests: Sequence[tuple[int, int, int]], row: int, page: int, page_size: int, on: Device
) -> tuple[Part, int]:
    """The part of a batch with groups (how many, new tokens, cached tokens), and the first page after it.

    Args:
        use: one of `USES`.
        row, page: its first.
    """
    groups, first, starts, lengths, tables = [], row, [0], [], []
    for count, new, cached in requests:
        total, pages = new + cached, -(-(new + cached) // page_size)
        bias = causal_lower_right(new, total) if new > 1 else None
        plain = bias is not None and cached and on.kind == "cpu"  # it would be made anew each time
        mask = torch.ones(new, total, dtype=torch.bool).tril(cached) if plain else None
        groups.append(Group(count, new, total, row - first, page, pages, mask, bias))
        for _ in range(count):
            starts.append(starts[-1] + new)
            lengths.append(total)
            tables.append(range(page, page + pages))
            row, page = row + new, page + pages
    widest = max(len(pages) for pages in tables)
    table = [[*pages, *[0] * (widest - len(pages))] for pages in tables]
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)

    def ints(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=on.torch)

    made = Part(
        use,
        tuple(groups),
        slice(first, row),
        ints(starts),
        ints(lengths),
        ints(offsets),
        ints(table),
        max(new for _, new, _ in requests),
        max(lengths),
    )
    return made, page


def plain(query: Tensor, keys: Tensor, values: Tensor, part: Part) -> Tensor:
    """What every kernel should give: softmax(Q K^T / sqrt(head_dim)) V in float32, or float64 if given it."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.empty(query.shape, dtype=wide, device=query.device)
    for group in part.groups:
        seen = torch.ones(group.new, group.total, dtype=torch.bool, device=query.device)
        seen = seen.tril(group.total - group.new)
        found = []
        for one in zip(*_views(query, keys, values, group), strict=True):  # by request: it takes much memory
            q, k, v = (x.to(wide) for x in one)
            k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            found.append(scores.masked_fill_(~seen, float("-inf")).softmax(-1) @ v)
        _put(out, group, torch.stack(found))
    return out


def paged_flash(with_sums: bool) -> Kernel:
    """Flash attention through the block table, all requests in one call.

    Args:
        with_sums: whether it is given the sums of lengths too, which flash attention 2 wants and 3 refuses.
    """

    def kernel(query: Tensor, keys: Tensor, values: Tensor, part: Part) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query,
            keys,
            values,
            part.starts,
            part.offsets if with_sums else None,
            part.most_new,
            part.most_total,
            # A decode sees all; without a window, flash attention takes its query heads together.
            window_size=(-1, -1) if part.most_new == 1 else (-1, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=part.lengths,
            block_table=part.table,
        )
        assert isinstance(out, Tensor)  # alone, as nothing else was asked for
        return out

    return kernel


def dense(backend: SDPBackend | None) -> Kernel:
    """`scaled_dot_product_attention`, a call for each group, by one backend; None: the one that it picks."""

    def kernel(query: Tensor, keys: Tensor, values: Tensor, part: Part) -> Tensor:
        if backend is None:
            return _dense(query, keys, values, part)
        with sdpa_kernel(backend):
            return _dense(query, keys, values, part)

    return kernel


def _dense(query: Tensor, keys: Tensor, values: Tensor, part: Part) -> Tensor:
    out = query if len(part.groups) == 1 else torch.empty_like(query)
    for group in part.groups:
        q, k, v = _views(query, keys, values, group)
        bias = group.mask if group.mask is not None else group.bias
        found = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=q.shape[1] != k.shape[1])
        if len(part.groups) == 1:
            return found.transpose(1, 2).reshape(query.shape)
        _put(out, group, found)
    return out


def _views(query: Tensor, keys: Tensor, values: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values of a group as (count, heads, tokens, head_dim); nothing is copied."""
    q = query[group.row : group.row + group.count * group.new].unflatten(0, (group.count, group.new))

    def held(pool: Tensor) -> Tensor:
        pages = pool[group.page : group.page + group.count * group.pages]
        return pages.unflatten(0, (group.count, group.pages)).flatten(1, 2)[:, : group.total].transpose(1, 2)

    return q.transpose(1, 2), held(keys), held(values)


def _put(out: Tensor, group: Group, found: Tensor) -> None:
    rows = out[group.row : group.row + group.count * group.new]
    rows.unflatten(0, (group.count, group.new)).copy_(found.transpose(1, 2))


KERNELS: dict[str, Kernel] = {
    "paged-flash": paged_flash(with_sums=True),
    "paged-flash3": paged_flash(with_sums=False),
    "sdpa-cudnn": dense(SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": dense(SDPBackend.FLASH_ATTENTION),
    "sdpa": dense(None),
}


@torch.inference_mode()
def choose(
    on: Device,
    samples: Mapping[str, tuple[Tensor, Tensor, Tensor, Part]],
    wanted: str | Mapping[str, str] = "auto",
) -> tuple[dict[str, Kernel], dict[str, dict[str, str]]]:
    """The fastest kernel that is right, for each use.

    Args:
        samples: arguments of a kernel for each use.
        wanted: "auto", or the only one of `KERNELS` to try, perhaps by use.

    Returns:
        The kernel by use; and what was found: by use and kernel microseconds, or why not, and "chosen".

    Raises:
        InputError: none is right.
    """
    chosen: dict[str, Kernel] = {}
    notes: dict[str, dict[str, str]] = {}
    for use, sample in samples.items():
        only = wanted if isinstance(wanted, str) else wanted[use]
        names = [only] if only != "auto" else ["sdpa"] if on.kind == "cpu" else list(KERNELS)
        expected = plain(*sample)
        notes[use], seconds = {}, {}
        for name in names:
            try:
                seconds[name] = _try(on, KERNELS[name], sample, expected)
                notes[use][name] = f"{1e6 * seconds[name]:.1f} us"
            except Exception as error:  # what a kernel cannot do it says in its own way
                if out_of_memory(error):
                    on.release()
                first = cause(error)
                notes[use][name] = " ".join(str(first).split())[:120] or type(first).__name__
        if not seconds:
            why = "; ".join(f"{name}: {note}" for name, note in notes[use].items())
            raise InputError(f"no kernel of PyTorch {torch.__version__} does attention of a {use}: {why}")
        best = min(seconds, key=lambda name: seconds[name])
        chosen[use] = KERNELS[best]
        notes[use]["chosen"] = best
    return chosen, notes


def activate(flash: str) -> None:
    """Another implementation of flash attention, such as "FA3", for the rest of the process.

    Raises:
        InputError: PyTorch does not know it, or it is not installed.
    """
    try:
        from torch.nn.attention import activate_flash_attention_impl
    except ImportError:
        raise InputError(
            f"PyTorch {torch.__version__} has but one flash attention; leave out --flash"
        ) from None
    try:
        activate_flash_attention_impl(flash)
    except Exception as error:
        what = " ".join(str(error).split())
        raise InputError(f"--flash {flash}: {what}; install it, or leave the option out") from None


def _try(on: Device, kernel: Kernel, sample: tuple[Tensor, Tensor, Tensor, Part], expected: Tensor) -> float:
    """Median seconds of a kernel.

    Raises:
        ValueError: it gives something else than it should; and whatever it raises.
    """
    tolerance = _TOLERANCE[sample[0].dtype]
    got = kernel(*sample)
    off = float((got.to(expected.dtype) - expected).norm() / expected.norm())
    if not off < tolerance:
        raise ValueError(f"wrong by {off:.2g} of its size")
    step = on.graph(lambda: kernel(*sample))  # as engines run it, and not as fast as Python launches it
    warm(on, step)  # the first one tried would else be the slowest
    return statistics.median(on.times(step, 10))
