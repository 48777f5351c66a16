#!/usr/bin/env bash
# The dashboard in Chromium, over the release binary: tests/dashboard/run.sh [test|pictures]. Installs
# what is missing where it can. With CI=true a missing part is a failure; otherwise it is printed as skipped.
set -euo pipefail
cd "$(dirname "$0")"
# Nothing is kept outside the repository.
export npm_config_cache=$PWD/../../target/npm
export KVKEEP=${KVKEEP:-$PWD/../../target/release/kvkeep} CHROMIUM=${CHROMIUM:-/usr/bin/chromium}
missing() {
  printf 'skipped: the dashboard in a browser: %s\n' "$1"
  if [ "${CI:-}" = true ]; then echo "CI=true: a missing part is a failure"; exit 1; fi
  exit 0
}
install() { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null 2>&1

[ -x "$CHROMIUM" ] || install chromium || missing "Chromium is not installed (CHROMIUM names it elsewhere)"
command -v npm >/dev/null || install nodejs npm || missing "Node.js with npm is not installed"
node -e 'process.exit(process.versions.node.split(".")[0] < 20 ? 1 : 0)' || missing "Node.js 20 or later is needed, $(node --version) is installed"
npm ci --silent --no-audit --no-fund || missing "npm cannot install what package-lock.json names"

case ${1:-test} in
  test) node --test --test-reporter=spec dashboard.test.js ;;
  pictures)
    command -v pngquant >/dev/null || install pngquant || missing "pngquant is not installed (it makes the pictures small)"
    node pictures.js
    pngquant --force --ext .png --strip 64 ../../docs/dashboard-*.png ;;
  *) echo "usage: run.sh [test|pictures]" >&2; exit 2 ;;
esac
