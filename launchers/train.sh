#!/usr/bin/env bash
# Distributed training with DeepSpeed's launcher, on one machine or many.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'HELP'
usage: launchers/train.sh [LAUNCHER OPTIONS] RECIPE.toml [--section.field value ...]

Options before the recipe go to DeepSpeed's launcher, the rest to `laser-dist train`:
  launchers/train.sh --num_gpus 8 recipe.toml --output runs/eight
  launchers/train.sh --hostfile hosts --num_nodes 2 recipe.toml --output /shared/runs/sixteen --resume
A hostfile has one line per machine, `name slots=8`; .venv and the data must be at the same path on each of them.
HELP
}

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
[[ "$1" == "-h" || "$1" == "--help" ]] && usage && exit 0

launcher=()
while [[ "${1:-}" == -* ]]; do
  case "$1" in
    *=* | --no_python | --no_ssh | --no_ssh_check | --force_multi | --no_local_rank | --enable_each_rank_log | --bind_cores_to_rank)
      launcher+=("$1")
      shift
      ;;
    *)
      [[ $# -ge 2 ]] || { echo "train: $1 needs a value" >&2; exit 2; }
      launcher+=("$1" "$2")
      shift 2
      ;;
  esac
done
[[ $# -gt 0 ]] || { echo "train: name a recipe; ready ones are in launchers/recipes/" >&2; exit 2; }
[[ -x "$root/.venv/bin/deepspeed" ]] || { echo "train: run $root/launchers/setup.sh first" >&2; exit 1; }

export PYTHONSAFEPATH=1
export PATH="$root/.venv/bin:$PATH" # DeepSpeed looks for ninja and python by name
exec deepspeed "${launcher[@]}" --module laser_dist.train "$@"
