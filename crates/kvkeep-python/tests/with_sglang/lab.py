"""SGLang's own HiCache controller over host pools in RAM, with kvkeep as its storage: everything but a GPU.

Nothing of SGLang's is replaced: its arguments, device and host pools (with their layouts), allocator, factory, controller with its threads, and
hashes are those of its wheel. Only what moves KV between the device and RAM is never asked to.
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_parallel, publish
from sglang.srt.server_args import ServerArgs

PAGE_TOKENS = 16
LAYERS, HEADS, HEAD_DIM = 3, 2, 64
TOKENS = 128 * PAGE_TOKENS


def model(folder: Path, weights: bytes = b"weights") -> Path:
    """What says which model it is."""
    if not folder.exists():
        folder.mkdir(parents=True)
        said = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
                "num_key_value_heads": HEADS, "intermediate_size": 128, "vocab_size": 1000, "max_position_embeddings": 4096}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(said))
        (folder / "model.safetensors").write_bytes(weights)
    return folder


def meet(store: Any, rank: int, ranks: int) -> None:
    """The group of ranks that this process is in, once and for all."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def begin(folder: Path, **arguments: Any) -> None:
    """Makes this process a scheduler of SGLang's, of this model."""
    meet(torch.distributed.HashStore(), 0, 1)
    ranks = {name: arguments.pop(name, default) for name, default in (("tp_rank", 0), ("dp_rank", None))}
    given = {"device": "cpu", "random_seed": 0, "dtype": "bfloat16", "page_size": PAGE_TOKENS, **arguments}
    publish(ServerArgs(model_path=str(model(folder)), **given), role="scheduler")
    get_parallel().override_permanently(pp_rank=0, pp_size=1, attn_dcp_size=1, attn_dcp_rank=0, **ranks)


def device_pool(kind: str, dtype: torch.dtype = torch.bfloat16, page_tokens: int = PAGE_TOKENS) -> Any:
    same = {"size": TOKENS, "page_size": page_tokens, "dtype": dtype, "layer_num": LAYERS, "device": "cpu", "enable_memory_saver": False}
    if kind == "mla":
        return MLATokenToKVPool(kv_lora_rank=96, qk_rope_head_dim=32, **same)
    return MHATokenToKVPool(head_num=HEADS, head_dim=HEAD_DIM, **same)


def host_pool(device: Any, kind: str, layout: str, page_tokens: int = PAGE_TOKENS) -> Any:
    same = {"pin_memory": False, "device_capacity_tokens": TOKENS, "start_layer": 0, "end_layer": LAYERS}
    info = device.get_device_pool_infos()[0].buffer_info
    if kind == "mla":
        return MLATokenToKVPoolHost(info, 2.0, 0, page_tokens, layout, target_layer_num=LAYERS, **same)
    return MHATokenToKVPoolHost(info, 2.0, 0, page_tokens, layout, **same)


def config(root: Path, v1: bool = True, **settings: Any) -> dict[str, Any]:
    """What `--hicache-storage-backend-extra-config` says."""
    named = {"backend_name": "kvkeep", "module_path": "kvkeep.sglang", "class_name": "KvkeepStorage", **({"interface_v1": 1} if v1 else {})}
    return {**named, "root_dir": str(root), "capacity_gb": 0.1, "queue_mb": 16, "buffer_mb": 4, **settings}


def page_bytes(key: str, size: int) -> torch.Tensor:
    """A page that no other key has."""
    return torch.from_numpy(np.random.default_rng(list(key.encode())).integers(0, 256, size, np.uint8))


class Lab:
    """A controller with its pools; pages are put where SGLang's scheduler has them, and taken from there."""

    def __init__(self, root: Path, kind: str = "mha", layout: str = "page_first", v1: bool = True, dtype: torch.dtype = torch.bfloat16,
                 page_tokens: int = PAGE_TOKENS, arguments: dict[str, Any] | None = None, metrics: bool = False, **settings: Any) -> None:  # fmt: skip
        begin(root.parent / "model", **arguments or {})
        device = device_pool(kind, dtype, page_tokens)
        self.host = host_pool(device, kind, layout, page_tokens)
        self.page_tokens = page_tokens
        self.controller = HiCacheController(
            PagedTokenToKVPoolAllocator(TOKENS, page_tokens, dtype, "cpu", device, False), self.host, page_tokens, torch.distributed.group.WORLD,
            threading.Event(), write_policy="write_through", io_backend="direct", storage_backend="dynamic", model_name=str(root.parent / "model"),
            storage_backend_extra_config=config(root, v1, **settings), enable_storage_metrics=metrics,
        )  # fmt: skip
        self.storage = self.controller.storage_backend

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.controller.detach_storage_backend()

    def keys(self, tokens: RadixKey | list[int]) -> list[str]:
        return list(get_storage_hash_str(as_key(tokens), None, page_size=self.page_tokens))

    def put(self, keys: list[str]) -> torch.Tensor:
        """Takes room in RAM for these pages, and fills it; says where."""
        indices = self.host.alloc(len(keys) * self.page_tokens)
        assert indices is not None, "there is no room in the host pool"
        for key, start in zip(keys, indices[:: self.page_tokens].tolist()):
            page = self.host.get_dummy_flat_data_page()
            self.host.set_from_flat_data_page(start, page_bytes(key, page.numel() * page.element_size()).view(page.dtype))
        return indices

    def right(self, keys: list[str], indices: torch.Tensor) -> list[bool]:
        """Which pages there are these keys'?"""
        starts = indices[:: self.page_tokens].tolist()
        pages = [self.host.get_data_page(start).contiguous().view(torch.uint8) for start in starts]
        return [bool((page == page_bytes(key, page.numel())).all()) for key, page in zip(keys, pages)]

    def store(self, tokens: RadixKey | list[int], flush: bool = True) -> int:
        """As SGLang's scheduler has a prompt backed up; says how many tokens were."""
        key = as_key(tokens)
        keys = self.keys(key)
        indices = self.put(keys)
        self.controller.write_storage(indices, key, hash_value=keys)
        operation = self.controller.ack_backup_queue.get(timeout=60)
        self.host.free(indices)
        if flush:
            self.storage._opened().flush()
        return int(operation.completed_tokens)

    def hits(self, tokens: RadixKey | list[int]) -> int:
        """How many tokens of a prompt SGLang believes to be there."""
        return self._asked(tokens).storage_hit_count

    def load(self, tokens: RadixKey | list[int]) -> int:
        """As SGLang's scheduler has a prompt fetched; says how many tokens came, and makes sure that they are right."""
        operation = self._asked(tokens)
        if not operation.hash_value:
            return 0
        indices = self.host.alloc(len(operation.hash_value) * self.page_tokens)
        operation.host_indices = indices
        self.controller.prefetch_buffer.put(operation)
        came = 0
        while True:
            ack = self.controller.ack_prefetch_queue.get(timeout=60)
            came = max(came, ack.completed_tokens or 0)
            if ack.completed_req:
                break
        pages = came // self.page_tokens
        assert all(self.right(operation.hash_value[:pages], indices)), "what came is not what was stored"
        self.host.free(indices)
        return came

    def _asked(self, tokens: RadixKey | list[int]) -> Any:
        self.controller.prefetch(f"r{time.monotonic_ns()}", as_key(tokens), None, None)
        return self.controller.prefetch_hit_queue.get(timeout=60)


def as_key(tokens: RadixKey | list[int]) -> RadixKey:
    return tokens if isinstance(tokens, RadixKey) else RadixKey(array("q", tokens))


def prompt(pages: int, salt: int = 0) -> list[int]:
    """A prompt that no other salt begins with."""
    return [1_000_000 * (salt + 1) + number for number in range(pages * PAGE_TOKENS)]


def segments(root: Path) -> list[Path]:
    return sorted(root.rglob("segment-*"))


def flip(root: Path, content: bytes, at: int = 5000) -> None:
    """Flips a bit of what lies on the disk."""
    (path,) = [path for path in segments(root) if content in path.read_bytes()]
    place = path.read_bytes().index(content) + at
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
