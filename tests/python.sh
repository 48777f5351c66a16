#!/usr/bin/env bash
# The wheel in an empty environment, then the Python tests that need numpy alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
wheel=$(ls "$PWD"/dist/kvkeep-*.whl)

echo "-- the wheel in an empty environment"
rm -rf .venv-empty
bash tests/venv.sh .venv-empty "$wheel"
.venv-empty/bin/python - <<'PY'
import importlib.metadata

installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()} - {"pip", "setuptools", "wheel"}
assert installed == {"kvkeep", "numpy"}, installed

import numpy as np
from simple_kv_cache import SimpleKVCache

cache = SimpleKVCache(max_size_gb=10)
k, v = np.random.randn(2, 8, 256, 64)
cache.cache_kv(prefix="user query", layer=0, k_tensor=k, v_tensor=v)
k_cached, v_cached = cache.get_cached_kv(prefix="user query", layer=0)
assert np.array_equal(k, k_cached) and np.array_equal(v, v_cached)
cache.print_stats()
PY

echo "-- pytest"
bash tests/venv.sh .venv-test "numpy" "pytest>=9,<10" "ml_dtypes" "mypy>=2,<3"
.venv-test/bin/python -m pip install --quiet --no-deps --force-reinstall --disable-pip-version-check "$wheel"
failed=0
(cd crates/kvkeep-python && ../../.venv-test/bin/python -m pytest --ignore tests/test_torch.py --ignore tests/test_torch_lending.py --ignore tests/test_transformers.py) || failed=1

echo "-- mypy --strict on a sample"
.venv-test/bin/python -m mypy --strict --no-incremental crates/kvkeep-python/tests/sample.py || failed=1
.venv-test/bin/python crates/kvkeep-python/tests/sample.py || failed=1
exit $failed
