#!/usr/bin/env bash
# /openapi.json and /metrics of the running server against their standards: tests/openapi.sh KVKEEP
set -euo pipefail
cd "$(dirname "$0")/.."

bash tests/venv.sh .venv-schemathesis "schemathesis>=4.32,<5" "openapi-spec-validator>=0.7,<1" "prometheus-client>=0.21,<1"
.venv-schemathesis/bin/python tests/openapi.py "$1"
