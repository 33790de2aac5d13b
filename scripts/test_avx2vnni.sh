#!/usr/bin/env bash
# Runs the native tests with the avx2vnni path on an AVX-512 processor without AVX-VNNI. The path is compiled from the
# same source, but its two dot product instructions (vpdpbusd, vpdpwssd) get the encoding of AVX512-VNNI instead of that
# of AVX-VNNI; they compute the same. What this cannot prove is that the processor at hand decodes the other encoding.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=build/avx2vnni
cmake -S . -B "$folder" -DTOKENMILL_PYTHON=OFF -DTOKENMILL_NATIVE_TESTS=ON -DTOKENMILL_EVEX_AVX2VNNI=ON
cmake --build "$folder" --parallel "$(nproc)"
ctest --test-dir "$folder" --output-on-failure --no-tests=error
# A test passes on processors without the path too; here it must have run.
"$folder/tests/native/rows_test" | grep '^paths:.* avx2vnni'
