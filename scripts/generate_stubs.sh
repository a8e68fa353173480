#!/usr/bin/env bash
# Generates preceptor/v1 from proto/ (committed). `--check` fails if the committed stubs differ.
# The tools live in an environment of their own and are pinned: stubs made by newer tools refuse older protobuf runtimes.
set -euo pipefail
cd "$(dirname "$0")/.."
env=.venv/proto-tools
if [ ! -x "$env/bin/protoc-gen-mypy" ]; then
  python3 -m venv "$env"
  "$env/bin/pip" install -q "grpcio-tools==1.76.0" "setuptools<81" "mypy-protobuf==3.7.0"
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
PATH="$PWD/$env/bin:$PATH" "$env/bin/python" -m grpc_tools.protoc -Iproto \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" proto/preceptor/v1/*.proto
printf '"""Generated from proto/preceptor/v1 by scripts/generate_stubs.sh; do not edit."""\n' > "$out/preceptor/v1/__init__.py"
if [ "${1:-}" = --check ]; then
  diff -r -x __pycache__ "$out/preceptor/v1" preceptor/v1 && echo "stubs are fresh"
else
  rm -rf preceptor/v1 && cp -r "$out/preceptor/v1" preceptor/v1
fi
