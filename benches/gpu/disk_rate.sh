#!/usr/bin/env bash
# What the disk can do without a page cache, for comparison: 4 GiB written and read in pieces of 32 MiB, by eight readers.
#   benches/gpu/disk_rate.sh DIR
set -euo pipefail
file=${1:?a folder on the disk}/kvkeep-rate
trap 'rm -f "$file"' EXIT
rate() { awk -v name="$1" '/copied/ { for (i = 1; i <= NF; i++) if ($i == "copied,") seconds = $(i + 1); bytes = $1; print name, bytes / seconds / 1e9, "GB/s" }'; }
dd if=/dev/zero of="$file" bs=32M count=128 oflag=direct 2>&1 | rate write
began=$(date +%s.%N)
for part in 0 1 2 3 4 5 6 7; do dd if="$file" of=/dev/null bs=32M skip=$((part * 16)) count=16 iflag=direct 2>/dev/null & done
wait
ended=$(date +%s.%N)
awk -v began="$began" -v ended="$ended" 'BEGIN { print "read by eight", 4294.967296 / 1000 / (ended - began), "GB/s" }'
