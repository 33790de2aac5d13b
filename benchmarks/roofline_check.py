"""Checks `tokenmill bench roofline` against loops that share nothing with it, in turn, and against the disassembly.

    python benchmarks/roofline_check.py [--rounds 12] [--threads N]

Read bandwidth of memory beside a plain C++ sum, the int8 peak beside 16 accumulators in written assembly (x86-64 with
AVX-512 VNNI): the best of all rounds each, since other tenants of a machine only make a limit look lower. Then the
built module: its `vpdpbusd` loop must hold all accumulators in registers and store nothing. Needs g++ and objdump;
exits 1 if a limit is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenmill import _native
from tokenmill.bench.roofline import MEMORY_WORKING_SET

SOURCE = Path(__file__).with_name("independent_limits.cpp")
TOLERANCE = 0.10
_LONGEST_LOOP = 120


def peak_loops(listing: str) -> list[list[str]]:
    """The instructions of each loop without inner jumps that is mostly ``vpdpbusd`` on 512-bit registers."""
    places: dict[int, int] = {}
    code: list[str] = []
    loops = []
    for line in listing.splitlines():
        found = re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line)
        if not found:
            continue
        places[int(found[1], 16)] = len(code)
        code.append(found[2])
        jump = re.match(r"j\w+\s+([0-9a-f]+)", found[2])
        begin = places.get(int(jump[1], 16)) if jump else None
        if begin is not None and len(code) - begin < _LONGEST_LOOP:
            body = code[begin:]
            products = [x for x in body if x.startswith("vpdpbusd") and "zmm" in x]
            if len(products) >= 12 and not any(x.startswith("j") for x in body[:-1]):
                loops.append(body)
    return loops


def check_disassembly() -> bool:
    """Prints the purest ``vpdpbusd`` loop of the built module; False if it spills or shares accumulators."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(_native.__file__)]
    loops = peak_loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if not loops:
        print("disassembly: no loop of 12 vpdpbusd on zmm registers in this build")
        return False
    body = max(loops, key=lambda loop: sum(x.startswith("vpdpbusd") for x in loop) / len(loop))
    print(f"disassembly: {len(loops)} such loops; the peak loop:")
    print("\n".join(f"    {instruction}" for instruction in body))
    accumulators = {x.rsplit("%", 1)[1] for x in body if x.startswith("vpdpbusd")}
    # In this syntax the destination is the last operand; a store ends in a memory operand.
    stores = [x for x in body if x.startswith("v") and x.rstrip().endswith(")")]
    print(f"{len(accumulators)} accumulators in registers, {len(stores)} stores in the loop")
    return len(accumulators) >= 12 and not stores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=_native.usable_cpu_count())
    parser.add_argument("--seconds", type=float, default=0.15, help="of each loop in each round")
    arguments = parser.parse_args()
    threads = arguments.threads
    ours: dict[str, list[float]] = {"read": [], "int8": []}
    theirs: dict[str, list[float]] = {"read": [], "int8": []}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "independent_limits"
        subprocess.run(["g++", "-O3", "-march=native", "-pthread", "-o", program, SOURCE], check=True)
        size = str(MEMORY_WORKING_SET >> 20)
        for number in range(arguments.rounds):
            run = [str(program), str(threads), size, str(arguments.seconds)]
            printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
            for name, value in zip(theirs, map(float, printed), strict=True):
                theirs[name].append(value)
            ours["read"].append(_native.read_bytes_per_second(MEMORY_WORKING_SET, threads, arguments.seconds))
            ours["int8"].append(_native.int8_operations_per_second(threads, arguments.seconds))
            pairs = [f"{name} {ours[name][-1] / 1e9:.1f} beside {theirs[name][-1] / 1e9:.1f}" for name in ours]
            print(f"round {number + 1}, G/s: {', '.join(pairs)}", flush=True)
    ratios = {name: max(ours[name]) / max(theirs[name]) for name in ours if max(theirs[name]) > 0}
    print("best of roofline / independent: " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    sound = all(abs(value - 1) <= TOLERANCE for value in ratios.values())
    if "int8" in ratios:
        sound &= check_disassembly()
    sys.exit(not sound)


if __name__ == "__main__":
    main()
