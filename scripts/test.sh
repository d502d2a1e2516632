#!/usr/bin/env bash
# Everything that must pass: ruff, mypy, pytest. Arguments go on to pytest: bash scripts/test.sh -k metrics; -m slow for
# the tests that take long.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
ensure_venv test
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
