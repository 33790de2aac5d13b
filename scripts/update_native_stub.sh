#!/usr/bin/env bash
# Writes src/tokenmill/_native.pyi, which type checkers read, from the native module of the active environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -m nanobind.stubgen --quiet --module tokenmill._native --output-file src/tokenmill/_native.pyi
