"""Traces from files: the formats, the options, and every way in which a file can be wrong."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmsched_env import workloads
from llmsched_env.errors import InputError
from llmsched_env.workloads import traces

PLAIN = "timestamp,input_tokens,output_tokens\n0.0,10,5\n1.5,20,6\n4.0,30,7\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="t.csv"):
        path = tmp_path / name
        data = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


# -- formats


def test_plain_columns(write):
    for name in ("t.csv", "t.csv.gz"):
        requests = traces.read(write(PLAIN, name))
        assert requests.arrival_s.tolist() == [0, 1.5, 4]
        assert requests.prompt_tokens.tolist() == [10, 20, 30]
        assert requests.output_tokens.tolist() == [5, 6, 7] == requests.declared_tokens.tolist()
        assert requests.predicted_tokens.tolist() == [5, 6, 7]
        assert requests.names is None


def test_all_columns(write):
    text = (
        "request_id,arrival_s,prompt_tokens,output_tokens,declared_tokens,predicted_tokens,priority,"
        "client,class_id,ttft_target_s,tpot_target_s,comment\n"
        "a,2.0,10,5,16,4.5,-1,beta,0,0.5,0.05,x\n"
        "b,3.0,11,6,6,,2,alpha,3,,,y\n"
        'c,3.0,12,7,8,9,0,beta,1,1,1,"z, with comma"\n'
    )
    requests = traces.read(write(text))
    assert requests.names == ("a", "b", "c")
    assert requests.arrival_s.tolist() == [2, 3, 3]  # arrival_s is taken as it stands
    assert requests.declared_tokens.tolist() == [16, 6, 8]
    np.testing.assert_array_equal(requests.predicted_tokens, [4.5, np.nan, 9])
    assert requests.priority.tolist() == [-1, 2, 0]
    assert requests.client.tolist() == [0, 1, 0]  # numbered as they appear
    assert requests.class_id.tolist() == [0, 3, 1]
    assert requests.ttft_target_s.tolist() == [0.5, np.inf, 1]


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
    "2023-11-16 18:16:00,879,55\n"
)
AZURE_2024 = AZURE.replace(",374", "+00:00,374").replace(",396", "+00:00,396").replace(",879", "+00:00,879")
MOONCAKE = (
    '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
    '{"timestamp": 6001, "input_length": 7322, "output_length": 490, "hash_ids": [2]}\n'
)
BURST_GPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,0,1087,Conversation log\n"
    "118,GPT-4,417,276,693,API log\n"
)


@pytest.mark.parametrize("text", [AZURE, AZURE_2024], ids=["2023", "2024"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_azure(write, text, spoilt):
    if spoilt:  # the reading row by row must agree
        text += "2023-11-16 18:16:10,0,55\n"
        with pytest.warns(traces.TraceWarning, match="left out 1 of 4"):
            requests = traces.read(write(text), drop_bad=True)
    else:
        requests = traces.read(write(text))
    assert requests.arrival_s == pytest.approx([0, 4.314579, 13.31941], abs=1e-7)
    assert requests.prompt_tokens.tolist() == [374, 396, 879]


def test_mooncake(write):
    requests = traces.read(write(MOONCAKE, "t.jsonl"))
    assert requests.arrival_s == pytest.approx([0, 3.001])
    assert requests.output_tokens.tolist() == [500, 490]


def test_burst_gpt_failures_are_left_out_and_counted(write):
    with pytest.warns(traces.TraceWarning, match="left out 1 of 3 rows without response tokens"):
        requests = traces.read(write(BURST_GPT))
    assert requests.arrival_s.tolist() == [0, 113]
    assert requests.output_tokens.tolist() == [18, 276]


def test_unusual_but_right(write):
    text = "\ufeff\n Timestamp ; Input_Tokens;output_tokens\n0;10.0;5\n\n1; 20 ;6\n"
    requests = traces.read(write(text))
    assert requests.prompt_tokens.tolist() == [10, 20] and requests.arrival_s.tolist() == [0, 1]


# -- options


def test_window_limit_and_scale(write):
    path = write(PLAIN)
    assert traces.read(path, window=(1, 4)).arrival_s.tolist() == [0.5]
    assert traces.read(path, limit=2).arrival_s.tolist() == [0, 1.5]
    assert traces.read(path, time_scale=2).arrival_s.tolist() == [0, 3, 8]
    assert traces.read(path, rate=4).arrival_s == pytest.approx([0, 0.1875, 0.5])
    with pytest.raises(InputError, match="no request arrives between 5 and 6"):
        traces.read(path, window=(5, 6))


def test_lengths_are_cut(write):
    path = write("arrival_s,prompt_tokens,output_tokens,declared_tokens\n0,100,5,50\n1,100,50,90\n")
    requests = traces.read(path, max_prompt=80, max_output=20, max_total=90)
    assert requests.prompt_tokens.tolist() == [80, 70]
    assert requests.output_tokens.tolist() == [5, 20]
    assert requests.declared_tokens.tolist() == [20, 20]


def test_jitter_is_seeded_and_sorted(write):
    path = write(
        "timestamp,input_tokens,output_tokens\n" + "".join(f"{3 * (i // 9)},{i + 1},1\n" for i in range(90))
    )
    one, two, other = (traces.read(path, jitter_s=3, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.arrival_s, two.arrival_s) and np.array_equal(
        one.prompt_tokens, two.prompt_tokens
    )
    assert not np.array_equal(one.arrival_s, other.arrival_s)
    rounded = 3 * np.floor(one.arrival_s / 3)
    assert np.array_equal(rounded, 3 * ((one.prompt_tokens - 1) // 9))  # each row moved within its 3 s
    assert sorted(one.prompt_tokens) == list(range(1, 91))


def test_mending(write):
    path = write("timestamp,input_tokens,output_tokens\n5,1,1\n0,2,2\nx,3,3\n7,0,4\n9,5\n8,6,6\n")
    with pytest.warns(traces.TraceWarning, match="left out 3 of 6"):
        requests = traces.read(path, sort=True, drop_bad=True)
    assert requests.arrival_s.tolist() == [0, 5, 8]
    assert requests.prompt_tokens.tolist() == [2, 1, 6]
    with pytest.warns(traces.TraceWarning, match="left out 4 of 6"):  # unsorted rows are bad rows, too
        assert traces.read(path, drop_bad=True).prompt_tokens.tolist() == [1, 6]


def test_no_row_can_be_used(write):
    path = write(HEAD + "0,0,5\n1,1\nx,1,1\n")
    with pytest.raises(InputError, match=r"none of its 3 rows can be used; the first: line 2, .*; mend it$"):
        traces.read(path, drop_bad=True)


def test_late_arrivals_in_another_unit(write):
    path = write(HEAD + "0,1,5\n2000000000000,1,5\n")
    assert traces.read(path, time_scale=1e-9).arrival_s == pytest.approx([0, 2000])


def test_replay_at_a_load(write):
    path = write(PLAIN)
    recipe = workloads.trace(path, load=0.5, num_requests=3, prediction="none", declared=64)
    requests = recipe.draw(capacity_rps=2.0)
    assert requests.arrival_s == pytest.approx([0, 0.75, 2])
    assert np.isnan(requests.predicted_tokens).all() and (requests.declared_tokens == 64).all()
    assert recipe.moments().prompt == 20
    assert workloads.trace(path).draw().arrival_s.tolist() == [0, 1.5, 4]
    with pytest.raises(InputError, match="exclude each other"):
        workloads.trace(path, load=0.5, rate=1)
    once = write("timestamp,input_tokens,output_tokens\n0,1,1\n0,1,1\n")
    with pytest.raises(InputError, match="same time"):
        workloads.trace(once, rate=1).draw()


# -- wrong files

HEAD = "timestamp,input_tokens,output_tokens\n"
BAD = {
    "empty file": ("", "the file is empty"),
    "blank file": ("\n\n", "the file is empty"),
    "header only": (HEAD, "no usable rows"),
    "no header": ("0.0,10,5\n1.0,10,5\n", "no column arrival_s"),
    "missing column": (
        "timestamp,input_tokens,outptu_tokens\n0,1,1\n",
        "no column output_tokens; is it 'outptu_tokens'",
    ),
    "word": (HEAD + "0,10,5\n1,many,5\n", "line 3, column 'input_tokens': 'many' is not a number"),
    "word in time": (HEAD + "0,10,5\nsoon,1,5\n", "line 3, column 'timestamp': 'soon' is not a number"),
    "empty field": (HEAD + "0,10,5\n1,,5\n", "line 3, column 'input_tokens': is empty"),
    "empty time": (HEAD + "0,10,5\n,1,5\n", "line 3, column 'timestamp': is empty"),
    "nan": (HEAD + "0,10,5\nnan,1,5\n", "line 3, column 'timestamp': nan is not a time"),
    "nan tokens": (HEAD + "0,10,5\n1,NaN,5\n", "line 3, column 'input_tokens': NaN is not a whole number"),
    "infinite": (HEAD + "0,10,5\ninf,1,5\n", "line 3, column 'timestamp': inf is not a time"),
    "negative time": (HEAD + "-1,10,5\n0,1,5\n", "line 2, column 'timestamp': -1 is not a time"),
    "negative tokens": (HEAD + "0,10,-5\n", "line 2, column 'output_tokens': -5 is not a count"),
    "zero prompt": (HEAD + "0,0,5\n", "line 2, column 'input_tokens': 0 is not a count"),
    "zero output": (HEAD + "0,1,5\n\n1,3,0\n", "line 4, column 'output_tokens': 0 is not a count"),
    "fraction": (HEAD + "0,1.5,5\n", "line 2, column 'input_tokens': 1.5 is not a whole number"),
    "huge": (HEAD + "0,99999999999,5\n", "line 2, column 'input_tokens': 99999999999 is not a count"),
    "overflow": (HEAD + "0,9" + "9" * 400 + ",5\n", "line 2, column 'input_tokens'"),
    "unsorted": (HEAD + "3,1,5\n2,1,5\n", "line 3, column 'timestamp': 2 is before the row above"),
    "late": (HEAD + "0,1,5\n1e11,1,5\n", "arrivals run to 1e+11 s, more than 1e+10 s"),
    "too few": (HEAD + "0,1,5\n1,1\n", "line 3 has 2 fields, and the header has 3"),
    "too many": (HEAD + "0,1,5\n1,1,5,6\n", "line 3 has 4 fields, and the header has 3"),
    "all too many": (HEAD + "0,1,5,6\n1,1,5,6\n", "line 2 has 4 fields, and the header has 3"),
    "declared": (
        "arrival_s,prompt_tokens,output_tokens,declared_tokens\n0,1,9,8\n",
        "line 2, column 'declared_tokens': 8 is below the output of 9",
    ),
    "target": (
        "arrival_s,prompt_tokens,output_tokens,ttft_target_s\n0,1,9,0\n",
        "'ttft_target_s': 0 is not positive",
    ),
    "client": (
        "arrival_s,prompt_tokens,output_tokens,client\n0,1,9,a\n1,1,9,\n",
        "line 3, column 'client': is empty",
    ),
    "date": (AZURE + "yesterday,1,1\n", "line 5, column 'TIMESTAMP': 'yesterday' is not a date"),
    "binary": (b"\x89PNG\r\n\xff\xfe\x00" * 9, "is not a text file"),
    "quote": (HEAD + '0,"1,5\n' + "1,1,1\n" * 3, "line 5"),
    "two columns": ("timestamp,input_tokens,output_tokens,Input_Tokens\n0,1,1,2\n", "'Input_Tokens' twice"),
    "two columns that are not read": (HEAD.replace("\n", ",note,note\n") + "0,1,1,a,b\n", "'note' twice"),
    "NUL": (HEAD + "0,1,5\n1,4\0,5\n", "line 3"),
    "NUL in a name": (
        "arrival_s,prompt_tokens,output_tokens,client\n0,1,9,a\n1,1,9,a\0\n",
        "line 3",
    ),
    "json": (MOONCAKE + "{\n", "line 3 is not a JSON object"),
    "json twice": (MOONCAKE.replace("hash_ids", "timestamp"), "line 1 names 'timestamp' twice"),
    "json NUL": (MOONCAKE.replace("7322", '"4\\u0000"'), "column 'input_length': '4\\x00' holds a NUL"),
    "json, deep": (MOONCAKE + '{"a": ' * 100_000, "line 3 is not a JSON object"),
    "json number": (MOONCAKE + "7\n", "line 3 is not a JSON object"),
    "json zero": (MOONCAKE.replace("490", "0"), "line 2, column 'output_length': 0 is not a count"),
    "json without": (MOONCAKE.replace("output_length", "len"), "no column output_tokens"),
    "json missing": (MOONCAKE + '{"timestamp": 7000}\n', "line 3, column 'input_length': is empty"),
    "only failures": (BURST_GPT.replace(",18,", ",0,").replace(",276,", ",0,"), "no row has response tokens"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.filterwarnings("ignore::llmsched_env.workloads.traces.TraceWarning")
def test_bad_files(write, text, message):
    path = write(text)
    with pytest.raises(InputError) as error:
        traces.read(path)
    said = str(error.value)
    assert message in said and str(path) in said and "\n" not in said


def test_unreadable_files(tmp_path, write):
    path = write(PLAIN, "trace.csv")
    with pytest.raises(InputError, match=r"there is no such file; did you mean 'trace.csv'"):
        traces.read(tmp_path / "trace.cvs")
    with pytest.raises(InputError, match="is a folder"):
        traces.read(tmp_path)
    (tmp_path / "fake.csv.gz").write_text(PLAIN)
    with pytest.raises(InputError, match="is not a gzip file"):
        traces.read(tmp_path / "fake.csv.gz")
    whole = gzip.compress(PLAIN.encode() * 500)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        traces.read(tmp_path / "cut.csv.gz")
    if os.geteuid() != 0:
        path.chmod(0)
        with pytest.raises(InputError, match="cannot be read"):
            traces.read(path)


@pytest.mark.parametrize(
    "options",
    [
        {"jitter_s": -1},
        {"window": (3, 1)},
        {"limit": 0},
        {"rate": 0},
        {"time_scale": -1},
        {"rate": 1, "time_scale": 2},
        {"max_prompt": 0},
    ],
    ids=str,
)
def test_bad_options(write, options):
    with pytest.raises(InputError):
        traces.read(write(PLAIN), **options)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=20
    )
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(write, rows):
    rows.sort()
    text = "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{a!r},{p},{o}\n" for a, p, o in rows)
    requests = traces.read(write(text))
    assert requests.arrival_s == pytest.approx([r[0] for r in rows], rel=1e-14)
    assert list(zip(requests.prompt_tokens, requests.output_tokens, strict=True)) == [r[1:] for r in rows]


@given(st.text(alphabet='0123456789,.\n"-e;{}a', max_size=80))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_is_an_input_error(write, noise):
    try:
        traces.read(write(HEAD + noise))
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.slow
def test_a_million_rows_in_two_seconds_and_500_mb():
    script = Path(__file__).parent.parent / "scripts" / "bench_traces.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    seconds, megabytes = (float(x) for x in done.stdout.split()[:2])
    print(done.stdout)
    assert seconds < 6  # 2 on a quiet machine
    assert megabytes < 500
