#!/usr/bin/env bash
# End to end: the real model, the real demos, and the promises that their JSON makes. Needs cargo, Python 3 and the demo model.
# tests/integrations.sh KVKEEP: the command, as `make command` builds it.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/parts.sh
CARGO=${CARGO:-cargo}
PYTHON=${PYTHON:-python3}
out=target/integrations
mkdir -p "$out"

kvkeep=$(realpath "$1")

part "demo comparison"
"$kvkeep" demo comparison --requests 14 --json --plot "$out/comparison.svg" >"$out/comparison.json"
part "demo agent (short)"
"$kvkeep" demo agent --requests 16 --json --plot "$out/agent.svg" >"$out/agent.json"
part "demo restart"
"$kvkeep" demo restart --disk "$out/restart" --json --plot "$out/restart.svg" >"$out/restart.json"
"$kvkeep" verify "$out/restart" --json >"$out/verify.json"
"$kvkeep" export "$out/restart" --limit 2 --out "$out/restart.safetensors"
rm -rf "$out/restart"
part "bench"
"$kvkeep" bench --quick --disk "$out" --json >"$out/bench.json"

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
restart = json.loads((out / "restart.json").read_text())
cold, warm = restart["cold"], restart["warm"]
check("restart: answers of the two processes are identical", restart["answers_identical"] is True and cold["pid"] != warm["pid"], f"processes {cold['pid']} and {warm['pid']}")
check("restart: nearly the whole prompt comes from the disk", warm["cached_tokens"] > 0.95 * warm["prompt_tokens"] and warm["loaded_bytes"] > 0, f"{warm['cached_tokens']} of {warm['prompt_tokens']} tokens")
check("restart: all that was loaded was worth it, at a measured rate", warm["worth_tokens"] >= warm["cached_tokens"] and warm["not_worth_tokens"] == 0 and warm["load_bytes_per_s"] > 0, f"{warm['worth_tokens']} tokens, {warm['load_bytes_per_s'] / 1e9:.2f} GB/s")
check("restart: time to first token falls at least 5x", restart["speedup"] >= 5, f"{restart['speedup']:.1f}x")
check("restart: the plot is an SVG", "<svg" in (out / "restart.svg").read_text()[:400], "svg")
verified = json.loads((out / "verify.json").read_text())
check("verify: what the demo left is whole", verified["whole"] is True and verified["records"]["good"] > 0, f"{verified['records']['good']} records")
results = json.loads((out / "bench.json").read_text())["results"]
check("bench: every result has name, value, unit, reference and ratio",
      bool(results) and all({"name", "value", "unit", "reference", "ratio"} <= set(r) for r in results), f"{len(results)} results")
check("bench: the disk tier was measured", sum(r["name"].startswith(("disk ", "open ")) for r in results) >= 6, "disk")
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
PY

part "server"
PYTHON="$PYTHON" bash tests/venv.sh .venv-server "openai>=2,<3"
.venv-server/bin/python tests/server.py "$kvkeep"
part "openapi"
PYTHON="$PYTHON" bash tests/openapi.sh "$kvkeep"
part "clients, directly and through nginx"
PYTHON="$PYTHON" bash tests/clients/run.sh "$kvkeep"
part "newcomer"
PYTHON="$PYTHON" bash tests/newcomer.sh dist/kvkeep-*.whl
part "the guides as a book"
make --no-print-directory book CARGO="$CARGO" PYTHON="$PYTHON"
part "load"
"$PYTHON" tests/load.py "$kvkeep" 20 32
part "hostile"
"$PYTHON" tests/hostile.py "$kvkeep" 3000

part "dashboard, in a browser"
KVKEEP=$kvkeep bash tests/dashboard/run.sh
part "soak (a minute)"
make --no-print-directory soak MINUTES=1 PROFILE=dev CARGO="$CARGO" PYTHON="$PYTHON"
