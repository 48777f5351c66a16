"""A tier over rows of this process, with an engine's configuration as far as the tier reads it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import ReqContext

from kvkeep.vllm import KvkeepTier

ROW_BYTES = 8192
CHUNK_TOKENS = 64


def engine_config(model: Path, **other: Any) -> SimpleNamespace:
    if not model.exists():
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (model / "model.safetensors").write_bytes(b"weights")
    hf_config = SimpleNamespace(to_dict=lambda: {"hidden_size": other.get("hidden_size", 64)})
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model), revision=None, dtype=other.get("dtype", "torch.bfloat16"), quantization=other.get("quantization"),
            hf_config=hf_config, max_model_len=other.get("max_model_len", 4096), seed=0,
            enable_sleep_mode=other.get("enable_sleep_mode", False),
        ),
        cache_config=SimpleNamespace(cache_dtype=other.get("cache_dtype", "auto"), prefix_caching_hash_algo=other.get("hash", "sha256")),
        parallel_config=SimpleNamespace(tensor_parallel_size=other.get("tp", 1), data_parallel_index=0),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=other.get("step_tokens", 8192), async_scheduling=other.get("ahead", False)),
        speculative_config=None,
        lora_config=None,
        load_config=SimpleNamespace(load_format=other.get("load_format", "auto")),
    )  # fmt: skip


def offloading_spec(events: bool = False, chunk_tokens: int = CHUNK_TOKENS) -> SimpleNamespace:
    group = SimpleNamespace(tokens_per_block=chunk_tokens, layer_names=("layers.0",))
    return SimpleNamespace(
        blocks_per_chunk=1, tokens_per_block=(chunk_tokens,), tokens_per_hash=16, config=SimpleNamespace(groups=(group,)),
        kv_events_config=SimpleNamespace(enable_kv_cache_events=events),
    )  # fmt: skip


class Lab:
    """A tier and the rows of the tier before it."""

    def __init__(self, root: Path, rows: int = 64, events: bool = False, config: dict[str, Any] | None = None, **settings: Any) -> None:
        self.rows = np.zeros((rows, ROW_BYTES), np.int8)
        vllm_config = engine_config(root.parent / "model", **config or {})  # the tier finds it under this name
        settings = {"root_dir": str(root), "capacity_gb": 0.1, "queue_mb": 8, "worth": "always", **settings}
        self.view = memoryview(self.rows)
        self.tier = KvkeepTier(offloading_spec(events), self.view, "kvkeep", **settings)
        del vllm_config
        self._jobs = 0

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.tier.shutdown()

    def job(self, keys: list[bytes], rows: list[int], context: Any, load: bool) -> Any:
        from vllm.v1.kv_offload.tiering import base

        self._jobs += 1
        cls, name = (base.TransferJob, "chunk_ids") if hasattr(base, "TransferJob") else (base.JobMetadata, "block_ids")
        return cls(job_id=self._jobs, keys=keys, is_promotion=load, req_context=context, **{name: np.array(rows)})

    def begin_store(self, keys: list[bytes], rows: list[int], context: Any = None) -> int:
        self.tier.submit_store(self.job(keys, rows, context or request("stores"), load=False))
        return self._jobs

    def begin_load(self, keys: list[bytes], rows: list[int], context: Any = None) -> int:
        self.tier.submit_load(self.job(keys, rows, context or request("loads"), load=True))
        return self._jobs

    def ended(self, job: int, at_most: float = 20) -> Any:
        """Waits until the job is reported, as vLLM does: by asking."""
        end = time.monotonic() + at_most
        while time.monotonic() < end:
            for result in self.tier.get_finished_jobs():
                assert result.job_id == job, (result, job)
                return result
            time.sleep(0.002)
        raise AssertionError(f"job {job} has not ended in {at_most} s")

    def store(self, keys: list[bytes], first_row: int = 0, context: Any = None) -> None:
        """Stores what `content` says, and waits until it is written."""
        rows = list(range(first_row, first_row + len(keys)))
        for key, row in zip(keys, rows):
            self.rows[row] = content(key)
        assert self.ended(self.begin_store(keys, rows, context)).success
        self.tier._engine.flush()

    def load(self, keys: list[bytes], first_row: int = 0, context: Any = None) -> Any:
        rows = list(range(first_row, first_row + len(keys)))
        self.rows[rows] = -1
        return self.ended(self.begin_load(keys, rows, context))

    def hits(self, keys: list[bytes], context: Any = None) -> list[bool]:
        from vllm.v1.kv_offload.base import LookupResult

        context = context or request(f"asks {time.monotonic_ns()}")
        if context.req_id not in self.tier._requests:
            self.tier.on_new_request(context)
        return [self.tier.lookup(key, context) is LookupResult.HIT for key in keys]


def request(name: str, keys: list[bytes] | None = None, **fields: Any) -> Any:
    context = ReqContext(req_id=name, **fields)
    for number, key in enumerate(keys or []):
        if hasattr(context, "set_offload_key_position"):
            context.set_offload_key_position(key, (number + 1) * CHUNK_TOKENS)
    return context


def names(count: int, salt: int = 0) -> list[bytes]:
    """Keys as vLLM makes them: a hash, and four bytes for the group of layers."""
    return [bytes([salt]) * 16 + number.to_bytes(16, "big") + bytes(4) for number in range(count)]


def content(key: bytes) -> np.ndarray[Any, Any]:
    """A row that no other key has."""
    return np.random.default_rng(list(key)).integers(-128, 128, ROW_BYTES, np.int8)
