"""Cost profiles: those that come along, files, the analytic ones, fits."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmsched_env import profiles
from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile, fit, roofline

SCRIPT = Path(__file__).parents[1] / "scripts" / "fit_cost.py"
HINGE = {"h0": 0.004, "h1": 0.007, "h2": 7e-5, "h3": 9e-8, "h4": 4e-9, "h5": 3e-5}


@pytest.mark.parametrize("name", profiles.names())
def test_those_that_come_along(name, tmp_path):
    profile = profiles.get(name)
    assert profile.name == name
    assert profile.kv_tokens >= 10_000
    assert len(profile.provenance) > 40
    if profile.form in ("hinge", "linear"):
        assert profile.fit["R2"] > 0.95 and 0 < profile.fit["median_rel"] < 0.08
        assert profile.gpus == (int(name.split("tp")[1][0]) if "tp" in name else 1)
    profiles.save(profile, tmp_path / "copy.json")
    assert profiles.get(tmp_path / "copy.json") == profile
    assert pickle.loads(pickle.dumps(profile)) == profile
    assert profiles.get(profile) is profile


def test_names():
    names = profiles.names()
    gpus = {f"{gpu}-{model}" for gpu in ("a100", "h100") for model in ("llama2-7b", "llama3-8b")}
    assert gpus | {"a100-llama2-70b-tp2", "h200-llama3.1-8b", "b200-llama3.1-70b-tp4", "infermax-7b"} <= set(
        names
    )
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100-lama3-8b", "did you mean 'a100-llama3-8b'?"),
        ("nothing.json", "cannot read profile nothing.json: No such file"),
        ("roofline:llama-3-8b", "not of the form roofline:SHAPE@GPU"),
        ("roofline:llama-3-9b@h100", "did you mean 'llama-3-8b'"),
        ("roofline:llama-3-8b@h10", "did you mean 'h100'"),
        ("roofline:llama-3-70b@h100", "take more GPUs"),
        ("roofline:llama-3-8b@h100:tp3", "tp 3 does not divide the 32 heads"),
        ("roofline:llama-3-8b@h100:tp0", "tp 0"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        profiles.get(name)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "hing"}, "did you mean 'hinge'"),
        ({"form": "custom"}, "cannot come from a file"),
        ({"params": {**HINGE, "h6": 1}}, "unknown parameter of form hinge in profile mine 'h6'"),
        (
            {"params": {k: v for k, v in HINGE.items() if k != "h3"}},
            "form hinge also needs the parameters h3",
        ),
        ({"params": {**HINGE, "h1": -1}}, "parameter h1 is -1; it must be a finite number of at least 0"),
        ({"params": {**HINGE, "h1": float("nan")}}, "parameter h1 is nan"),
        ({"params": {**HINGE, "h1": "1"}}, "parameter h1 is '1'"),
        ({"params": {**HINGE, "h1": True}}, "parameter h1 is True"),
        ({"params": [1, 2]}, "params must map names to numbers"),
        ({"params": dict.fromkeys(HINGE, 0)}, "both must take time"),
        ({"form": "staircase", "params": {"c": 1, "a": 1, "b0": 0}}, "parameter b0 is 0; it must be"),
        ({"kv_tokens": 0}, "kv_tokens is 0; it must be a whole number above 0"),
        ({"kv_tokens": 12.5}, "kv_tokens is 12.5"),
        ({"kv_bytes_per_token": -2}, "kv_bytes_per_token is -2"),
        ({"gpus": 0}, "gpus is 0"),
        ({"cpu_s": float("inf")}, "cpu_s is inf"),
        ({"gpu": 7}, "gpu 7 is not a text"),
        ({"kv_token": 7}, "did you mean 'kv_tokens'"),
        ({"form": None}, "form None is not a text"),
        ({"kv_tokens": 12.0}, "kv_tokens is 12.0; it must be a whole number"),
    ],
)
def test_bad_files(tmp_path, change, message):
    good = {"name": "mine", "form": "hinge", "params": HINGE, "kv_tokens": 1000}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(good))
    assert profiles.get(path).time(0, 0, 0, 0, 1, 1) > 0
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        profiles.get(path)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "lacks name, form, params"),
        ("\xff", "is not JSON"),
    ],
)
def test_no_profiles_at_all(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        profiles.get(path)


def test_a_custom_profile_cannot_be_saved(tmp_path):
    with pytest.raises(InputError, match="cannot be saved"):
        profiles.save(Profile.custom(lambda P, NP, CX, KP, D, KV: 1.0), tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


def test_facts_of_the_published_fits():
    """Bit for bit the coefficients that the profiles were made of."""
    shared = os.environ.get("LLMSCHED_SHARED")
    if not shared:
        pytest.skip("LLMSCHED_SHARED is not set")
    facts = json.loads(Path(shared, "facts", "costs.json").read_text())
    for name, row in facts["profiles"].items():
        profile = profiles.get(name)
        assert profile.params == {f"h{i}": row["hinge"][f"h{i}"] for i in range(6)}
        assert list(profiles.get(f"{name}-linear").params.values()) == list(row["linear"].values())[:5]
        assert profile.fit == row["hinge"]["heldout"]
        if row["kv_blocks_of_16_tokens"]:
            assert profile.kv_tokens == 16 * row["kv_blocks_of_16_tokens"]
    for key, row in facts["second_source"].items():
        gpu, model, tp = key.lower().replace("_sxm", "").replace("llama-", "llama").split("|")
        profile = profiles.get(f"{gpu}-{model}" + (f"-{tp}" if tp != "tp1" else ""))
        assert profile.params == {f"h{i}": row["hinge"][f"h{i}"] for i in range(6)}
        assert 0 <= row["kv_capacity_tokens_90pct"] - profile.kv_tokens < 16.5


# -- analytic profiles


def test_shapes_have_the_parameters_of_their_names():
    billions = {
        "llama-2-7b": 6.74,
        "llama-2-13b": 13.0,
        "llama-2-70b": 69.0,
        "codellama-34b": 33.7,
        "llama-3-8b": 8.03,
        "llama-3-70b": 70.6,
        "mistral-7b": 7.24,
        "qwen2.5-7b": 7.6,
        "qwen2.5-32b": 32.8,
    }
    assert set(billions) == set(roofline.SHAPES)
    for name, shape in roofline.SHAPES.items():
        assert shape.parameters / 1e9 == pytest.approx(billions[name], rel=0.01)
    assert roofline.SHAPES["llama-3-8b"].kv_bytes_per_token == 131072
    assert roofline.SHAPES["llama-2-7b"].kv_bytes_per_token == 524288


def test_roofline_by_hand():
    """A decoder of round numbers on a GPU of 1 FLOP/s and 1 byte/s."""
    shape = roofline.DecoderShape("tiny", 1, 4, 8, 2, 1, 2, 10, dtype_bytes=1)
    gpu = roofline.Gpu("slow", 1, 1, 1e6, 1)
    ones = {"compute_efficiency": 1, "bandwidth_efficiency": 1, "attention_efficiency": 1, "kv_efficiency": 1}
    profile = roofline.profile(shape, gpu, **ones, layer_overhead_s=7)
    weights = (
        4 * (2 * 2 * 2 + 2 * 2) + 3 * 4 * 8
    )  # Q and O of 2 heads, K and V of 1, of width 2; three matrices
    assert shape.layer_parameters == weights == 144
    # One decode reads the weights (144), and the head (40), but computes 2 operations with each of them.
    assert profile.time(0, 0, 0, 0, 1, 5) == 7 + 2 * 144 + 2 * 40 + 5 * 4
    # A prefill: head for its last token only; attention has 4 operations for each of 2x2 numbers and pair.
    assert profile.time(3, 1, 4.5, 0, 0, 0) == 7 + 3 * 2 * 144 + 2 * 40 + 4.5 * 16
    assert profile.kv_tokens == (0.9e6 - 144 - 80) // 4


@pytest.mark.parametrize(
    ("analytic", "fitted"),
    [
        ("roofline:llama-3-8b@a100", "a100-llama3-8b"),
        ("roofline:llama-3-8b@h100", "h100-llama3-8b"),
        ("roofline:llama-3-8b@h200", "h200-llama3.1-8b"),
        ("roofline:llama-3-8b@l40s", "l40s-llama3.1-8b"),
        ("roofline:llama-3-8b@b200", "b200-llama3.1-8b"),
        ("roofline:llama-3-70b@h200:tp4", "h200-llama3.1-70b-tp4"),
    ],
)
def test_roofline_is_near_the_fits(analytic, fitted):
    a, b = profiles.get(analytic), profiles.get(fitted)
    D = np.array([1, 32, 128, 256])
    for batch in ((0, 0, 0, 0, D, 1000 * D), (512 * D, D, 512 * D * 256, 0, 0, 0)):
        assert (np.abs(a.time(*batch) / b.time(*batch) - 1) < 0.35).all()
    assert a.kv_tokens == pytest.approx(b.kv_tokens, rel=0.2)
    assert a.kv_bytes_per_token == b.kv_bytes_per_token


def test_more_gpus_than_kv_heads_copy_the_heads():
    shape = roofline.SHAPES["qwen2.5-7b"]  # 4 KV heads
    assert roofline.profile(shape, "h100", 4).kv_bytes_per_token == shape.kv_bytes_per_token
    assert roofline.profile(shape, "h100", 7).kv_bytes_per_token == shape.kv_bytes_per_token * 7 / 4


def test_bad_efficiency():
    with pytest.raises(InputError, match=r"compute_efficiency 1\.5"):
        roofline.profile("llama-3-8b", "h100", compute_efficiency=1.5)


# -- fits

TRUTH = {
    "hinge": HINGE,
    "linear": {"c0": 0.009, "c1": 6e-5, "c2": 4e-5, "c3": 9e-8, "c4": 6e-9},
    "staircase": {"c": 0.011, "a": 0.035, "b0": 128.0},
    "piecewise": {"c": 0.045, "a": 0.0003, "b0": 64.0},
}


def measured(profile, n=400, noise=0.0, seed=3):
    """Iterations as a GPU with this profile would give them: features (n, 6) and seconds."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(1, 4, n)
    P = np.where(kind & 1, rng.integers(1, 2000, n), 0)
    k = np.where(kind & 1, rng.integers(0, 4000, n), 0)
    D = np.where(kind & 2, np.round(np.exp(rng.uniform(0, np.log(300), n))), 0)
    features = np.stack([P, P > 0, P * (k + P / 2), k, D, D * rng.integers(1, 8000, n)], axis=1)
    return features, profile.time(*features.T) * np.exp(noise * rng.normal(size=n))


@pytest.mark.parametrize("form", TRUTH)
def test_a_fit_recovers_the_truth(form):
    truth = Profile("truth", form, TRUTH[form])
    found = fit.fit(*measured(truth), form)
    assert found.params == pytest.approx(truth.params, rel=2e-3)
    assert found.fit["R2"] > 0.999999 and found.fit["max_rel"] < 1e-3
    assert (found.fit["rows"], found.fit["rows_held_out"]) == (320, 80)
    noisy = fit.fit(*measured(truth, noise=0.05), form, seed=1)
    assert noisy.params == pytest.approx(truth.params, rel=0.25)
    assert 0.02 < noisy.fit["median_rel"] < 0.05 and 0.07 < noisy.fit["p95_rel"] < 0.14


def test_the_script_end_to_end(tmp_path):
    truth = Profile("truth", "hinge", HINGE)
    features, seconds = measured(truth)
    source, target = tmp_path / "measured.csv", tmp_path / "mine.json"
    with source.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*fit.FEATURES, "seconds"])
        rows.writerows(np.column_stack([features, seconds]).tolist())
    command = [sys.executable, str(SCRIPT), str(source), str(target), "--kv-tokens", "4096", "--gpu", "h100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "p95_rel" in done.stdout
    profile = profiles.get(target)
    assert (profile.name, profile.kv_tokens, profile.gpu) == ("mine", 4096, "h100")
    assert profile.params == pytest.approx(HINGE, rel=2e-3)

    source.write_text("seconds,decodes\n1,2\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: 1 rows are too few to fit hinge and to judge it; measure at least 15\n"


ROWS = "seconds,decodes\n" + "".join(f"{0.01 + i / 1000},{i}\n" for i in range(1, 41))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: csv, output; see"),
        (["m.csv", "o.json", "--form", "hing"], "invalid choice: 'hing' (choose from "),
        (["m.csv", "o.json", "--seed", "-1"], "seed -1 must not be negative"),
        (["m.csv", "o.json", "--kv-tokens", "0"], "kv_tokens is 0; it must be a whole number above 0"),
        (["m.csv", "./m.csv"], "m.csv holds the measurements; name another file"),
        (["m.csv", "none/o.json"], "there is no folder none; make it first"),
        (["none.csv", "o.json"], "cannot read none.csv: No such file or directory; name a CSV"),
        ([".", "o.json"], "cannot read .: Is a directory; name a CSV"),
        (["cut.csv.gz", "o.json"], "cannot read cut.csv.gz: Compressed file ended before"),
        (["ragged.csv", "o.json"], "line 2: 1 cells, but 2 columns; mend the row, or leave it out"),
        (["nul.csv", "o.json"], r"line 2: decodes '4\x00' is no number of at least 0; mend it"),
        (["twice.csv", "o.json"], "names a column twice: seconds, decodes, decodes; leave one out"),
        (["header.csv", "o.json"], "has no rows below its header; add one"),
    ],
    ids=str,
)
def test_the_script_complains_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = {
        "m": ROWS,
        "ragged": "seconds,decodes\n1\n",
        "nul": "seconds,decodes\n1,4\0\n",
        "twice": "seconds,decodes,decodes\n1,2,3\n",
        "header": "seconds,decodes\n",
    }
    for name, text in texts.items():
        Path(f"{name}.csv").write_text(text)
    Path("cut.csv.gz").write_bytes(gzip.compress(ROWS.encode())[:60])
    before = sorted(os.listdir())
    script = runpy.run_path(str(SCRIPT))
    try:
        code = script["main"](arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("error: ") and said in captured.err
    assert sorted(os.listdir()) == before


def test_columns_that_are_missing(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("seconds,prefill_tokens,prefill_cached,decodes\n0.5,100,50,2\n0.25,0,0,7\n")
    features, seconds = fit.read(path)
    assert features.tolist() == [[100, 1, 100 * (50 + 50), 50, 2, 0], [0, 0, 0, 0, 7, 0]]
    assert seconds.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decodes\n1\n", "lacks the column seconds"),
        ("seconds,decodes\n0,1\n", "row 1 takes no time"),
        ("seconds,decodes\n1,1\n1,0\n", "row 2 has neither prefill_tokens nor decodes"),
        ("seconds,decodes\n1,nan\n", "line 2: decodes 'nan'"),
    ],
)
def test_bad_measurements(tmp_path, text, message):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        fit.read(path)


def test_unknown_form_to_fit():
    features, seconds = measured(Profile("truth", "hinge", HINGE))
    with pytest.raises(InputError, match="unknown form to fit 'hing'; did you mean 'hinge'"):
        fit.fit(features, seconds, "hing")
    with pytest.raises(InputError, match="held_out 1"):
        fit.fit(features, seconds, held_out=1)


@pytest.mark.parametrize(("run", "median", "p95"), [("sarathi512", 0.07, 0.12), ("vllm", 0.03, 0.11)])
def test_hinge_on_the_batches_of_vidur(run, median, p95):
    """Batches that Vidur's schedulers formed, and the times it gave them, for Llama-3-8B on an A100."""
    shared = os.environ.get("LLMSCHED_SHARED")
    if not shared:
        pytest.skip("LLMSCHED_SHARED is not set")
    pd = pytest.importorskip("pandas")
    rows = pd.read_csv(Path(shared, "data", "vidur_runs", f"conv_q6.45_{run}_batches.csv.gz"))
    context = rows.prefill_sum_chunk_x_ctx + rows.prefill_sum_chunk_sq / 2
    features = [rows.prefill_tokens, rows.n_prefill_reqs, context, rows.prefill_kv, rows.n_decode]
    features = np.stack([*features, rows.decode_kv_tokens], axis=1).astype(float)
    errors = fit.judge(
        profiles.get("a100-llama3-8b"), features, (rows.completed_at - rows.scheduled_at).to_numpy()
    )
    assert errors["median_rel"] < median and errors["p95_rel"] < p95 and errors["R2"] > 0.95
