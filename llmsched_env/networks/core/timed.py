"""Hops that are released later: a binary heap by (time, order of entry)."""

from __future__ import annotations

from llmsched_env.core.compile import njit
from llmsched_env.networks.core.state import Net


@njit
def push_timed(net: Net, h: int, when: float) -> None:
    """Have hop h released at `when` (s)."""
    g, timed = net.g, net.timed
    order = g.timed
    g.timed += 1
    i = g.num_timed
    g.num_timed += 1
    while i > 0:
        up = (i - 1) >> 1
        above = timed[up]
        if above.when < when or (above.when == when and above.order < order):
            break
        _set(timed, i, above.when, above.order, above.hop)
        i = up
    _set(timed, i, when, order, h)


@njit
def pop_timed(net: Net) -> int:
    """Take out the hop that is released first."""
    g, timed = net.g, net.timed
    h = timed[0].hop
    g.num_timed -= 1
    n = g.num_timed
    last = timed[n]
    i = 0
    while True:
        down = 2 * i + 1
        if down >= n:
            break
        if down + 1 < n and _before(timed[down + 1], timed[down]):
            down += 1
        if not _before(timed[down], last):
            break
        least = timed[down]
        _set(timed, i, least.when, least.order, least.hop)
        i = down
    if n > 0:
        _set(timed, i, last.when, last.order, last.hop)
    return int(h)


@njit(forceinline=True)
def _before(a, b) -> bool:  # type: ignore[no-untyped-def]
    return a.when < b.when or (a.when == b.when and a.order < b.order)


@njit(forceinline=True)
def _set(timed, i: int, when: float, order: int, hop: int) -> None:  # type: ignore[no-untyped-def]
    timed[i].when = when
    timed[i].order = order
    timed[i].hop = hop
