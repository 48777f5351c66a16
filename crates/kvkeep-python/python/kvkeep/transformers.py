"""Reuse for `generate` of Hugging Face transformers: what a model has read once it does not read again.

    from kvkeep import KVCache
    from kvkeep.transformers import CachedGenerator

    generator = CachedGenerator(model, KVCache(max_size_gb=10))
    output = generator.generate(input_ids, max_new_tokens=64)      # as model.generate(input_ids, ...)
    generator.last.cached_tokens                                   # of the prompt, not read again

Works for causal models whose state is a `DynamicCache` of full or sliding attention (Llama, Qwen,
Mistral, Gemma, GPT-2, ...); others are refused when the generator is made. One prompt at a time,
greedy or sampling. The generator finds the longest stored prefix, builds the model's cache from it,
lets the model read the rest, and stores what is new: the prompt, and the answer as far as the model
has read it.

Sliding windows: a layer with a window forgets what lies behind it, but a shorter prompt that shares a
prefix needs just that. So such layers are told to record all states while they generate, blocks are stored
whole, and a cache that is built from blocks is cut to the window by the layer itself.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvkeep._errors import KvkeepError, UnsupportedModelError, UnsupportedTensorError
from kvkeep._tensors import dtype_code
from kvkeep._tokens import KVCache, Namespace

if TYPE_CHECKING:
    from kvkeep import StoreReport

__all__ = ["CachedGenerator", "Generation", "UnsupportedModelError"]

_SAMPLED_ELEMENTS = 64
"""Elements of each parameter that the fingerprint reads."""

_REFUSED_ARGUMENTS = {
    "past_key_values": "the cache builds it",
    "inputs_embeds": "reuse is by token ids",
    "pixel_values": "reuse is by token ids",
    "token_type_ids": "reuse is by token ids alone",
    "cache_implementation": "the model's state must be a DynamicCache",
    "assistant_model": "assisted decoding rolls the state back",
    "prompt_lookup_num_tokens": "assisted decoding rolls the state back",
    "position_ids": "positions count from the first token",
}
_RECORDS_WINDOWS = Version("5.23")
"""With 5.17 a cache that was built with more than a window fails in attention; tested from this one on."""

_REFUSED_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Generation:
    """What one call of `CachedGenerator.generate` reused and stored."""

    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were not read again."""
    ttft_seconds: float
    """From the call to the first token, look-up and load included."""
    stored: StoreReport | None
    """What became of the new blocks; None if there was no full block."""


class FirstToken:
    """A stopping criterion that never stops and notes when the first token was there."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._begin = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.seconds is None:
            input_ids[0, -1].item()  # a GPU is only told what to do: wait until it has done it
            self.seconds = time.perf_counter() - self._begin
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class CachedGenerator:
    """`model.generate` with reuse.

    - `cache`: may be shared by any number of generators and threads.
    - `block_tokens`: reuse ends at a multiple of it; small blocks reuse more and cost more look-ups.
    - `salt`, `lora`: a tenant's secret, the name of the adapter in use.
    - `store_answers`: keep the KV of generated tokens too, so that the next turn of a chat reuses them.

    The model is known by its name, its revision and a fingerprint of its weights, taken now: make
    a new generator after changing them.

    Raises `UnsupportedModelError`.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        *,
        block_tokens: int = 16,
        salt: str = "",
        lora: str = "",
        store_answers: bool = True,
    ) -> None:
        self.model, self.cache, self.store_answers = model, cache, store_answers
        self.namespace = _namespace(model, block_tokens, salt, lora)
        self.last: Generation | None = None
        """What the last call reused and stored; of several threads, whichever came last."""

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """As `model.generate(input_ids, **kwargs)` for one prompt, `[1, tokens]`; returns what it returns.
        Every token of the prompt counts (the attention mask is all ones), also one that could be padding.

        Raises `KvkeepError` for arguments that go against reuse, and what `generate` raises.
        """
        first_token = FirstToken()
        _check_arguments(self.model, input_ids, kwargs)
        prompt = input_ids[0].tolist()
        # At least one token is left for the model, which must make the first logits.
        past, cached_tokens = self._past(prompt[:-1])
        # Without a mask `generate` guesses one and hides tokens that look like padding: then KV would
        # depend on more than the tokens.
        kwargs["attention_mask"] = torch.ones_like(input_ids)
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), first_token]
        begin = time.perf_counter()
        output = self.model.generate(input_ids, past_key_values=past, **kwargs)
        compute_seconds = time.perf_counter() - begin
        sequence = output if isinstance(output, torch.Tensor) else output.sequences
        end = past.get_seq_length() if self.store_answers else len(prompt)
        stored = self._store(sequence[0, :end].tolist(), past, cached_tokens, compute_seconds)
        self.last = Generation(len(prompt), cached_tokens, first_token.seconds or compute_seconds, stored)
        return output

    def _past(self, tokens: list[int]) -> tuple[DynamicCache, int]:
        """The model's cache of the longest stored prefix, and how many tokens that is."""
        past, cached_tokens = DynamicCache(config=self.model.config), 0
        if tokens:
            with self.cache.lookup(self.namespace, tokens) as found:
                cached_tokens = found.cached_tokens
                if found:
                    device = self.model.device
                    # Pinned memory goes to a GPU at the bus's speed, and torch keeps it for the next time.
                    loaded = found.to_torch(pin_memory=device.type == "cuda")
                    for layer, (k, v) in zip(past.layers, loaded, strict=True):
                        layer.update(k[None].to(device, non_blocking=True), v[None].to(device, non_blocking=True))
        for layer in past.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.activate_past_recording()
        return past, cached_tokens

    def _store(
        self, tokens: list[int], past: DynamicCache, first_token: int, compute_seconds: float
    ) -> StoreReport | None:
        """Stores the full blocks behind `first_token`."""
        if len(tokens) - first_token < self.namespace.block_tokens:
            return None
        # Layers hold all tokens, or with a window at least those behind `first_token`.
        behind = past.get_seq_length() - first_token
        layers = [(layer.keys[0, :, -behind:], layer.values[0, :, -behind:]) for layer in past.layers]
        return self.cache.store(
            self.namespace, tokens, layers, first_token=first_token, compute_seconds=compute_seconds
        )


def _namespace(model: Any, block_tokens: int, salt: str, lora: str) -> Namespace:
    """What the model's KV depends on, and its layout, read off one forward pass."""
    config = _check_model(model)
    layers = _probe(model)
    shapes = {(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers}
    dtypes = {tensor.dtype for layer in layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1 or len(dtypes) != 1:
        raise UnsupportedModelError(f"{_name(model)}: its layers differ in KV heads, head_dim or dtype")
    (kv_heads, head_dim, v_head_dim), dtype = shapes.pop(), dtypes.pop()
    try:
        dtype_code(dtype)
    except UnsupportedTensorError as error:
        raise UnsupportedModelError(f"{_name(model)}: {error}") from error
    attention = getattr(config, "_attn_implementation", "")
    return Namespace(
        _name(model),
        layers=len(layers),
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=dtype,
        block_tokens=block_tokens,
        order="head_token",
        revision=f"{getattr(model.config, '_commit_hash', None) or ''} {_fingerprint(model)}",
        engine=f"transformers {transformers.__version__} torch {torch.__version__} {attention} {model.device.type}",
        lora=lora,
        salt=salt,
    )


def _check_model(model: Any) -> Any:
    """Refuses what can be refused by its configuration; returns the decoder's."""
    name = _name(model)
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise UnsupportedModelError(f"a {type(model).__name__} is no transformers model that generates")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name}: an encoder-decoder reads its prompt in the encoder, which has no KV to keep")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(f"{name}: with bidirectional attention KV depends on what follows")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModelError(f"{name}: chunked attention is not supported")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    if any(kind in _REFUSED_ROPE for kind in kinds):
        raise UnsupportedModelError(f"{name}: with {kinds[0]} RoPE scaling KV depends on the prompt's length")
    return config


def _probe(model: Any) -> list[DynamicLayer]:
    """The model's cache layers after reading one token; refuses what is not KV by token."""
    name = _name(model)
    cache = DynamicCache(config=model.config)
    no_kv = f"{name}: its state cannot be cut by token, so no prefix of it can be reused"
    foreign = {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if foreign:
        raise UnsupportedModelError(f"{no_kv} (it has {', '.join(sorted(foreign))})")
    if getattr(model, "_is_stateful", False) or not model._supports_default_dynamic_cache():
        raise UnsupportedModelError(f"{no_kv} (it keeps no DynamicCache)")
    if any(layer.is_sliding for layer in cache.layers) and Version(transformers.__version__) < _RECORDS_WINDOWS:
        raise UnsupportedModelError(
            f"{name}: transformers {transformers.__version__} does not keep what sliding windows forget: "
            f"upgrade it to {_RECORDS_WINDOWS} or later"
        )
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    if not cache.layers or any(not layer.is_initialized or layer.keys is None for layer in cache.layers):
        raise UnsupportedModelError(f"{name}: not every layer keeps KV of its own in a DynamicCache")
    if any(layer.keys.shape[2] != 1 or layer.get_seq_length() != 1 for layer in cache.layers):
        raise UnsupportedModelError(f"{no_kv} (one token does not leave one entry in every layer)")
    return list(cache.layers)


def _fingerprint(model: Any) -> str:
    """Names, shapes, dtypes and some elements of all weights: tells models apart that share a name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        if not isinstance(parameter, torch.Tensor):
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)][: 2 * _SAMPLED_ELEMENTS]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_arguments(model: Any, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise KvkeepError("give one prompt at a time: input_ids of shape [1, tokens]")
    for argument, reason in _REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise KvkeepError(f"{argument} cannot be given with reuse: {reason}")
    config = kwargs.get("generation_config") or model.generation_config
    for argument in ("num_beams", "num_return_sequences"):
        if (kwargs.get(argument) or getattr(config, argument, None) or 1) != 1:
            raise KvkeepError(f"{argument} must be 1: reuse is for one sequence")
    if kwargs.get("use_cache", getattr(config, "use_cache", True)) is False:
        raise KvkeepError("use_cache is False: then there is no KV to reuse")
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise KvkeepError("attention_mask has zeros: reuse needs a prompt without padding")


def _name(model: Any) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} {name}".strip()
