"""The floor: what two plain relays cost, and the time that the AEAD alone takes on this processor."""

import json
import subprocess

from report import good

# What one unit of work has sealed once and opened once between the sidecars: bytes, in records of about this size.
GB = [(1_000_000_000, 16384)]
REQUEST = [(120, 1024), (1024 + 130, 1024)]
REQUEST_64K = [(120, 1024), (65536 + 130, 16384)]
SEALED = {"bulk": ("cpu_s_per_GB", 1, GB), "http-over-l4": ("cpu_us_per_req", 1e6, REQUEST), "http-over-l4-64k": ("cpu_us_per_req", 1e6, REQUEST_64K),
          "http-over-l7": ("cpu_us_per_req", 1e6, REQUEST)}


def aead_speeds(program):
    """GB/s of sealing and opening, by library and size; {} where the program is not there."""
    if not program:
        return {}
    return json.loads(subprocess.run([program], capture_output=True, text=True, timeout=60, check=True).stdout)


def add_floor(results, relay, speeds):
    """Adds the rounds of a peer "floor" to `results`. `speeds` are those of the fastest library."""
    for work, (key, unit, sealed) in SEALED.items():
        rounds = good(results.get(work, {}).get(relay, []))
        if not rounds or not speeds:
            continue
        seconds = sum(size / 1e9 * (1 / speeds[f"seal_{record}"] + 1 / speeds[f"open_{record}"]) for size, record in sealed)
        results[work]["floor"] = [{"round": r["round"], key: r[key] + unit * seconds} for r in rounds if key in r]


def fastest(by_library):
    """The speeds of the library that seals 16 KiB fastest."""
    return max(by_library.values(), key=lambda speeds: speeds["seal_16384"], default={})
