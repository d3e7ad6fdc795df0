#!/usr/bin/env bash
# Distributed training with DeepSpeed's launcher, on one machine or many, started again after failures.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

[[ -x "$root/.venv/bin/python" ]] || { echo "train: run $root/launchers/setup.sh first" >&2; exit 1; }

export PYTHONSAFEPATH=1
export PATH="$root/.venv/bin:$PATH" # DeepSpeed looks for ninja and python by name
# `laser-dist launch --help` explains everything; launchers/README.md has examples for clusters.
exec "$root/.venv/bin/python" -m laser_dist.cli launch "$@"
