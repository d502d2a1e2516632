"""Batch time in plain Python: the twin of `core/cost.py`, to be read. Every operation in the same order."""

from __future__ import annotations

import bisect
import math

from llmsched_env.profiles import Profile


def batch_time(profile: Profile, P: float, NP: float, CX: float, KP: float, D: float, KV: float) -> float:
    """Seconds of a batch: P prefill tokens of NP requests, D decodes; contexts as in `core/cost.py`."""
    if P + D == 0:
        return 0.0
    gpu = globals()[f"_{profile.form}"](profile.params, P, NP, CX, KP, D, KV)
    return gpu + profile.cpu_s + profile.cpu_s_per_request * (NP + D)


def _hinge(p, P, NP, CX, KP, D, KV):
    return p["h0"] + max(p["h1"], p["h2"] * (P + D)) + p["h3"] * KV + p["h4"] * CX + p["h5"] * D


def _linear(p, P, NP, CX, KP, D, KV):
    return p["c0"] + p["c1"] * P + p["c2"] * D + p["c3"] * KV + p["c4"] * CX


def _staircase(p, P, NP, CX, KP, D, KV):
    return p["c"] + p["a"] * math.ceil((P + D) / p["b0"])


def _piecewise(p, P, NP, CX, KP, D, KV):
    return p["c"] + p["a"] * max(0, P + D - p["b0"])


def _infermax(p, P, NP, CX, KP, D, KV):
    layer = max(p["a_o"] * (P + D) + p["b_o"], p.get("floor", 0))
    if D > 0:
        layer += p["a_d"] * KV + p["b_d"] + p["s_d"] * D
    if NP > 0:
        layer += p["a_p"] * (2 * CX) + p["b_p"] + p["s_p"] * NP + p["m_p"] * KP
    return p["layers"] * layer * 1e-3


def _roofline(p, P, NP, CX, KP, D, KV):
    dense = max(p["weights"], p["token"] * (P + D))
    head = max(p["head_weights"], p["head_token"] * (NP + D))
    attention = max(p["attention"] * CX, p["kv_prefill"] * (KP + P)) if P > 0 else 0.0
    return p["t0"] + dense + head + attention + p["kv_decode"] * KV + p["communication"] * (P + D)


def _table(p, P, NP, CX, KP, D, KV):
    def between(axis, x, value):
        """Linear interpolation of value(0), value(1), ... at the axis; it goes on beyond the end."""
        if len(axis) == 1 or x <= axis[0]:
            return value(0)
        i = min(bisect.bisect_right(axis, x) - 1, len(axis) - 2)
        share = (x - axis[i]) / (axis[i + 1] - axis[i])
        return (1 - share) * value(i) + share * value(i + 1)

    seconds, context = p["seconds"], KV / D if D else 0
    t = between(
        p["prefill_tokens"],
        P,
        lambda i: between(
            p["decodes"], D, lambda j: between(p["context"], context, lambda k: seconds[i][j][k])
        ),
    )
    return max(t, min(s for plane in seconds for row in plane for s in row))


def _custom(p, P, NP, CX, KP, D, KV):
    return float(getattr(p["function"], "py_func", p["function"])(P, NP, CX, KP, D, KV))
