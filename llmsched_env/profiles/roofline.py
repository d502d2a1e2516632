"""Analytic cost profiles: from the shape of a decoder and the datasheet of a GPU, nothing measured.

Each kind of operator takes the larger of its compute time and its memory time (the roofline of Williams,
Waterman and Patterson, 2009), at given fractions of the GPU's peaks. Useful where nobody has measured; the
fitted profiles are better where they exist.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TypeVar

from llmsched_env.errors import InputError, unknown
from llmsched_env.profiles.profile import Profile

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """A dense decoder with gated feed-forward layers (three matrices), as Llama, Mistral and Qwen have.

    Attributes:
        layers, hidden, ffn, heads, kv_heads, head_dim, vocab: the numbers of its configuration file.
        dtype_bytes: bytes of a weight, and of a number in the KV cache.
        tied: whether the embedding doubles as the output head.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype_bytes: float = 2.0
    tied: bool = False

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' matrix products, without embedding and output head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def parameters(self) -> int:
        """All weights, without the few of the norms."""
        return self.layer_parameters + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache of a token in bytes: a key and a value for each layer and KV head."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as its datasheet has it.

    Attributes:
        flops: peak 16-bit floating-point operations per second with dense matrices.
        bandwidth: memory bandwidth, bytes per second.
        memory: bytes.
        link: bandwidth to the other GPUs in one direction, bytes per second.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 2039e9, 80e9, 300e9),  # A100 SXM 80 GB
        Gpu("h100", 989e12, 3350e9, 80e9, 450e9),  # H100 SXM
        Gpu("h200", 989e12, 4800e9, 141e9, 450e9),  # H200 SXM
        Gpu("b200", 2250e12, 8000e9, 180e9, 900e9),  # B200 in an HGX board
        Gpu("l40s", 362e12, 864e9, 48e9, 32e9),  # L40S, PCIe 4
    )
}

SHAPES = {
    shape.name: shape
    for shape in (
        DecoderShape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000),
        DecoderShape("llama-2-13b", 40, 5120, 13824, 40, 40, 128, 32000),
        DecoderShape("llama-2-70b", 80, 8192, 28672, 64, 8, 128, 32000),
        DecoderShape("codellama-34b", 48, 8192, 22016, 64, 8, 128, 32000),
        DecoderShape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        DecoderShape("llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        DecoderShape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32000),
        DecoderShape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064),
        DecoderShape("qwen2.5-32b", 64, 5120, 27648, 40, 8, 128, 152064),
    )
}


def kv_tokens(shape: DecoderShape, gpu: Gpu, tp: int = 1, memory_fraction: float = 0.9) -> int:
    """KV capacity in tokens: what `memory_fraction` of the memory of `tp` GPUs holds beside the weights.

    Raises:
        InputError: the weights do not fit.
    """
    free = tp * gpu.memory * memory_fraction - shape.parameters * shape.dtype_bytes
    tokens = int(free // (shape.kv_bytes_per_token * _copies(shape, tp)))
    if tokens < 1:
        weights = shape.parameters * shape.dtype_bytes / 1e9
        room = tp * gpu.memory * memory_fraction / 1e9
        raise InputError(
            f"{shape.name} has {weights:.0f} GB of weights, {tp} x {gpu.name} hold {room:.0f}; take more GPUs"
        )
    return tokens


def profile(
    shape: str | DecoderShape,
    gpu: str | Gpu,
    tp: int = 1,
    *,
    compute_efficiency: float = 0.65,
    bandwidth_efficiency: float = 0.9,
    attention_efficiency: float = 0.5,
    kv_efficiency: float = 0.7,
    layer_overhead_s: float = 60e-6,
    allreduce_s: float = 10e-6,
    memory_fraction: float = 0.9,
) -> Profile:
    """The analytic profile of a decoder on `tp` GPUs (tensor parallel).

    The default efficiencies are near those that fits of such a model to measured kernels gave on A100 to
    B200: 0.5 to 0.9 of peak compute and 0.7 to 0.95 of peak bandwidth for matrix products, 0.2 to 0.9 of peak
    compute for attention of prefills, 0.5 to 0.9 of peak bandwidth for that of decodes.

    Args:
        shape: a DecoderShape or one of `SHAPES`.
        gpu: a Gpu or one of `GPUS`.
        tp: how many GPUs.
        compute_efficiency, bandwidth_efficiency: fractions of the peaks that matrix products reach.
        attention_efficiency: fraction of peak compute that attention of prefills reaches.
        kv_efficiency: fraction of peak bandwidth at which attention reads the KV cache.
        layer_overhead_s: seconds of every layer whatever the batch: small kernels and their launches.
        allreduce_s: least seconds of an all-reduce, of which a layer has two if tp > 1.
        memory_fraction: part of the memory for weights and KV cache; the rest is for activations.

    Raises:
        InputError: an unknown name, a shape that tp does not divide, or weights that do not fit.
    """
    shape, gpu = _named("decoder shape", shape, SHAPES), _named("GPU", gpu, GPUS)
    efficiencies = {
        "compute_efficiency": compute_efficiency,
        "bandwidth_efficiency": bandwidth_efficiency,
        "attention_efficiency": attention_efficiency,
        "kv_efficiency": kv_efficiency,
        "memory_fraction": memory_fraction,
    }
    for key, value in efficiencies.items():
        if not 0 < value <= 1:
            raise InputError(f"{key} {value} must be above 0 and at most 1")
    if tp < 1 or shape.heads % tp:
        raise InputError(f"tp {tp} does not divide the {shape.heads} heads of {shape.name}")
    copies = _copies(shape, tp)
    flops, attention_flops = compute_efficiency * gpu.flops * tp, attention_efficiency * gpu.flops * tp
    bandwidth = bandwidth_efficiency * gpu.bandwidth * tp
    head = shape.vocab * shape.hidden
    kv = shape.kv_bytes_per_token * copies / (kv_efficiency * gpu.bandwidth * tp)
    allreduces = 2 * shape.layers if tp > 1 else 0
    params = {
        "t0": shape.layers * layer_overhead_s + allreduces * allreduce_s,
        "weights": shape.layer_parameters * shape.dtype_bytes / bandwidth,
        "token": 2 * shape.layer_parameters / flops,
        "head_weights": head * shape.dtype_bytes / bandwidth,
        "head_token": 2 * head / flops,
        "attention": 4 * shape.layers * shape.heads * shape.head_dim / attention_flops,
        "kv_prefill": kv,
        "kv_decode": kv,
        "communication": allreduces * 2 * (tp - 1) / tp * shape.hidden * shape.dtype_bytes / gpu.link,
    }
    return Profile(
        name=f"roofline:{shape.name}@{gpu.name}" + (f":tp{tp}" if tp > 1 else ""),
        form="roofline",
        params=params,
        kv_tokens=kv_tokens(shape, gpu, tp, memory_fraction),
        kv_bytes_per_token=shape.kv_bytes_per_token * copies,
        gpus=tp,
        gpu=gpu.name,
        model=shape.name,
        provenance=(
            "Analytic, nothing measured: FLOPs and bytes of the decoder over the GPU's datasheet peaks, at "
            + ", ".join(f"{key} {value:g}" for key, value in efficiencies.items())
        ),
    )


def parse(name: str) -> Profile:
    """The profile named `roofline:SHAPE@GPU` or `roofline:SHAPE@GPU:tpN`."""
    match = re.fullmatch(r"roofline:([^@:]+)@([^@:]+)(?::tp(\d+))?", name)
    if not match:
        raise InputError(f"profile {name!r} is not of the form roofline:SHAPE@GPU or roofline:SHAPE@GPU:tpN")
    return profile(match[1], match[2], int(match[3] or 1))


def _copies(shape: DecoderShape, tp: int) -> float:
    """How many GPUs hold the same KV head: more than one if there are more GPUs than KV heads."""
    return max(1.0, tp / shape.kv_heads)


def _named(kind: str, thing: str | T, known: dict[str, T]) -> T:
    if not isinstance(thing, str):
        return thing
    if thing not in known:
        raise unknown(kind, thing, known)
    return known[thing]
