#!/usr/bin/env python3
"""Finds the functions that sidecars run, at the start and with traffic, and writes a linker script that lays them side by side."""

import argparse
import collections
import os
import re
import signal
import subprocess
import sys
import time

from context import Context
from peers import ConsulPeer

# A module of which so much runs is taken whole, which holds for the functions that it gets later, too.
WHOLE = 0.75
# Longer names differ in their generic arguments alone.
LONGEST = 140
HASH = re.compile(r"17h[0-9a-f]{16}E(\.llvm\.\d+)?$")
# What a section's name may be in a linker script without quotes.
PLAIN = re.compile(r"^[\w.$*]+$")


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    for name in ("lictor", "consul", "out"):
        ap.add_argument(f"--{name}", required=True)
    args = ap.parse_args()
    ctx = Context(argparse.Namespace(port_base=20000, no_sniff=True, pin=False, time_scale=1))
    ctx.default_agent = os.path.abspath(args.consul)
    try:
        started, served = run(ctx, os.path.abspath(args.lictor))
    finally:
        ctx.end()
    symbols = sizes(args.lictor)
    start = patterns(symbols, started)
    traffic = {p: share for p, share in patterns(symbols, served).items() if p not in start}
    with open(args.out, "w") as f:
        f.write(script([start, traffic]))
    print(f"{len(start)} names for the start, {len(traffic)} for traffic", file=sys.stderr)


def run(ctx, lictor):
    """The names of the functions that run: of sidecars that rest, and of some with traffic."""
    found = []
    for mode, loads in (("tcp", []), ("tcp", [["http", 4, 3, 1024, 0], ["churn", 2, 3, 1024]]), ("http", [["http", 4, 3, 1024, 0]]), ("grpc", [["h2", 2, 2, 3]])):
        out = os.path.join(ctx.tmp, f"callgrind-{len(found)}")
        os.mkdir(out)
        wrapper = os.path.join(ctx.tmp, f"lictor-{len(found)}")
        with open(wrapper, "w") as f:
            f.write(f'#!/bin/sh\nexec valgrind --tool=callgrind --demangle=no --callgrind-out-file={out}/%p {lictor} "$@"\n')
        os.chmod(wrapper, 0o755)
        pair = ConsulPeer(ctx, "lictor", f"order-{len(found)}", wrapper, {}).start(mode)
        time.sleep(8)  # what a sidecar does at rest
        for how, *rest in loads:
            ctx.run_load([how, pair.upstream, *rest], pair)
        for proc in pair.procs():
            proc.send_signal(signal.SIGTERM)
        for proc in pair.procs():
            proc.wait(30)
        found.append(names(out))
    return found[0], set().union(*found[1:])


def names(directory):
    found = set()
    for name in os.listdir(directory):
        with open(os.path.join(directory, name)) as f:
            for line in f:
                m = re.match(r"c?fn=\(\d+\) (.+)$", line)
                if m:
                    found.add(re.sub(r"'\d+$", "", m[1].strip()))
    return found


def sizes(program):
    out = subprocess.run(["nm", "-S", program], capture_output=True, text=True, check=True).stdout
    rows = [line.split(" ", 3) for line in out.splitlines()]
    return {r[3]: int(r[1], 16) for r in rows if len(r) == 4 and r[1] and r[2] in "tTwW"}


def without_hash(name):
    return HASH.sub("", name)


def modules(name):
    """The modules that a name is in, the outermost first, each as the beginning of the names in it."""
    if not name.startswith("_ZN"):
        return
    prefix, rest = "_ZN", name[3:]
    while m := re.match(r"(\d+)", rest):
        end = len(m[1]) + int(m[1])
        prefix, rest = prefix + rest[:end], rest[end:]
        if rest and rest[0].isdigit():
            yield prefix


def patterns(symbols, ran):
    """Patterns of names with the share of their bytes that runs. A hash, and the version of aws-lc, match any."""
    all_of, run_of = collections.Counter(), collections.Counter()
    for name, size in symbols.items():
        for part in {without_hash(name), *modules(without_hash(name))}:
            all_of[part] += size
            run_of[part] += size * (name in ran)
    found = {}
    for name in symbols.keys() & ran:
        base = without_hash(name)
        whole = next((m for m in modules(base) if run_of[m] >= WHOLE * all_of[m]), None)
        if whole:
            found[whole + "*"] = 1
        else:
            found[pattern(base, base != name)] = run_of[base] / all_of[base]
    return {p: share for p, share in found.items() if PLAIN.match(p)}


def pattern(name, hashed):
    """Matches the name whatever the versions of aws-lc and of the standard library."""
    name = re.sub(r"aws_lc_\d+_\d+_\d+_", "aws_lc_*_", re.sub(r"Cs[0-9A-Za-z]+_", "Cs*_", name))
    if len(name) > LONGEST:
        return name[:LONGEST] + "*"
    return name + ("17h*" if hashed else "")


def script(groups):
    """Groups in order; in each, first what runs most of itself."""
    parts = ["/* Written by scripts/link-order. */\nSECTIONS\n{\n"]
    for name, group in zip((".text.at_start", ".text.with_traffic"), groups):
        ordered = sorted(group, key=lambda p: (-round(group[p], 1), p))
        lines = "".join(f"    *(.text*.{p})\n" for p in ordered)
        parts.append(f"  {name} :\n  {{\n{lines}  }}\n")
    # A release has no symbols and aborts when it panics: nothing reads the tables for unwinding.
    return "".join(parts) + "  /DISCARD/ : { *(.eh_frame) }\n}\nINSERT BEFORE .text;\n"


if __name__ == "__main__":
    main()
