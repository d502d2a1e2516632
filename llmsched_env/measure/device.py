"""The device that is measured: what it is, its clock, and its two peaks as PyTorch reaches them."""

from __future__ import annotations

import abc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from llmsched_env.errors import InputError
from llmsched_env.measure.settings import GIB
from llmsched_env.measure.shapes import DTYPES
from llmsched_env.profiles.roofline import GPUS

Step = Callable[[], Any]


class Device(abc.ABC):
    """A device that iterations run on, one after the other.

    Attributes:
        kind: "cuda" or "cpu".
        torch: PyTorch's name of it.
    """

    kind: str
    torch: torch.device

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What times on it depend on: name, driver, versions; strings and numbers."""

    @abc.abstractmethod
    def total_bytes(self) -> int:
        """Memory that it has."""

    @abc.abstractmethod
    def free_bytes(self) -> int:
        """Memory that nobody uses."""

    @abc.abstractmethod
    def times(self, step: Step, repeats: int) -> list[float]:
        """Seconds of each of so many repetitions, one begun when the one before is done."""

    def peak_bytes(self, step: Step) -> int | None:
        """Memory that one repetition takes beside what is taken before; None: it cannot be told."""
        return None

    def launch(self, step: Step) -> float:
        """Seconds until one repetition is launched; 0 where that is not apart from running it."""
        return 0.0

    def graph(self, step: Step) -> Step:
        """The step as one launch, where the device has that; the step itself elsewhere."""
        return step

    def require(self, dtype: str) -> None:
        """That it computes in a dtype of `shapes.DTYPES`.

        Raises:
            InputError: it does not.
        """
        return

    def release(self) -> None:
        """Give back what no tensor uses any more."""
        return


class Cpu(Device):
    """This machine's processor, to try the program."""

    kind = "cpu"

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        torch.set_num_threads(1)  # several wait for each other where the machine has other work to do

    def facts(self) -> dict[str, Any]:
        return {
            "device": _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def total_bytes(self) -> int:
        """Half of what the machine has: nothing here is worth driving others out of memory."""
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    def free_bytes(self) -> int:
        try:
            with open("/proc/meminfo") as file:
                fields = dict(line.split(":", 1) for line in file)
            return int(fields["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return self.total_bytes()

    def times(self, step: Step, repeats: int) -> list[float]:
        found = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            found.append(time.perf_counter() - begin)
        return found


class Cuda(Device):
    """The current CUDA (or ROCm) device."""

    kind = "cuda"

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self._side: torch.cuda.Stream | None = None

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.torch)
        return {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / GIB, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "torch": torch.__version__,
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "cudnn": torch.backends.cudnn.version(),
            **_nvidia_smi(getattr(properties, "uuid", None)),
        }

    def total_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch)[1])

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch)[0])

    def times(self, step: Step, repeats: int) -> list[float]:
        # Each between two events on the stream: the GPU's own clock. A step that the CPU launches more slowly
        # than the GPU works is timed as slow as that is.
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        torch.cuda.synchronize()
        for begin, end in events:
            begin.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in events]

    def peak_bytes(self, step: Step) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated(self.torch)) - before

    def launch(self, step: Step) -> float:
        found = []
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            found.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        return statistics.median(found)

    def graph(self, step: Step) -> Step:
        # Once on the stream that captures first: libraries set themselves up on it. It is the same for all
        # graphs, since they keep a workspace for each stream that they have seen.
        if self._side is None:
            self._side = torch.cuda.Stream(self.torch)
        current = torch.cuda.current_stream(self.torch)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            step()
        current.wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        # The outer one, since where capturing fails PyTorch leaves the stream that captured the current one.
        with torch.cuda.stream(current), torch.cuda.graph(graph, stream=self._side):
            step()
        return graph.replay

    def require(self, dtype: str) -> None:
        if dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_properties(self.torch).name
            raise InputError(f"{name} does not compute in bf16; measure with --dtype fp16")

    def release(self) -> None:
        torch.cuda.empty_cache()


def device(kind: str) -> Device:
    """The device of a kind.

    Raises:
        InputError: "cuda", and PyTorch finds none.
    """
    if kind == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        built = (
            "was built without CUDA" if torch.version.cuda is None else "finds no GPU, or no driver for it"
        )
        raise InputError(
            f"no CUDA device: PyTorch {torch.__version__} {built}; measure on a machine with a GPU and a "
            "PyTorch for it, or try the program on the processor: --device cpu --model tiny"
        )
    return Cuda()


_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception of PyTorch says that the memory did not suffice, or one in the handling of which
    it came up: when a graph cannot be captured, another error follows."""
    while error is not None:
        if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(what in str(error) for what in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def cause(error: BaseException) -> BaseException:
    """What went wrong: the exception itself, or the one before it where capturing a graph failed because of
    that."""
    before = error.__cause__ or error.__context__
    return cause(before) if isinstance(before, Exception) and "capture" in str(error) else error


def short_name(name: str, memory_gib: float | None = None) -> str:
    """A GPU's name as `profiles.roofline.GPUS` has it, where it is one of them; the name itself otherwise,
    and of those of the same name for another socket, with other memory, or of a part of one.

    Args:
        memory_gib: that PyTorch finds; None: not known.
    """
    words = name.lower().replace("-", " ").split()
    found = next((known for known in GPUS if known in words), None)
    if found is None or {"pcie", "nvl", "mig"} & set(words):
        return name
    # Datasheets count in powers of ten, and a part is kept back.
    if memory_gib is not None and not 0.85 < memory_gib * GIB / GPUS[found].memory < 1.15:
        return name
    return found


def bandwidth(on: Device) -> float:
    """Bytes per second that reading a large array reaches, or copying it if that is more."""
    size = min(1 * GIB, on.free_bytes() // 8) if on.kind == "cuda" else GIB // 4
    source = torch.ones(size // 4, dtype=torch.float32, device=on.torch)
    target = torch.empty_like(source)
    read = _best(on, lambda: source.sum())
    copy = _best(on, lambda: target.copy_(source))
    return source.nbytes * max(1 / read, 2 / copy)


def flops(on: Device, dtype: str, hidden: int, ffn: int, tokens: int) -> float:
    """Operations per second that products of large matrices reach: square ones, and those of the decoder."""
    side = 8192 if on.kind == "cuda" else 512
    kind = getattr(torch, DTYPES[dtype][0])
    best = 0.0
    for m, k, n in ((side, side, side), (tokens, hidden, 2 * ffn), (tokens, ffn, hidden)):
        # Numbers at random: with zeros a GPU draws less power, and runs faster than it ever will.
        a = torch.randn(m, k, device=on.torch, dtype=kind)
        b = torch.randn(n, k, device=on.torch, dtype=kind)
        best = max(best, 2.0 * m * k * n / _best(on, partial(torch.nn.functional.linear, a, b)))
    return best


def warm(on: Device, step: Step) -> None:
    """Repeat a step until a GPU's clocks are up."""
    begin = time.perf_counter()
    for _ in range(100 if on.kind == "cuda" else 1):
        on.times(step, 3)
        if time.perf_counter() - begin > 0.3:
            break


def _best(on: Device, step: Step) -> float:
    """Median seconds of the better half of some repetitions."""
    with torch.inference_mode():
        warm(on, step)
        found = sorted(on.times(step, 20))
    return max(statistics.median(found[:10]), 1e-9)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _nvidia_smi(uuid: Any) -> dict[str, Any]:
    """Driver, power limit and highest clock; nothing where there is no nvidia-smi."""
    wanted = {"driver": "driver_version", "power_limit": "power.limit", "sm_clock_most": "clocks.max.sm"}
    command = ["nvidia-smi", f"--query-gpu={','.join(wanted.values())}", "--format=csv,noheader"]
    if uuid is not None:
        command.append(f"--id=GPU-{uuid}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    cells = [cell.strip() for cell in done.stdout.strip().split("\n")[0].split(",")]
    return dict(zip(wanted, cells, strict=True)) if len(cells) == len(wanted) and not done.returncode else {}
