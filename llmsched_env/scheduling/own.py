"""What a scheduler of your own calls: the engine's primitives, from plain Python and from numba alike.

    from llmsched_env.scheduling.own import can_grant, first, grant, known_tokens

    def first_come_first_served(e):
        for k in range(e.s.num_running):  # whoever runs goes on
            q = e.req[e.running[k]]
            grant(e, e.running[k], min(max(1, q.target - q.computed), e.s.budget))
        while e.s.num_waiting > 0:  # admit until one does not fit
            prompt = min(known_tokens(e.req[first(e)]), e.s.budget)
            if not can_grant(e, first(e), prompt):
                break
            grant(e, first(e), prompt)

It is called for each iteration, also when nobody is there yet: `first(e)` is -1 then, and an empty plan waits
for the next arrival. `can_grant` asks without doing; a `grant` that breaks a rule ends the run with an error
that names it.

`e` is an `Engine` (`llmsched_env.core.state`): `e.s` holds the engine's settings and counters, `e.req[r]`
request r, `e.running[:e.s.num_running]` the running requests. Decorated with `numba.njit` the same function
runs at the speed of the built-in ones; in plain Python it is slower by a factor of a hundred or more.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from numba.extending import overload

from llmsched_env.core import engine, facts, queue
from llmsched_env.core.compile import njit
from llmsched_env.core.state import Engine, Error

__all__ = [
    "blocks_for",
    "can_grant",
    "evict",
    "first",
    "first_fit",
    "following",
    "following_fit",
    "grant",
    "known_tokens",
    "queue_key",
    "random_unit",
    "refund",
    "swap_in",
]


@njit
def _can_grant(e: Engine, r: int, tokens: int) -> bool:
    """Whether `grant(e, r, tokens)` would succeed; changes nothing."""
    return engine.grant_error(e, r, tokens) == _NO_ERROR


_NO_ERROR = int(Error.NONE)


def _public(compiled: Any) -> Callable[..., Any]:
    """`compiled`, callable also with the view of an engine that plain Python gets."""

    def call(e: Any, *args: Any) -> Any:
        return compiled(getattr(e, "compiled", e), *args)

    functools.update_wrapper(call, compiled.py_func)
    arity = len(inspect.signature(compiled.py_func).parameters)
    implementations: dict[int, Any] = {
        1: lambda e: compiled(e),
        2: lambda e, a: compiled(e, a),
        3: lambda e, a, b: compiled(e, a, b),
    }
    overload(call, strict=False)(lambda *args: implementations[arity])
    return call


grant = _public(engine.grant)
can_grant = _public(_can_grant)
evict = _public(engine.evict)
swap_in = _public(engine.swap_in)
refund = _public(engine.refund)
blocks_for = _public(facts.blocks_for)
queue_key = _public(engine.queue_key)
random_unit = _public(facts.random_unit)
first = _public(queue.first)
following = _public(queue.following)
first_fit = _public(queue.first_fit)
following_fit = _public(queue.following_fit)


def known_tokens(q: Any) -> int:
    """Prompt and answer so far of request record q: what its (re-)admission has to prefill."""
    return int(q.prompt + q.generated)


overload(known_tokens, strict=False)(lambda q: lambda q: q.prompt + q.generated)
