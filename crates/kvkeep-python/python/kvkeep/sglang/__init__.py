"""kvkeep as a storage backend of SGLang's HiCache: a bounded, checked disk behind SGLang's RAM, warm after a restart.

    python -m sglang.launch_server --model-path MODEL --page-size 64 --enable-hierarchical-cache --hicache-mem-layout page_first
      --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "kvkeep", "module_path": "kvkeep.sglang",
      "class_name": "KvkeepStorage", "interface_v1": 1, "root_dir": "/var/lib/kvkeep", "capacity_gb": 500}'

SGLang moves KV between the GPU and RAM; kvkeep moves it between RAM and the disk. See `docs/sglang.md`.

Invariant: importing this imports nothing of SGLang's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvkeep.sglang._storage import KvkeepStorage

__all__ = ["KvkeepStorage"]


def __getattr__(name: str) -> Any:
    if name == "KvkeepStorage":
        from kvkeep.sglang._storage import KvkeepStorage

        return KvkeepStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
