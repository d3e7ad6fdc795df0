#!/usr/bin/env bash
# From a bare machine to a trained, evaluated and exported retriever, on the embedded sample set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
  cat <<'HELP'
usage: launchers/quickstart.sh [QUICKSTART OPTIONS]

Sets up .venv if needed, then runs `laser-dist quickstart`; its own options: .venv/bin/laser-dist quickstart --help
HELP
  exit 0
fi

launchers/setup.sh
export PYTHONSAFEPATH=1
exec .venv/bin/laser-dist quickstart "$@"
