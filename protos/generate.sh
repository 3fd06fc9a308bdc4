#!/usr/bin/env bash
# Regenerates protos/gen from the protos. Needs the `dev` extra; versions are pinned in pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")"
# Only generated files go: gen/headrace also holds __init__.py and py.typed, written by hand.
find gen -name '*_pb2*' -delete
mapfile -t protos < <(find headrace -name '*.proto' | sort)
python -m grpc_tools.protoc -I. --python_out=gen --grpc_python_out=gen --mypy_out=quiet:gen --mypy_grpc_out=quiet:gen "${protos[@]}"
# Files without a service need no gRPC module.
grep -L '^class .*Servicer' $(find gen -name '*_pb2_grpc.py') | while read -r file; do rm "$file" "${file}i"; done
