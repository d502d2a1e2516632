"""Measuring a device: shapes, batches, memory, the decoder's numbers, sessions that stop and go on, fits.

All on the processor with a tiny decoder; what only a GPU can do (CUDA graphs, its kernels, its clock) is not
tested here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from agents.cli import main  # noqa: E402
from agents.cli import measure as command  # noqa: E402
from llmsched_env import profiles  # noqa: E402
from llmsched_env.errors import InputError  # noqa: E402
from llmsched_env.measure import (  # noqa: E402
    Interrupted,
    Settings,
    attention,
    decoder,
    device,
    grid,
    journal,
    memory,
    report,
    session,
    shapes,
)
from llmsched_env.measure.grid import CHOOSING, FITTED, JUDGED, Batch, Limits  # noqa: E402
from llmsched_env.measure.settings import GIB  # noqa: E402
from llmsched_env.profiles import fit, roofline  # noqa: E402

SMALL = {"max_tokens": 128, "max_context": 256, "max_decodes": 8, "quick": True}
FAST = Settings("tiny", "fp32", "cpu", warmup=1, repeats=3, seconds=0.0, memory_gib=1.0, **SMALL)
OPTIONS = [
    *("profiles", "measure", "--model", "tiny", "--dtype", "fp32", "--device", "cpu", "--quick"),
    *("--max-tokens", "128", "--max-context", "256", "--max-decodes", "8", "--memory-gib", "1"),
    *("--warmup", "1", "--repeats", "3", "--seconds", "0"),
]


bandwidth = device.bandwidth


@pytest.fixture(autouse=True)
def quicker(monkeypatch):
    """One thread; and memory bandwidth, which takes seconds, is not measured in each session."""
    monkeypatch.setattr(device, "bandwidth", lambda on: 1e10)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------- shapes, settings, memory


def test_shapes_of_the_analytic_profiles_and_of_configuration_files(tmp_path):
    assert {"tiny", *roofline.SHAPES} == set(shapes.names())
    assert shapes.get("Llama-3-8B") == roofline.SHAPES["llama-3-8b"]
    assert shapes.get("tiny", "fp32").kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    numbers = {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    (folder / "config.json").write_text(json.dumps(numbers))
    known = dataclasses.replace(roofline.SHAPES["qwen2.5-7b"], name="Qwen2.5-7B")
    assert shapes.get(folder) == shapes.get(folder / "config.json") == known
    (folder / "config.json").write_text(json.dumps({**numbers, "head_dim": 64, "tie_word_embeddings": True}))
    assert shapes.get(folder) == dataclasses.replace(known, head_dim=64, tied=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, "is a mixture of experts (num_local_experts 8)"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number above 0"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "3 KV heads do not divide 4 heads"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_configuration_files_that_will_not_do(tmp_path, change, message):
    path = tmp_path / "m.json"
    numbers = dict.fromkeys(("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"), 8)
    path.write_text(json.dumps({**numbers, "num_attention_heads": 4, **change}))
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        shapes.get(path)
    assert message in str(raised.value)
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        shapes.get(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "lama-3-8b"}, "did you mean 'llama-3-8b'"),
        ({"dtype": "bf8"}, "unknown dtype 'bf8'; did you mean 'bf16'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"layers": 3}, "layers 3 must be from 1 to 2"),
        ({"max_tokens": 8}, "max_tokens 8 must be at least 32"),
        ({"max_decodes": 200}, "max_decodes 200 is more than max_tokens 128"),
        ({"repeats": 1}, "repeats 1 must be at least 3"),
        ({"utilization": 1.5}, "utilization 1.5 must be above 0 and at most 1"),
        ({"memory_gib": 0.0}, "memory_gib 0.0 must be above 0"),
        ({"seconds": math.nan}, "seconds nan"),
        ({"attention": "flash"}, "unknown attention 'flash'"),
    ],
)
def test_settings_that_will_not_do(change, message):
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        dataclasses.replace(FAST, **change)
    assert message in str(raised.value)


def test_memory_by_hand():
    settings = Settings("llama-3-8b")
    found = memory.of(settings, 80 * GIB)
    assert found.weights == roofline.SHAPES["llama-3-8b"].parameters * 2
    assert found.page == 256 * 131072  # bytes of a token's keys and values, from its configuration
    free = 0.9 * 80 * GIB - found.weights - found.activations
    assert found.capacity_tokens == int(free // 131072)
    assert found.pages == found.capacity_tokens // 256
    half = memory.of(dataclasses.replace(settings, layers=16), 80 * GIB)
    assert half.page == found.page / 2
    assert (half.capacity_tokens, half.pages) == (found.capacity_tokens, found.pages)


@pytest.mark.parametrize(("model", "gib"), [("llama-3-8b", 16), ("llama-2-70b", 80), ("codellama-34b", 48)])
def test_memory_that_does_not_suffice_says_how_many_layers_it_would_suffice_for(model, gib):
    with pytest.raises(InputError, match=r"GiB are to be used; --layers (\d+) fits") as raised:
        memory.of(Settings(model), gib * GIB)
    layers = int(str(raised.value).split("--layers ")[1].split()[0])
    found = memory.of(Settings(model, layers=layers), gib * GIB)
    assert found.needed <= 0.9 * gib * GIB
    with pytest.raises(InputError):
        memory.of(Settings(model, layers=layers + 1), gib * GIB)
    with pytest.raises(InputError, match="take a smaller decoder"):
        memory.of(Settings(model), 2 * GIB)


# ---------------------------------------------------------------------- batches

counts = st.integers(1, 40)
batches = st.builds(
    Batch,
    st.lists(st.tuples(counts, st.integers(1, 9999)), max_size=3).map(tuple),
    st.lists(st.tuples(counts, st.integers(1, 999), st.integers(0, 9999)), max_size=3).map(tuple),
).filter(lambda batch: batch.decodes or batch.chunks)


@given(batches)
def test_batches_as_text_and_as_features(batch):
    assert Batch.parse(str(batch)) == batch
    chunks = [(c, k) for n, c, k in batch.chunks for _ in range(n)]
    contexts = [context for n, context in batch.decodes for _ in range(n)]
    assert batch.features == (
        sum(c for c, _ in chunks),
        len(chunks),
        sum(c * (k + c / 2) for c, k in chunks),
        sum(k for _, k in chunks),
        len(contexts),
        sum(contexts),
    )
    assert batch.tokens == sum(c for c, _ in chunks) + len(contexts)
    assert batch.rows == len(chunks) + len(contexts)
    held = [*contexts, *(c + k for c, k in chunks)]
    assert batch.pages(16) == sum(math.ceil(tokens / 16) for tokens in held)


@pytest.mark.parametrize("text", ["", "8", "8xd", "xd8", "8xp5", "8xd5+", "8xd5 + 1xp5@0", "-1xd5", "1xd5;"])
def test_text_that_is_no_batch(text):
    with pytest.raises(InputError, match="is no batch such as"):
        Batch.parse(text)


@given(
    st.builds(
        Limits,
        tokens=st.integers(64, 16384),
        context=st.integers(64, 65536),
        decodes=st.integers(4, 512),
        pages=st.integers(8, 4000),
        page=st.just(256),
    ),
    st.booleans(),
)
def test_designed_batches_are_within_the_limits(limits, quick):
    try:
        parts = grid.design(limits, quick=quick, seed=3)
    except InputError as error:
        assert "allow more" in str(error)
        return
    for part in parts.values():
        assert all(limits.allow(batch) for batch in part)
        assert len(set(part)) == len(part)
        assert all(batch.tokens <= limits.tokens for batch in part)
        assert all(min(batch.features) >= 0 for batch in part)
    assert list(parts) == list(grid.PARTS)
    assert len(set().union(*parts.values())) == sum(map(len, parts.values()))  # none is in two


def test_the_grid_of_a_real_decoder():
    settings = Settings("llama-3-8b")
    parts = session.plan(settings, 80 * GIB).parts
    assert parts == session.plan(settings, 80 * GIB).parts
    other = session.plan(dataclasses.replace(settings, seed=1), 80 * GIB).parts
    assert other[FITTED] == parts[FITTED] and other[JUDGED] != parts[JUDGED]
    features = np.array([batch.features for batch in parts[FITTED]])
    P, NP, _, KP, D, KV = features.T
    # What makes the parameters of every form separable: each feature varies with the others as they are.
    assert {16, 512, 8192} <= set(P[(NP == 1) & (KP == 0) & (D == 0)])
    assert len(set(KP[(P == 512) & (NP == 1) & (D == 0)])) >= 4
    assert len(set(NP[(P == 512) & (KP == 0) & (D == 0)])) >= 3
    assert {1, 64, 256} <= set(D[P == 0])
    assert len(set(KV[(D == 64) & (P == 0)])) >= 5
    assert ((P > 0) & (D > 0)).sum() >= 40
    judged = [batch.kind for batch in parts[JUDGED]]
    assert judged.count("mix") == 48 and judged.count("decode") == judged.count("prefill") == 16
    assert [batch.kind for batch in parts[CHOOSING]] == ["mix"] * 24
    quick = session.plan(dataclasses.replace(settings, quick=True), 80 * GIB)
    assert 70 <= quick.batches < session.plan(settings, 80 * GIB).batches / 3


def test_limits_that_leave_too_few_batches():
    with pytest.raises(InputError, match="batches of the grid are within 256 tokens of KV cache"):
        grid.design(Limits(128, 256, 8, 1, 256))


# ---------------------------------------------------------------------- the decoder's numbers


def reference(made, inputs, keys, values):
    """Logits by plain loops in float64, given the KV cache before the iteration; writes to that."""

    def norm(x, weight):
        return x / np.sqrt((x * x).mean() + 1e-5) * weight

    def turned(x, position):
        half = len(x) // 2
        angle = position * 500_000.0 ** (-np.arange(half) / half)
        a, b = x[:half], x[half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    shape = made.shape
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    rows = []  # (request's first slot, position)
    for part in inputs.parts:
        for group in part.groups:
            for i in range(group.count):
                first = (group.page + i * group.pages) * memory.PAGE
                rows += [(first, position) for position in range(group.total - group.new, group.total)]
    hidden = [made.embedding[token].numpy().astype(float) for token in inputs.tokens]
    for layer, k_cache, v_cache in zip(made.layers, keys, values, strict=True):
        w = {f.name: getattr(layer, f.name).numpy().astype(float) for f in dataclasses.fields(layer)}
        queries = []
        for x, (first, position) in zip(hidden, rows, strict=True):
            mixed = w["qkv"] @ norm(x, w["norm_attention"])
            q, k, v = np.split(mixed, [heads * dim, (heads + kv_heads) * dim])
            queries.append([turned(head, position) for head in q.reshape(heads, dim)])
            k_cache[first + position] = [turned(head, position) for head in k.reshape(kv_heads, dim)]
            v_cache[first + position] = v.reshape(kv_heads, dim)
        for n, (first, position) in enumerate(rows):
            seen = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                k = k_cache[first : first + position + 1, shared]
                v = v_cache[first : first + position + 1, shared]
                scores = k @ queries[n][head] / math.sqrt(dim)
                weights = np.exp(scores - scores.max())
                seen.append(weights / weights.sum() @ v)
            x = hidden[n] + w["out"] @ np.concatenate(seen)
            gate, up = np.split(w["gate_up"] @ norm(x, w["norm_ffn"]), 2)
            hidden[n] = x + w["down"] @ (gate / (1 + np.exp(-gate)) * up)
    head = made.head.numpy().astype(float)
    return np.stack([head @ norm(hidden[int(i)], made.norm.numpy()) for i in inputs.last])


def flat(pools):
    return [pool.double().numpy().reshape(-1, *pool.shape[2:]).copy() for pool in pools]


@pytest.fixture(scope="module")
def tiny():
    settings = Settings("tiny", "fp32", "cpu", max_tokens=128, max_context=1024, max_decodes=8)
    return decoder.Decoder(settings, device.device("cpu"), pages=24, dtype=torch.float64)


@pytest.mark.parametrize(
    "text",
    [
        "1xd1",
        "1xd300",
        "3xd17+2xd1+1xd257",
        "1xp7@0",
        "3xp5@0",
        "1xp5@300",
        "2xp3@254+1xp4@0+1xp1@9",
        "2xd40+1xd260+2xp6@10+1xp3@0",
    ],
)
def test_logits_are_those_of_plain_loops_in_float64(tiny, text):
    inputs = tiny.inputs(Batch.parse(text))
    keys, values = flat(tiny.keys), flat(tiny.values)
    expected = reference(tiny, inputs, keys, values)
    got = tiny.logits(inputs)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-9)
    # The new keys and values are in the cache, and nothing else has changed there.
    for pools, caches in ((tiny.keys, keys), (tiny.values, values)):
        for got_pool, cache in zip(flat(pools), caches, strict=True):
            np.testing.assert_allclose(got_pool, cache, rtol=1e-9, atol=1e-12)
    assert tiny.step(inputs).tolist() == expected.argmax(-1).tolist()


def test_a_prompt_in_chunks_and_with_decodes_is_the_prompt(tiny):
    ids = torch.arange(40) * 7 % 256

    def logits(text, some):
        return tiny.logits(dataclasses.replace(tiny.inputs(Batch.parse(text)), tokens=some)).numpy()

    whole = logits("1xp40@0", ids)
    logits("1xp25@0", ids[:25])
    chunked = logits("1xp15@25", ids[25:])
    np.testing.assert_allclose(chunked, whole, rtol=1e-9, atol=1e-9)
    logits("1xp37@0", ids[:37])
    for i in (37, 38, 39):
        decoded = logits(f"1xd{i + 1}", ids[i : i + 1])
    np.testing.assert_allclose(decoded, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "off"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_narrower_dtypes_are_near_float64(dtype, off):
    settings = Settings("tiny", dtype, "cpu", max_tokens=64, max_context=512, max_decodes=8)
    made = decoder.Decoder(settings, device.device("cpu"), pages=12)
    inputs = made.inputs(Batch.parse("3xd70+1xp9@300+1xp4@0"))
    assert made.layers[0].qkv.dtype == getattr(torch, shapes.DTYPES[dtype][0])
    keys, values = flat(made.keys), flat(made.values)
    got = made.logits(inputs).double().numpy()
    layers, ends = made.layers, (made.embedding, made.head, made.norm)
    made.layers = [
        decoder.Layer(**{f.name: getattr(layer, f.name).double() for f in dataclasses.fields(layer)})
        for layer in layers
    ]
    made.embedding, made.head, made.norm = (x.double() for x in ends)
    expected = reference(made, inputs, keys, values)
    assert np.linalg.norm(got - expected) < off * np.linalg.norm(expected)


def test_ends_are_the_iteration_without_layers(tiny):
    inputs = tiny.inputs(Batch.parse("2xd9+1xp5@0"))
    hidden = tiny.embedding[inputs.tokens[inputs.last]].numpy()
    normed = hidden / np.sqrt((hidden**2).mean(1, keepdims=True) + 1e-5)
    assert tiny.ends(inputs).tolist() == (normed @ tiny.head.numpy().T).argmax(-1).tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, in its compiler
def test_fused_operations_give_the_same():
    settings = Settings("tiny", "fp32", "cpu", max_tokens=64, max_context=512, max_decodes=8, fuse=True)
    made = decoder.Decoder(settings, device.device("cpu"), pages=12)
    assert made.notes["small operations"] == "fused"
    for text in ("1xd5", "3xd70+1xp9@300+1xp4@0", "1xp64@0"):  # as many rows as columns, at last
        inputs = made.inputs(Batch.parse(text))
        fused, made._small = made.logits(inputs), decoder._EAGER
        torch.testing.assert_close(made.logits(inputs), fused, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_compiled_knows_the_widths_and_takes_any_number_of_rows(monkeypatch):
    compiled: list[list[tuple]] = []
    true = torch.compile

    def backend(graph, _):
        found = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        compiled.append([tuple(x.shape) for x in found if isinstance(x, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **how: true(function, backend=backend, **how))
    settings = Settings("tiny", "fp32", "cpu", max_tokens=64, max_context=512, max_decodes=8, fuse=True)
    made = decoder.Decoder(settings, device.device("cpu"), pages=12)
    assert made.notes["small operations"] == "fused"
    last: dict[int, list[tuple]] = {shapes[0][-1]: shapes for shapes in compiled}
    wanted = {64: [(64,), (64,), ()], 256: [(256,)], 128: [(128,), (1, 8), (1, 8)]}
    assert {width: [shape[1:] for shape in found] for width, found in last.items()} == wanted
    for found in last.values():
        assert not isinstance(found[0][0], int)  # rows: a symbol
    assert last[64][2] == (64,)
    # A session compiles nothing more, except for one row.
    before = len(compiled)
    for text in ("3xd70+1xp9@300", "1xp64@0", "8xd9"):
        made.logits(made.inputs(Batch.parse(text)))
    assert len(compiled) == before
    made.logits(made.inputs(Batch.parse("1xd5")))
    assert len(compiled) <= before + 3
    torch._dynamo.reset()


def test_operations_that_cannot_be_fused_run_as_they_are(monkeypatch):
    def broken():
        raise RuntimeError("no compiler\nanywhere")

    monkeypatch.setattr(decoder, "_compiled", broken)
    made = decoder.Decoder(dataclasses.replace(FAST, fuse=True), device.device("cpu"), pages=12)
    assert made.notes["small operations"] == "eager: no compiler anywhere"
    assert made.logits(made.inputs(Batch.parse("1xd5"))).shape == (1, 256)


# ---------------------------------------------------------------------- attention


def sample(requests, use, heads=6, kv_heads=2, dim=8, seed=0):
    made, pages = attention.part(use, requests, 0, 0, memory.PAGE, device.device("cpu"))
    draw = torch.Generator().manual_seed(seed)
    pool = (pages, memory.PAGE, kv_heads, dim)
    keys, values = (torch.randn(pool, generator=draw, dtype=torch.float64) for _ in range(2))
    query = torch.randn(made.rows.stop, heads, dim, generator=draw, dtype=torch.float64)
    return query, keys, values, made


REQUESTS = {
    "decode": [(3, 1, 299), (1, 1, 0), (2, 1, 16)],
    "prefill": [(2, 7, 0), (1, 300, 0)],
    "chunk": [(2, 5, 290), (1, 3, 0)],
}


def plain_varlen(query, key, value, starts, sums, most_new, most_total, **given):
    """What `varlen_attn` documents, request by request through the block table, causal to the last token."""
    out = torch.empty_like(query)
    for n, (length, pages) in enumerate(
        zip(given["seqused_k"].tolist(), given["block_table"].tolist(), strict=True)
    ):
        rows = slice(int(starts[n]), int(starts[n + 1]))
        assert rows.stop - rows.start <= most_new and length <= most_total
        k, v = (torch.cat([x[page] for page in pages])[:length] for x in (key, value))
        share = query.shape[1] // k.shape[1]
        for row in range(rows.start, rows.stop):
            seen = length - (rows.stop - 1 - row) if given["window_size"] == (-1, 0) else length
            for head in range(query.shape[1]):
                scores = k[:seen, head // share] @ query[row, head] / query.shape[2] ** 0.5
                out[row, head] = scores.softmax(0) @ v[:seen, head // share]
    return out


@pytest.mark.parametrize("use", attention.USES)
@pytest.mark.parametrize("with_sums", [True, False])
def test_the_block_table_is_as_flash_attention_wants_it(use, with_sums, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def called(*given, **named):
        assert signature.bind(*given, **named).arguments["enable_gqa"] is True
        for numbers in (given[3], named["seqused_k"], named["block_table"]):
            assert numbers.dtype == torch.int32
        assert (given[4] is not None) == with_sums
        if with_sums:
            assert given[4].diff().tolist() == named["seqused_k"].tolist()
        return plain_varlen(*given, **named)

    monkeypatch.setattr(varlen, "varlen_attn", called)
    given = sample(REQUESTS[use], use)
    got = attention.paged_flash(with_sums)(*given)
    torch.testing.assert_close(got, attention.plain(*given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use", attention.USES)
def test_scaled_dot_product_attention_gives_the_same(use):
    given = sample(REQUESTS[use], use)
    for kernel in (attention.dense(None), attention.dense(attention.SDPBackend.MATH)):
        torch.testing.assert_close(kernel(*given), attention.plain(*given), rtol=1e-9, atol=1e-9)
    # As on a GPU, where the mask is not made in advance.
    groups = tuple(dataclasses.replace(group, mask=None) for group in given[3].groups)
    bare = dataclasses.replace(given[3], groups=groups)
    torch.testing.assert_close(attention.dense(None)(*given[:3], bare), attention.plain(*given))


def test_the_fastest_kernel_that_is_right_is_chosen(monkeypatch):
    right = attention.dense(None)

    def refuses(*_):
        raise RuntimeError("No available kernel.\nAborting execution.")

    def wrong(*given):
        return right(*given) * 1.2

    def slow(*given):
        for _ in range(20):
            right(*given)
        return right(*given)

    kernels = {"refuses": refuses, "wrong": wrong, "slow": slow, "sdpa": right}
    monkeypatch.setattr(attention, "KERNELS", kernels)
    gpu = device.Cpu()
    gpu.kind = "cuda"  # only there are several tried
    samples = {use: sample(requests, use) for use, requests in REQUESTS.items()}
    chosen, notes = attention.choose(gpu, samples)
    assert chosen == dict.fromkeys(attention.USES, right)
    for found in notes.values():
        assert found["refuses"] == "No available kernel. Aborting execution."
        assert found["wrong"] == "wrong by 0.2 of its size"
        assert found["slow"].endswith(" us") and found["chosen"] == "sdpa"
    # As a session that goes on has it: by use.
    chosen, _ = attention.choose(gpu, samples, {"decode": "slow", "prefill": "sdpa", "chunk": "slow"})
    assert [chosen[use] for use in attention.USES] == [slow, right, slow]
    with pytest.raises(
        InputError, match=r"no kernel of PyTorch .* does attention of a decode: wrong: wrong by"
    ):
        attention.choose(gpu, samples, "wrong")


def test_another_flash_attention_that_is_not_there():
    with pytest.raises(InputError, match=r"^--flash FA9: [^\n]*; install it, or leave the option out$"):
        attention.activate("FA9")


# ---------------------------------------------------------------------- times


class Clock(device.Cpu):
    """A device that takes as long as it is told to, also to launch, and counts."""

    def __init__(self, seconds, launch=lambda what: 0.0):
        super().__init__()
        self.seconds, self.calls, self.graphs, self.launch_s = seconds, 0, 0, launch

    def times(self, step, repeats):
        self.calls += repeats
        return [self.seconds(step())] * repeats

    def launch(self, step):
        return self.launch_s(step())

    def graph(self, step):
        self.graphs += 1
        return step


class Answers:
    """A decoder whose iterations say what they are."""

    def inputs(self, batch):
        return batch

    def step(self, batch):
        return "whole"

    def ends(self, batch):
        return "ends"


@pytest.mark.parametrize(("layers", "expected"), [(None, 5.0), (1, 1 + (5 - 1) * 2)])
def test_times_are_scaled_to_all_layers(layers, expected):
    settings = dataclasses.replace(FAST, layers=layers)
    clock = Clock(lambda what: {"whole": 5.0, "ends": 1.0}[what])
    found = session._time(settings, Answers(), clock, Batch.parse("1xd9"), lambda: False)
    assert (found.seconds, found.spread_s, found.repeats, found.launch_s) == (expected, 0.0, 3, 0.0)


@pytest.mark.parametrize(("layers", "expected"), [(None, 4.0), (1, 0.5 + (4 - 0.5) * 2)])
def test_launching_is_timed_where_there_is_no_graph(layers, expected):
    settings = dataclasses.replace(FAST, layers=layers, graph_tokens=0)
    clock = Clock(lambda what: 5.0 if what == "whole" else 1.0, lambda what: 4.0 if what == "whole" else 0.5)
    found = session._time(settings, Answers(), clock, Batch.parse("1xd9"), lambda: False)
    assert found.launch_s == expected
    row = journal.Row(Batch.parse("1xd9"), FITTED, 5.0, 0.0, 3)
    assert [dataclasses.replace(row, launch_s=s).launching for s in (0.0, 4.4, 4.6, 5.1)] == [
        *(False, False, True, True)
    ]


@pytest.mark.parametrize(
    ("took", "seconds", "repeats", "expected"),
    [
        (0.5, 0.0, 3, 3),
        (0.5, 4.0, 3, 8),
        (1e-3, 4.0, 3, 100),
        (0.5, 1.0, 3, 3),
        (1e-3, 4.0, 150, 150),  # "at least" is meant
    ],
)
def test_repetitions(took, seconds, repeats, expected):
    settings = dataclasses.replace(FAST, seconds=seconds, repeats=repeats, warmup=2, graph_tokens=64)
    for tokens, graphs in ((64, 1), (65, 0)):
        clock = Clock(lambda _: took, lambda _: 0.25)
        batch = Batch(chunks=((1, tokens, 0),))
        found, launch = session._repeat(settings, clock, batch, lambda: None, lambda: False)
        assert len(found) == expected and launch == (0.0 if graphs else 0.25)
        assert clock.calls == 2 + 2 * graphs + expected  # two more to warm up the graph
        assert clock.graphs == graphs


class Entered:
    """`torch.cuda.stream`: what is current stays so until it is left."""

    def __init__(self, gpu, stream):
        self.gpu, self.stream = gpu, stream

    def __enter__(self):
        self.before, self.gpu.current = self.gpu.current, self.stream

    def __exit__(self, *_):
        self.gpu.current = self.before


class Gpu:
    """What `device.Cuda` uses of `torch.cuda`, in place of it: streams, events of a clock, and graphs, which
    end as CUDA does when a step has failed in them."""

    def __init__(self, monkeypatch):
        self.current, self.streams, self.now, self.log = "the first", 0, 0.0, []
        self.capturing = self.broken = False
        gpu = self

        class Stream:
            def __init__(self, *_):
                gpu.streams += 1

            def wait_stream(self, other):
                gpu.log.append("wait")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                return 1000 * (end.at - self.at)

        class Graph:
            def capture_begin(self, **_):
                gpu.capturing, gpu.broken = True, False

            def capture_end(self):
                gpu.capturing = False
                if gpu.broken:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

            def replay(self):
                gpu.log.append("replay")

        self.current = Stream()
        self.first, self.streams = self.current, 0
        for name, fake in {
            "current_device": lambda: 0,
            "current_stream": lambda *_: gpu.current,
            "stream": lambda which: Entered(gpu, which),
            "synchronize": lambda *_: gpu.log.append("synchronize"),
            "empty_cache": lambda: None,
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        # PyTorch's own class makes the graph.
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)


def test_graphs_are_captured_on_one_stream_that_was_warmed_up(monkeypatch):
    gpu = Gpu(monkeypatch)
    cuda = device.Cuda()
    ran = []
    for _ in range(40):
        ran.clear()
        step = cuda.graph(lambda: ran.append((gpu.capturing, gpu.current)))
        (before, warmed), (during, captured) = ran
        assert (before, during) == (False, True) and warmed is captured is not gpu.first
        assert gpu.current is gpu.first
        gpu.log.clear()
        step()
        assert gpu.log == ["replay"] and len(ran) == 2
    assert gpu.streams == 1


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("no")])
def test_a_graph_that_cannot_be_captured(monkeypatch, error):
    gpu = Gpu(monkeypatch)
    cuda = device.Cuda()

    def step():
        if gpu.capturing:
            gpu.broken = True
            raise error

    with pytest.raises(
        RuntimeError, match="operation failed due to a previous error during capture"
    ) as raised:
        cuda.graph(step)
    assert device.out_of_memory(raised.value) == isinstance(error, torch.cuda.OutOfMemoryError)
    assert gpu.current is gpu.first
    assert device.cause(raised.value) is error  # and that is what is told
    cuda.graph(lambda: None)()


def test_times_are_those_between_events(monkeypatch):
    gpu = Gpu(monkeypatch)
    took = iter((0.5, 0.25, 0.125))

    def step():
        gpu.now += next(took)

    assert device.Cuda().times(step, 3) == [0.5, 0.25, 0.125]
    assert gpu.log == ["synchronize", "synchronize"]  # none between them


def test_a_gpu_without_bf16(monkeypatch, tmp_path):
    Gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    properties = type("Properties", (), {"name": "Tesla V100"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    with pytest.raises(InputError, match=r"^Tesla V100 does not compute in bf16; measure with --dtype fp16$"):
        device.Cuda().require("bf16")
    device.Cuda().require("fp16")


def test_floors_by_hand():
    shape = roofline.DecoderShape(
        "tiny", 1, 4, 8, 2, 1, 2, 10, dtype_bytes=1
    )  # as in test_profiles: 144 weights
    assert session.bytes_read(shape, Batch.parse("1xd5")) == 144 + 40 + 5 * 4
    assert session.bytes_read(shape, Batch.parse("2xd5+1xp3@7")) == 144 + 40 + (10 + 7) * 4
    assert session.operations(shape, Batch.parse("1xp3@0")) == 2 * 144 * 3 + 2 * 40 + 16 * 4.5
    assert session.operations(shape, Batch.parse("1xd5")) == 2 * 144 + 2 * 40 + 16 * 5


def test_peaks_are_those_of_the_clock():
    """A device on which everything takes 1 ms."""
    clock = Clock(lambda _: 1e-3)
    assert bandwidth(clock) == 2 * (GIB // 4) / 1e-3  # a copy reads and writes
    assert device.flops(clock, "fp32", 64, 128, 4096) == 2 * 512**3 / 1e-3
    assert device.flops(clock, "fp32", 512, 1024, 4096) == 2 * 4096 * 512 * 2048 / 1e-3


def test_a_device_that_has_changed_is_told(capsys):
    before = {"decode_s": 1.0, "prefill_s": 2.0}
    session._compare_checks(before, {"decode_s": 1.05, "prefill_s": 1.9}, print)
    assert capsys.readouterr().out == ""
    session._compare_checks(before, {"decode_s": 1.0, "prefill_s": 2.5}, print)
    assert "the prefill takes 1.25 times what it took" in capsys.readouterr().out


def test_short_names_of_gpus():
    assert device.short_name("NVIDIA H200") == "h200"
    assert device.short_name("NVIDIA A100-SXM4-80GB") == "a100"
    assert device.short_name("NVIDIA H100 80GB HBM3") == "h100"
    assert device.short_name("NVIDIA H100 80GB HBM3", 79.2) == "h100"
    assert device.short_name("NVIDIA H200", 139.8) == "h200"
    for other, gib in (
        ("NVIDIA GeForce RTX 4090", 23.6),
        ("NVIDIA H100 PCIe", 79.2),  # 2.0 TB/s, where the datasheet of the other socket has 3.35
        ("NVIDIA H100 NVL", 93.1),
        ("NVIDIA A100-SXM4-40GB", 39.4),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.2),
    ):
        assert device.short_name(other, gib) == other


# ---------------------------------------------------------------------- sessions


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A measurement from beginning to end, nothing left out."""
    assert device.bandwidth is bandwidth
    torch.set_num_threads(1)
    said: list[str] = []
    moved: list[session.Progress] = []
    path = tmp_path_factory.mktemp("whole") / "mine.json"
    outcome = session.run(FAST, path, say=said.append, progress=moved.append)
    return outcome, said, moved


def copied(whole, folder):
    """The files of the whole measurement, somewhere else."""
    files = journal.Files(folder / "mine.json")
    for name in ("rows", "about"):
        getattr(files, name).write_bytes(getattr(whole[0].files, name).read_bytes())
    return files


def test_a_measurement(whole):
    outcome, said, moved = whole
    planned = session.plan(FAST, GIB)
    wanted = {batch: part for part, found in planned.parts.items() for batch in found}
    assert {row.batch: row.part for row in outcome.rows.values()} == wanted
    assert (outcome.fresh, outcome.skipped) == (len(wanted), {})
    assert all(0 < row.seconds < 5 and row.repeats == 3 for row in outcome.rows.values())
    assert [now.done for now in moved] == list(range(1, len(wanted) + 1))
    assert moved[-1].left_s == 0 and moved[0].seconds == pytest.approx(outcome.rows[moved[0].batch].seconds)
    checks = outcome.about["checks"]
    for kind in ("decode", "prefill"):
        assert checks[f"{kind}_over_floor"] == pytest.approx(checks[f"{kind}_s"] / checks[f"{kind}_floor_s"])
    assert any("bytes over bandwidth" in line for line in said)
    assert any("operations over peak" in line for line in said)
    about = json.loads(outcome.files.about.read_text())
    assert about == outcome.about
    assert about["hardware"]["torch"] == torch.__version__ and about["hardware"]["device"]
    assert about["settings"]["shape"]["layers"] == 2


def test_the_rows_are_a_file_that_fits_are_made_of(whole):
    outcome = whole[0]
    features, seconds = fit.read(outcome.files.rows)
    assert len(seconds) == len(outcome.rows)
    for f, s in zip(features, seconds, strict=True):
        same = [row for row in outcome.rows.values() if np.allclose(row.batch.features, f)]
        assert any(row.seconds == pytest.approx(s, rel=1e-8) for row in same)
    assert fit.fit(features, seconds, "linear").fit["rows"] > 20


def test_it_stops_and_goes_on(tmp_path, whole):
    path, count = tmp_path / "mine.json", 0

    def stop():
        return count >= 5

    def progress(now):
        nonlocal count
        count += 1

    with pytest.raises(Interrupted) as raised:
        session.run(FAST, path, progress=progress, stop=stop)
    files, total = journal.Files(path), len(whole[0].rows)
    assert (raised.value.done, raised.value.total, raised.value.begun) == (5, total, True)
    first = files.rows.read_text()
    assert first.count("\n") == 6 and first.endswith("\n")
    seen: list[session.Progress] = []
    outcome = session.run(FAST, path, resume=True, progress=seen.append)
    assert files.rows.read_text().startswith(first)  # what was measured is as it was
    assert outcome.fresh == total - 5 and seen[0].done == 6
    assert set(outcome.rows) == set(whole[0].rows)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_it_stops_before_the_first_batch(tmp_path):
    with pytest.raises(Interrupted, match=r"^0 of 57 batches are measured; nothing is kept$") as raised:
        session.run(FAST, tmp_path / "mine.json", stop=lambda: True)
    assert not raised.value.begun and not list(tmp_path.iterdir())


def test_what_is_all_measured_is_not_measured_again(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(session, "_build", None)
    files = copied(whole, tmp_path)
    outcome = session.run(FAST, files.profile, resume=True)
    assert outcome.fresh == 0 and outcome.rows == whole[0].rows


def test_a_last_line_that_was_cut_off_is_measured_again(tmp_path, whole):
    files = copied(whole, tmp_path)
    lines = files.rows.read_bytes().splitlines(keepends=True)
    files.rows.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    outcome = session.run(FAST, files.profile, resume=True)
    assert outcome.fresh == 1 and set(outcome.rows) == set(whole[0].rows)
    assert files.rows.read_bytes().splitlines(keepends=True)[:-1] == lines[:-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cells: cells[:-1], "line 3 is damaged: 11 cells, but 12 columns; delete the line"),
        (lambda cells: ["1xq5", *cells[1:]], "'1xq5' is no batch such as"),
        (lambda cells: [cells[0], "none", *cells[2:]], "part 'none' is none of grid, choosing, held-out"),
        (lambda cells: [*cells[:2], "1e9", *cells[3:]], "the features are not those of"),
        (lambda cells: [*cells[:8], "0", *cells[9:]], "seconds 0, spread"),
        (lambda cells: [*cells[:8], "nan", *cells[9:]], "seconds nan, spread"),
        (lambda cells: [*cells[:11], "-1"], "launch -1 are no measurement"),
        (lambda cells: [*cells[:8], "fast", *cells[9:]], "could not convert string to float: 'fast'"),
    ],
)
def test_damage_elsewhere_is_told_by_its_line(tmp_path, whole, damage, message):
    files = copied(whole, tmp_path)
    lines = files.rows.read_text().splitlines()
    lines[2] = ",".join(damage(lines[2].split(",")))
    files.rows.write_text("\n".join(lines) + "\n")
    before = files.rows.read_bytes()
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        session.run(FAST, files.profile, resume=True)
    assert message in str(raised.value)
    assert files.rows.read_bytes() == before


def test_files_that_will_not_do(tmp_path, whole):
    files = copied(whole, tmp_path)
    with pytest.raises(InputError, match=r"go on with it \(--resume\), or name another --output"):
        session.run(FAST, files.profile)
    text = files.rows.read_text()
    files.rows.write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(InputError, match="for the second time"):
        session.run(FAST, files.profile, resume=True)
    files.rows.write_text("batch,seconds\n")
    with pytest.raises(InputError, match="its columns must be batch, part, prefill_tokens"):
        session.run(FAST, files.profile, resume=True)
    files.rows.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="is damaged"):
        session.run(FAST, files.profile, resume=True)
    files.rows.write_text(text)
    about = files.about.read_text()
    for bad, message in (("{", "is not JSON"), ("[]", "says not all of settings"), ("{}", "says not all of")):
        files.about.write_text(bad)
        with pytest.raises(InputError, match=message):
            session.run(FAST, files.profile, resume=True)
    files.about.write_text(about)
    held = journal.Journal.open(files)
    with pytest.raises(InputError, match="another process measures to"):
        session.run(FAST, files.profile, resume=True)
    held.close()
    files.about.unlink()
    with pytest.raises(InputError, match=r"there is no .*mine\.about\.json; begin without --resume"):
        session.run(FAST, files.profile, resume=True)


def test_what_was_measured_otherwise_is_refused(tmp_path, whole):
    files = copied(whole, tmp_path)
    with pytest.raises(InputError, match=r"was measured otherwise: dtype was 'fp32', is 'bf16'; shape was"):
        session.run(dataclasses.replace(FAST, dtype="bf16"), files.profile, resume=True)
    about = json.loads(files.about.read_text())
    about["hardware"]["device"] = "another"
    files.about.write_text(json.dumps(about))
    with pytest.raises(
        InputError, match=r"device was 'another', is .*; make it the same, or measure to another"
    ):
        session.run(FAST, files.profile, resume=True)


def test_kernels_are_those_of_before(tmp_path, whole):
    files = copied(whole, tmp_path)
    text = files.rows.read_text().splitlines(keepends=True)
    files.rows.write_text("".join(text[:-1]))
    about = json.loads(files.about.read_text())
    about["kernels"]["small operations"] = "fused"
    files.about.write_text(json.dumps(about))
    with pytest.raises(
        InputError, match="the small operations were 'fused' when it began, and are now 'eager'"
    ):
        session.run(FAST, files.profile, resume=True)


def test_a_batch_that_does_not_fit_is_skipped_and_tried_again(tmp_path, monkeypatch):
    true_step = decoder.Decoder.step
    kinds = iter((torch.cuda.OutOfMemoryError("CUDA out of memory."), MemoryError()))
    few = iter(range(2))

    def step(self, inputs):
        if len(inputs.tokens) == 128 and len(inputs.parts) == 2 and next(few, None) is not None:
            raise next(kinds)
        return true_step(self, inputs)

    monkeypatch.setattr(decoder.Decoder, "step", step)
    path = tmp_path / "mine.json"
    seen: list[session.Progress] = []
    # MemoryError is no RuntimeError: it has to be skipped all the same.
    outcome = session.run(FAST, path, progress=seen.append)
    assert len(outcome.skipped) == 2 and set(outcome.skipped.values()) == {"out of memory"}
    assert sum(now.seconds is None for now in seen) == 2
    assert not set(outcome.skipped) & set(outcome.rows)
    found = report.of(outcome)
    assert "2 more skipped for lack of memory" in found.profile.provenance
    again = session.run(FAST, path, resume=True)
    assert again.fresh == 2 and set(again.rows) == set(outcome.rows) | set(outcome.skipped)


def test_a_failure_of_pytorch_keeps_what_is_measured(tmp_path, monkeypatch):
    true_step, calls = decoder.Decoder.step, 0

    def step(self, inputs):
        nonlocal calls
        calls += 1
        if calls > 60:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")
        return true_step(self, inputs)

    monkeypatch.setattr(decoder.Decoder, "step", step)
    path = tmp_path / "mine.json"
    with pytest.raises(
        InputError, match=r"failed: CUDA error: an illegal memory access was encountered; the"
    ):
        session.run(FAST, path)
    assert journal.Files(path).rows.read_text().count("\n") > 3
    monkeypatch.setattr(decoder.Decoder, "step", true_step)
    assert session.run(FAST, path, resume=True).skipped == {}


def test_a_full_disk(tmp_path, whole, monkeypatch):
    files = copied(whole, tmp_path)
    lines = files.rows.read_text().splitlines(keepends=True)
    files.rows.write_text("".join(lines[:-1]))
    opened = journal.Journal.open(files)
    row = next(row for row in whole[0].rows.values() if row.batch not in opened.rows)
    before = files.rows.read_bytes()

    class Full:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            return self._file.write(data[:7])

        def __getattr__(self, name):
            return getattr(self._file, name)

    opened._file = Full(opened._file)
    with pytest.raises(InputError, match=r"cannot write .*; make room, then --resume"):
        opened.append(row)
    opened.close()
    assert files.rows.read_bytes() == before and row.batch not in opened.rows


def test_a_failure_before_the_first_batch_is_one_line(tmp_path, monkeypatch):
    def step(self, inputs):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(decoder.Decoder, "step", step)
    with pytest.raises(InputError, match=r"^PyTorch failed before the first batch: CUDA error: [^\n]*$"):
        session.run(FAST, tmp_path / "mine.json")
    assert not list(tmp_path.iterdir())


def test_memory_that_others_use(tmp_path, monkeypatch):
    monkeypatch.setattr(device.Cpu, "free_bytes", lambda self: 2**20)
    with pytest.raises(
        InputError, match=r"GiB are needed, but of the .* only 0.0 are free: end what else uses it"
    ):
        session.run(FAST, tmp_path / "mine.json")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- fits


@pytest.mark.parametrize("name", ["llama-3-8b@h100", "llama-2-7b@a100", "qwen2.5-7b@h200"])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_roofline_is_found_on_the_grid(name, noise):
    truth = profiles.get(f"roofline:{name}")
    parts = session.plan(Settings(name.split("@")[0]), 80 * GIB).parts
    rng = np.random.default_rng(0)
    measured = []
    for part in (FITTED, JUDGED):
        features = np.array([batch.features for batch in parts[part]])
        measured.append((features, truth.time(*features.T) * np.exp(noise * rng.normal(size=len(features)))))
    found = fit.fit(*measured[0], "roofline", judged=measured[1])
    assert found.fit["rows_held_out"] == len(parts[JUDGED])
    assert found.fit["median_rel"] < 1e-4 + noise and found.fit["p95_rel"] < 2e-3 + 3 * noise
    for key in ("token", "attention", "kv_decode", "weights"):
        assert found.params[key] == pytest.approx(truth.params[key], rel=2e-3 + 5 * noise), key


def test_the_form_that_is_true_is_chosen(whole):
    """Rows as they would be on a GPU of that profile."""
    settings = Settings("llama-3-8b", memory_gib=80.0)
    for truth, form in (
        (profiles.get("roofline:llama-3-8b@h100"), "roofline"),
        (profiles.get("a100-llama3-8b"), "hinge"),
        (profiles.get("a100-llama3-8b-linear"), "linear"),
    ):
        planned = session.plan(settings, 80 * GIB)
        rows = {
            batch: journal.Row(batch, part, float(truth.time(*batch.features)), 0.0, 10)
            for part, found in planned.parts.items()
            for batch in found
        }
        about = {**whole[0].about, "hardware": {"device": "NVIDIA H200", "driver": "1.2.3", "cuda": "12.8"}}
        files = journal.Files(Path("h200-mine.json"))
        found = report.of(session.Outcome(settings, files, planned, about, rows, {}, 0))
        assert list(found.fits) == list(report.FORMS)
        assert found.fits[form].fit["p95_rel"] < 2e-3
        assert found.errors[form]["mix"]["R2"] > 0.9999 and set(found.errors[form]) == set(grid.KINDS)
        # A linear model is a hinge too, so that either may come out; a staircase is none of them.
        assert found.chosen in ({"linear", "hinge", "roofline"} if form == "linear" else {form})
        assert found.fits["staircase"].fit["median_rel"] > 0.05
        assert (
            report.of(session.Outcome(settings, files, planned, about, rows, {}, 0), "linear").chosen
            == "linear"
        )
        profile = found.profile
        assert (profile.name, profile.gpu, profile.model) == ("h200-mine", "h200", "llama-3-8b")
        assert profile.kv_bytes_per_token == 131072
        assert profile.kv_tokens == planned.memory.capacity_tokens
        for said in (
            "NVIDIA H200 (driver 1.2.3, cuda 12.8)",
            "all 32 layers",
            "bf16",
            f"the {found.chosen} form",
        ):
            assert said in profile.provenance
    about["checks"] = {**about["checks"], "activation_bytes": 3.0 * GIB}
    seen = report.kv_tokens(session.Outcome(settings, files, planned, about, rows, {}, 0))
    free = 72 * GIB - planned.memory.weights - 3 * GIB - memory.SPARE["cuda"]
    assert seen == int(free // 131072)


def test_the_form_is_chosen_by_mixes_that_do_not_judge_it(whole):
    """What is reported is no better for having been chosen by."""
    settings = Settings("llama-3-8b", memory_gib=80.0)
    planned = session.plan(settings, 80 * GIB)
    one, other = profiles.get("roofline:llama-3-8b@h100"), profiles.get("a100-llama3-8b")

    def chosen(grid_by, choosing_by, judged_by):
        by = {FITTED: grid_by, CHOOSING: choosing_by, JUDGED: judged_by}
        rows = {
            batch: journal.Row(batch, part, float(by[part].time(*batch.features)), 0.0, 10)
            for part, found in planned.parts.items()
            for batch in found
        }
        return report.of(dataclasses.replace(whole[0], settings=settings, plan=planned, rows=rows))

    staircase = chosen(one, one, one).fits["staircase"]
    found = chosen(one, staircase, one)
    assert found.chosen == "staircase" and found.profile.fit["median_rel"] > 0.05
    found = chosen(one, one, other)
    assert found.chosen == "roofline" and found.profile.fit["median_rel"] > 0.05


def test_batches_that_launching_bounds_are_told(whole, capsys):
    rows = dict(whole[0].rows)
    some = [batch for batch in rows if rows[batch].part == FITTED][:2]
    for batch in some:
        rows[batch] = dataclasses.replace(rows[batch], launch_s=rows[batch].seconds)
    outcome = dataclasses.replace(whole[0], rows=rows)
    found = report.of(outcome)
    assert ", 2 of them as slow as their kernels were launched;" in found.profile.provenance
    assert "were launched" not in report.of(whole[0]).profile.provenance
    assert command._summary(found, outcome)["launching"] == sorted(map(str, some))
    command._show(found, outcome)
    most = max(batch.tokens for batch in some)
    text = capsys.readouterr().out
    assert "careful: 2 batches" in text and f"--graph-tokens {most} measures the GPU alone" in text


def test_too_few_rows_to_fit(whole):
    rows = dict(list(whole[0].rows.items())[:9])
    with pytest.raises(InputError, match="could be measured, too few to fit"):
        report.of(dataclasses.replace(whole[0], rows=rows))


# ---------------------------------------------------------------------- the command


def test_the_command_from_the_grid_to_a_simulation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = command._Bar._show

    def interrupting(self, now):
        shown(self, now)
        if now.done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(command._Bar, "_show", interrupting)
    assert main([*OPTIONS, "--output", "mine.json"]) == 130
    captured = capsys.readouterr()
    assert "4 of 57 batches are measured; the same command with --resume goes on\n" in captured.err
    assert "times the floor" in captured.out
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert sorted(os.listdir()) == ["mine.about.json", "mine.csv"]
    monkeypatch.setattr(command._Bar, "_show", shown)

    assert main([*OPTIONS, "--output", "mine.json", "--resume", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["measured"], said["measured_now"], said["skipped"]) == (57, 53, {})
    assert said["form"] in report.FORMS and set(said["errors"]) == set(report.FORMS)
    assert {"R2", "median_rel", "p95_rel"} <= set(said["errors"]["hinge"]["mix"])
    assert sorted(os.listdir()) == ["mine.about.json", "mine.csv", "mine.fit.png", "mine.json"]
    assert (
        Path("mine.fit.png").read_bytes()[:4] == b"\x89PNG" and Path("mine.fit.png").stat().st_size > 10_000
    )

    # Another form of the same times; nothing is measured.
    assert main([*OPTIONS, "--output", "mine.json", "--resume", "--form", "linear"]) == 0
    text = capsys.readouterr().out
    assert "errors on held-out batches" in text and "linear *" in text and "KV cache of an engine" in text
    profile = profiles.get("mine.json")
    assert profile.form == "linear" and profile.name == "mine" and profile.model == "tiny"
    assert profile.fit["rows"] == 12 and profile.fit["rows_held_out"] == 21

    command_line = ["simulate", "--profile", "mine.json", "--workload", "fixed-100-10", "--rate", "5"]
    assert main([*command_line, "--num-requests", "20", "--scheduler", "vllm-v1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] == 20


def test_the_second_interruption_leaves_at_once(monkeypatch, capfd):
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with command._asked_to_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and not left
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]
    assert "stopping after this iteration" in capfd.readouterr().err


def test_a_dry_run_needs_no_pytorch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    options = ["profiles", "measure", "--model", "llama-3-8b", "--output", "x.json", "--dry-run"]
    assert main([*options, "--memory-gib", "80"]) == 0
    text = capsys.readouterr().out
    planned = session.plan(Settings("llama-3-8b"), 80 * GIB)
    for part, found in planned.parts.items():
        assert f"{part}: {len(found)} batches" in text
        assert all(f"\n{batch} " in text for batch in found)
    assert f"{planned.needed / GIB:.2f}" in text and "KV cache of about" in text
    assert main([*options, "--memory-gib", "80", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["batches"][FITTED] == [str(batch) for batch in planned.parts[FITTED]]
    assert said["memory_bytes"]["needed"] == planned.needed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "llama-3-8b"], "no CUDA device: PyTorch"),
        (["--model", "llama-3-8b", "--dry-run", "--memory-gib", "10"], "GiB are to be used; --layers 1"),
        (["--model", "tiny", "--form", "hing"], "unknown form 'hing'; did you mean 'hinge'"),
        (["--model", "tiny", "--device", "cpu", "--output", "x.csv"], "--output x.csv must end in .json"),
        (
            ["--model", "tiny", "--device", "cpu", "--output", "no/x.json"],
            "there is no folder no; make it first",
        ),
        (["--model", "tiny", "--device", "cpu", "--resume"], "nothing to go on with: there is no x.csv"),
        (["--model", "tiny", "--device", "cpu", "--memory-gib", "0.01"], "take a smaller decoder"),
    ],
    ids=str,
)
def test_complaints_are_one_line(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profiles", "measure", "--output", "x.json", *more]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "message"),
    [("torch", "measuring needs PyTorch"), ("scipy", "fitting needs scipy; install it: pip install")],
)
def test_what_is_not_installed_is_told_before_anything_is_measured(tmp_path, monkeypatch, module, message):
    parent = importlib.import_module("llmsched_env.measure")
    monkeypatch.setitem(sys.modules, module, None)
    if module == "torch":
        monkeypatch.delitem(sys.modules, "llmsched_env.measure.device")
        monkeypatch.delattr(parent, "device")
    with pytest.raises(InputError, match=message):
        session.run(FAST, tmp_path / "mine.json")
    assert not list(tmp_path.iterdir())
