#!/usr/bin/env bash
# Builds the native tests with sanitizers and runs them on every instruction-set path of this processor.
# Usage: scripts/sanitize.sh [address,undefined | thread]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sanitizers=${1:-address,undefined}
folder=build/sanitize-${sanitizers//,/-}

cmake -S . -B "$folder" \
  -DTOKENMILL_PYTHON=OFF -DTOKENMILL_NATIVE_TESTS=ON -DTOKENMILL_SANITIZE="$sanitizers"
cmake --build "$folder" --parallel "$(nproc)"

export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1
ctest --test-dir "$folder" --output-on-failure --no-tests=error
