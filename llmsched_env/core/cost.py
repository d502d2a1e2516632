"""Batch time: how long one iteration of the engine takes, compiled.

A batch is described by six numbers, in this order everywhere:

    P    prefill tokens computed in this iteration, all chunks together
    NP   requests with a prefill chunk
    CX   prefill context: the sum over chunks of c * (k + c / 2), with c new tokens and k already cached
    KP   cached tokens read by the chunks: the sum of k
    D    decodes (requests that generate one token each)
    KV   decode context: the sum over decodes of the tokens read, the new one included

A cost model is packed in one float64 vector, so that every form runs in the same compiled loop. The
functions take it as an array or, 20 ns faster a call, as a span (`core.span`):

    cost[0]  form, one of the constants below
    cost[1]  CPU seconds per iteration
    cost[2]  CPU seconds per request in the batch
    cost[3:] the form's parameters, in the order of `PARAMETERS`

`llmsched_env.profiles.Profile.pack` writes such vectors. The forms, in seconds, with b = P + D tokens in the
batch:

    hinge      h0 + max(h1, h2*b) + h3*KV + h4*CX + h5*D
    linear     c0 + c1*P + c2*D + c3*KV + c4*CX
    staircase  c + a*ceil(b/b0)                      Dai, Deng, Li, Peng, arXiv 2504.07347v3
    piecewise  c + a*max(0, b - b0)                  the same paper, v1 and v2
    infermax   layers * (other + decode + prefill)   Kim et al., arXiv 2411.07447; see `_infermax`
    roofline   t0 + max(weights, token*b) + max(head_weights, head_token*(NP+D))
               + max(attention*CX, kv_prefill*(KP+P)) + kv_decode*KV + communication*b
               one maximum of compute and memory time for each kind of operator
    table      interpolated measurements, see `_table`
    custom     a compiled function of the user: f(P, NP, CX, KP, D, KV), all float64, -> seconds

An empty batch takes no time, without CPU time either.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from llmsched_env.core.compile import njit
from llmsched_env.core.span import span

HINGE, LINEAR, STAIRCASE, PIECEWISE, INFERMAX, ROOFLINE, TABLE, CUSTOM = range(8)

CODES = {
    "hinge": HINGE,
    "linear": LINEAR,
    "staircase": STAIRCASE,
    "piecewise": PIECEWISE,
    "infermax": INFERMAX,
    "roofline": ROOFLINE,
    "table": TABLE,
    "custom": CUSTOM,
}

PARAMETERS: dict[str, tuple[str, ...]] = {
    "hinge": ("h0", "h1", "h2", "h3", "h4", "h5"),
    "linear": ("c0", "c1", "c2", "c3", "c4"),
    "staircase": ("c", "a", "b0"),
    "piecewise": ("c", "a", "b0"),
    "infermax": ("layers", "a_o", "b_o", "a_d", "b_d", "s_d", "a_p", "b_p", "s_p", "m_p", "floor"),
    "roofline": (
        "t0",
        "weights",
        "token",
        "head_weights",
        "head_token",
        "attention",
        "kv_prefill",
        "kv_decode",
        "communication",
    ),
    "table": ("prefill_tokens", "decodes", "context", "seconds"),
    "custom": ("function",),
}


@njit
def batch_time(
    cost: NDArray[np.float64], P: float, NP: float, CX: float, KP: float, D: float, KV: float
) -> float:
    """Seconds that the batch takes under the packed cost model; 0 for an empty batch.

    The features are float64 or int64, see the top of this module.
    """
    if P + D <= 0:
        return 0.0
    if cost[0] == HINGE:
        t = cost[3] + max(cost[4], cost[5] * (P + D)) + cost[6] * KV + cost[7] * CX + cost[8] * D
    else:
        t = _other_form(cost, float(P), float(NP), float(CX), float(KP), float(D), float(KV))
    return t + cost[1] + cost[2] * (NP + D)


@njit
def decode_line(cost: NDArray[np.float64], D: float) -> tuple[float, float]:
    """(a, b) such that a batch of D decodes and nothing else takes a + b*KV seconds.

    (nan, nan) for the forms that are not linear in KV: table and custom.
    """
    form = cost[0]
    if form == TABLE or form == CUSTOM:
        return math.nan, math.nan
    b = 0.0
    if form == HINGE or form == LINEAR:
        b = cost[6]
    elif form == INFERMAX:
        b = cost[3] * cost[6] * 1e-3
    elif form == ROOFLINE:
        b = cost[10]
    return batch_time(cost, 0.0, 0.0, 0.0, 0.0, float(D), 0.0), b if D > 0 else 0.0


@njit
def batch_times(
    cost: NDArray[np.float64], features: NDArray[np.float64], seconds: NDArray[np.float64]
) -> None:
    """`batch_time` of many batches: features float64 (n, 6), the result into seconds float64 (n,)."""
    packed: Any = span(cost)
    for i in range(len(seconds)):
        P, NP, CX = features[i, 0], features[i, 1], features[i, 2]
        KP, D, KV = features[i, 3], features[i, 4], features[i, 5]
        seconds[i] = batch_time(packed, P, NP, CX, KP, D, KV)


@njit
def _other_form(
    cost: NDArray[np.float64], P: float, NP: float, CX: float, KP: float, D: float, KV: float
) -> float:
    """GPU seconds of a batch that is not empty, for every form but the hinge."""
    form = cost[0]
    if form == LINEAR:
        return cost[3] + cost[4] * P + cost[5] * D + cost[6] * KV + cost[7] * CX
    if form == STAIRCASE:
        return cost[3] + cost[4] * math.ceil((P + D) / cost[5])
    if form == PIECEWISE:
        return cost[3] + cost[4] * max(0.0, P + D - cost[5])
    if form == INFERMAX:
        return _infermax(cost, P, NP, CX, KP, D, KV)
    if form == ROOFLINE:
        dense = max(cost[4], cost[5] * (P + D))
        head = max(cost[6], cost[7] * (NP + D))
        attention = max(cost[8] * CX, cost[9] * (KP + P)) if P > 0 else 0.0
        return cost[3] + dense + head + attention + cost[10] * KV + cost[11] * (P + D)
    if form == TABLE:
        return _table(cost, P, D, KV)
    return _call(cost[3], P, NP, CX, KP, D, KV)  # type: ignore[call-arg]


@njit
def _infermax(
    cost: NDArray[np.float64], P: float, NP: float, CX: float, KP: float, D: float, KV: float
) -> float:
    """The per-layer model of INFERMAX (arXiv 2411.07447, the authors' simulator), in milliseconds per layer.

    other   = a_o * b + b_o, at least `floor`            the matrix products
    decode  = a_d * KV + b_d + s_d * D                   if the batch has decodes
    prefill = a_p * 2 * CX + b_p + s_p * NP + m_p * KP   if it has prefills; 2*CX is their sum of c*c + 2*c*m

    The floor is the time to read the weights, which the published line lacks; 0: as published.
    """
    layer = max(cost[4] * (P + D) + cost[5], cost[13])
    if D > 0:
        layer += cost[6] * KV + cost[7] + cost[8] * D
    if NP > 0:
        layer += cost[9] * (2.0 * CX) + cost[10] + cost[11] * NP + cost[12] * KP
    return cost[3] * layer * 1e-3


@njit
def _table(cost: NDArray[np.float64], P: float, D: float, KV: float) -> float:
    """Measured seconds, interpolated linearly over prefill tokens x decodes x mean context of them (KV/D).

    cost[3:7] = sizes of the three axes and the least measured time; then the axes and the (n0, n1, n2) times,
    last axis fastest. Below an axis its first value counts. Beyond its end the last cell goes on linearly
    (matrix products and attention are linear there, and a refusal would end a long run); the result is never
    below the least measured time.
    """
    n0, n1, n2 = int(cost[3]), int(cost[4]), int(cost[5])
    at = 7
    i, u = _cell(cost, at, n0, P)
    j, v = _cell(cost, at + n0, n1, D)
    k, w = _cell(cost, at + n0 + n1, n2, KV / D if D > 0 else 0.0)
    at += n0 + n1 + n2
    total = 0.0
    for di in range(min(n0, 2)):
        for dj in range(min(n1, 2)):
            for dk in range(min(n2, 2)):
                weight = (u if di else 1.0 - u) * (v if dj else 1.0 - v) * (w if dk else 1.0 - w)
                total += weight * cost[at + ((i + di) * n1 + j + dj) * n2 + k + dk]
    return max(total, cost[6])


@njit
def _cell(cost: NDArray[np.float64], at: int, n: int, x: float) -> tuple[int, float]:
    """The cell of the increasing axis cost[at:at+n] that holds x, and where in it: 0 its start, 1 its end."""
    if n == 1 or x <= cost[at]:
        return 0, 0.0
    low, high = 0, n - 1
    while high - low > 1:
        middle = (low + high) // 2
        if cost[at + middle] <= x:
            low = middle
        else:
            high = middle
    return low, (x - cost[at + low]) / (cost[at + low + 1] - cost[at + low])


@intrinsic
def _call(typing_context: Any, address: Any, P: Any, NP: Any, CX: Any, KP: Any, D: Any, KV: Any) -> Any:
    """Calls the C function double(double x 6) whose address is the bit pattern of the float64 `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.DoubleType()
        pointer = ir.FunctionType(number, [number] * 6).as_pointer()
        function = builder.inttoptr(builder.bitcast(args[0], ir.IntType(64)), pointer)
        return builder.call(function, args[1:])

    return types.float64(*[types.float64] * 7), generate
