"""Priorities token by token: requests in groups of equal key, served one group after the other, each by
Sarathi's composition.

The class priorities of Dai, Deng, Li and Peng (arXiv 2504.07347v3, section 5): of the tokens and places that
the groups before it left, a group takes one token for each of its decodes, then chunks of its unfinished
prompts, then prompts that wait, each in the order in which the requests came. The key is that of the waiting
queue: a request keeps the one with which it entered. With one key for all this is the composition of
Sarathi-Serve.

A plan is made by `begin_levels`, then `serve_level` for one key after the other, then `end_levels`;
`plan_levels` does that from the lowest key upwards. Networks serve in other orders (`llmsched_env.networks`).
"""

from __future__ import annotations

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import evict, grant
from llmsched_env.core.facts import CHUNK, blocks_for, known_tokens
from llmsched_env.core.state import Engine


@njit
def plan_levels(e: Engine) -> None:
    """Plan one iteration: the group of the lowest key first.

    Behind somebody who finds no room to be admitted nobody is admitted, whatever the key.
    """
    s, req, running = e.s, e.req, e.running
    begin_levels(e)
    admitting = True
    i = 0
    while not plan_full(e):
        head = queue.first(e) if admitting else -1
        if i >= s.ordered:
            if head < 0:
                break
            key = req[head].key
        elif head < 0:
            key = req[running[i]].key
        else:
            key = min(req[running[i]].key, req[head].key)
        admitting = _serve(e, key, i, admitting) and admitting
        if s.num_victims > 0:  # nobody is admitted any more
            admitting = False
            i = first_at(e, key)
        while i < s.ordered and req[running[i]].key <= key:
            i += 1
    end_levels(e)


@njit(forceinline=True)
def plan_full(e: Engine) -> bool:
    """Whether nobody else can get a token in the plan being built: its budget or its places are used up."""
    s = e.s
    return s.budget <= 0 or 0 < s.max_batch_requests <= s.num_planned


@njit(forceinline=True)
def begin_levels(e: Engine) -> None:
    """Before the first group of a plan: the running list is in the order of keys as `end_levels` left it."""
    e.s.ordered = e.s.num_running


@njit
def serve_level(e: Engine, key: float) -> bool:
    """Serve those whose key is `key` into the plan, as far as budget, places and KV cache go.

    May be called for keys in any order, and again. Whoever has tokens in the plan gets no more.

    Returns:
        False if one of them who waits found no room: those who wait behind it are left out as well.
    """
    return _serve(e, key, first_at(e, key), True)


@njit
def first_at(e: Engine, key: float) -> int:
    """Index of the first running request whose key is at least `key`."""
    low, high = 0, e.s.ordered
    while low < high:
        middle = (low + high) // 2
        if e.req[e.running[middle]].key < key:
            low = middle + 1
        else:
            high = middle
    return low


@njit
def end_levels(e: Engine) -> None:
    """Bring the running list into the order of key and arrival: those admitted in this plan are at its end,
    and keys may have changed."""
    req, running = e.req, e.running
    for i in range(1, e.s.num_running):
        r = running[i]
        k = i - 1
        while k >= 0 and _comes_after(req, running[k], r):
            running[k + 1] = running[k]
            k -= 1
        running[k + 1] = r
    e.s.ordered = e.s.num_running


@njit(forceinline=True)
def _comes_after(req, a: int, b: int) -> bool:  # type: ignore[no-untyped-def]
    return req[a].key > req[b].key or (req[a].key == req[b].key and req[a].rank > req[b].rank)


@njit
def _serve(e: Engine, key: float, start: int, admitting: bool) -> bool:
    """`serve_level`, the running requests of the group beginning at index `start`."""
    s, req, running, plan = e.s, e.req, e.running, e.plan
    i = start
    while i < s.ordered and req[running[i]].key == key:
        if plan_full(e):
            return True
        r = running[i]
        q = req[r]
        if q.granted > 0 or q.computed < q.target:
            i += 1
        elif q.computed < q.blocks * s.block_size:
            q.granted = 1
            plan[s.num_planned] = r
            s.num_planned += 1
            s.decodes += 1
            s.decode_context += q.computed + 1
            s.budget -= 1
            i += 1
        else:
            i = _grant_running(e, i, 1)
    if s.num_victims > 0:
        start = first_at(e, key)
    i = start
    while i < s.ordered and req[running[i]].key == key:
        if plan_full(e):
            return True
        q = req[running[i]]
        tokens = 0 if q.granted > 0 or q.computed >= q.target else _chunk(e, q.target - q.computed)
        if tokens > 0:
            i = _grant_running(e, i, tokens)
        else:
            i += 1
    if admitting and s.num_victims == 0:
        return _admit(e, key)
    return True


@njit
def _grant_running(e: Engine, i: int, tokens: int) -> int:
    """Grant tokens to the running request at index i; returns the index of the one after it.

    If it finds no KV block, others are preempted from the end of the list, those left out that have tokens in
    this plan; at last it goes itself.
    """
    s, running = e.s, e.running
    q = e.req[running[i]]
    need = max(0, blocks_for(e, max(q.computed + tokens, q.hold)) - q.blocks)
    while s.free < need:
        k = s.num_running - 1
        while e.req[running[k]].granted > 0:
            k -= 1
        evict(e, running[k])
        s.ordered -= 1
        if k == i:
            return i
        if k < i:
            i -= 1
    grant(e, running[i], tokens)
    return i + 1


@njit(forceinline=True)
def _chunk(e: Engine, rest: int) -> int:
    """Tokens of the next chunk of a prefill of which `rest` are left; 0: none now."""
    if rest <= e.s.budget or not e.s.limit_prefills:
        return rest
    return e.s.budget if e.s.chunked else 0


@njit
def _admit(e: Engine, key: float) -> bool:
    """Admit those of the group that wait; False if one of them found no room."""
    s, req = e.s, e.req
    r = queue.first(e)
    if r >= 0 and req[r].key != key:
        r = queue.first_from(e, key)
    while r >= 0 and req[r].key == key and not plan_full(e):
        q = req[r]
        tokens = _chunk(e, known_tokens(q))
        if tokens <= 0 or s.num_running >= s.max_num_seqs or not _fits(e, q, tokens):
            return False
        after = queue.following(e, r)
        if not grant(e, r, tokens):
            return False
        r = after
    return True


@njit(forceinline=True)
def _fits(e: Engine, q, tokens: int) -> bool:  # type: ignore[no-untyped-def]
    """Whether the KV cache takes q with a first chunk of so many tokens."""
    s = e.s
    need = max(q.need, blocks_for(e, tokens)) if s.test == CHUNK else q.need
    if s.watermark_when_idle or s.num_running > 0:
        need += s.watermark_blocks
    return bool(need <= s.free)
