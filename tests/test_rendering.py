"""Pictures, terminal views and traces of schedules."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import importlib
import json
import resource
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import baselines
from llmsched_env import EngineConfig, InputError, Requests, Result, simulate, workloads
from llmsched_env.envs.export import chrome_trace, gantt
from llmsched_env.envs.page import Page, text_width
from llmsched_env.envs.picture import Picture
from llmsched_env.envs.rendering import Painter, Window, draw, text
from llmsched_env.envs.scene import Kind, Scene, State

TIGHT = EngineConfig(kv_blocks=450)
GAPS = Requests.of(
    [0.5, 0.7, 500, 500.1, 9000, 9000.2, 9001], [300, 800, 200, 100, 2000, 100, 500], [40, 6, 10, 20, 8, 9, 5]
)


@cache
def run(scheduler: str, n: int = 40, kv_blocks: int | None = 450) -> Result:
    workload = workloads.get("azure-conv", num_requests=n, rate=4.0, seed=2)
    engine = EngineConfig(kv_blocks=kv_blocks)
    return simulate(workload, baselines.get(scheduler), engine=engine, record="schedule", oversized="drop")


@cache
def gaps() -> Result:
    return simulate(GAPS, baselines.get("sarathi"), record="schedule")


@cache
def crowd() -> Result:
    rng = np.random.default_rng(0)
    workload = Requests.of(
        np.sort(rng.uniform(0, 5, 500)), rng.integers(20, 200, 500), rng.integers(50, 200, 500)
    )
    engine = EngineConfig(max_num_seqs=600, kv_blocks=12000)
    return simulate(workload, baselines.get("vllm-v1"), engine=engine, record="schedule")


def moment(result: Result, j: int, **changes: Any) -> Scene:
    """A scene before iteration j, most of which is planned."""
    rows = result.iterations
    schedule = result.schedule
    assert rows is not None and schedule is not None
    entries = int(rows["entries"][j - 1]) if j else 0
    now = float(rows["start_s"][j]) if j < len(rows) else float(rows["end_s"][-1])
    planned: list[tuple[int, int]] = []
    if j < len(rows):
        own = slice(entries, int(rows["entries"][j]))
        planned = list(zip(schedule.requests[own].tolist(), schedule.tokens[own].tolist(), strict=True))
        planned = planned[: max(1, len(planned) - 1)]
    fields: dict[str, Any] = {
        "rows": rows[:j],
        "requests": schedule.requests[:entries],
        "tokens": schedule.tokens[:entries],
        "workload": result.requests,
        "kv_tokens": result.engine.kv_tokens,
        "now": now,
        "finish_s": np.where(result.finish_s <= now, result.finish_s, np.nan),
        "planned": planned,
        "decision": f"GRANT request {planned[-1][0]}, {planned[-1][1]} tokens" if planned else "",
        "title": f"{result.scheduler} on {result.profile}",
        "metrics": {"reward": -0.12345, "mean latency (s)": 3.2, "preemptions": 12, "tokens/s": 1234.5},
    }
    return Scene(**{**fields, **changes})


def moments(result: Result, count: int = 12) -> Iterator[Scene]:
    rows = result.iterations
    assert rows is not None
    some = np.linspace(0, len(rows), count).astype(int).tolist()
    after = np.minimum(np.flatnonzero(rows["preempted"])[:5] + 3, len(rows)).tolist()
    for j in sorted({*some, *after}):
        yield moment(result, j)


# ---------------------------------------------------------------------- what follows from the decisions

FOLLOWED = [
    "vllm-v1",
    "vllm-v1-async",
    "vllm-v0-swap",
    "sarathi",
    "fastserve",
    "orca",
    "sglang",
    "trtllm-max-utilization",
]


@pytest.mark.parametrize("scheduler", FOLLOWED)
def test_the_story_is_what_the_engine_did(scheduler: str) -> None:
    result = run(scheduler)
    scene = Scene.of(result)
    story, rows = scene.story, scene.rows
    row = np.repeat(np.arange(len(rows)), np.diff(rows["entries"], prepend=0))
    prefill = story.kind == Kind.PREFILL
    decode = (story.kind == Kind.DECODE) | (story.kind == Kind.WASTED)
    given = np.bincount(row[prefill], scene.tokens[prefill], len(rows))
    np.testing.assert_array_equal(given, rows["prefill_tokens"])
    np.testing.assert_array_equal(np.bincount(row[decode], minlength=len(rows)), rows["decode_requests"])
    np.testing.assert_array_equal(story.first_scheduled_s, result.first_scheduled_s)
    np.testing.assert_array_equal(story.first_token_s, result.first_token_s)
    np.testing.assert_array_equal(story.generated, result.generated_tokens)
    np.testing.assert_array_equal(story.preemptions, result.preemptions)
    np.testing.assert_array_equal(story.state == State.FINISHED, ~np.isnan(result.finish_s))
    assert np.count_nonzero(story.kind == Kind.WASTED) == result.wasted_tokens
    assert story.kv_after[-1] == 0 and story.running[-1] == 0
    assert story.waiting[-1] == np.isnan(result.finish_s).sum()  # those dropped, which a result does not tell
    assert story.waiting.min() >= 0 and story.running.min() >= 0
    dropped = np.isnan(result.finish_s)
    assert dataclasses.replace(scene, dropped=dropped).waiting[-1] == 0


def test_the_queue_is_counted_from_arrivals_admissions_and_preemptions() -> None:
    result = run("vllm-v1")
    scene = Scene.of(result)
    rows = scene.rows
    for j in (5, len(rows) // 3, len(rows) // 2):
        part = moment(result, j + 1, planned=(), now=float(rows["end_s"][j]))
        state = part.story.state
        after = np.isin(state, [State.WAITING, State.PREEMPTED]).sum()
        arrived_meanwhile = (scene.workload.arrival_s > rows["start_s"][j]) & (
            scene.workload.arrival_s <= part.now
        )
        assert part.waiting[-1] == scene.waiting[j] == after - arrived_meanwhile.sum()
    between = scene.waiting_at(np.array([0.0, *rows["start_s"][:3], 1e9]))
    assert between[0] == (scene.workload.arrival_s <= 0).sum()
    np.testing.assert_array_equal(between[1:4], scene.waiting[:3])


def test_lanes_are_never_shared() -> None:
    for result in (run("vllm-v1"), run("fastserve"), crowd()):
        scene = Scene.of(result)
        lane, first, last = scene.story.lane, scene.story.first_scheduled_s, scene.finish_s
        for k in range(scene.story.lanes):
            own = np.flatnonzero(lane == k)
            own = own[np.argsort(first[own])]
            assert (first[own][1:] >= last[own][:-1]).all()
        assert set(lane[~np.isnan(first)]) == set(range(scene.story.lanes))


def test_a_scene_that_does_not_fit_together_is_one_line() -> None:
    scene = moment(run("sarathi"), 30)
    with pytest.raises(InputError, match="give one of each for each decision"):
        dataclasses.replace(scene, tokens=scene.tokens[:-1])
    with pytest.raises(InputError, match="finish_s has 3 values for 40 requests"):
        dataclasses.replace(scene, finish_s=np.zeros(3))
    with pytest.raises(InputError, match='record="schedule"'):
        Scene.of(simulate(GAPS, baselines.get("sarathi")))


# ---------------------------------------------------------------------- pictures


def test_a_picture_has_the_size_asked_for_and_shows_the_same_every_time() -> None:
    scene = moment(run("vllm-v1"), 200)
    for width, height, dpi in ((960, 600, 100.0), (333, 517, 77.7), (640, 480, 130.123), (321, 241, 100.0)):
        frame = draw(scene, width, height, dpi)
        assert frame.shape == (height, width, 3) and frame.dtype == np.uint8
        assert frame.flags.c_contiguous and frame.flags.writeable
        np.testing.assert_array_equal(frame, Painter(width, height, dpi).draw(scene))
    assert (frame == 255).mean() > 0.3  # mostly white
    for changes in ({"planned": ()}, {"decision": "WAIT"}, {"metrics": {}}, {"title": ""}, {"focus": 0}):
        assert (draw(scene) != draw(dataclasses.replace(scene, **changes))).any(), changes


def test_what_is_too_small_to_show_anything_is_refused() -> None:
    scene = moment(run("vllm-v1"), 200)
    for size in (
        (64, 64, 100.0),
        (960, 600, 0.0),
        (960, 600, float("nan")),
        (960, 600, 1000.0),
        (0, 0, 100.0),
    ):
        with pytest.raises(InputError, match="is too small to read"):
            draw(scene, *size)


def boxes(page: Page) -> list[tuple[float, float, float, float, str]]:
    """What the texts of a page cover: left, bottom, right, top."""
    return [
        (x, y - 0.1 * size, x + text_width(words, size, bold), y + 0.75 * size, words)
        for x, y, words, size, bold, _ in page.texts
    ]


def assert_legible(page: Page) -> None:
    """No text overlaps another or leaves the page."""
    covered = boxes(page)
    assert len(covered) > 4
    for i, (a, b, c, d, words) in enumerate(covered):
        assert min(a, b) >= -0.5 and c <= page.width + 0.5 and d <= page.height + 0.5, words
        for e, f, g, h, others in covered[:i]:
            assert c <= e + 0.3 or g <= a + 0.3 or d <= f + 0.3 or h <= b + 0.3, (words, others)


SIZES = [(691.0, 432.0), (230.0, 173.0), (216.0, 648.0), (960.0, 300.0)]


RUNS: dict[str, Callable[[], Result]] = {
    "preempted": lambda: run("vllm-v1"),
    "swapped": lambda: run("vllm-v0-swap"),
    "chunks": lambda: run("sarathi", 15),
    "gaps": gaps,
    "crowd": crowd,
}


@pytest.mark.parametrize("name", RUNS)
def test_no_label_overlaps_another(name: str) -> None:
    result = RUNS[name]()
    for scene in moments(result):
        for size in SIZES:
            assert_legible(Picture(scene, *size, live=True).page)
    for size in SIZES:
        assert_legible(Picture(Scene.of(result), *size, live=False).page)


def test_long_words_and_many_numbers_are_cut() -> None:
    metrics = {f"a metric with a long name {i}": 12345.678 * i for i in range(30)}
    scene = moment(run("vllm-v1"), 200, metrics=metrics, title="long " * 50, decision="ADMIT " * 50)
    scene = dataclasses.replace(
        scene,
        workload=dataclasses.replace(scene.workload, names=tuple(f"conversation-{i:09}" for i in range(40))),
    )
    for size in SIZES:
        assert_legible(Picture(scene, *size, live=True).page)


def test_signs_that_the_font_lacks_do_no_harm() -> None:
    names = ("日本語", "a$b^c_d", "x\ny", "\x1b[31m", "−∞", "", "🙂")
    result = simulate(dataclasses.replace(GAPS, names=names), baselines.get("sarathi"), record="schedule")
    scene = moment(result, 30, title="$\\frac{1}{2}$ 🙂", metrics={"nan": np.nan, "∞": -np.inf, "日": 1})
    draw(scene)  # no warning, which the tests would take for an error
    assert "\x1b" not in text(scene)
    assert len(text(scene).splitlines()) == len(text(moment(gaps(), 30)).splitlines())


def test_a_scene_of_nothing_can_be_shown() -> None:
    empty = moment(gaps(), 0, planned=(), decision="", title="", metrics={}, now=0.0)
    for scene in (empty, dataclasses.replace(empty, now=1e6), dataclasses.replace(empty, now=0.6)):
        assert draw(scene).shape == (600, 960, 3)
        assert "iteration 0" in text(scene)


def test_one_request_and_five_hundred() -> None:
    one = simulate(Requests.of([0.0], [300], [1]), baselines.get("sarathi"), record="schedule")
    for result in (one, crowd()):
        for scene in moments(result, 5):
            draw(scene)
            text(scene)
    scene = moment(crowd(), len(crowd().iterations) // 2)  # type: ignore[arg-type]
    words = [label for *_, label in boxes(Picture(scene, 691, 432, live=True).page)]
    assert any(word.endswith("more not shown)") for word in words)


def test_long_idle_stretches_are_cut_short() -> None:
    result = gaps()
    rows = result.iterations
    assert rows is not None
    for live in (True, False):
        picture = Picture(Scene.of(result), 691, 432, live=live)
        clock = picture.clock
        x = clock.x(np.sort(np.concatenate([rows["start_s"], rows["end_s"]])))
        assert (np.diff(x) >= 0).all()
        on = slice(clock.first, clock.last)
        assert (np.diff(clock.x(rows["start_s"][on])) > 1).all()  # all iterations can be told apart
        assert 500 in [round(t) for t in np.ravel(clock.idle)] or live
        labels = [float(label) for _, label in clock.ticks()]
        assert labels == sorted(labels) and min(labels) >= 0
        assert any(label.startswith("idle") for *_, label in boxes(picture.page))


def test_the_scale_holds_for_a_while() -> None:
    result = run("vllm-v1")
    scales = {Picture(moment(result, j), 691, 432, live=True).clock.seconds for j in range(100, 400)}
    assert len(scales) < 30


def test_what_is_preempted_and_planned_is_marked() -> None:
    result = run("vllm-v1")
    rows = result.iterations
    assert rows is not None
    j = int(np.flatnonzero(rows["preempted"])[0])
    schedule = result.schedule
    assert schedule is not None
    victim = schedule[j].preempted[0]
    plan = [(victim, -1)]
    scene = moment(result, j, planned=plan, decision=f"PREEMPT request {victim}")
    assert scene.focused == victim and scene.story.planned == [Kind.EVICTED]
    assert "preempt" in [label for *_, label in boxes(Picture(scene, 691, 432, live=True).page)]
    assert f"preempt {victim}" in text(scene)
    after = moment(result, j + 2, planned=())
    assert after.story.state[victim] == State.PREEMPTED
    assert "preempted" in [label for *_, label in boxes(Picture(after, 691, 432, live=True).page)]
    assert f"{victim}(preempted)" in text(after)


def test_a_planned_admission_has_a_lane_of_its_own() -> None:
    result = run("vllm-v1")
    rows = result.iterations
    assert rows is not None
    scene = Scene.of(result)
    new = int(np.flatnonzero(~np.isnan(scene.story.first_scheduled_s))[-1])
    j = int(np.searchsorted(rows["start_s"], scene.story.first_scheduled_s[new]))
    before = moment(result, j, planned=[(new, 64)])
    held = np.isin(before.story.state, [State.RUNNING, State.PREEMPTED])
    assert before.story.lane[new] >= 0 and before.story.lane[new] not in before.story.lane[held]
    assert before.story.planned == [Kind.PREFILL]
    assert before.story.state[new] == State.WAITING


def test_frames_leave_nothing_behind() -> None:
    painter = Painter(320, 240)
    scenes = [moment(run("vllm-v1"), j) for j in range(100, 110)]
    for scene in scenes:
        painter.draw(scene)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(5):
        for scene in scenes:
            painter.draw(scene)
    gc.collect()
    assert len(gc.get_objects()) <= before + 50


def test_pyplot_is_left_alone() -> None:
    code = "import sys, llmsched_env.envs.export, llmsched_env.envs.rendering; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib.figure" in done.stdout.split() and "matplotlib.pyplot" not in done.stdout.split()


# ---------------------------------------------------------------------- a terminal


def test_the_terminal_view_says_what_goes_on() -> None:
    scene = moment(run("vllm-v1"), 200)
    shown = text(scene)
    lines = shown.splitlines()
    assert lines[0] == "vllm-v1 on a100-llama3-8b"
    assert lines[1].startswith(f"t {scene.now:.3f} s   iteration 200   finished ")
    held = int(scene.story.kv_after[-1])
    assert f"{held:,} of 7,200 tokens" in lines[2]
    waiting = int(np.isin(scene.story.state, [State.WAITING, State.PREEMPTED]).sum())
    assert lines[3].startswith(f"queue   {waiting} waiting")
    running = np.flatnonzero(scene.story.state == State.RUNNING)
    assert f"running {len(running)}" in lines
    assert sum("decode" in line or "prefill" in line for line in lines) == len(running)
    assert f"last    {scene.decision}" in lines
    assert sum(line.startswith(">") for line in lines) == 1  # whom the last decision was about
    assert lines[-1].startswith("metrics reward −0.1235")


@pytest.mark.parametrize("name", RUNS)
def test_the_terminal_view_keeps_within_its_columns(name: str) -> None:
    for scene in moments(RUNS[name](), 6):
        for width in (40, 60, 80, 120):
            shown = text(scene, width, 5)
            assert max(map(len, shown.splitlines())) <= width
            assert len(shown.splitlines()) <= 16
            plain = text(scene, width, plain=True)
            assert plain.isascii()
            assert "\x1b" not in plain
        coloured = text(scene, colour=True)
        assert "\x1b[1m" in coloured and coloured.count("\x1b[0m") * 2 == coloured.count("\x1b[")


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["png", "pdf", "svg", "PNG"])
def test_a_gantt_chart_is_written_and_always_the_same(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"run.{kind}"
    gantt(run("vllm-v1"), path)
    first = path.read_bytes()
    assert first.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind.lower()])
    gantt(Scene.of(run("vllm-v1")), path)
    assert path.read_bytes() == first
    gantt(run("vllm-v1"), path, between=(1.0, 4.0), title="")
    assert path.read_bytes() != first
    assert list(tmp_path.iterdir()) == [path]


def test_a_gantt_chart_of_many_requests(tmp_path: Path) -> None:
    gantt(crowd(), tmp_path / "run.png", dpi=60)
    gantt(moment(gaps(), 0), tmp_path / "none.png", dpi=60)
    assert len(list(tmp_path.iterdir())) == 2


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["run.png", "run.pdf", "run.svg", "run.json", "run.json.gz"])
def test_a_full_disk_is_one_line_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    write = gantt if name[4] != "j" else chrome_trace
    path = tmp_path / name
    with disk_of(1000), pytest.raises(InputError, match=f"^cannot write {path}: [^\n]*$"):
        write(run("vllm-v1"), path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with disk_of(1000), pytest.raises(InputError):
        write(run("vllm-v1"), path)
    assert path.read_text() == "old"


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    result = gaps()
    for write, name in ((gantt, "x.png"), (chrome_trace, "x.json")):
        with pytest.raises(InputError, match="there is no folder"):
            write(result, tmp_path / "none" / name)
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="it is a folder"):
            write(result, tmp_path / name)
        with pytest.raises(InputError, match='record="schedule"'):
            write(simulate(GAPS, baselines.get("sarathi")), tmp_path / f"new-{name}")
    with pytest.raises(InputError, match="unknown picture format 'jpg'"):
        gantt(result, tmp_path / "run.jpg")
    with pytest.raises(InputError, match="too small"):
        gantt(result, tmp_path / "run.png", width=0.5)
    for between in ((2.0, 1.0), (0.0, float("nan"))):
        with pytest.raises(InputError, match="the earlier first"):
            gantt(result, tmp_path / "run.png", between=between)
    with pytest.raises(InputError, match="unknown threads 'each'"):
        chrome_trace(result, tmp_path / "run.json", threads="each")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.png"]


def read_trace(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    trace = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    return list(trace["traceEvents"])


@pytest.mark.parametrize("threads", ["request", "slot"])
@pytest.mark.parametrize("scheduler", ["vllm-v1", "vllm-v1-async", "vllm-v0-swap", "fastserve"])
def test_a_trace_holds_the_schedule(scheduler: str, threads: str, tmp_path: Path) -> None:
    result = run(scheduler)
    rows, schedule = result.iterations, result.schedule
    assert rows is not None and schedule is not None
    chrome_trace(result, tmp_path / "run.json", threads=threads)
    events = read_trace(tmp_path / "run.json")

    names = [e for e in events if e["ph"] == "M"]
    assert events[: len(names)] == names
    assert {e["name"] for e in names} == {"process_name", "thread_name", "thread_sort_index"}
    assert names[0]["args"]["name"] == f"engine: {scheduler} on a100-llama3-8b"
    named = {e["tid"] for e in names if e["name"] == "thread_name"}
    assert {e["tid"] for e in events} <= named | {0}

    rest = events[len(names) :]
    assert [e["ts"] for e in rest] == sorted(e["ts"] for e in rest)
    assert {e["ph"] for e in rest} == {"X", "i", "C"}
    by_request: dict[str, int] = defaultdict(int)
    lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in rest:
        if event["ph"] != "X":
            continue
        assert event["dur"] > 0
        lines[event["tid"]].append(event)
        if event["cat"] != "iteration":
            by_request[event["args"]["request"]] += event["args"]["tokens"]
    for line in lines.values():  # one after the other
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.002 for a, b in pairwise(line))
    given = schedule.tokens > 0
    tokens = np.bincount(schedule.requests[given], schedule.tokens[given], len(result.requests))
    assert by_request == {str(r): int(t) for r, t in enumerate(tokens) if t}
    assert len(lines[0]) == len(rows)
    assert sum(e["args"]["prefill_tokens"] for e in lines[0]) == result.prefill_tokens

    instants: dict[str, int] = defaultdict(int)
    for event in rest:
        if event["ph"] == "i":
            assert event["s"] == "t"
            instants[event["name"]] += 1
    done = int((~np.isnan(result.finish_s)).sum())
    assert instants["arrival"] == len(result.requests)
    assert instants["first token"] == instants["finish"] == done
    assert instants["preempted"] + instants["swapped out"] == result.preemptions_total

    counters: dict[str, list[dict[str, int]]] = defaultdict(list)
    for event in rest:
        if event["ph"] == "C":
            counters[event["name"]].append(event["args"])
    assert set(counters) == {"KV tokens", "queue length", "batch tokens"}
    assert max(c["tokens"] for c in counters["KV tokens"]) == rows["kv_tokens"].max()
    assert counters["KV tokens"][-1] == {"tokens": 0}
    assert counters["batch tokens"][-1] == {"prefill": 0, "decode": 0}
    assert sum(c["prefill"] + c["decode"] for c in counters["batch tokens"]) == schedule.tokens[given].sum()


def test_successive_decodes_are_one_event(tmp_path: Path) -> None:
    one = simulate(Requests.of([1.0], [300], [50]), baselines.get("sarathi"), record="schedule")
    chrome_trace(one, tmp_path / "run.json.gz")
    first = (tmp_path / "run.json.gz").read_bytes()
    own = [e for e in read_trace(tmp_path / "run.json.gz") if e["ph"] == "X" and e["tid"] == 2]
    assert [(e["name"], e["args"]["tokens"]) for e in own] == [("prefill", 300), ("decode", 49)]
    assert one.iterations is not None
    assert own[1]["dur"] == pytest.approx(1e6 * (one.makespan_s - one.iterations["start_s"][1]), abs=0.01)
    chrome_trace(Scene.of(one), tmp_path / "run.json.gz")
    assert (tmp_path / "run.json.gz").read_bytes() == first


# ---------------------------------------------------------------------- a screen


def test_a_window_shows_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pygame = pytest.importorskip("pygame")
    frame = draw(moment(run("vllm-v1"), 200), 320, 240)
    with Window(320, 240) as window:
        assert window.open and window.show(frame)
        shown = pygame.surfarray.array3d(pygame.display.get_surface())
        np.testing.assert_array_equal(shown.transpose(1, 0, 2), frame)
        assert window.show(frame[:100, :100])  # scaled
        pygame.event.post(pygame.event.Event(pygame.QUIT))
        assert not window.show(frame) and not window.open
    window.close()
    window.close()
    first = Window(200, 100)
    second = Window(320, 240)
    assert second.open and not first.open
    first.close()
    assert second.show(frame)
    second.close()
    assert not second.show(frame)


def test_without_pygame_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name == "pygame":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r'pip install "llmsched-env\[render\]"'):
        Window()


def test_without_a_display_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "nonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pygame")
    with pytest.raises(InputError, match=r"^no window: [^\n]*take the pixels of draw"):
        Window()
