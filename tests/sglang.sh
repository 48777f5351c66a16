#!/usr/bin/env bash
# kvkeep under SGLang's HiCache, on the CPU, with the wheel that was built: SGLang's own controller, pools, factory and hashes. Needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
wheel=$(ls "$PWD"/dist/kvkeep-*.whl)
release=0.5.23

# SGLang wants dozens of packages with kernels for GPUs. What its memory cache imports is a few of them; they are given here. ninja builds its hash.
bash tests/venv.sh .venv-sglang "torch==2.14.1" "torchvision>=0.29" numpy "transformers==5.19.0" "pytest>=9,<10" "apache-tvm-ffi" "compressed-tensors>=0.18" \
  aiohttp dill fastapi gguf ipython loguru msgspec ninja openai orjson partial-json-parser prometheus-client psutil pybase64 pydantic pyzmq requests sentencepiece setproctitle uvloop
# For its Python alone, and its hash in C++: a Python of another version than the wheel's imports it as well.
unpacked=$PWD/.venv-sglang-release/$release
if [ ! -d "$unpacked/sglang" ]; then
  fetched=$(mktemp -d)
  .venv-sglang/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 -d "$fetched" "sglang==$release"
  .venv-sglang/bin/python -m zipfile -e "$fetched"/sglang-*.whl "$unpacked"
  rm -rf "$fetched"
fi
.venv-sglang/bin/python -m pip install --quiet --no-deps --force-reinstall --disable-pip-version-check "$wheel"

export PYTHONPATH=$unpacked PATH=$PWD/.venv-sglang/bin:$PATH TORCH_EXTENSIONS_DIR=$PWD/.venv-sglang/extensions PYTHONDONTWRITEBYTECODE=1
echo "-- pytest with SGLang $release on the CPU"
cd crates/kvkeep-python/tests/with_sglang
python -m pytest -c ../../pyproject.toml --rootdir ../.. -p no:cacheprovider . --durations 5
echo "passed: kvkeep in SGLang $release on the CPU, under its own HiCache controller, pools, factory and failure injector"
