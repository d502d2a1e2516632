"""Spans: what compiled code passes around instead of arrays, a pointer and a length.

numba counts references to an array whenever it is passed to a function, which costs more than most of the
functions of an engine do. A span borrows the memory of an array that somebody else keeps alive, is indexed
like it, and costs nothing to pass. It has no bounds checks and takes no negative index.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import models, overload, register_model
from numba.np.numpy_support import from_dtype

intrinsic: Any = numba_intrinsic  # its annotations know nothing of the typing context that it passes itself


class SpanType(types.Type):
    """The type of a span of numbers or records."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"Span({dtype})")


@register_model(SpanType)
class _SpanModel(models.StructModel):
    def __init__(self, manager: Any, span_type: SpanType) -> None:
        super().__init__(manager, span_type, [("data", types.voidptr), ("size", types.intp)])


@intrinsic
def span(typing_context: Any, array: Any) -> Any:
    """The span of a contiguous one-dimensional array, in compiled code; the array has to outlive it."""
    signature = SpanType(array.dtype)(array)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = context.make_array(signature.args[0])(context, builder, args[0])
        result = cgutils.create_struct_proxy(signature.return_type)(context, builder)
        result.data = builder.bitcast(source.data, cgutils.voidptr_t)
        result.size = source.nitems
        return result._getvalue()

    return signature, build


@intrinsic
def part(typing_context: Any, source: Any, at: Any, count: Any) -> Any:
    """The span of `count` elements of a span from index `at` on; nobody checks that they are there."""
    signature = source(source, types.intp, types.intp)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = cgutils.create_struct_proxy(signature.return_type)(context, builder)
        address = _pointer(context, builder, signature.args[0], args[0], args[1])
        result.data = builder.bitcast(address, cgutils.voidptr_t)
        result.size = args[2]
        return result._getvalue()

    return signature, build


def span_at(dtype: Any) -> Any:
    """A compiled function (address, size) -> span of that numpy dtype, for memory that somebody else keeps
    alive.

    A table of addresses is one argument; as many arrays cost more to pass from Python than a step of an
    environment takes.
    """
    element = from_dtype(np.dtype(dtype))

    @intrinsic
    def at(typing_context: Any, address: Any, size: Any) -> Any:
        signature = SpanType(element)(types.intp, types.intp)

        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            result = cgutils.create_struct_proxy(signature.return_type)(context, builder)
            result.data = builder.inttoptr(args[0], cgutils.voidptr_t)
            result.size = args[1]
            return result._getvalue()

        return signature, build

    return at


@intrinsic
def trailing_zeros(typing_context: Any, number: Any) -> Any:
    """How many zeros an int64 other than 0 ends with in binary."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], context.get_constant(types.boolean, True))

    return types.int64(types.int64), build


@intrinsic
def copy_record(typing_context: Any, target: Any, source: Any) -> Any:
    """Copy all of one record into another of the same type."""
    signature = types.void(target, source)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.raw_memcpy(builder, args[0], args[1], context.get_constant(types.intp, source.size), 1)
        return context.get_dummy_value()

    return signature, build


def _pointer(context: Any, builder: Any, source_type: Any, value: Any, index: Any) -> Any:
    """The address of an element of a span or of an array."""
    if isinstance(source_type, SpanType):
        data = cgutils.create_struct_proxy(source_type)(context, builder, value=value).data
    else:
        data = context.make_array(source_type)(context, builder, value).data
    element = context.get_data_type(source_type.dtype)
    return builder.gep(builder.bitcast(data, element.as_pointer()), [index])


@intrinsic
def _load(typing_context: Any, source: Any, index: Any) -> Any:
    signature = source.dtype(source, types.intp)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1])
        if isinstance(signature.return_type, types.Record):
            return pointer
        return builder.load(pointer)

    return signature, build


@intrinsic
def _store(typing_context: Any, target: Any, index: Any, value: Any) -> Any:
    signature = types.void(target, types.intp, target.dtype)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, signature.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return signature, build


@intrinsic
def _size(typing_context: Any, source: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0]).size

    return types.intp(source), build


@intrinsic
def prefetch(typing_context: Any, source: Any, index: Any) -> Any:
    """Ask memory for the first three cache lines of a record before they are needed; it may lie beyond the
    end.
    """
    signature = types.void(source, types.intp)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(
            _pointer(context, builder, signature.args[0], args[0], args[1]), cgutils.voidptr_t
        )
        ask = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[ir.IntType(32)] * 3]),
            "llvm.prefetch.p0i8",
        )
        for line in (0, 64, 128):
            address = builder.gep(pointer, [ir.IntType(64)(line)])
            builder.call(ask, [address, *(ir.IntType(32)(x) for x in (1, 3, 1))])  # write, keep, data
        return context.get_dummy_value()

    return signature, build


@intrinsic
def move(typing_context: Any, source: Any, to: Any, at: Any, count: Any) -> Any:
    """Move `count` elements of a span or array from `at` to `to`, which may overlap."""
    signature = types.void(source, types.intp, types.intp, types.intp)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(signature.args[0].dtype)
        size = context.get_constant(types.intp, context.get_abi_sizeof(element))
        to, at = (_pointer(context, builder, signature.args[0], args[0], i) for i in args[1:3])
        cgutils.raw_memmove(builder, to, at, args[3], size)
        return context.get_dummy_value()

    return signature, build


WORD = 8  # bytes that are written at once


@intrinsic
def less_than(typing_context: Any, numbers: Any, limit: Any) -> Any:
    """Which of the first eight numbers of an int64 array are less than the limit: a word of bytes 0 or 1."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        vector = ir.VectorType(integer, WORD)
        zero = context.get_constant(types.intp, 0)
        first = _pointer(context, builder, signature.args[0], args[0], zero)
        found = builder.load(builder.bitcast(first, vector.as_pointer()), align=8)
        all_alike = ir.Constant(ir.VectorType(ir.IntType(32), WORD), [0] * WORD)
        limits = builder.insert_element(ir.Constant(vector, ir.Undefined), args[1], ir.IntType(32)(0))
        limits = builder.shuffle_vector(limits, limits, all_alike)
        less = builder.icmp_signed("<", found, limits)
        return builder.bitcast(builder.zext(less, ir.VectorType(ir.IntType(8), WORD)), integer)

    return types.uint64(numbers, types.int64), build


@intrinsic
def store_word(typing_context: Any, target: Any, index: Any, word: Any) -> Any:
    """Write the eight bytes of a word into a span of bytes, from `index` on."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(target, types.intp, types.uint64), build


@intrinsic
def ones(typing_context: Any, word: Any) -> Any:
    """How many bits of a word are set."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), build


@overload(operator.getitem, strict=False)
def _getitem(source: Any, index: Any) -> Callable[..., Any] | None:
    if isinstance(source, SpanType) and isinstance(index, types.Integer):
        return lambda source, index: _load(source, index)
    return None


@overload(operator.setitem, strict=False)
def _setitem(target: Any, index: Any, value: Any) -> Callable[..., Any] | None:
    if isinstance(target, SpanType) and isinstance(index, types.Integer):
        dtype = target.dtype
        return lambda target, index, value: _store(target, index, dtype(value))
    return None


@overload(len, strict=False)
def _len(source: Any) -> Callable[..., Any] | None:
    if isinstance(source, SpanType):
        return lambda source: _size(source)
    return None
