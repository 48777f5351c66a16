#!/usr/bin/env bash
# Every mode in turns, so that each is measured on the same warm machine: RUNS times. Writes JSON lines and a table to OUT.
#   benches/gpu/run.sh OUT [DIR]      DIR: on the disk to be measured; emptied before each run
# RESTART=no leaves out the second process of each mode. MORE="--shape 70b --layers 20" is given to each.
# RUNS=3  FIRST=1  LENS=2048,8192,32768  ROUNDS=4  MODES="none native tiering fs kvkeep lossless daemon ram layers"  WORTH=measured  PYTHON=python3
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?where to write} dir=${2:-/tmp/kvkeep-bench}
python=${PYTHON:-python3}
unset PYTHONHASHSEED
mkdir -p "$out" "$dir"
# For the keys of vLLM's tier of files in older releases; kvkeep needs no such thing, and is measured without.
with_seed() { if [ "$1" = fs ]; then PYTHONHASHSEED=0 measure "$@"; else measure "$@"; fi; }
measure() { echo "== $*" >&2; timeout "${LIMIT:-280}" "$python" "$here/ttft.py" "$@" --worth "${WORTH:-measured}" --lens "${LENS:-2048,8192,32768}" --rounds "${ROUNDS:-4}" ${MORE:-} --first-pause "$(case $1 in ram | layers) echo 15 ;; *) echo 0 ;; esac)" 2>>"$out/errors.txt"; }
for run in $(seq "${FIRST:-1}" $((${FIRST:-1} + ${RUNS:-1} - 1))); do
  for mode in ${MODES:-none native kvkeep ram fs}; do
    rm -rf "${dir:?}/$mode"
    with_seed "$mode" --dir "$dir/$mode" --seed "$run" >>"$out/$mode.jsonl" || echo "$mode failed: see $out/errors.txt" >&2
    case $mode in fs | kvkeep | lossless | daemon | ram | layers)
      [ "${RESTART:-yes}" = no ] || with_seed "$mode" --dir "$dir/$mode" --seed "$run" --phase restart >>"$out/$mode.jsonl" || echo "$mode failed: see $out/errors.txt" >&2
      rm -rf "${dir:?}/$mode" ;;
    esac
  done
done
cat "$out"/*.jsonl | "$python" "$here/table.py" | tee "$out/table.md"
