#!/usr/bin/env bash
# The clients that people use, against the release binary, directly and through nginx: tests/clients/run.sh KVKEEP.
# Installs what is missing where it can. With CI=true a missing part is a failure; otherwise it is printed as skipped.
set -euo pipefail
kvkeep=$(realpath "${1:-target/release/kvkeep}")
cd "$(dirname "$0")"
export npm_config_cache=$PWD/../../target/npm PYTHON=${PYTHON:-python3} PATH=$PATH:/usr/sbin
missing() {
  printf 'skipped: clients: %s\n' "$1"
  if [ "${CI:-}" = true ]; then echo "CI=true: a missing part is a failure"; exit 1; fi
  exit 0
}
install() { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null 2>&1

command -v nginx >/dev/null || install nginx-light || missing "nginx is not installed"
command -v npm >/dev/null || install nodejs npm || missing "Node.js with npm is not installed"
command -v curl >/dev/null || install curl || missing "curl is not installed"
npm ci --silent --no-audit --no-fund || missing "npm cannot install what package-lock.json names"
bash ../venv.sh .venv-clients "openai>=2,<3" "litellm>=1.100,<2" "langchain-openai>=1,<2" "llama-index-llms-openai-like>=0.8" "llm>=0.32"
../../.venv-clients/bin/python clients.py "$kvkeep"
