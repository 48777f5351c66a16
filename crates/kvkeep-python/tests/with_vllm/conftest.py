"""Where vLLM is not installed, these tests are not collected: `make test-vllm` installs it."""

import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_vllm_*.py"]
if not collect_ignore_glob:
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING", VLLM_CPU_KVCACHE_SPACE="1")
