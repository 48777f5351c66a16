#!/usr/bin/env bash
# Get and put between two processes through `kvkeep daemon`'s memory, beside memcpy in the same run. On an idle machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec cargo run --release --locked -p kvkeep-daemon --example throughput
