#!/usr/bin/env bash
# Everything that wants a GPU, in one run of at most 9 minutes: see benchmarks/gpu_suite.py.
#   benchmarks/gpu_suite.sh [output folder]          rows.jsonl, and a bench folder for the widened model
# Runs from the source tree with the python3 that is there. Wheels laid in ./wheels are installed first,
# so that a machine without network can be given what it lacks (optuna, pydantic).
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-results/measured/gpu}"
python="${PYTHON:-python3}"
if [ -d wheels ]; then
  "$python" -m pip install --quiet --no-index --find-links wheels optuna pydantic || echo "some wheels are missing"
fi
PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" exec "$python" benchmarks/gpu_suite.py --out "$out" --minutes 8.5
