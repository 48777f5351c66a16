#!/usr/bin/env bash
# End to end on the release build: the real model, the real demos, and the promises that
# their JSON makes. Needs cargo, Python 3 and the demo model.
set -euo pipefail
cd "$(dirname "$0")/.."
CARGO=${CARGO:-cargo}
PYTHON=${PYTHON:-python3}
out=target/integrations
mkdir -p "$out"

"$CARGO" build --release --locked -p kvkeep-cli
kvkeep=${CARGO_TARGET_DIR:-target}/release/kvkeep

echo "-- demo comparison"
"$kvkeep" demo comparison --json --plot "$out/comparison.svg" >"$out/comparison.json"
echo "-- demo agent (short)"
"$kvkeep" demo agent --requests 16 --json --plot "$out/agent.svg" >"$out/agent.json"
echo "-- bench"
"$kvkeep" bench --quick --json >"$out/bench.json"

"$PYTHON" - "$out" <<'PY'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
passed = failed = 0

def check(name, ok, figure):
    global passed, failed
    passed, failed = passed + ok, failed + (not ok)
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {figure}")

for demo, factor in (("comparison", 3.0), ("agent", 3.0)):
    run = json.loads((out / f"{demo}.json").read_text())
    check(f"{demo}: answers with and without the cache are identical", run["answers_identical"] is True, run["answers_identical"])
    # Half of what a quiet machine shows: this is a test of the promise, not a benchmark.
    check(f"{demo}: time to first token falls at least {factor}x", run["speedup"] >= factor, f"{run['speedup']:.1f}x")
    check(f"{demo}: most prompt tokens come from the cache", run["hit_rate_percent"] > 70, f"{run['hit_rate_percent']:.1f}%")
    check(f"{demo}: the plot is an SVG", "<svg" in (out / f"{demo}.svg").read_text()[:400], "svg")
results = json.loads((out / "bench.json").read_text())["results"]
check("bench: every result has name, value, unit, reference and ratio",
      bool(results) and all({"name", "value", "unit", "reference", "ratio"} <= set(r) for r in results), f"{len(results)} results")
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
PY
