#!/usr/bin/env bash
# Builds the native tests for 64-bit Arm with a cross compiler and runs them in qemu's user mode: the neon path against
# the portable one. On Debian: apt install g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=build/neon
cmake -S . -B "$folder" -DTOKENMILL_PYTHON=OFF -DTOKENMILL_NATIVE_TESTS=ON \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR="$(command -v qemu-aarch64);-cpu;max"
cmake --build "$folder" --parallel "$(nproc)"
ctest --test-dir "$folder" --output-on-failure --no-tests=error
# A test passes on processors without the path too; here it must have run.
"$(command -v qemu-aarch64)" -cpu max "$folder/tests/native/rows_test" | grep '^paths:.* neon'
