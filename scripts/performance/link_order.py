#!/usr/bin/env python3
"""Finds the functions that sidecars run, at the start and with traffic, and writes a linker script that lays them side by side."""

import argparse
import collections
import itertools
import os
import re
import signal
import subprocess
import sys
import time

from context import Context
from peers import ConsulPeer

# Names that begin alike, such as those of a module, are taken together where so much of their bytes runs. That holds for functions
# that come later, too.
WHOLE = 0.9
# What a section's name may be in a linker script without quotes.
PLAIN = re.compile(r"^[\w.$*]+$")
# Parts of a name as rustc mangles it (its RFC 2603). Hashes of crates, numbers of implementations and back references change with versions.
IDENTIFIER = re.compile(r"u?(0|[1-9]\d*)")
CHANGING = re.compile(r"([CMX]s|B)[0-9A-Za-z]*_")
OTHER = re.compile(r"[sLG][0-9A-Za-z]*_|K[a-z]n?[0-9a-f]*_|.")


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


def parts(name):
    """A name in parts, of which those that change from build to build match any (`*`)."""
    if not name.startswith("_R"):
        return [re.sub(r"aws_lc_\d+_\d+_\d+_", "aws_lc_*_", name)]
    found, at = ["_R"], 2
    name = name.split(".")[0]
    while at < len(name):
        if m := IDENTIFIER.match(name, at):
            separated = m[1] != "0" and name[m.end() : m.end() + 1] == "_"
            end = m.end() + separated + int(m[1])
            found.append(name[at:end])
        elif m := CHANGING.match(name, at):
            end = m.end()
            found.append(m[1] + "*_")
        else:
            m = OTHER.match(name, at)
            end = m.end()
            found.append(m[0])
        at = end
    return found


def patterns(symbols, ran):
    """Patterns of names with the share of their bytes that runs."""
    all_of, run_of = collections.Counter(), collections.Counter()
    beginnings = {name: list(itertools.accumulate(parts(name))) for name in symbols}
    for name, size in symbols.items():
        for beginning in beginnings[name]:
            all_of[beginning] += size
            run_of[beginning] += size * (name in ran)
    found = {}
    for name in symbols.keys() & ran:
        *shorter, whole = beginnings[name]
        share = {beginning: run_of[beginning] / all_of[beginning] for beginning in beginnings[name]}
        taken = next((beginning for beginning in shorter if share[beginning] >= WHOLE), whole)
        found[taken if taken == whole and "." not in name else taken + "*"] = share[taken]
    return {p: share for p, share in found.items() if PLAIN.match(p)}


def script(groups):
    """Groups in order; in each, first what runs most of itself."""
    text = ["/* Written by scripts/link-order. */\nSECTIONS\n{\n"]
    for name, group in zip((".text.at_start", ".text.with_traffic"), groups):
        ordered = sorted(group, key=lambda p: (-round(group[p], 1), p))
        lines = "".join(f"    *(.text.{p})\n" for p in ordered)
        text.append(f"  {name} :\n  {{\n{lines}  }}\n")
    # A release has no symbols and aborts when it panics: nothing reads the tables for unwinding.
    return "".join(text) + "  /DISCARD/ : { *(.eh_frame) }\n}\nINSERT BEFORE .text;\n"


if __name__ == "__main__":
    main()
