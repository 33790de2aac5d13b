#!/usr/bin/env bash
# Builds native code with sanitizers and tests it on every instruction-set path of this processor: the native tests,
# and, with the address sanitizer, the Python tests that call kernels, pool, executor and engine. Takes about ten
# minutes on two cores; needs an environment with the test extra.
# Usage: scripts/sanitize.sh [address,undefined | thread] [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sanitizers=${1:-address,undefined}
shift || true
folder=build/sanitize-${sanitizers//,/-}
python=$(command -v "${PYTHON:-python3}")
with_module=OFF
[[ "$sanitizers" == *address* ]] && with_module=ON

cmake -S . -B "$folder" -DTOKENMILL_PYTHON="$with_module" -DPython_EXECUTABLE="$python" \
  -DTOKENMILL_NATIVE_TESTS=ON -DTOKENMILL_NATIVE_BENCHMARKS=ON -DTOKENMILL_SANITIZE="$sanitizers"
cmake --build "$folder" --parallel "$(nproc)"

export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1
ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 ctest --test-dir "$folder" --output-on-failure --no-tests=error
[[ "$with_module" == ON ]] || exit 0

# The package with the sanitized module in it. The interpreter is not sanitized, so the runtimes are loaded before it
# (libstdc++ too, whose throw they wrap), and its own leaks are not looked for.
package=$PWD/$folder/package
rm -rf "$package"
mkdir -p "$package"
cp -r src/tokenmill "$package/"
rm -f "$package"/tokenmill/_native*.so
cmake --install "$folder" --prefix "$package" >/dev/null
runtime() { c++ -print-file-name="$1"; }
tests=("$@")
[[ ${#tests[@]} -gt 0 ]] || tests=(tests/kernels tests/platform tests/backends/test_native.py tests/engine)
env LD_PRELOAD="$(runtime libasan.so):$(runtime libubsan.so):$(runtime libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1 PYTHONPATH="$package" PYTHONMALLOC=malloc \
  "$python" -m pytest -p no:cacheprovider -o timeout=0 "${tests[@]}"
