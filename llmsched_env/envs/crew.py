"""Threads that share the steps of many environments.

Each thread begins with blocks of its own, the same in every step, so that they stay in the caches of its
processor, and then takes those that others have not come to. The thread that steps works as well, so that a
helper which the system does not run, or which is still waking up, costs nothing; and a helper waits for the
next step for some microseconds before it sleeps.
"""

from __future__ import annotations

import _thread
import platform
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic
from numpy.typing import NDArray

from llmsched_env.core.compile import njit

intrinsic: Any = numba_intrinsic  # its annotations know nothing of the typing context that it passes itself

BLOCK = 16  # environments that are taken at a time
_PATIENCE = 2000  # looks at the work there is before a helper sleeps
# Numbers of the state, a cache line each: environments, threads, blocks that are done, events, and from NEXT
# on for each thread how many of its own blocks are taken.
_LINE = 8
TOTAL, THREADS, DONE, EVENTS, NEXT = 0, _LINE, 2 * _LINE, 3 * _LINE, 4 * _LINE
_CLOSED = 2**40


def _address(builder: Any, signature: Any, context: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


@intrinsic
def _add(typing_context: Any, state: Any, index: Any, amount: Any) -> Any:
    """Add to a number that others change as well; returns what it was."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _address(builder, signature, context, args), args[2], "seq_cst")

    return types.int64(state, types.int64, types.int64), build


@intrinsic
def _read(typing_context: Any, state: Any, index: Any) -> Any:
    """A number that others change as well."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_address(builder, signature, context, args), "seq_cst", 8)

    return types.int64(state, types.int64), build


@intrinsic
def _set(typing_context: Any, state: Any, index: Any, value: Any) -> Any:
    """Set a number that others read."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _address(builder, signature, context, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(state, types.int64, types.int64), build


@intrinsic
def _pause(typing_context: Any) -> Any:
    """Tell the processor that this thread only waits."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), build


@njit
def _blocks(total: int) -> int:
    return (total + BLOCK - 1) // BLOCK


@njit
def claim(state, who: int, patience: int) -> int:  # type: ignore[no-untyped-def]
    """The first environment of the block that thread `who` is to step, or -1 if there is none for so long."""
    blocks, threads = _blocks(_read(state, TOTAL)), _read(state, THREADS)
    looks = 0
    while True:
        for k in range(threads):
            owner = (who + k) % threads
            first = owner * blocks // threads
            own = (owner + 1) * blocks // threads - first
            at = NEXT + _LINE * owner
            if _read(state, at) < own:
                taken = _add(state, at, 1)
                if taken < own:
                    return (first + taken) * BLOCK
        looks += 1
        if looks > patience:
            return -1
        _pause()


@njit
def finish(state, events: int) -> None:  # type: ignore[no-untyped-def]
    """A block is done."""
    if events > 0:
        _add(state, EVENTS, events)
    _add(state, DONE, 1)


@njit
def _publish(state) -> None:  # type: ignore[no-untyped-def]
    """There is work."""
    _set(state, EVENTS, 0)
    _set(state, DONE, 0)
    for k in range(_read(state, THREADS)):
        _set(state, NEXT + _LINE * k, 0)


@njit
def _await(state) -> int:  # type: ignore[no-untyped-def]
    """Wait until all blocks are done; returns the events."""
    blocks = _blocks(_read(state, TOTAL))
    while _read(state, DONE) < blocks:
        _pause()
    return _read(state, EVENTS)


class Crew:
    """Helpers for the steps of one set of environments.

    `share(state, who, *work, patience)` is compiled code that claims blocks for thread `who` and steps them
    until there are none.
    """

    def __init__(self, helpers: int, share: Callable[..., None], total: int, work: tuple[Any, ...]) -> None:
        size = NEXT + _LINE * (helpers + 1)
        state: NDArray[np.int64] = np.zeros(size + _LINE, np.int64)
        self._state = state = state[-(state.ctypes.data // 8) % _LINE :][:size]  # on a cache line
        self._share, self._work = share, work
        state[TOTAL], state[THREADS] = total, helpers + 1
        self._taken = state[NEXT::_LINE]
        self._own = np.diff(np.arange(helpers + 2) * _blocks(total) // (helpers + 1))
        self._taken[:] = _CLOSED
        self._awake = [True] * helpers
        self._bells = [_thread.allocate_lock() for _ in range(helpers)]
        self._stopped = False
        for i, bell in enumerate(self._bells):
            bell.acquire()
            threading.Thread(target=self._help, args=(i,), daemon=True, name="llmsched step").start()

    def _help(self, i: int) -> None:
        """What a helper does. (Between compiled calls one thread runs at a time, so nothing is missed.)"""
        while not self._stopped:
            self._share(self._state, i + 1, *self._work, _PATIENCE)
            self._awake[i] = False
            if (self._taken >= self._own).all() and not self._stopped:
                self._bells[i].acquire()
            self._awake[i] = True

    def step(self) -> int:
        """One step of all; returns the events."""
        _publish(self._state)
        self._ring()
        self._share(self._state, 0, *self._work, 0)
        return int(_await(self._state))

    def _ring(self) -> None:
        for awake, bell in zip(self._awake, self._bells, strict=True):
            if not awake and bell.locked():
                bell.release()

    def stop(self) -> None:
        """Send the helpers home; again does nothing."""
        self._stopped = True
        self._ring()
