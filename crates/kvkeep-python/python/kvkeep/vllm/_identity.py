"""What the KV of an engine depends on besides tokens: the namespace of its blocks.

vLLM's hash of a block covers the tokens before it, the cache salt, images, and the adapter's name. Everything else is here: weights,
configuration, precision, the layout of a row, parallelism, versions, device. Two engines share blocks only if all of it is equal.

An adapter's name says nothing of its weights. So the adapters' files enter vLLM's hash, too: see `cover_adapters`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvkeep import _kvkeep
from kvkeep._engines.identity import adapter, digest, machine
from kvkeep._engines.weights import fingerprint
from kvkeep.vllm import _compat
from kvkeep.vllm._settings import Settings

_log = logging.getLogger(__name__)

_PLAIN_ROPE = {"default", "linear", "llama3", "yarn", "mrope", "proportional"}
"""Kinds of rotary embedding that do not ask how long a context may be."""


def describe(config: Any, spec: Any, row_bytes: int, weights: str | None, known: Path) -> dict[str, Any]:
    """Everything that decides the bytes of a row, under names, for a digest of them."""
    model, cache_config, parallel = config.model_config, config.cache_config, config.parallel_config
    return {
        "weights": weights_of(config, weights, known),
        "config": _hf_config(model),
        "dtype": str(model.dtype),
        "kv_dtype": str(cache_config.cache_dtype),
        "quantization": str(model.quantization),
        "scales": bool(getattr(cache_config, "calculate_kv_scales", False)),
        "max_model_len": model.max_model_len if _asks_for_length(model) else None,
        "row_bytes": row_bytes,
        "tokens_per_hash": spec.tokens_per_hash,
        "blocks_per_chunk": spec.blocks_per_chunk,
        "groups": [(group.tokens_per_block, list(group.layer_names)) for group in spec.config.groups],
        "layout": str(getattr(spec.config, "kv_cache_layout", None) or os.environ.get("VLLM_KV_CACHE_LAYOUT")) + _compat.layers_apart(config),
        "replicated": bool(getattr(spec, "replicated_layout", False)),
        "canonical": bool(getattr(spec.config, "canonical_layout", False)),
        "parallel": [
            getattr(parallel, name, 1)
            for name in ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size")
        ],
        "hash": str(cache_config.prefix_caching_hash_algo),
        "attention": _attention(config),
        "engine": _engine(),
    }


def namespace(settings: Settings, config: Any, spec: Any, row_bytes: int) -> tuple[_kvkeep.Namespace, str]:
    """The namespace of an engine's rows, and its name. Makes the folder, since hashes of weights are kept there."""
    root = settings.root
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if "xxhash" in str(config.cache_config.prefix_caching_hash_algo):
        raise ValueError("kvkeep: xxhash has collisions, and one would be another prompt's KV: set --prefix-caching-hash-algo sha256")
    fix_seed()
    known = root / "weights.json"
    if config.lora_config is not None and not cover_adapters(known):
        raise ValueError("kvkeep: this vLLM does not say which adapter a request uses: serve it without --enable-lora, or without kvkeep")
    began = time.monotonic()
    identity = digest(describe(config, spec, row_bytes, settings.weights, known))
    _log.info("kvkeep: identity %s in %.1f s", identity[:16], time.monotonic() - began)
    dims = (1, 1, row_bytes // 2, row_bytes // 2, 1)
    code = _kvkeep.DTYPES.index("u8")
    return _kvkeep.Namespace(config.model_config.model, dims, code, False, (identity, "vllm", "", settings.salt)), identity


def weights_of(config: Any, vouched: str | None, known: Path) -> str:
    """The weights of the model, and of the one that drafts for it."""
    drafts = getattr(config.speculative_config, "draft_model_config", None)
    models = [config.model_config] + ([drafts] if drafts is not None else [])
    if vouched is not None:
        return f"vouched {vouched}"
    if str(config.load_config.load_format) in ("dummy", "LoadFormat.DUMMY"):
        # The same for the same configuration and seed, in every process.
        return f"dummy {[model.seed for model in models]}"
    return " ".join(dict.fromkeys(fingerprint(model.model, model.revision, known) for model in models))


def _hf_config(model: Any) -> Any:
    """The model's configuration without what says only where it is from."""
    read = dict(model.hf_config.to_dict())
    for name in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        read.pop(name, None)
    return json.loads(json.dumps(read, sort_keys=True, default=str))


def _asks_for_length(model: Any) -> bool:
    config = getattr(model, "hf_text_config", model.hf_config)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope] if "rope_type" in rope or "type" in rope else [part for part in rope.values() if isinstance(part, Mapping)]
    return any(str(kind.get("rope_type") or kind.get("type") or "default") not in _PLAIN_ROPE for kind in kinds)


def _attention(config: Any) -> str:
    backend = getattr(getattr(config, "attention_config", None), "backend", None)
    return str(backend or os.environ.get("VLLM_ATTENTION_BACKEND"))


def _engine() -> list[str]:
    import vllm

    return [f"vllm {vllm.__version__}", *machine()]


_HASH_NAME = "_gen_lora_extra_hash_keys"


def cover_adapters(known: Path) -> bool:
    """Has vLLM's hash of a block cover the bytes of an adapter, not its name and path alone. False if this vLLM has no place for it.

    A LoRA that was trained on is loaded under its old name, and the engine that loads it is a new one: nothing else tells the two apart.
    """
    from vllm.v1.core import kv_cache_utils

    before = getattr(kv_cache_utils, _HASH_NAME, None)
    if before is None:
        return False
    if getattr(before, "_kvkeep", False):
        return True

    contents: dict[tuple[int, str, str], str] = {}

    def content(lora: Any) -> str:
        # A worker reads an adapter when it first meets its number, or each time if it is to be loaded again.
        path = lora.lora_path
        name = (lora.lora_int_id, path, _changed(path) if getattr(lora, "load_inplace", False) else "")
        if name not in contents:
            contents[name] = adapter(path, known)
        return contents[name]

    def with_content(request: Any) -> list[Any]:
        keys = list(before(request))
        return [*keys, ("kvkeep", content(request.lora_request))] if request.lora_request else keys

    with_content._kvkeep = True  # type: ignore[attr-defined]
    setattr(kv_cache_utils, _HASH_NAME, with_content)
    return True


def _changed(path: str) -> str:
    """Another text as soon as a file of the adapter was written."""
    try:
        return " ".join(f"{entry.name} {entry.stat().st_mtime_ns} {entry.stat().st_size}" for entry in sorted(os.scandir(path), key=str))
    except OSError:
        return ""


def fix_seed() -> None:
    """Older releases begin the chain of hashes with a random number in each process, unless this is set: then nothing is ever found again."""
    os.environ.setdefault("PYTHONHASHSEED", "0")
