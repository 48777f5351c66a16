#!/usr/bin/env bash
# Torch, transformers, types, examples, demos, benchmark and notebooks, with the wheel that was built.
# tests/integrations_python.sh bench: the benchmark alone, in full. sweep: all architectures.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/parts.sh
export PYTHON=${PYTHON:-python3}
wheel=$(ls "$PWD"/dist/kvkeep-*.whl)
out=$PWD/target/integrations
mkdir -p "$out"

# A machine of CI's has room for one torch, and not beside what the tests were built from: nothing of it is needed below.
if [ "${CI:-}" = true ]; then rm -rf target/debug target/shuttle; fi

part "torch and transformers are installed"
bash tests/venv.sh .venv-torch "torch>=2.15,<3" "transformers>=5.23,<6" "peft>=0.19" accelerate numpy "pytest>=9,<10" "pytest-xdist>=3.8,<4" "tqdm>=4.60" "matplotlib>=3.7" \
  ml_dtypes "nbclient>=0.11,<1" "nbformat>=5,<6" "ipykernel>=7,<8" "mypy>=2,<3" "basedpyright>=1.40,<2"
.venv-torch/bin/python -m pip install --quiet --no-deps --force-reinstall --disable-pip-version-check "$wheel"
export PATH="$PWD/.venv-torch/bin:$PATH"

if [ "${1:-}" = bench ]; then
  exec python -m kvkeep.bench
fi
if [ "${1:-}" = sweep ]; then
  cd crates/kvkeep-python
  exec python -m pytest tests/test_architectures.py
fi
part "pytest with torch and transformers"
(cd crates/kvkeep-python && OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile)
# The path of processors without AVX: the libraries underneath round differently on each.
best=$(python -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())')
if [ "$best" != default ]; then
  part "pytest with torch's default path (this processor's best is $best)"
  (cd crates/kvkeep-python && ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadscope tests/test_torch.py tests/test_transformers.py)
fi
part "types"
(cd crates/kvkeep-python && python -m mypy --strict --no-incremental tests/sample.py python/kvkeep)
# From a folder of its own: in the repository pyright takes crates/kvkeep for the package.
mkdir -p "$out/types" && cp crates/kvkeep-python/tests/sample.py "$out/types"
(cd "$out/types" && basedpyright --level error --pythonpath "$(command -v python)" sample.py && python sample.py)
part "README's snippets"
python tests/readme.py
part "examples"
for example in examples/example_*.py; do python "$example"; done
part "demos"
python -m kvkeep.demo --layers 3 --json --plot "$out/python-demo.png" >"$out/python-demo.json" 2>"$out/python-demo.err" \
  || { cat "$out/python-demo.err"; exit 1; }
part "benchmark"
python -m kvkeep.bench --quick --json >"$out/python-bench.json"
part "notebooks"
python tests/notebooks.py

python - "$out" <<'PY'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
passed = failed = 0


def check(name, ok, figure):
    global passed, failed
    passed, failed = passed + ok, failed + (not ok)
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {figure}")


for demo, run in json.loads((out / "python-demo.json").read_text()).items():
    check(f"python {demo}: answers with and without the cache are identical", run["answers_identical"] is True, run["answers_identical"])
    # Less than half of what a quiet machine shows: this is a test of the promise, not a benchmark.
    check(f"python {demo}: time to first token falls", run["speedup"] >= 1.2, f"{run['speedup']:.1f}x")
    check(f"python {demo}: most prompt tokens come from the cache", run["hit_rate_percent"] > 60, f"{run['hit_rate_percent']:.1f}%")
check("python demo: the plot is a PNG", (out / "python-demo.png").read_bytes()[1:4] == b"PNG", "png")
results = json.loads((out / "python-bench.json").read_text())["results"]
check("python bench: every result has name, value, unit, reference and ratio",
      bool(results) and all({"name", "value", "unit", "reference", "ratio"} <= set(r) for r in results), f"{len(results)} results")
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
PY

if [ "${CI:-}" = true ]; then rm -rf .venv-torch; fi
part "vLLM"
bash tests/vllm.sh short
