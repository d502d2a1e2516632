"""When a network of engines can be stable: conditions on rates, tokens and capacities, as plain arrays.

A network has C classes and S engines. A class is one hop of one kind of request: it is served at one engine,
with so many tokens of prefill and decode together, and arrives at a rate (of its kind, for each visits each
of its hops). An engine's capacity is in tokens for a unit of time: b_max / t_{b_max}, as `limits.best_batch`
gives it. Units of time are the caller's.

The nominal condition, load below 1 at each engine, is necessary for any network and any scheduler: that is
Theorem 2(a) of Dai, Deng, Li and Peng (arXiv 2504.07347v3), engine by engine. For routes without a cycle
(DAG, fork-join) work-conserving K-FCFS scheduling needs no more (the abstract of v3). With cycles it is not
enough: under fixed priorities classes at different engines can come to exclude each other, as if they shared
one engine, and then this *virtual station* must not be overloaded either, as in the network of Rybko and
Stolyar, which the paper takes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsched_env.errors import InputError


def nominal_loads(
    rates: ArrayLike, tokens: ArrayLike, stations: ArrayLike, capacities: ArrayLike
) -> NDArray[np.float64]:
    """(S,) load of each engine: the sum over the classes served there of rate * tokens / capacity.

    An engine with a load above 1 is unstable under every scheduler. Necessary for all networks; sufficient
    under work-conserving K-FCFS for routes without a cycle. Assumes that an engine reaches its capacity
    whatever mix of classes it serves, as where time depends on the tokens of a batch alone.

    Args:
        rates: (C,) requests for a unit of time. tokens: (C,) mean prefill and decode tokens of a request.
        stations: (C,) integers, the engine of each class. capacities: (S,) tokens for a unit of time.

    Raises:
        InputError: lengths that do not fit together, a station that there is not, negative rates or tokens, a
            capacity that is not positive.
    """
    rate, size, where, capacity = _network(rates, tokens, stations, capacities)
    loads = np.bincount(where, weights=rate * size / capacity[where], minlength=len(capacity))
    return loads.astype(np.float64)


def virtual_station_load(
    rates: ArrayLike, tokens: ArrayLike, stations: ArrayLike, capacities: ArrayLike, members: Sequence[int]
) -> float:
    """The load of a virtual station: the sum over its classes of rate * tokens / capacity of their engines.

    Above 1 the network is unstable, provided that of these classes no two are ever served at the same time.
    In the network of Rybko and Stolyar with priority to requests that leave, the two second hops are such
    classes (`exclusive_sets` finds them): with 544 tokens each and engines of 768 tokens for a unit of time,
    lambda (544 + 544) / 768 < 1, a nominal load of 0.559. That an overloaded one is unstable is known for
    fluid networks with batches of one; for batches of tokens it rests on simulation.

    Args:
        members: the classes of the virtual station. The rest is as in `nominal_loads`.
    """
    rate, size, where, capacity = _network(rates, tokens, stations, capacities)
    index = np.asarray(members)
    whole = index.ndim == 1 and index.dtype.kind in "iu"
    if not whole or len(index) == 0 or index.min() < 0 or index.max() >= len(rate):
        raise InputError(f"members must name some of the {len(rate)} classes, 0 to {len(rate) - 1}")
    return float((rate * size / capacity[where])[np.unique(index)].sum())


def exclusive_pairs(
    routes: Sequence[Sequence[int]], stations: ArrayLike, priorities: ArrayLike
) -> list[tuple[int, int]]:
    """Pairs of classes at different engines that come to exclude each other under preemptive priorities.

    Classes k and l do where, on the route of each, an earlier hop is served at the other's engine with less
    priority than the other has there: while k is served nothing passes that hop towards l, and the other way
    round. Once only one of the two has requests it stays so until that one is empty, and then perhaps the
    other's turn comes. Priorities without preemption make this approximate, by up to one batch.

    Args:
        routes: for each kind of request the classes that it goes through, in order; each class on one route.
        stations: (C,) engine of each class.
        priorities: (C,) lower is served first, among the classes of an engine.
    """
    where, rank = np.asarray(stations), np.asarray(priorities, dtype=np.float64)
    if where.ndim != 1 or where.dtype.kind not in "iu":
        raise InputError(f"stations must be whole numbers, one for each class, not {stations!r}")
    classes = [k for route in routes for k in route]
    if len(where) != len(rank) or sorted(classes) != list(range(len(where))):
        raise InputError(
            f"routes must hold each of the classes 0 to {len(where) - 1} once; with station and priority"
        )
    before = {k: route[:i] for route in routes for i, k in enumerate(route)}

    def blocked_by(k: int, other: int) -> bool:
        return any(where[h] == where[other] and rank[h] > rank[other] for h in before[k])

    return [
        (k, other)
        for k in range(len(where))
        for other in range(k + 1, len(where))
        if where[k] != where[other] and blocked_by(k, other) and blocked_by(other, k)
    ]


def exclusive_sets(
    routes: Sequence[Sequence[int]], stations: ArrayLike, priorities: ArrayLike
) -> list[tuple[int, ...]]:
    """The largest sets of classes of which any two exclude each other: the virtual stations, for of each no
    more than one class is served at a time. Arguments as for `exclusive_pairs`.
    """
    pairs = exclusive_pairs(routes, stations, priorities)
    near: dict[int, set[int]] = {k: set() for pair in pairs for k in pair}
    for k, other in pairs:
        near[k].add(other)
        near[other].add(k)
    found: list[tuple[int, ...]] = []

    def grow(members: tuple[int, ...], able: set[int], done: set[int]) -> None:  # Bron and Kerbosch (1973)
        if not able and not done:
            found.append(tuple(sorted(members)))
            return
        pivot = max(able | done, key=lambda k: len(near[k] & able))
        for k in sorted(able - near[pivot]):
            grow((*members, k), able & near[k], done & near[k])
            able = able - {k}
            done = done | {k}

    if near:
        grow((), set(near), set())
    return sorted(found)


def _network(
    rates: ArrayLike, tokens: ArrayLike, stations: ArrayLike, capacities: ArrayLike
) -> tuple[Any, Any, Any, Any]:
    rate, size = np.asarray(rates, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    where, capacity = np.asarray(stations), np.asarray(capacities, dtype=np.float64)
    if not (rate.ndim == capacity.ndim == 1 and rate.shape == size.shape == where.shape):
        raise InputError(
            "rates, tokens and stations must be as many as there are classes, capacities as engines"
        )
    if len(rate) == 0 or len(capacity) == 0:
        raise InputError("a network has a class and an engine at least")
    if where.dtype.kind not in "iu" or where.min() < 0 or where.max() >= len(capacity):
        raise InputError(f"stations must be whole numbers from 0 to {len(capacity) - 1}, one for each class")
    if not (np.isfinite(rate).all() and np.isfinite(size).all() and (rate >= 0).all() and (size >= 0).all()):
        raise InputError("rates and tokens must not be negative")
    if not (np.isfinite(capacity).all() and (capacity > 0).all()):
        raise InputError("capacities must be positive tokens for a unit of time")
    return rate, size, where, capacity
