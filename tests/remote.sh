#!/usr/bin/env bash
# make test-remote: remote tiers on real servers: redis-server (one, and a cluster of three masters), an S3 server, a directory; faults
# between them; two servers that share a store. The last line says what passed.
set -euo pipefail
cd "$(dirname "$0")/.."
CARGO=${CARGO:-cargo} PYTHON=${PYTHON:-python3}

command -v redis-server redis-cli >/dev/null || apt-get install -y -qq redis-server >/dev/null || { echo "redis-server is not installed"; exit 1; }
# A server that speaks S3 over a directory, from its own package, so that it is no part of this build.
tools=$PWD/target/tools
[ -x "$tools/bin/s3s-fs" ] || "$CARGO" install --quiet --locked s3s-fs --version 0.14.1 --features binary --debug --root "$tools"
export KVKEEP_S3_SERVER=$tools/bin/s3s-fs

log=$(mktemp) scratch=$(mktemp -d)
servers=()
cleanup() { for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done; rm -rf "$log" "$scratch"; }
trap cleanup EXIT

"$CARGO" test --locked --workspace --features kvkeep-cli/remote --test remote -- \
  --include-ignored --nocapture --test-threads 1 2>&1 | tee "$log"
"$CARGO" build --locked --workspace --features kvkeep-cli/remote --bin kvkeep

# Two servers that share a store, on ports of this test's own.
port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
redis=$(port) s3=$(port)
redis-server --port "$redis" --bind 127.0.0.1 --save '' --appendonly no --dir "$scratch" >/dev/null & servers+=($!)
mkdir -p "$scratch/s3/kvkeep"
export AWS_ACCESS_KEY_ID=kvkeep AWS_SECRET_ACCESS_KEY=a-secret-of-the-tests AWS_REGION=us-east-1 AWS_ENDPOINT=http://127.0.0.1:$s3
"$KVKEEP_S3_SERVER" --access-key "$AWS_ACCESS_KEY_ID" --secret-key "$AWS_SECRET_ACCESS_KEY" --host 127.0.0.1 --port "$s3" "$scratch/s3" >/dev/null 2>&1 & servers+=($!)
sleep 1
"$PYTHON" tests/remote.py "${CARGO_TARGET_DIR:-target}/debug/kvkeep" "redis://127.0.0.1:$redis" s3://kvkeep "file://$scratch/files" | tee -a "$log"

passed=$(grep -c '^test .* ok$\|^ok$\|\.\.\. ok$' "$log" || true)
echo "test-remote: $passed tests and $(grep -c '^ok  ' "$log") checks passed on Redis, a Redis cluster, S3 and a directory"
