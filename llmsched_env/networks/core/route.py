"""Routing: which station of a pool a hop goes to."""

from __future__ import annotations

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.networks.core.state import Net, Routing

_JSQ, _ROUND_ROBIN, _RANDOM, _POWER_OF_TWO, _BY_CLASS, _BY_PROGRAM, _LEAST_TIME, _OUTSIDE = (
    int(r) for r in Routing
)
ASK = -1  # the station is to be named from outside


@njit
def remaining_tokens(net: Net, k: int) -> int:
    """Tokens that the hops at station k, waiting or running, have left: what of their prompts is not computed
    and what of their answers is to come. An iteration that runs counts when it ends.
    """
    s = net.engines[k]
    tokens: int = net.station[k].tokens_in - s.total_prefill - s.total_decode + s.total_recomputed
    return tokens


@njit
def choose_station(net: Net, h: int) -> int:
    """The station that hop h, released at this moment, goes to by its pool's rule; ASK: it does not say."""
    pool = net.pool[net.node[net.hop[h].node].pool]
    routing, first, size = pool.routing, pool.first, pool.size
    if size == 1:
        return int(net.members[first])
    if routing == _OUTSIDE:
        return ASK
    if routing == _ROUND_ROBIN:
        i = pool.turn
        pool.turn = (i + 1) % size
    elif routing == _RANDOM:
        i = _draw(net, size)
    elif routing == _POWER_OF_TWO:
        i = _draw(net, size)
        j = _draw(net, size - 1)
        if j >= i:
            j += 1
        if remaining_tokens(net, net.members[first + j]) < remaining_tokens(net, net.members[first + i]):
            i = j
    elif routing == _BY_CLASS:
        i = net.hop[h].node % size
    elif routing == _BY_PROGRAM:
        i = net.hop[h].job % size
    else:
        i = 0
        least = np.inf
        for j in range(size):
            k = net.members[first + j]
            queue = np.float64(remaining_tokens(net, k))
            if routing == _LEAST_TIME:
                queue *= net.station[k].s_per_token
            if queue < least:
                least = queue
                i = j
    return int(net.members[first + i])


@njit
def _draw(net: Net, n: int) -> int:
    """A whole number below n, from the network's own generator (SplitMix64)."""
    state = net.g.random + np.uint64(0x9E3779B97F4A7C15)
    net.g.random = state
    x = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return int(np.float64(x >> np.uint64(11)) * 2.0**-53 * n)
