"""Decoders to measure: those of the analytic profiles, a tiny one, or a model's configuration file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from llmsched_env.errors import InputError, unknown
from llmsched_env.profiles.roofline import SHAPES, DecoderShape

DTYPES = {"bf16": ("bfloat16", 2.0), "fp16": ("float16", 2.0), "fp32": ("float32", 4.0)}
"""Name: PyTorch's name, bytes. Weights, activations and KV cache are of the same."""

TINY = DecoderShape("tiny", layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=256)

_MANY_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def names() -> list[str]:
    """Of the decoders that are known, sorted."""
    return sorted([*SHAPES, TINY.name])


def get(name: str | Path, dtype: str = "bf16") -> DecoderShape:
    """A decoder by one of `names()`, or by a Hugging Face `config.json` (or the folder that it is in).

    Raises:
        InputError: an unknown name or dtype, a file that describes no dense decoder with gated feed-forward
            layers.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    known = {**SHAPES, TINY.name: TINY}
    path = Path(name)
    if str(name).lower() in known:
        shape = known[str(name).lower()]
    elif path.suffix == ".json" or path.exists():
        shape = _read(path / "config.json" if path.is_dir() else path)
    else:
        raise unknown("decoder", name, [*known, "the path of a config.json"])
    return dataclasses.replace(shape, dtype_bytes=DTYPES[dtype][1])


def _read(path: Path) -> DecoderShape:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} must be a JSON object, a model's configuration")
    for key in _MANY_EXPERTS:
        if found.get(key):
            raise InputError(
                f"{path} is a mixture of experts ({key} {found[key]}); measured are dense decoders"
            )

    def number(key: str, default: Any = None) -> int:
        value = found.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{path}: {key} is {value!r}; it must be a whole number above 0")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    shape = DecoderShape(
        name=path.parent.name if path.name == "config.json" and path.parent.name else path.stem,
        layers=number("num_hidden_layers"),
        hidden=hidden,
        ffn=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads) if found.get("head_dim") else hidden // heads,
        vocab=number("vocab_size"),
        tied=bool(found.get("tie_word_embeddings", False)),
    )
    if shape.heads % shape.kv_heads:
        raise InputError(f"{path}: {shape.kv_heads} KV heads do not divide {shape.heads} heads")
    if shape.head_dim % 2:
        raise InputError(f"{path}: head_dim {shape.head_dim} is odd; rotary embeddings need it even")
    return shape
