"""Measuring a GPU: how long it takes for iterations of a decoder, and the cost profile that follows.

    settings   what to measure: model, numbers, limits of the batches, repetitions
    shapes     decoders by name or configuration file
    grid       the batches: a designed grid, and others at random that judge the fits
    memory     what it takes, and how much KV cache an engine would have
    device     the GPU (or, for tests, the CPU): its description, its clock, its two peaks
    attention  attention over a paged KV cache, by the fastest kernel that PyTorch has for it there
    decoder    the decoder with random weights, as engines run it
    journal    the files: rows as they are measured, so that it can be stopped and goes on
    session    all of it in order
    report     fits, their errors, the profile

Only `device`, `attention` and `decoder` import PyTorch.
"""

from __future__ import annotations

from llmsched_env.measure.session import Interrupted, Outcome, plan, run
from llmsched_env.measure.settings import Settings

__all__ = ["Interrupted", "Outcome", "Settings", "plan", "run"]
