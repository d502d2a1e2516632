"""A measurement from beginning to end: plan, two peaks, all batches, in files that it can go on with."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_env.errors import InputError
from llmsched_env.measure import grid, memory
from llmsched_env.measure.grid import PARTS, Batch
from llmsched_env.measure.journal import Files, Journal, Row
from llmsched_env.measure.memory import PAGE, Memory
from llmsched_env.measure.settings import GIB, Settings
from llmsched_env.profiles.roofline import GPUS, DecoderShape

if TYPE_CHECKING:
    from llmsched_env.measure.decoder import Decoder
    from llmsched_env.measure.device import Device, Step

_MOST_REPEATS = 100
_DRIFT = 0.1  # of the first check, from which a later one is worth a warning


class Interrupted(Exception):
    """It was asked to stop; what is measured is on disk.

    Attributes:
        done, total: batches.
        begun: whether there are files to go on with.
    """

    def __init__(self, done: int, total: int, *, begun: bool = True) -> None:
        how = "the same command with --resume goes on" if begun else "nothing is kept"
        super().__init__(f"{done} of {total} batches are measured; {how}")
        self.done, self.total, self.begun = done, total, begun


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a measurement will do.

    Attributes:
        memory: of the device, and what is taken of it.
        parts: batches by part.
        pages: of the KV cache that they need.
    """

    memory: Memory
    parts: dict[str, list[Batch]]
    pages: int

    @property
    def batches(self) -> int:
        """How many."""
        return sum(map(len, self.parts.values()))

    @property
    def needed(self) -> float:
        """Bytes of the device."""
        return self.memory.weights + self.memory.activations + self.pages * self.memory.page


@dataclasses.dataclass(frozen=True)
class Progress:
    """How a measurement stands after a batch.

    Attributes:
        done, total: batches.
        batch: the last.
        seconds: of its iteration; None: it was skipped.
        left_s: seconds left, from those that the batches took so far.
    """

    done: int
    total: int
    batch: Batch
    seconds: float | None
    left_s: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was measured.

    Attributes:
        about: settings, hardware, kernels, checks; see `journal`.
        rows: by batch.
        skipped: batches that were not measured, and why.
        fresh: how many rows are of this session.
    """

    settings: Settings
    files: Files
    plan: Plan
    about: dict[str, Any]
    rows: dict[Batch, Row]
    skipped: dict[Batch, str]
    fresh: int


def plan(settings: Settings, total_bytes: float) -> Plan:
    """The batches, and the memory that they need of a device that has so much.

    Raises:
        InputError: it does not suffice.
    """
    found = memory.of(settings, total_bytes)
    limits = grid.Limits(settings.max_tokens, settings.max_context, settings.max_decodes, found.pages, PAGE)
    parts = grid.design(limits, quick=settings.quick, seed=settings.seed)
    # What the kernels of attention are chosen on needs some as well.
    least = -(-min(2048, settings.max_context) // PAGE)
    return Plan(found, parts, max(least, *(batch.pages(PAGE) for part in parts.values() for batch in part)))


def run(
    settings: Settings,
    output: str | Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Progress], None] = lambda now: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Measure, or go on measuring.

    Args:
        output: the profile to write in the end (`report.write`); the rows go beside it, see `journal`.
        resume: go on with what is there; rows that are measured are not measured again.
        say: told what is found before the batches, a line at a time.
        progress: told how it stands, after each batch.
        stop: asked between repetitions; once it says yes, `Interrupted` is raised.

    Raises:
        InputError: PyTorch or the device is missing, the memory does not suffice, the files cannot be
            written, or with `resume` something is not as it was.
        Interrupted: as asked to.
    """
    files = Files(Path(output))
    files.check(resume)
    on, total = open_device(settings)
    on.require(settings.dtype)
    planned = plan(settings, total)
    facts = {"settings": settings.facts(), "hardware": on.facts()}
    journal = Journal.open(files) if resume else None
    try:
        if journal is not None:
            journal.require(**facts)
            if _all_measured(planned, journal):  # for another form of the fit, say
                return Outcome(settings, files, planned, journal.about, journal.rows, {}, 0)
        _require_free(planned, on)
        try:
            peaks = _peaks(settings, on, say)  # before the decoder takes its memory
            decoder = _build(settings, planned, on, journal)
            checks = {**peaks, **_check(settings, decoder, on, peaks, say, stop)}
        except (RuntimeError, MemoryError) as error:
            raise InputError(
                f"PyTorch failed before the first batch: {_first_line(error)}; try --no-fuse, "
                "--graph-tokens 0, or another --attention"
            ) from error
        if journal is None:
            about = {**facts, "kernels": decoder.notes, "checks": checks, "begun": _now()}
            journal = Journal.create(files, about)
        else:
            _compare_checks(journal.about["checks"], checks, say)
        return _measure(settings, files, planned, decoder, on, journal, progress, stop)
    except _Stop:
        done = 0 if journal is None else len(journal.rows)
        raise Interrupted(done, planned.batches, begun=journal is not None) from None
    finally:
        if journal is not None:
            journal.close()


def open_device(settings: Settings) -> tuple[Device, float]:
    """The device, and its memory in bytes as far as it counts.

    Raises:
        InputError: there is none, or no PyTorch.
    """
    try:
        from llmsched_env.measure import device
    except ImportError as error:
        raise InputError(
            f"measuring needs PyTorch ({error}); install it: pip install 'llmsched-env[train,fit]'"
        ) from None
    try:
        import scipy  # noqa: F401  # the fits at the end: better known now than in an hour
    except ImportError:
        raise InputError("fitting needs scipy; install it: pip install 'llmsched-env[fit]'") from None
    on = device.device(settings.device)
    return on, float(settings.memory_gib * GIB if settings.memory_gib else on.total_bytes())


def _require_free(planned: Plan, on: Device) -> None:
    free = on.free_bytes()
    if planned.needed > free:
        raise InputError(
            f"{planned.needed / GIB:.1f} GiB are needed, but of the {on.total_bytes() / GIB:.1f} GiB of this "
            f"device only {free / GIB:.1f} are free: end what else uses it, or plan with less: --memory-gib, "
            "--layers"
        )


def _build(settings: Settings, planned: Plan, on: Device, journal: Journal | None) -> Decoder:
    """The decoder; with the kernels of before, where the measurement goes on."""
    from llmsched_env.measure import attention, device
    from llmsched_env.measure.decoder import Decoder

    if settings.flash is not None:
        attention.activate(settings.flash)
    before = None if journal is None else journal.about["kernels"]
    kernels = before and {use: found["chosen"] for use, found in before["attention"].items()}
    try:
        decoder = Decoder(settings, on, planned.pages, kernels=kernels)
    except (RuntimeError, MemoryError) as error:
        if not device.out_of_memory(error):
            raise
        raise InputError(
            f"the memory did not suffice for the decoder and its KV cache ({planned.needed / GIB:.1f} GiB): "
            f"{_first_line(error)}; plan with less: --memory-gib, --layers"
        ) from None
    if before and before["small operations"] != decoder.notes["small operations"]:
        raise InputError(
            f"the small operations were {before['small operations']!r} when it began, and are now "
            f"{decoder.notes['small operations']!r}; make them the same (--fuse, --no-fuse), or measure anew"
        )
    return decoder


# ---------------------------------------------------------------------- two numbers first


def _peaks(settings: Settings, on: Device, say: Callable[[str], None]) -> dict[str, float]:
    """Bytes and operations per second that PyTorch reaches; beside them the share of the datasheet's."""
    from llmsched_env.measure import device

    shape, tokens = settings.shape, min(settings.max_tokens, settings.max_context)
    peaks = {
        "bandwidth": device.bandwidth(on),
        "flops": device.flops(on, settings.dtype, shape.hidden, shape.ffn, tokens),
    }
    say(
        f"memory bandwidth {peaks['bandwidth'] / 1e9:,.0f} GB/s, {peaks['flops'] / 1e12:,.2f} TFLOP/s reached"
    )
    facts = on.facts()
    known = GPUS.get(device.short_name(str(facts["device"]), facts.get("memory_gib")))
    if known is not None and settings.dtype != "fp32":
        peaks["bandwidth_of_datasheet"] = peaks["bandwidth"] / known.bandwidth
        peaks["flops_of_datasheet"] = peaks["flops"] / known.flops
        say(
            f"that is {peaks['bandwidth_of_datasheet']:.0%} and {peaks['flops_of_datasheet']:.0%} of the "
            f"datasheet's for {known.name}"
        )
    on.release()
    return peaks


def _check(
    settings: Settings,
    decoder: Decoder,
    on: Device,
    peaks: dict[str, float],
    say: Callable[[str], None],
    stop: Callable[[], bool],
) -> dict[str, float]:
    """How near an iteration comes to the peaks: bytes over bandwidth, operations over peak.

    A decode of one request has to read all weights; a long prompt has to do all operations. What is measured
    can be no faster than that; if it is far slower, the program or the machine has a fault.

    Raises:
        InputError: the longest prompt does not fit the memory.
    """
    from llmsched_env.measure import device

    shape, tokens = settings.shape, min(settings.max_tokens, settings.max_context)
    decode, prefill = Batch(decodes=((1, 128),)), Batch(chunks=((1, tokens, 0),))
    found: dict[str, float] = {}
    try:
        peak = _peak_bytes(decoder, on, prefill)
    except (RuntimeError, MemoryError) as error:
        if not device.out_of_memory(error):
            raise
        raise InputError(
            f"the memory did not suffice for a prompt of {tokens} tokens: {_first_line(error)}; give a "
            "smaller --max-tokens, or --memory-gib"
        ) from None
    if peak is not None:
        found["activation_bytes"] = float(peak)
    for name, batch, floor, what in (
        ("decode", decode, bytes_read(shape, decode) / peaks["bandwidth"], "bytes over bandwidth"),
        ("prefill", prefill, operations(shape, prefill) / peaks["flops"], "operations over peak"),
    ):
        seconds = _time(settings, decoder, on, batch, stop).seconds
        found |= {f"{name}_s": seconds, f"{name}_floor_s": floor, f"{name}_over_floor": seconds / floor}
        say(
            f"{name} {batch}: {1000 * seconds:.3f} ms, {what} {1000 * floor:.3f} ms: "
            f"{seconds / floor:.2f} times the floor"
        )
        if seconds < floor and on.kind == "cuda":  # a processor's caches are faster than its memory
            say(f"careful: {batch} took less time than {what} allows; these times are not to be trusted")
    return found


def _peak_bytes(decoder: Decoder, on: Device, batch: Batch) -> int | None:
    inputs = decoder.inputs(batch)
    decoder.step(inputs)  # libraries take their workspaces
    return on.peak_bytes(lambda: decoder.step(inputs))


def bytes_read(shape: DecoderShape, batch: Batch) -> float:
    """Bytes that an iteration has to read at least: weights once, and the KV cache of its requests."""
    _, _, _, cached, _, context = batch.features
    matrices = shape.layer_parameters + shape.vocab * shape.hidden
    return matrices * shape.dtype_bytes + (cached + context) * shape.kv_bytes_per_token


def operations(shape: DecoderShape, batch: Batch) -> float:
    """Floating-point operations of an iteration: two for each weight and token, and attention's."""
    _, _, pairs, _, _, context = batch.features
    attention = 4 * shape.layers * shape.heads * shape.head_dim * (pairs + context)
    return 2 * shape.layer_parameters * batch.tokens + 2 * shape.vocab * shape.hidden * batch.rows + attention


def _compare_checks(before: dict[str, float], now: dict[str, float], say: Callable[[str], None]) -> None:
    for name in ("decode", "prefill"):
        times = now[f"{name}_s"] / before[f"{name}_s"]
        if abs(times - 1) > _DRIFT:
            say(
                f"careful: the {name} takes {times:.2f} times what it took when the measuring began; is "
                "something else running on the device, or are its clocks different?"
            )


# ---------------------------------------------------------------------- the batches


def _all_measured(planned: Plan, journal: Journal) -> bool:
    return all(batch in journal.rows for part in planned.parts.values() for batch in part)


def _measure(
    settings: Settings,
    files: Files,
    planned: Plan,
    decoder: Decoder,
    on: Device,
    journal: Journal,
    progress: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> Outcome:
    from llmsched_env.measure.device import out_of_memory

    whole = [(batch, part) for part in PARTS for batch in planned.parts[part]]
    # In an order at random, so that a drift of the clocks is not taken for an effect of the size.
    order = np.random.default_rng(settings.seed).permutation(len(whole))
    todo = [whole[i] for i in order if whole[i][0] not in journal.rows]
    skipped: dict[Batch, str] = {}
    begin, before = time.perf_counter(), len(whole) - len(todo)
    for n, (batch, part) in enumerate(todo, start=1):
        row = None
        try:
            timing = _time(settings, decoder, on, batch, stop)
            row = Row(batch, part, timing.seconds, timing.spread_s, timing.repeats, timing.launch_s)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise InputError(
                    f"{batch} failed: {_first_line(error)}; the rows before are in {files.rows}, and "
                    "--resume goes on"
                ) from error
            skipped[batch] = "out of memory"
        if row is not None:
            journal.append(row)
        else:
            gc.collect()
            on.release()
        left = (time.perf_counter() - begin) / n * (len(todo) - n)
        progress(Progress(before + n, len(whole), batch, None if row is None else row.seconds, left))
    journal.note(
        ended=_now(),
        skipped={str(batch): why for batch, why in skipped.items()},
    )
    return Outcome(settings, files, planned, journal.about, journal.rows, skipped, len(todo) - len(skipped))


class _Stop(Exception):
    """Within a batch: it is to stop."""


@dataclasses.dataclass(frozen=True)
class _Timing:
    """Of a batch, with all layers."""

    seconds: float
    spread_s: float
    repeats: int
    launch_s: float


def _time(
    settings: Settings, decoder: Decoder, on: Device, batch: Batch, stop: Callable[[], bool]
) -> _Timing:
    """Median and spread of an iteration. Where not all layers are built, those that are stand for the others:
    an iteration is what it has beside layers, and so many times a layer."""
    inputs = decoder.inputs(batch)
    found, launch = _repeat(settings, on, batch, lambda: decoder.step(inputs), stop)
    low, middle, high = (float(x) for x in np.quantile(found, (0.1, 0.5, 0.9)))
    share = settings.shape.layers / settings.built_layers
    if share > 1:
        of_ends, launch_ends = _repeat(settings, on, batch, lambda: decoder.ends(inputs), stop)
        ends = statistics.median(of_ends)
        middle = ends + max(0.0, middle - ends) * share
        launch = launch_ends + max(0.0, launch - launch_ends) * share
    return _Timing(middle, (high - low) * share, len(found), launch)


def _repeat(
    settings: Settings, on: Device, batch: Batch, step: Step, stop: Callable[[], bool]
) -> tuple[list[float], float]:
    """Seconds of each repetition; and until one is launched, where that is not as a graph."""
    if stop():
        raise _Stop
    about, launch = on.times(step, settings.warmup)[-1], 0.0
    if batch.tokens <= settings.graph_tokens:
        step = on.graph(step)
        about = on.times(step, 2)[-1]
    else:
        launch = on.launch(step)
    wanted = max(settings.repeats, int(min(_MOST_REPEATS, settings.seconds / max(about, 1e-9))))
    found: list[float] = []
    while len(found) < wanted:
        if stop():
            raise _Stop
        # A tenth of a second at a time, for who waits for it to stop.
        found += on.times(step, min(wanted - len(found), max(1, int(0.1 / max(about, 1e-9)))))
    return found, launch


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _first_line(error: BaseException) -> str:
    from llmsched_env.measure.device import cause

    error = cause(error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
