#!/usr/bin/env bash
# Makes the environment of dictionary_learning's side of the peers' benchmark: its published version needs an old nnsight.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv-bench-dictionary-learning
test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==4.46.3 accelerate==1.2.1 datasets einops pandas pillow msgspec websocket-client sentencepiece \
    toml ipython pydantic diffusers==0.31.0
# Without what only plots and training runs need, and without torchvision.
"${pip[@]}" --no-deps nnsight==0.3.7 dictionary-learning==0.1.0 python-socketio bidict python-engineio simple-websocket \
    wsproto h11
