"""What the KV of an engine depends on besides tokens: the namespace of its pages.

SGLang's hash of a page covers the tokens before it, `extra_key` (with the adapter's number in it) and `cache_salt`. What a page is made of
(pool, layout, precision, sizes) is in its name: see `_pages`. Everything else is here: weights, adapters, configuration, ranks, versions, device.

An adapter's number says its name and path, not its weights. So the files of all adapters that an engine is started with are here, too: one that was
trained on makes all pages others. (One that is loaded later gets a random number from SGLang, and is never found again.) The adapters of each
page apart were the alternative: of a page this process sees a hash alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvkeep._engines.identity import OneAtATime, adapter, machine
from kvkeep._engines.weights import fingerprint

_DECIDING = (
    "dtype", "kv_cache_dtype", "quantization", "quantization_param_path", "torchao_config", "modelopt_quant", "rl_quant_profile", "load_format",
    "model_loader_extra_config", "model_impl", "json_model_override_args", "context_length", "is_embedding", "language_model_only", "random_seed",
    "attention_backend", "prefill_attention_backend", "decode_attention_backend", "mm_attention_backend", "lora_backend", "mamba_backend",
    "linear_attn_backend", "linear_attn_prefill_backend", "linear_attn_decode_backend", "dsa_prefill_backend", "dsa_decode_backend",
    "dsa_topk_backend", "dsv4_attn_backend", "dsv4_prefill_backend", "bf16_gemm_backend", "fp8_gemm_runner_backend", "fp4_gemm_runner_backend",
    "moe_runner_backend", "mamba_ssm_dtype", "qsa_indexer_dtype", "prefill_kv_cache_dequant_dtype", "enable_fused_qk_norm_rope",
    "speculative_algorithm", "speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens", "speculative_draft_attention_backend",
    "speculative_draft_kv_cache_dtype", "speculative_draft_model_quantization", "speculative_draft_window_size", "speculative_draft_sink_size",
    "enable_deterministic_inference", "enable_multi_layer_eagle", "enable_precise_embedding_interpolation", "rl_on_policy_target",
)  # fmt: skip
"""Of SGLang's arguments, those that can change a byte of KV. One that a release does not have is nothing to it."""


def describe(arguments: Mapping[str, Any], storage: Any, weights: str | None, known: Path) -> dict[str, Any]:
    """Everything that decides the bytes of a page and is not in its name, under names."""
    deciding = {name: arguments.get(name) for name in _DECIDING}
    if arguments.get("load_format") != "dummy":
        del deciding["random_seed"]
    return {
        "weights": _weights_of(arguments, weights, known),
        "adapters": _adapters_of(arguments, known),
        "arguments": {name: str(value) for name, value in deciding.items()},
        "ranks": _ranks(storage),
        "engine": [f"sglang {_version()}", *machine()],
    }


def _weights_of(arguments: Mapping[str, Any], vouched: str | None, known: Path) -> str:
    """The weights of the model, and of the one that drafts for it."""
    if vouched is not None:
        return f"vouched {vouched}"
    if arguments.get("load_format") == "dummy":
        return "dummy"
    models = [(arguments.get("model_path"), arguments.get("revision"))]
    if (draft := arguments.get("speculative_draft_model_path")) is not None:
        models.append((draft, arguments.get("speculative_draft_model_revision")))
    with OneAtATime(known):
        return " ".join(dict.fromkeys(fingerprint(str(path), revision, known) for path, revision in models))


def _adapters_of(arguments: Mapping[str, Any], known: Path) -> list[tuple[str, str]]:
    given = arguments.get("lora_paths") or ()
    adapters = list(given.items()) if isinstance(given, Mapping) else [_named(lora) for lora in given]
    if (path := arguments.get("uno_lora_path")) is not None:
        adapters.append(("uno", str(path)))
    return sorted((name, adapter(path, known)) for name, path in adapters)


def _named(lora: Any) -> tuple[str, str]:
    """Name and path of an adapter, as SGLang has it or as it was given."""
    if isinstance(lora, str):
        name, _, path = lora.rpartition("=")
        return name or path, path
    known = lora if isinstance(lora, Mapping) else {name: getattr(lora, name) for name in ("lora_name", "lora_path")}
    return str(known["lora_name"]), str(known["lora_path"])


def _ranks(storage: Any) -> dict[str, Any]:
    """Which part of each page this process has. The rank also where all have the same KV: other states of such a model may still be parts."""
    ranks = ("tp_rank", "tp_size", "pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size", "dcp_rank", "dcp_size", "is_mla_model")
    return {name: getattr(storage, name, None) for name in ranks}


def _version() -> str:
    import sglang

    return str(sglang.__version__)
