#!/usr/bin/env bash
# From a fresh checkout to the first benchmark: makes .venv, installs, compares the schedulers, writes a picture.
# Needs bash and Python 3.10 to 3.13. A second call installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
ensure_venv core
.venv/bin/llmsched bench --suite quick --output bench/quick "$@"
