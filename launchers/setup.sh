#!/usr/bin/env bash
# Makes .venv at the root of the repository and installs laser-dist into it, editable. Run again, it does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'HELP'
usage: launchers/setup.sh [EXTRAS]

EXTRAS is a comma-separated list of the extras in pyproject.toml (default: gguf, what the quickstart needs;
dev for working on the code; flash,kernels on a machine with NVIDIA GPUs).

environment:
  PYTHON                Python >= 3.11 that makes .venv (default: the first that is found)
  TORCH                 torch requirement, e.g. TORCH='torch==2.12.1'
  PIP_EXTRA_INDEX_URL   pip's own; set it to PyTorch's CPU index for the small CPU-only build of torch
HELP
}

fail() {
  echo "setup: $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14; do
    # Ask, rather than trust the name: version managers leave names on the path that run nothing.
    if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "needs Python 3.11 or newer and found none. Install one (Debian, Ubuntu: apt install python3 python3-venv" \
    "python3-dev; macOS: brew install python) or name it: PYTHON=/path/to/python3 $0"
}

# phase NAME COMMAND...: one line of progress; on failure the end of the log.
phase() {
  local name=$1 began=$SECONDS
  shift
  printf 'setup: %s ... ' "$name"
  if ! "$@" >>"$log" 2>&1; then
    printf 'failed\n\n'
    tail -n 30 "$log" >&2
    fail "$name failed; the whole log is $log"
  fi
  printf '%ds\n' $((SECONDS - began))
}

[[ "${1:-}" == "-h" || "${1:-}" == "--help" ]] && usage && exit 0
extras=${1:-gguf}
[[ "$extras" =~ ^[a-z,]+$ ]] || { usage >&2; fail "not a list of extras: $extras"; }

# What was installed last, and from where: an editable install breaks when its folder moves.
wanted="$extras $(pwd) $(cat pyproject.toml launchers/constraints-dev.txt | cksum) ${TORCH:-}"
stamp=".venv/laser-dist.installed"
# dev includes gguf, so that the quickstart does not undo what the tests have set up.
if [[ -x .venv/bin/python && -f "$stamp" ]]; then
  installed=$(<"$stamp")
  [[ "$installed" == "$wanted" || ("$extras" == gguf && "$installed" == "dev ${wanted#gguf }") ]] && exit 0
fi

log=.venv/setup.log
if [[ ! -x .venv/bin/python ]]; then
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments. Debian, Ubuntu: apt install python3-venv"
  mkdir -p .venv
  : >"$log"
  phase "virtual environment ($("$python" --version))" "$python" -m venv .venv
fi
: >"$log"
if [[ -n "${TORCH:-}" ]]; then
  torch=$TORCH
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  torch='torch>=2.11,<2.14'
else
  torch='torch==2.13.0' # matches its CPU-only build too, where pip is offered one
fi
pip=(.venv/bin/python -m pip install --disable-pip-version-check --no-input)
# torch first: DeepSpeed's own set-up looks for it.
phase "torch ($torch)" "${pip[@]}" setuptools wheel "$torch"
constraints=()
[[ ",$extras," == *,dev,* ]] && constraints=(-c launchers/constraints-dev.txt)
phase "laser-dist [$extras] and what it needs" "${pip[@]}" "${constraints[@]}" -e ".[$extras]" "$torch"
echo "$wanted" >"$stamp"
echo "setup: done in ${SECONDS}s"
