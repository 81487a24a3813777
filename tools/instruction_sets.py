"""Run all tests as on other processors: those that know only older instructions.

    python tools/instruction_sets.py [options of pytest]

PyTorch, oneDNN and MKL choose their code by the processor. Told to do without its newer
instructions they add up in another order, as they do on an older processor: a test that
asks two ways of computing for the same bits passes on one and fails on another. One
line for each: what failed, then passed, failed and minutes. Exit code 1 if any failed.
"""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTIONS = {
    "this processor": {},
    "SSE4": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def run_tests(
    environment,  # what differs from this one
    options,      # of pytest, as on a command line
):                # (names of failed tests, passed, failed, minutes)
    "Run the tests once, and read what they say in the end."
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfE", "tests", *options],
        cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True,
    )
    minutes = (time.perf_counter() - start) / 60
    counts = re.search(r"^(\d+) passed, (\d+) failed", done.stdout, re.M)
    if not counts:
        sys.exit(f"pytest ended without counting:\n{done.stdout}{done.stderr}")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return failed, int(counts[1]), int(counts[2]), minutes


def main():
    failures = 0
    for name, environment in INSTRUCTIONS.items():
        names, passed, failed, minutes = run_tests(environment, sys.argv[1:])
        for test in names:
            print(f"    {test}")
        line = f"{name:<15} {passed} passed, {failed} failed, {minutes:.1f} minutes"
        print(line, flush=True)
        failures += failed
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
