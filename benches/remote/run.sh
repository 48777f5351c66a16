#!/usr/bin/env bash
# Redis through a remote tier, in turns with redis-benchmark: blocks of 2 MiB on the loopback, as deep a pipeline. Prints MB/s and
# their ratio. For a machine that does nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --profile "${PROFILE:-release}" --locked --workspace --features kvkeep-cli/remote --example throughput
folder=$([ "${PROFILE:-release}" = dev ] && echo debug || echo "${PROFILE:-release}")
port=${PORT:-16379} blocks=${BLOCKS:-256} depth=16
scratch=$(mktemp -d)
redis-server --port "$port" --bind 127.0.0.1 --save '' --appendonly no --dir "$scratch" >/dev/null &
server=$!
trap 'kill $server; rm -rf "$scratch"' EXIT
sleep 1

theirs() { # MB/s of one command
  redis-benchmark -p "$port" -c 1 -P $depth -d 2097152 -n "$blocks" -r "$blocks" -t "$1" --csv 2>/dev/null |
    python3 -c 'import csv, sys; print(round(float(list(csv.reader(sys.stdin))[-1][1]) * 2097152 / 1e6))'
}
for round in 1 2 3; do
  set_theirs=$(theirs set) get_theirs=$(theirs get)
  redis-cli -p "$port" flushall >/dev/null
  read -r set_ours get_ours miss < <("${CARGO_TARGET_DIR:-target}/$folder"/examples/throughput "redis://127.0.0.1:$port" "$blocks" | awk '{ printf "%s ", $2 } END { print "" }')
  python3 - "$round" "$set_ours" "$set_theirs" "$get_ours" "$get_theirs" "$miss" <<'P'
import sys
round, so, st, go, gt, miss = sys.argv[1:]
print(f"round {round}: set {so} of {st} MB/s = {float(so)/float(st):.2f} (bar 0.60); get {go} of {gt} MB/s = {float(go)/float(gt):.2f} (bar 0.70); a miss that the node knows of {int(miss) / 1000:.1f} us (bar 5)")
P
done
