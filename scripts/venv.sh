# shellcheck shell=bash
# Sourced by the other scripts, from the top of the checkout: `ensure_venv core` or `ensure_venv test` makes .venv with
# what is asked for, once. A stamp in .venv holds the hash of what was installed; while it fits, nothing is installed.

suits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.13 found${PYTHON:+ at $PYTHON}; install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

# torch from PyPI brings gigabytes of CUDA on Linux, and nothing here needs a GPU: its CPU build, if PyTorch's own index
# (or what pip is configured with) has it. Where it has not, the installation that follows takes what there is.
cpu_torch() {
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 15 --no-deps \
        --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch 2>/dev/null && [ "$(uname)" = Linux ]; then
        echo "warning: no CPU build of torch found (download.pytorch.org has them); one with CUDA is several GB" >&2
    fi
}

ensure_venv() {
    local want=$1 python hash stamp=.venv/.installed target=.
    [ "$want" = core ] || target=".[$want]"
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python)
        echo "making .venv with $("$python" --version)"
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "error: $python cannot make a virtual environment; install its venv module (on Debian: apt install python3-venv)" >&2
            return 1
        fi
    fi
    if ! suits .venv/bin/python; then
        echo "error: .venv is not of Python 3.10 to 3.13; remove it and run this again" >&2
        return 1
    fi
    # The place is part of it: an editable install points to where the checkout was.
    hash=$( (pwd; cat pyproject.toml constraints.txt) | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    # What the tests need contains what the core needs.
    if [ -f "$stamp" ] && { grep -qx "$want $hash" "$stamp" || grep -qx "test $hash" "$stamp"; }; then
        return
    fi
    echo "installing into .venv (once)"
    case $want in *test* | *train* | *interop*) cpu_torch ;; esac
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$target"; then
        echo "error: the installation failed (see above); it needs a package index: check the network and run this again" >&2
        return 1
    fi
    echo "$want $hash" >"$stamp"
}
