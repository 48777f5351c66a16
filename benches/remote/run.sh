#!/usr/bin/env bash
# Redis through a remote tier, in turns with redis-benchmark: blocks of 2 MiB on the loopback, as deep a pipeline. And S3, in turns with
# the same client without kvkeep, if KVKEEP_S3_SERVER names s3s-fs (`make test-remote` builds it, target/tools/bin). Prints MB/s and their ratio.
# For a machine that does nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --profile "${PROFILE:-release}" --locked --workspace --features kvkeep-cli/remote --example rates --example plain_s3
folder=$([ "${PROFILE:-release}" = dev ] && echo debug || echo "${PROFILE:-release}")
port=${PORT:-16379} blocks=${BLOCKS:-256} depth=16
scratch=$(mktemp -d)
redis-server --port "$port" --bind 127.0.0.1 --save '' --appendonly no --dir "$scratch" >/dev/null &
servers=($!)
trap 'kill "${servers[@]}"; rm -rf "$scratch"' EXIT
sleep 1

theirs() { # MB/s of one command
  redis-benchmark -p "$port" -c 1 -P $depth -d 2097152 -n "$blocks" -r "$blocks" -t "$1" --csv 2>/dev/null |
    python3 -c 'import csv, sys; print(round(float(list(csv.reader(sys.stdin))[-1][1]) * 2097152 / 1e6))'
}
for round in 1 2 3; do
  set_theirs=$(theirs set) get_theirs=$(theirs get)
  redis-cli -p "$port" flushall >/dev/null
  read -r set_ours get_ours miss < <("${CARGO_TARGET_DIR:-target}/$folder"/examples/rates "redis://127.0.0.1:$port" "$blocks" | awk '{ printf "%s ", $2 } END { print "" }')
  python3 - "$round" "$set_ours" "$set_theirs" "$get_ours" "$get_theirs" "$miss" <<'P'
import sys
round, so, st, go, gt, miss = sys.argv[1:]
print(f"round {round}: set {so} of {st} MB/s = {float(so)/float(st):.2f} (bar 0.60); get {go} of {gt} MB/s = {float(go)/float(gt):.2f} (bar 0.70); a miss that the node knows of {int(miss) / 1000:.1f} us (bar 5)")
P
done
[ -n "${KVKEEP_S3_SERVER:-}" ] || exit 0
mkdir -p "$scratch/s3/bench"
export AWS_ACCESS_KEY_ID=kvkeep AWS_SECRET_ACCESS_KEY=a-secret-of-the-bench AWS_REGION=us-east-1 AWS_ENDPOINT=http://127.0.0.1:$((port + 1))
"$KVKEEP_S3_SERVER" --access-key "$AWS_ACCESS_KEY_ID" --secret-key "$AWS_SECRET_ACCESS_KEY" --host 127.0.0.1 --port $((port + 1)) "$scratch/s3" >/dev/null 2>&1 & servers+=($!)
sleep 1
s3() { "${CARGO_TARGET_DIR:-target}/$folder/examples/$1" s3://bench "$blocks" | awk '{ printf "%s ", $2 } END { print "" }'; }
for round in 1 2 3; do
  read -r set_theirs get_theirs < <(s3 plain_s3)
  read -r set_ours get_ours _ < <(s3 rates)
  awk -v r="$round" -v so="$set_ours" -v st="$set_theirs" -v go="$get_ours" -v gt="$get_theirs" 'BEGIN {
    printf "round %s: S3 set %s of %s MB/s = %.2f (bar 0.80); get %s of %s MB/s = %.2f (bar 0.80)\n", r, so, st, so / st, go, gt, go / gt }'
done
