#!/usr/bin/env bash
# Lint, types and tests, as a merge needs them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
  cat <<'HELP'
usage: launchers/test.sh [PYTEST ARGUMENTS]

  launchers/test.sh                          everything that this machine can run
  launchers/test.sh -m "not slow"            the quick part
  launchers/test.sh tests/test_config.py     one file
  launchers/test.sh -n 0                     in one process, one test after the other
HELP
  exit 0
fi

launchers/setup.sh dev
export PYTHONSAFEPATH=1 # the folder kernels/ must not stand in for the package of that name
export TOKENIZERS_PARALLELISM=false
export PATH="$PWD/.venv/bin:$PATH"

# Tests run even when lint fails: one run then tells everything. The exit code is a failure if either failed.
status=0
make --keep-going --no-print-directory check || status=1
workers=$(($(nproc) + 1)) # one more than cores: tests of lost hosts, hung ranks and timeouts wait a lot
# A file stays on one worker, so that what its tests share is made once; tests/conftest.py puts the long ones first.
python -m pytest -n "$((workers < 4 ? workers : 4))" --dist loadfile --no-loadscope-reorder "$@" || status=$?
exit "$status"
