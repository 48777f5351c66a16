"""Where SGLang is not unpacked, these tests are not collected: `make test-sglang` does it."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["test_sglang_*.py"]
