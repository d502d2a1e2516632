"""Disciplines: the key by which a hop is served at a station, and in which order classes are.

The key of a hop is settled when it comes to a station. Under PLAS and ATLAS it rises as the hop is served;
under MAX_WEIGHT and PRESSURE it is the number of its class, and the order of classes is chosen anew for each
iteration.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.facts import length_class
from llmsched_env.networks.core.state import Net, Rule, engine_of
from llmsched_env.scheduling.levels import begin_levels, end_levels, plan_full, serve_level

_FCFS, _CLASS, _DEPTH, _OLDEST, _PLAS, _ATLAS, _MAX_WEIGHT, _PRESSURE = (int(r) for r in Rule)


@njit
def key_of(net: Net, h: int) -> float:
    """The key of hop h if it came to a station now; for PLAS and ATLAS `hop.base` is noted."""
    rule, hop = net.g.rule, net.hop[h]
    if rule == _FCFS:
        return 0.0
    if rule == _CLASS:
        return float(net.node[hop.node].key)
    if rule == _DEPTH:
        return np.float64(hop.depth)
    if rule == _OLDEST:
        return np.float64(hop.job)
    if rule == _PLAS:
        hop.base = net.job[hop.job].attained
        return _level(net, hop.base)
    if rule == _ATLAS:
        hop.base = hop.attained
        return _level(net, hop.base)
    return np.float64(hop.node)


@njit(forceinline=True)
def _level(net: Net, tokens: int) -> float:
    """Levels that double: level i holds quantum * (2^i - 1) up to quantum * (2^(i + 1) - 1) tokens."""
    return np.float64(length_class(1 + tokens // net.g.quantum))


@njit
def raise_keys(net: Net, k: int) -> None:
    """Under PLAS and ATLAS: bring the keys of those that run at station k up to what they have attained."""
    e = engine_of(net, k)
    for i in range(e.s.num_running):
        r = e.running[i]
        q = e.req[r]
        q.score = _level(net, net.hop[r].base + q.computed + q.recomputed)
        q.key = q.score
    end_levels(e)


@njit
def plan_by_pressure(net: Net, k: int) -> None:
    """Plan the next iteration of station k: the class with the highest pressure first, of equals the first.

    MAX_WEIGHT: the pressure of a class is its weight times the tokens that its hops at the station have left.
    PRESSURE: its hops at the station less those that wait downstream, for each token that one takes: (hops
    here - sum over classes j of flow to j * hops of j for each station of its pool) * weight / mean tokens,
    the maximum-pressure policy of Dai and Lin (Operations Research 53(2), 2005) for classes whose service is
    counted in tokens. Classes with negative pressure are served too, after the others.
    """
    e = engine_of(net, k)
    classes = len(net.node)
    first = k * classes
    for c in range(classes):
        cell = net.cell[first + c]
        cell.served = cell.present == 0
        node = net.node[c]
        if net.g.rule == _MAX_WEIGHT:
            cell.pressure = node.weight * cell.tokens
        elif cell.present > 0:
            below = 0.0
            for j in range(classes):
                share = net.flow[c * classes + j]
                if share > 0.0:
                    below += share * net.node[j].present / net.pool[net.node[j].pool].size
            cell.pressure = node.weight * (cell.present - below) / node.mean_tokens
    begin_levels(e)
    while not plan_full(e):
        best = -1
        for c in range(classes):
            cell = net.cell[first + c]
            if not cell.served and (best < 0 or cell.pressure > net.cell[first + best].pressure):
                best = c
        if best < 0:
            break
        net.cell[first + best].served = 1
        serve_level(e, np.float64(best))
    end_levels(e)
