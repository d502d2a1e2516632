"""Decisions recorded from real schedulers are reproduced, and the script that checks it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from baselines.recorded import check
from llmsched_env.errors import InputError

ROOT = Path(__file__).parent
CASES = sorted((ROOT / "recorded").rglob("*.json"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_recorded_decision_is_reproduced(path: Path) -> None:
    outcome = check(path)
    assert outcome.reproduced, outcome.difference
    assert outcome.iterations == len(json.loads(path.read_text())["iterations"]) > 0


def test_all_recorded_systems_are_there() -> None:
    folders = {path.parent.name for path in CASES}
    assert folders == {"sarathi", "vllm_v0", "vllm_v1", "vllm_v1_async"} and len(CASES) == 43


CASE = ROOT / "recorded" / "vllm_v1" / "10_kv_pressure_basic.json"


def change(case: dict[str, Any], what: str) -> None:
    """Tell another story in the middle of the case."""
    story = next(row for row in case["iterations"] if row["preempted"])
    if what == "tokens":
        story["scheduled"][0][1] += 1
    elif what == "order":
        story["scheduled"].reverse()
    elif what == "free blocks":
        story["free_blocks_after_schedule"] += 1
    else:
        story[what] = []


@pytest.mark.parametrize("what", ["tokens", "order", "free blocks", "preempted"])
def test_a_case_that_tells_another_story_is_not_reproduced(tmp_path: Path, what: str) -> None:
    case = json.loads(CASE.read_text())
    change(case, what)
    (tmp_path / "case.json").write_text(json.dumps(case))
    outcome = check(tmp_path / "case.json")
    assert not outcome.reproduced and outcome.difference.startswith("iteration ")
    assert "\n" not in outcome.difference


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"name": "x"}', '{"name": 1, "iterations": [], "engine": "unheard of"}', "\x00"],
)
def test_what_is_no_case_is_said_so_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "case.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"case\.json") as caught:
        check(path)
    assert "\n" not in str(caught.value)


def test_damage_anywhere_in_a_case_is_an_input_error(tmp_path: Path) -> None:
    """Each key in turn missing, or of another type: reproduced, different or refused, but never a crash."""
    original = json.loads(CASE.read_text())
    path = tmp_path / "case.json"
    for where in ((), ("config",), ("requests", 0), ("iterations", 0)):
        for key in list(get(original, where)):
            for damage in (None, "text", -1, [], {}):
                case = json.loads(json.dumps(original))
                case["iterations"] = case["iterations"][:3]
                part = get(case, where)
                if damage is None:
                    del part[key]
                else:
                    part[key] = damage
                path.write_text(json.dumps(case))
                try:
                    check(path)
                except InputError as error:
                    assert "\n" not in str(error)


def get(case: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        case = case[key]
    return case


# ---------------------------------------------------------------------------------- scripts/check_recorded.py


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_recorded", ROOT.parent / "scripts" / "check_recorded.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_counts_what_is_reproduced(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folders = [str(ROOT / "recorded" / name) for name in ("vllm_v0", "sarathi")]
    assert script.main(folders) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 25 and lines[-1] == "24 of 24 cases reproduced"

    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "good.json").write_text(CASE.read_text())
    (tmp_path / "broken.json").write_text("{")
    case = json.loads(CASE.read_text())
    change(case, "tokens")
    (tmp_path / "different.json").write_text(json.dumps(case))
    assert script.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1] == "1 of 3 cases reproduced"
    assert "not a recorded case" in lines[1] and "recorded [[" in lines[2]

    assert script.main([str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["reproduced"], report["cases"]) == (1, 3)
    assert [case["reproduced"] for case in report["results"]] == [True, False, False]


def test_the_script_needs_cases(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert script.main([str(folder)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and str(folder) in captured.err


def test_vllm_011_passes_over_a_whole_prompt_that_exceeds_the_budget(tmp_path: Path) -> None:
    case = json.loads(CASE.read_text())
    case["vllm_version"] = "0.11.0"
    case["config"] |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 94, "max_num_seqs": 8}
    case["config"] |= {"num_gpu_blocks": 101, "block_size": 16}
    case["usable_blocks"] = 100
    case["requests"] = [
        {"id": f"r{i}", "arrival_iter": 0, "prompt_len": tokens, "output_len": 5}
        for i, tokens in enumerate((48, 40, 20, 5))
    ]
    free = {"free_blocks_before": 100, "free_blocks_after_schedule": 93, "free_blocks_after_update": 93}
    scheduled = [["r0", 48], ["r1", 40], ["r3", 5]]  # 6 tokens are left when r2's turn comes
    case["iterations"] = [{"iter": 0, "scheduled": scheduled, "preempted": [], "finished": [], **free}]
    (tmp_path / "case.json").write_text(json.dumps(case))
    assert check(tmp_path / "case.json").difference == ""
