#!/usr/bin/env bash
# Makes a virtual environment with these packages, or leaves it as it is if it was made with the
# same ones: tests/venv.sh FOLDER PACKAGE...
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
folder=$1
shift

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "kvkeep: Python 3.10 or later is needed; $PYTHON is not that" >&2
  exit 1
fi
wanted=$(printf '%s\n' "$("$PYTHON" --version)" "$@")
[ -f "$folder/made-with" ] && [ "$(cat "$folder/made-with")" = "$wanted" ] && exit 0
rm -rf "$folder"
if ! "$PYTHON" -m venv "$folder" >/dev/null 2>&1; then
  echo "kvkeep: $PYTHON cannot make virtual environments: install python3-venv (Debian, Ubuntu)" >&2
  exit 1
fi
"$folder/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check "$@"
printf '%s\n' "$wanted" >"$folder/made-with"
