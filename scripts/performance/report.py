"""Tables of what was measured: figures, ratios inside rounds, and how they stand to the targets."""

import json
import os
import re
import subprocess

from system import med
from works import HIDE, WORKS


def fmt(x):
    if isinstance(x, str):
        return x
    if x is None:
        return "-"
    ax = abs(x)
    return f"{x:,.0f}" if ax >= 1000 else f"{x:.0f}" if ax >= 100 else f"{x:.1f}" if ax >= 10 else f"{x:.2f}" if ax >= 0.1 else f"{x:.3f}"


def span(values, unit=""):
    """The median, and between which values it stands."""
    text = fmt(med(values)) + unit
    return text + (f" [{fmt(min(values))}..{fmt(max(values))}]" if len(values) > 1 and min(values) != max(values) else "")


def table(rows, head):
    out = ["| " + " | ".join(head) + " |", "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(head))) + "|"]
    return "\n".join(out + ["| " + " | ".join(r) + " |" for r in rows])


def good(rounds):
    return [r for r in rounds if "fail" not in r]


def ratios(ours, theirs, key):
    """One figure against that of another peer, round by round."""
    by = {r["round"]: r for r in good(theirs)}
    pairs = [(r[key], by[r["round"]][key]) for r in good(ours) if key in r and key in by.get(r["round"], {})]
    return [a / b for a, b in pairs if isinstance(a, (int, float)) and b]


def report(results, peers, works, subjects, references, absolute=True):
    """For each workload a table of median [min..max], unless `absolute` is false, then the ratios of subjects to references."""
    text = []
    for w in works:
        cells = results.get(w, {})
        if not cells:
            continue
        text.append(f"\n### {w} ({WORKS[w].id}): {WORKS[w].title}\n")
        keys = list(dict.fromkeys(k for rounds in cells.values() for r in rounds for k in r if k not in HIDE and k not in ("fail", "round")))
        rows = [row for p in peers if p.label in cells for row in figures(p.label, cells[p.label], keys)]
        if not absolute:
            rows = []
        text.append("" if not rows else table(rows, ["peer", *keys]) if keys else "\n".join(f"- {r[0]}: {r[1]}" for r in rows))
        main = WORKS[w].main or [k for k in keys if k in ("idle_rss_MB", "idle_pss_MB") or k.endswith(("_KB_per_conn", "_rss_MB"))]
        rows = []
        for s in subjects:
            for ref in references:
                if ref != s and s in cells and ref in cells:
                    found = [ratios(cells[s], cells[ref], k) for k in main]
                    if any(found):
                        rows.append([f"{s} / {ref}", *(span(v, "x") if v else "-" for v in found)])
        if rows:
            text.append("\nRatio per round, median [min..max]:\n")
            text.append(table(rows, ["ratio", *main]))
    return "\n".join(text)


def figures(label, rounds, keys):
    whole = good(rounds)
    if len(whole) < len(rounds):
        first = next(r["fail"] for r in rounds if "fail" in r).replace("|", "/").replace("\n", " ")
        yield [label, f"**FAILED** {first[:160]}", *("" for _ in keys[1:])]
    if whole:
        row = [label if len(whole) == len(rounds) else f"{label} ({len(whole)} of {len(rounds)})"]
        for k in keys:
            v = [r[k] for r in whole if k in r]
            row.append("-" if not v else v[0] if isinstance(v[0], str) else span(v))
        yield row


def verdicts(results, label_of, targets):
    """How the targets stand: the table, and how many of them were judged, met and missed.
    `label_of` names the peer of a kind in this run."""
    rows, count = [], {"met": 0, "missed": 0, "not measured": 0}
    for target in targets:
        cells = results.get(target.work)
        if cells is None:
            continue
        ours = cells.get(label_of.get(target.ours), [])
        theirs = cells.get(label_of.get(target.theirs), [])
        found = target.judge(ours, theirs)
        verdict = target.verdict(found)
        count["met" if verdict in ("met", "aim met") else verdict.lower()] += 1
        rows.append([target.work, target.title, target.against, span(found) if found else "-", target.limit(target.must), target.limit(target.aim),
                     f"**{verdict}**" if verdict == "MISSED" else verdict])
    return table(rows, ["work", "figure", "against", "measured", "must", "aim", "verdict"]), count


def limits(load):
    """The limits of the machine."""
    return json.loads(subprocess.run([load, "limits"], capture_output=True, text=True, timeout=60).stdout)


def machine():
    m = {"cores": os.cpu_count(), "kernel": os.uname().release, "machine": os.uname().machine}

    def read(key, path, pat=None, conv=str):
        try:
            with open(path) as f:
                t = f.read()
            m[key] = conv(re.search(pat, t)[1] if pat else t.strip())
        except (OSError, TypeError, ValueError):
            m[key] = None

    want = {"aes", "vaes", "vpclmulqdq", "avx2", "avx512f", "avx512bw", "avx512vl", "sha_ni", "adx", "bmi2"}
    read("cpu", "/proc/cpuinfo", r"model name\s*: (.*)")
    read("family", "/proc/cpuinfo", r"cpu family\s*: (.*)")
    read("number", "/proc/cpuinfo", r"model\s*: (.*)")
    m["model"] = f"family {m['family']} model {m['number']}"
    read("flags", "/proc/cpuinfo", r"flags\s*: (.*)", lambda t: sorted(want & set(t.split())))
    read("mem_GB", "/proc/meminfo", r"MemTotal:\s+(\d+)", lambda t: round(int(t) / 1e6, 1))
    read("congestion_control", "/proc/sys/net/ipv4/tcp_congestion_control")
    read("tcp_ulp", "/proc/sys/net/ipv4/tcp_available_ulp")
    return m
