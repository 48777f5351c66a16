#!/usr/bin/env bash
# make test-remote: remote tiers on real servers: redis-server (one, with TLS, behind Sentinel, a cluster of three masters), an S3
# server, a directory; faults between them; Python; two servers that share a store. The last line says what passed.
set -euo pipefail
cd "$(dirname "$0")/.."
CARGO=${CARGO:-cargo} PYTHON=${PYTHON:-python3}

command -v redis-server redis-cli >/dev/null || apt-get install -y -qq redis-server >/dev/null || { echo "redis-server is not installed"; exit 1; }
# A server that speaks S3 over a directory, from its own package, so that it is no part of this build.
tools=$PWD/target/tools
[ -x "$tools/bin/s3s-fs" ] || "$CARGO" install --quiet --locked s3s-fs --version 0.14.1 --features binary --debug --root "$tools"
export KVKEEP_S3_SERVER=$tools/bin/s3s-fs

command -v openssl >/dev/null || { echo "openssl is not installed"; exit 1; }

log=$(mktemp) scratch=$(mktemp -d)
servers=()
cleanup() { for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done; rm -rf "$log" "$scratch"; }
trap cleanup EXIT

# A certificate of an authority that is trusted, and one that nobody vouches for.
certificate() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=$1" -keyout "$scratch/$1.key" -out "$scratch/$1.crt" "${@:2}" 2>/dev/null; }
certificate authority
certificate server -CA "$scratch/authority.crt" -CAkey "$scratch/authority.key" -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE
certificate stranger -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE
export KVKEEP_TLS=$scratch SSL_CERT_FILE=$scratch/authority.crt

# One build with all stores: tests, command, Python's extension. The names keep the other crates' tests out.
features=(--locked --workspace --features kvkeep-cli/remote,kvkeep-python/remote)
"$CARGO" test "${features[@]}" --lib --test remote -- --include-ignored --nocapture --test-threads 1 redis:: s3:: faults:: file::a_ file::what_ file::an_ 2>&1 | tee "$log"
"$CARGO" build "${features[@]}" --bin kvkeep --lib
built=${CARGO_TARGET_DIR:-target}/debug

# Two servers that share a store, on ports of this test's own.
port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
redis=$(port) s3=$(port)
redis-server --port "$redis" --bind 127.0.0.1 --save '' --appendonly no --dir "$scratch" >/dev/null & servers+=($!)
mkdir -p "$scratch/s3/kvkeep"
export AWS_ACCESS_KEY_ID=kvkeep AWS_SECRET_ACCESS_KEY=a-secret-of-the-tests AWS_REGION=us-east-1 AWS_ENDPOINT=http://127.0.0.1:$s3
"$KVKEEP_S3_SERVER" --access-key "$AWS_ACCESS_KEY_ID" --secret-key "$AWS_SECRET_ACCESS_KEY" --host 127.0.0.1 --port "$s3" "$scratch/s3" >/dev/null 2>&1 & servers+=($!)
sleep 1
"$PYTHON" tests/remote.py "$built/kvkeep" "redis://127.0.0.1:$redis" s3://kvkeep "file://$scratch/files" | tee -a "$log"

# From Python: the same tests on each store.
bash tests/venv.sh .venv-remote "numpy" "pytest>=9,<10" "PyYAML>=6,<7"
mkdir -p "$scratch/site" && cp -r crates/kvkeep-python/python/. "$scratch/site" && cp "$built/lib_kvkeep.so" "$scratch/site/kvkeep/_kvkeep.abi3.so"
for url in "redis://127.0.0.1:$redis" s3://kvkeep "file://$scratch/python"; do
  echo "-- Python, ${url%%:*}"
  KVKEEP_TEST_REMOTE=$url PYTHONPATH=$scratch/site .venv-remote/bin/python -m pytest -q -p no:cacheprovider crates/kvkeep-python/tests/test_remote.py | tee -a "$log"
done

echo "-- examples in deploy/"
.venv-remote/bin/python tests/deploy.py "$built/kvkeep" | tee -a "$log"

tests=$(grep -o 'test result: ok. [0-9]* passed' "$log" | awk '{ sum += $4 } END { print sum }')
checks=$(grep -c '^ok  ' "$log")
from_python=$(grep -o '^[0-9]* passed' "$log" | awk '{ sum += $1 } END { print sum }')
echo "test-remote: $tests tests, $checks checks of two servers and of examples, and $from_python tests from Python passed, on Redis (one server, TLS, Sentinel, a cluster), S3 and a directory"
