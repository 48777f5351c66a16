#!/usr/bin/env bash
# KV events of the running server, read with vLLM's classes and by the indexer of Dynamo's router: tests/kv_events.sh KVKEEP
# Needs the environment that tests/vllm.sh makes.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! [ -x .venv-vllm/bin/python ]; then
  echo "kvkeep: vLLM is not here: make test-vllm fetches it" >&2
  exit 1
fi
bash tests/venv.sh .venv-dynamo "ai-dynamo-runtime==1.6.1"
KVKEEP_DYNAMO_PYTHON=$PWD/.venv-dynamo/bin/python .venv-vllm/bin/python tests/kv_events.py "$1"
echo "passed: KV events as vLLM's classes, a replay and Dynamo's indexer read them"
