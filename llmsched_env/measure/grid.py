"""The batches that are measured: a designed grid, to which cost models are fitted, and batches at random, by
some of which a form is chosen, and which judge it by the others.

The grid varies one thing at a time: prefill tokens with nothing cached and behind a context, the same tokens
as one prompt and as several, decodes by their number and by the tokens they read, and mixes of both. The
others are such as engines form: prompts, chunks and decodes of all sizes together. No batch is in two parts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from llmsched_env.errors import InputError

FITTED, CHOOSING, JUDGED = "grid", "choosing", "held-out"
"""The parts: what cost models are fitted to, what one of their forms is chosen by, and what judges them."""

PARTS = (FITTED, CHOOSING, JUDGED)

KINDS = ("prefill", "decode", "mix")

_ITEM = re.compile(r"(\d+)x(?:d(\d+)|p(\d+)@(\d+))")


@dataclasses.dataclass(frozen=True, order=True)
class Batch:
    """One iteration's work.

    Attributes:
        decodes: pairs (how many requests, tokens that each reads, the new one included).
        chunks: triples (how many requests, new tokens of each, tokens of each that are cached).

    >>> str(Batch(decodes=((8, 1024),), chunks=((1, 512, 2048),)))
    '8xd1024+1xp512@2048'
    """

    decodes: tuple[tuple[int, int], ...] = ()
    chunks: tuple[tuple[int, int, int], ...] = ()

    def __str__(self) -> str:
        decodes = [f"{n}xd{context}" for n, context in self.decodes]
        return "+".join([*decodes, *(f"{n}xp{new}@{cached}" for n, new, cached in self.chunks)])

    @staticmethod
    def parse(text: str) -> Batch:
        """The batch that `str` gave.

        Raises:
            InputError: it gave no such text.
        """
        decodes: list[tuple[int, int]] = []
        chunks: list[tuple[int, int, int]] = []
        for item in text.split("+"):
            match = _ITEM.fullmatch(item)
            if match is None:
                raise InputError(f"{text!r} is no batch such as 8xd1024+1xp512@2048")
            if match[2]:
                decodes.append((int(match[1]), int(match[2])))
            else:
                chunks.append((int(match[1]), int(match[3]), int(match[4])))
        return Batch(tuple(decodes), tuple(chunks))

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return "mix" if self.decodes and self.chunks else "decode" if self.decodes else "prefill"

    @property
    def features(self) -> tuple[float, float, float, float, float, float]:
        """P, NP, CX, KP, D, KV of `core.cost`."""
        return (
            float(sum(n * new for n, new, _ in self.chunks)),
            float(sum(n for n, _, _ in self.chunks)),
            float(sum(n * new * (cached + new / 2) for n, new, cached in self.chunks)),
            float(sum(n * cached for n, _, cached in self.chunks)),
            float(sum(n for n, _ in self.decodes)),
            float(sum(n * context for n, context in self.decodes)),
        )

    @property
    def tokens(self) -> int:
        """New tokens of the iteration."""
        return sum(n for n, _ in self.decodes) + sum(n * new for n, new, _ in self.chunks)

    @property
    def rows(self) -> int:
        """Requests, each of which has one row of logits."""
        return sum(n for n, *_ in (*self.decodes, *self.chunks))

    def pages(self, page: int) -> int:
        """Pages of `page` tokens that the requests hold, the new tokens included."""
        held = [*self.decodes, *((n, new + cached) for n, new, cached in self.chunks)]
        return sum(n * -(-tokens // page) for n, tokens in held)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of the batches.

    Attributes:
        tokens: new ones in an iteration.
        context: of a sequence.
        decodes: in an iteration.
        pages: of the KV cache, and tokens of one.
    """

    tokens: int
    context: int
    decodes: int
    pages: int
    page: int

    def allow(self, batch: Batch) -> bool:
        """Whether a batch is within them."""
        lengths = [*(c for _, c in batch.decodes), *(new + cached for _, new, cached in batch.chunks)]
        return (
            batch.tokens <= self.tokens
            and max(lengths) <= self.context
            and sum(n for n, _ in batch.decodes) <= self.decodes
            and batch.pages(self.page) <= self.pages
        )


def design(limits: Limits, *, quick: bool = False, seed: int = 0) -> dict[str, list[Batch]]:
    """The batches of all parts, by the part's name; each part is sorted, and none is beyond the limits.

    Args:
        quick: about a third of them.
        seed: of those at random.

    Raises:
        InputError: the limits leave too few to fit a model.
    """
    grid = {batch for batch in _grid(limits, quick) if limits.allow(batch)}
    many, rng = 7 if quick else 16, np.random.default_rng(seed)
    judges = _random(limits, {"prefill": many, "decode": many, "mix": 3 * many}, rng, grid)
    choosing = _random(limits, {"mix": 3 * many // 2}, rng, grid | judges)
    if len(grid) < 12 or len(choosing) < 4 or sum(batch.kind == "mix" for batch in judges) < 4:
        raise InputError(
            f"{len(grid)} batches of the grid are within {limits.pages * limits.page:,} tokens of KV cache, "
            f"contexts of {limits.context}, {limits.tokens} tokens and {limits.decodes} decodes; allow more"
        )
    found = {FITTED: grid, CHOOSING: choosing, JUDGED: judges}
    return {part: sorted(batches, key=_order) for part, batches in found.items()}


def _order(batch: Batch) -> tuple[int, Batch]:
    return KINDS.index(batch.kind), batch


def _ladder(low: int, high: int, halves: bool = False) -> list[int]:
    """`low` and its doublings up to `high`, and `high`; perhaps also what is half-way between them."""
    found, value = {high}, low
    while value < high:
        found |= {value, 3 * value // 2} if halves and 3 * value // 2 < high else {value}
        value *= 2
    return sorted(found)


def _grid(limits: Limits, quick: bool) -> Iterable[Batch]:
    fewer = slice(None, None, -2 if quick else -1)  # what is largest stays
    for new in _ladder(16, limits.tokens, halves=not quick):  # a prompt alone
        yield Batch(chunks=((1, min(new, limits.context), 0),))
    for cached in (limits.context // 4,) if quick else (1024, 4096, 16384):  # a chunk behind a context
        for new in _ladder(64, min(4096, limits.tokens))[fewer]:
            yield Batch(chunks=((1, min(new, limits.context), max(0, min(cached, limits.context - new))),))
    for n in (4, 16) if quick else (2, 4, 8, 16, 32):  # several prompts
        for new in (16, 64, 512) if quick else (16, 64, 256, 1024):
            yield Batch(chunks=((n, new, 0),))
    sizes = {*_ladder(1, limits.decodes), *_ladder(64, max(64, limits.decodes), halves=not quick)}
    for n in sorted(sizes)[fewer]:
        for context in _ladder(128, limits.context)[fewer]:
            yield Batch(decodes=((n, context),))
    many = (16, 2) if quick else (32, 8, 2, 1)
    for n in {max(1, limits.decodes // part) for part in many}:
        for context in (1024,) if quick else (512, 2048):
            for new in (256, 1024) if quick else (64, 256, 512, 1024, 2048):
                for cached in (0, 2048) if quick else (0, 4096):
                    fit = min(new, limits.tokens - n, limits.context)
                    if fit > 0:
                        decode = (n, min(context, limits.context))
                        yield Batch((decode,), ((1, fit, min(cached, limits.context - fit)),))


def _random(
    limits: Limits, many: Mapping[str, int], rng: np.random.Generator, taken: set[Batch]
) -> set[Batch]:
    """So many of each kind at random, none of them taken."""

    def size(low: int, high: int) -> int:
        """Log-uniform."""
        return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))

    def prefills() -> tuple[tuple[int, int, int], ...]:
        chunks = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            new = size(16, min(limits.tokens, limits.context))
            behind = limits.context - new
            chunks.append((1, new, size(16, behind) if behind > 16 and rng.random() < 0.5 else 0))
        return tuple(sorted(chunks))

    def decodes() -> tuple[tuple[int, int], ...]:
        found = {size(16, limits.context): size(1, limits.decodes) for _ in range(rng.integers(1, 5))}
        return tuple(sorted((n, context) for context, n in found.items()))

    found: set[Batch] = set()
    for kind, wanted in many.items():
        here: set[Batch] = set()
        for _ in range(200 * wanted):
            batch = Batch(() if kind == "prefill" else decodes(), () if kind == "decode" else prefills())
            if limits.allow(batch) and batch not in taken:
                here.add(batch)
            if len(here) == wanted:
                break
        found |= here
    return found
