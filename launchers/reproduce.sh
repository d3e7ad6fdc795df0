#!/usr/bin/env bash
# One row of the paper's table: train on LaSER-Training, then BRIGHT, FollowIR and BrowseComp-Plus. Not run yet.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ $# -lt 4 || "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
  cat <<'HELP'
usage: launchers/reproduce.sh RECIPE METHOD ROWS OUT [TRAINING OPTIONS]

RECIPE   a file, or a name in launchers/recipes: paper/qwen3-0.6b, paper/llama-3.1-8b, ...
METHOD   a name in launchers/recipes/methods: laser, contrastive, gircse, without-output, ...
ROWS     LaSER-Training as JSON lines, Parquet, a saved dataset, or its hub id
OUT      folder for shards (shared by all rows of the table), runs and results

Uses all GPUs of this host (or NUM_GPUS of them). Every stage keeps what it made: a second call goes on.

examples:
  launchers/reproduce.sh paper/qwen3-0.6b laser LaSER-Training.jsonl runs/paper
  NUM_GPUS=4 launchers/reproduce.sh paper/qwen3-8b gircse LaSER-Training.jsonl runs/paper --thinking.steps 5
HELP
  [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]] && exit 0 || exit 2
fi

recipe=$1 method=$2 rows=$3 out=$4
shift 4
[[ -f "$recipe" ]] || recipe="$root/launchers/recipes/$recipe.toml"
overlay="$root/launchers/recipes/methods/$method.toml"
for file in "$recipe" "$overlay"; do
  [[ -f "$file" ]] || { echo "reproduce: $file does not exist" >&2; exit 2; }
done
[[ -x "$root/.venv/bin/python" ]] || { echo "reproduce: run $root/launchers/setup.sh first" >&2; exit 1; }
export PYTHONSAFEPATH=1
export PATH="$root/.venv/bin:$PATH" # DeepSpeed looks for ninja and python by name

run="$out/$(basename "$recipe" .toml)-$method"
mkdir -p "$run"
[[ -f "$out/shards/manifest.json" ]] || laser-dist prepare --source "$rows" --missing-rationale drop --out "$out/shards"
gpus=()
[[ -z "${NUM_GPUS:-}" ]] || gpus=(--num_gpus "$NUM_GPUS")
laser-dist launch "${gpus[@]}" "$recipe" "$overlay" --data.train "$out/shards" --output "$run" --resume "$@"
for task in BRIGHT FollowIR BrowseComp-Plus; do
  [[ -f "$run/$task.json" ]] || laser-dist evaluate --model "$run" --task "$task" --max-tokens 8192 --out "$run/$task.json"
done
