"""The README's Python examples run, and the commands it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agents.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int) -> None:
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "readme"})


COMMANDS = sorted(set(re.findall(r"llmsched ((?:profiles )?[a-z]+) (?:\S+ )?--", README)))


def test_the_commands_are_found() -> None:
    assert {"simulate", "bench", "optimum", "train", "evaluate", "watch", "tune"} <= {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_the_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([*command.split(), "--help"])
    text = capsys.readouterr().out
    for line in re.findall(rf"llmsched {command} (.*?)(?<!\\)\n", README, re.DOTALL):
        for option in re.findall(r"(?<!\S)--[a-z-]+", re.split("[`#]", line)[0]):
            assert option in text, option


def test_files_it_names_exist() -> None:
    for name in re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"scripts/\w+\.\w+", README):
        assert (Path(__file__).parents[1] / name).is_file(), name
