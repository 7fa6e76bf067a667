#!/usr/bin/env python3
"""Counts the instructions of fixed work and compares them with those that the repository remembers."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BASELINE = os.path.join(TOP, "benches", "instructions", "baseline.json")
# What is done besides the setting up, in each scenario: often enough that what differs from run to run (keys,
# signatures, the order of a hash map) disappears in it.
TIMES = {"handshake": 60, "connection": 60, "tunnel": 3000, "relay": 100, "exchange": 1000, "http": 1000}
UNITS = {"handshake": "full mutual handshake, both ends", "connection": "resumed connection with one request, both sidecars",
         "tunnel": "connection with one request on a session that was kept, both sidecars",
         "relay": "64 KiB there and back, both sidecars", "exchange": "1 KiB answer on an open connection, L4, both sidecars",
         "http": "1 KiB answer on an open connection, L7, both sidecars"}
SETTING_UP = 10  # is part of both runs, so that a first session and first buffers are not counted


def main():
    ap = argparse.ArgumentParser(prog="scripts/instructions", description=__doc__)
    ap.add_argument("--program", required=True, help=argparse.SUPPRESS)
    ap.add_argument("--update", action="store_true", help="remember what is counted now")
    ap.add_argument("--tolerance", type=float, default=3, help="per cent more that is still no regression (default 3)")
    args = ap.parse_args()
    here = made_with()
    if args.update:
        remember(here, count(args.program, TIMES))
        return
    with open(BASELINE) as f:
        baseline = json.load(f)
    different = [f"{k}: {baseline['made_with'].get(k)} there, {v} here" for k, v in here.items() if baseline["made_with"].get(k) != v]
    if different:
        print("SKIPPED: instructions were not compared, for those remembered were made otherwise (" + "; ".join(different)
              + "). If this is the way to build from now on: scripts/instructions --update", file=sys.stderr)
        return
    sys.exit(compare(baseline["instructions"], count(args.program, baseline["instructions"]), args.tolerance))


def count(program, scenarios):
    """Instructions for one unit of each scenario: two runs that differ in nothing but the number of units."""
    runs = [(s, times) for s in scenarios for times in (SETTING_UP, SETTING_UP + TIMES[s])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        collected = list(pool.map(lambda run: collect(program, *run), runs))
    return {s: round((collected[2 * i + 1] - collected[2 * i]) / TIMES[s]) for i, s in enumerate(scenarios)}


def collect(program, scenario, times):
    argv = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, scenario, str(times)]
    # The same length of environment and path everywhere, as far as that matters at all.
    done = subprocess.run(argv, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=300)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        sys.exit(f"{' '.join(argv)} failed:\n{done.stderr[-2000:]}")
    return int(found[1])


def made_with():
    """The versions that instruction counts depend on besides the source."""
    def says(*argv):
        return subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout.split("\n")[0].strip()

    with open("/proc/cpuinfo") as f:
        flags = set(re.search(r"^(?:flags|Features)\s*: (.*)", f.read(), re.M)[1].split())
    # The simulated processor has what the real one has, up to AVX2; the cryptography chooses its code by that.
    return {"machine": platform.machine() + ("".join(f" {x}" for x in ("aes", "avx2", "bmi2") if x in flags)), "rustc": says("rustc", "--version"),
            "cc": says("cc", "--version"), "libc": " ".join(platform.libc_ver()), "valgrind": says("valgrind", "--version")}


def remember(here, counted):
    with open(BASELINE, "w") as f:
        json.dump({"made_with": here, "instructions": counted}, f, indent=2)
        f.write("\n")
    for s, n in counted.items():
        print(f"{s:10} {n:>12,}  {UNITS[s]}")
    print(f"Remembered in {os.path.relpath(BASELINE, TOP)}: commit it with the change that explains it.", file=sys.stderr)


def compare(remembered, counted, tolerance):
    """Prints how they differ; returns the exit status."""
    worse = []
    for s, n in counted.items():
        change = 100 * (n / remembered[s] - 1)
        verdict = "more than allowed" if change > tolerance else "less: remember it with --update" if change < -tolerance else "as before"
        print(f"{s:10} {n:>12,}  {change:+6.2f} %  {verdict:32} {UNITS[s]}")
        if change > tolerance:
            worse.append(s)
    if worse:
        print(f"Instructions grew by more than {tolerance:g} % in: {', '.join(worse)}. If what they buy is worth it, say so in the commit "
              "and remember them: scripts/instructions --update", file=sys.stderr)
    return bool(worse)


if __name__ == "__main__":
    main()
