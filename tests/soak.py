#!/usr/bin/env python3
"""Runs the soak example and watches it from outside.

Usage: soak.py BINARY SECONDS [DIR]

The directory is measured with du, memory from /proc/PID/status, several times a second, by a process that
knows nothing of the cache's own counters. Prints what was checked and `N passed, N failed`.
"""
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

# Index, queues, four readers, stacks, and the load's own tensors; the payloads' arena comes on top.
BASE_BYTES = 64 << 20
# Of the median of the last third over the first third's, after one round to fill everything.
GROWTH_BYTES = 8 << 20
WARM_UP_S = 20


def du_bytes(path):
    """As du counts it; files may go while it looks."""
    out = subprocess.run(["du", "-s", "--block-size=1", path], capture_output=True, text=True).stdout
    return int(out.split()[0]) if out else 0


def rss_bytes(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0]) * 1024 if lines else 0


def watch(binary, seconds, directory):
    process = subprocess.Popen([binary, str(directory), str(seconds)], stdout=subprocess.PIPE, text=True)
    begin, sizes, memory = time.monotonic(), [], []
    # Some time to list, close and open after the last round.
    while process.poll() is None and time.monotonic() - begin < seconds * 1.5 + 120:
        if directory.is_dir():
            sizes.append(du_bytes(directory))
        memory.append((time.monotonic() - begin, rss_bytes(process.pid)))
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
    out = process.communicate()[0]
    return process.returncode, out, sizes, [sample for sample in memory if sample[1]]


def thirds(memory):
    settled = [rss for at, rss in memory if at >= WARM_UP_S] or [rss for _, rss in memory]
    third = max(1, len(settled) // 3)
    return statistics.median(settled[:third]), statistics.median(settled[-third:])


def main():
    binary, seconds = sys.argv[1], float(sys.argv[2])
    home = pathlib.Path(tempfile.mkdtemp(prefix="kvkeep-soak-", dir=sys.argv[3] if len(sys.argv) > 3 else None))
    passed = failed = 0

    def check(name, ok, figure):
        nonlocal passed, failed
        passed, failed = passed + bool(ok), failed + (not ok)
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {figure}", flush=True)

    try:
        code, out, sizes, memory = watch(binary, int(seconds), home / "cache")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    mib = lambda size: f"{size / (1 << 20):.1f} MiB"
    check("soak: no wrong byte, no lost flushed entry, no failure", code == 0, f"exit code {code}")
    if code == 0:
        run = json.loads(out)
        print(json.dumps(run))
        check("soak: hits were checked byte by byte", run["hits"] > 0 and run["checked_bytes"] > 0,
              f"{run['hits']} hits, {mib(run['checked_bytes'])}")
        check("soak: entries were kept over restarts", run["kept_over_restarts"] > 0, run["kept_over_restarts"])
        disk, ram = run["disk_capacity_bytes"], run["ram_capacity_bytes"]
        check("soak: the directory stays under its cap, as du sees it", 0 < max(sizes) <= disk,
              f"at most {mib(max(sizes))} of {mib(disk)} in {len(sizes)} samples")
        check("soak: the disk was filled", max(sizes) > 0.8 * disk, mib(max(sizes)))
        most = max(rss for _, rss in memory)
        check("soak: memory stays under the RAM tier's cap and a margin", most <= ram + BASE_BYTES,
              f"at most {mib(most)}, cap {mib(ram)}")
        first, last = thirds(memory)
        check("soak: memory does not grow", last - first <= GROWTH_BYTES, f"median {mib(first)}, at the end {mib(last)}")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
