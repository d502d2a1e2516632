#!/usr/bin/env python3
"""Replay recorded decisions of real schedulers, and say which cases ours reproduce, decision by decision."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from baselines.recorded import Outcome, check
from llmsched_env.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Exit status: 0 if all are reproduced, 1 if not, 2 if there is no case."
    )
    parser.add_argument("folder", type=Path, nargs="+", help="where the cases are, *.json, at any depth")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    paths: list[Path] = []
    for folder in options.folder:
        found = sorted(folder.rglob("*.json")) if folder.is_dir() else []
        if not found:
            what = "holds no case (*.json)" if folder.is_dir() else "is not a folder"
            print(f"error: {folder} {what}; give a folder of recorded cases", file=sys.stderr)
            return 2
        paths += found
    cases = []
    for path in paths:
        case = {"file": str(path), **_outcome(path)}
        cases.append(case)
        if not options.json:
            print(f"{path}: {case['difference'] or 'reproduced, {iterations} iterations'.format(**case)}")
    good = sum(bool(case["reproduced"]) for case in cases)
    if options.json:
        print(json.dumps({"reproduced": good, "cases": len(cases), "results": cases}, indent=1))
    else:
        print(f"{good} of {len(cases)} cases reproduced")
    return 0 if good == len(cases) else 1


def _outcome(path: Path) -> dict[str, object]:
    """What became of a case; one that cannot be read, or that ours fails on, is not reproduced."""
    try:
        outcome = check(path)
    except InputError as error:
        outcome = Outcome(path.stem, 0, str(error).removeprefix(f"{path}: "))
    return {
        "name": outcome.name,
        "iterations": outcome.iterations,
        "reproduced": outcome.reproduced,
        "difference": outcome.difference,
    }


if __name__ == "__main__":
    sys.exit(main())
