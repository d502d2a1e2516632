"""The waiting queue: requests ordered by (key, order), each knowing how many free blocks it needs to be
admitted.

A treap whose nodes are the requests themselves. Entering, leaving, the first in order, and the first in order
that fits into a number of free blocks all take O(log n) expected, whatever the key, so a queue of 100,000 is
no slower to serve than one of ten. The shape depends on the requests' indices alone: the same requests give
the same queue on any machine.

Where the order is that of arrival and searches for a fit are rare (`s.by_arrival`), a set of bits does
instead, one for each request: less to read and write, which counts where hundreds of engines take turns.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.span import trailing_zeros
from llmsched_env.core.state import Engine

FRONT = -np.inf  # the key of requests put before all others
NOTHING = 2**31 - 1  # `least` of an empty subtree


@njit(forceinline=True)
def _rank(i: int) -> int:
    """A fixed pseudo-random heap priority of node i (the finaliser of MurmurHash3)."""
    x = np.uint32(i + 1)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return int(x ^ (x >> np.uint32(16)))


@njit(forceinline=True)
def _before(req, a: int, b: int) -> bool:  # type: ignore[no-untyped-def]
    return req[a].key < req[b].key or (req[a].key == req[b].key and req[a].order < req[b].order)


@njit
def _pull(req, i: int) -> None:  # type: ignore[no-untyped-def]
    """Recompute the smallest need in the subtree of i."""
    node = req[i]
    least = node.need
    if node.left >= 0:
        least = min(least, req[node.left].least)
    if node.right >= 0:
        least = min(least, req[node.right].least)
    node.least = least


@njit
def _rotate_up(e: Engine, i: int) -> None:
    """Swap node i with its parent, keeping the order."""
    req = e.req
    parent = req[i].up
    above = req[parent].up
    if req[parent].left == i:
        child = req[i].right
        req[parent].left = child
        req[i].right = parent
    else:
        child = req[i].left
        req[parent].right = child
        req[i].left = parent
    if child >= 0:
        req[child].up = parent
    req[parent].up = i
    req[i].up = above
    if above < 0:
        e.s.root = i
    elif req[above].left == parent:
        req[above].left = i
    else:
        req[above].right = i
    _pull(req, parent)
    _pull(req, i)


@njit
def insert(e: Engine, i: int) -> None:
    """Put request i into the queue by its `key` and `order`, with its `need`."""
    req, s = e.req, e.s
    if s.by_arrival:
        _set(e, i)
        return
    node = req[i]
    node.left = node.right = node.up = -1
    node.least = node.need
    s.num_waiting += 1
    if s.root < 0:
        s.root = s.head = s.tail = i
        return
    # Most enter at an end, or near the head: search from there.
    if _before(req, i, s.head):
        at = s.head
        req[at].left = i
        s.head = i
    elif not _before(req, i, s.tail):
        at = s.tail
        req[at].right = i
        s.tail = i
    else:
        at = s.head  # its ancestors come one after the other behind it
        while req[at].up >= 0 and not _before(req, i, req[at].up):
            at = req[at].up
        if req[at].right < 0:
            req[at].right = i
        else:
            at = _descend(req, i, req[at].right)
    node.up = at
    while at >= 0 and req[at].least > node.need:
        req[at].least = node.need
        at = req[at].up
    rank = _rank(i)
    while node.up >= 0 and _rank(node.up) < rank:
        _rotate_up(e, i)


@njit(forceinline=True)
def _descend(req, i: int, at: int) -> int:  # type: ignore[no-untyped-def]
    """Hang i below the subtree of `at`; returns its parent."""
    while True:
        if _before(req, i, at):
            if req[at].left < 0:
                req[at].left = i
                return at
            at = req[at].left
        else:
            if req[at].right < 0:
                req[at].right = i
                return at
            at = req[at].right


@njit
def following(e: Engine, i: int) -> int:
    """The request after i in the queue, -1 if i is the last."""
    req = e.req
    if e.s.by_arrival:
        return _at_or_after(e, i + 1)
    if req[i].right >= 0:
        at = req[i].right
        while req[at].left >= 0:
            at = req[at].left
        return at
    at = i
    while req[at].up >= 0 and req[req[at].up].right == at:
        at = req[at].up
    return req[at].up


@njit
def preceding(e: Engine, i: int) -> int:
    """The request before i in the queue, -1 if i is the first."""
    req = e.req
    if req[i].left >= 0:
        at = req[i].left
        while req[at].right >= 0:
            at = req[at].right
        return at
    at = i
    while req[at].up >= 0 and req[req[at].up].left == at:
        at = req[at].up
    return req[at].up


@njit
def remove(e: Engine, i: int) -> None:
    """Take request i out of the queue."""
    req, s = e.req, e.s
    if s.by_arrival:
        _clear(e, i)
        return
    node = req[i]
    if s.head == i:
        s.head = following(e, i)
    if s.tail == i:
        s.tail = preceding(e, i)
    while node.left >= 0 or node.right >= 0:
        if node.right < 0 or (node.left >= 0 and _rank(node.left) > _rank(node.right)):
            _rotate_up(e, node.left)
        else:
            _rotate_up(e, node.right)
    up = node.up
    if up < 0:
        s.root = -1
    elif req[up].left == i:
        req[up].left = -1
    else:
        req[up].right = -1
    while up >= 0:
        least = req[up].least
        _pull(req, up)
        if req[up].least == least:
            break
        up = req[up].up
    s.num_waiting -= 1


@njit(forceinline=True)
def first(e: Engine) -> int:
    """The request at the head of the queue, -1 if it is empty."""
    s = e.s
    if s.by_arrival:
        return _at_or_after(e, s.head) if s.num_waiting > 0 else -1
    return s.head if s.root >= 0 else -1


@njit
def first_from(e: Engine, key: float) -> int:
    """The first request in the queue whose key is at least `key`, -1 if there is none; not where the queue is
    a set of bits.
    """
    req = e.req
    at, found = e.s.root, -1
    while at >= 0:
        if req[at].key >= key:
            found = at
            at = req[at].left
        else:
            at = req[at].right
    return found


@njit
def _first_fit_below(req, at: int, free: int) -> int:  # type: ignore[no-untyped-def]
    """The first in the subtree of `at` that needs at most `free` blocks; there is one."""
    while True:
        left = req[at].left
        if left >= 0 and req[left].least <= free:
            at = left
        elif req[at].need <= free:
            return at
        else:
            at = req[at].right


@njit
def first_fit(e: Engine, free: int) -> int:
    """The first request in the queue that needs at most `free` blocks, -1 if there is none."""
    if e.s.by_arrival:
        return _fit_from(e, first(e), free)
    root = e.s.root
    if root < 0 or e.req[root].least > free:
        return -1
    return _first_fit_below(e.req, root, free)


@njit
def following_fit(e: Engine, i: int, free: int) -> int:
    """The first request after i in the queue that needs at most `free` blocks, -1 if there is none."""
    req = e.req
    if e.s.by_arrival:
        return _fit_from(e, following(e, i), free)
    at = i
    while True:
        right = req[at].right
        if right >= 0 and req[right].least <= free:
            return _first_fit_below(req, right, free)
        while req[at].up >= 0 and req[req[at].up].right == at:
            at = req[at].up
        at = req[at].up
        if at < 0 or req[at].need <= free:
            return at


# ---------------------------------------------------------------------- as a set of bits


@njit
def _set(e: Engine, i: int) -> None:
    s = e.s
    if s.num_waiting == 0 or i < s.head:
        s.head = i
    e.bits[i >> 6] |= np.int64(1) << (i & 63)
    s.num_waiting += 1


@njit
def _clear(e: Engine, i: int) -> None:
    s = e.s
    e.bits[i >> 6] &= ~(np.int64(1) << (i & 63))
    s.num_waiting -= 1
    if s.head == i:
        s.head = i + 1  # or later


@njit
def _at_or_after(e: Engine, i: int) -> int:
    """The first request in the queue from i on, -1 if there is none."""
    word = i >> 6
    if word >= len(e.bits):
        return -1
    left = e.bits[word] & (np.int64(-1) << (i & 63))
    while left == 0:
        word += 1
        if word >= len(e.bits):
            return -1
        left = e.bits[word]
    return (word << 6) + trailing_zeros(left)


@njit
def _fit_from(e: Engine, i: int, free: int) -> int:
    """The first request from i on that needs at most `free` blocks, -1 if there is none."""
    while i >= 0 and e.req[i].need > free:
        i = _at_or_after(e, i + 1)
    return i
