#!/usr/bin/env bash
# The quick loop before a commit, in the active environment: format, lint, types, then the tests up to the first failure.
# Arguments go to pytest, e.g. scripts/check.sh tests/sources
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ruff format .
ruff check --fix .
mypy
pytest --exitfirst "$@"
