#!/usr/bin/env bash
# Looks at what is deployed: Dockerfile, Helm chart, compose files. What a machine has no tool for is left out, and said.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
chart=deploy/helm/preceptor

if command -v hadolint > /dev/null; then
  hadolint Dockerfile
else
  echo "no hadolint here: the Dockerfile is not looked at"
fi

if command -v helm > /dev/null; then
  for values in "$chart"/ci/*-values.yaml; do
    helm lint --strict --quiet "$chart" --values "$values"
    # What it renders is looked at by tests/unit/test_chart.py.
    helm template mine "$chart" --values "$values" > /dev/null
  done
else
  echo "no helm here: the chart is not looked at"
fi

if docker compose version > /dev/null 2>&1; then
  # Neither needs a daemon. Without anybody's own .env, which could hide that something is not set.
  docker compose --env-file /dev/null --file compose.yaml --profile '*' config --quiet
  docker compose --env-file /dev/null --file compose.yaml --file compose.gpu.yaml --profile '*' config --quiet
else
  echo "no docker compose here: compose files are not looked at"
fi
