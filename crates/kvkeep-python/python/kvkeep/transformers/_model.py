"""What a model must be so that KV of its prefixes can be reused: told by its configuration, then by reading.

Invariant: a `Layout` is only given for a model that has shown, by reading four tokens in several ways, that the KV of a
token depends on the tokens up to it alone, that a state rebuilt from KV is as good as the one it came from, and that
nothing else carries over from one reading to the next. A list of known architectures was the alternative: it is wrong
about the next one, and about a known one with other settings.

The probe leaves the model as it was: attributes and buffers that a reading sets are set back, gradients and random
numbers are not touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvkeep._errors import UnsupportedModelError, UnsupportedTensorError
from kvkeep._tensors import dtype_code

_RECORDS_WINDOWS = Version("5.23")
"""With 5.17 a cache that was built with more than a window fails in attention; tested from this one on."""

CACHE_ARGUMENT = next(
    (name for name in ("cache", "past_key_values") if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters),
    "past_key_values",
)  # fmt: skip
"""What this release of transformers calls a model's state in calls."""

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_LEFT_BY_A_REQUEST = ("rope_deltas",)
"""Attributes in which models of the mRoPE family keep the offset of the last request's positions. With a state built
from KV they would take the offset of another request for this one's; None means: count from the first token."""

_LONGEST_WINDOW = 16384
"""Of windows that are tried out: that takes the state of twice as many tokens."""

_APART = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far KV may differ, relative to its norm, between ways to read the same tokens: rounding, with room. What depends
on more than the tokens before it is at 0.1 and more."""
_APART_HALF = 0.15
"""In half precision, where rounding may send a token to another expert."""


@dataclass(frozen=True)
class Layout:
    """One token's KV in this model, and where each layer keeps it."""

    layers: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]


def inner(model: Any) -> Any:
    """The transformers model in a wrapper of PEFT or `torch.compile`."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def name_of(model: Any) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(inner(model)).__name__} {name}".strip()


def text_config(model: Any) -> Any:
    """The configuration of the part that has the KV."""
    return model.config.get_text_config(decoder=True)


def new_cache(model: Any) -> DynamicCache:
    """An empty state, as `generate` makes one."""
    return DynamicCache(config=text_config(model))


def record_windows(cache: DynamicCache) -> None:
    """From now on layers with a window keep all they read."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()


def read(model: Any, tokens: Sequence[Sequence[int]], cache: DynamicCache) -> torch.Tensor:
    """Lets the model read tokens behind what `cache` holds, rows of the same length; returns its last logits."""
    ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
    kwargs: dict[str, Any] = {CACHE_ARGUMENT: cache}
    if "logits_to_keep" in inspect.signature(inner(model).forward).parameters:
        kwargs["logits_to_keep"] = 1
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=True, return_dict=True, **kwargs).logits
    return logits[:, -1]


def forget_requests(model: Any) -> None:
    """Sets back what earlier requests left on the model for their own next token."""
    for module in model.modules():
        for attribute in _LEFT_BY_A_REQUEST:
            if module.__dict__.get(attribute) is not None:
                setattr(module, attribute, None)


def leaves_state(model: Any) -> bool:
    """Is there anything for `forget_requests` to do, ever?"""
    return any(attribute in module.__dict__ for module in model.modules() for attribute in _LEFT_BY_A_REQUEST)


def check_model(model: Any) -> None:
    """Refuses what can be refused without reading anything.

    Raises `UnsupportedModelError`.
    """
    if not hasattr(model, "generate") or not hasattr(model, "config") or not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(f"a {type(model).__name__} is no transformers model that generates")
    reason = _unlike_others(model) or _unlike_causal(model) or _no_kv_by_token(model)
    if reason is not None:
        raise UnsupportedModelError(f"{name_of(model)}: {reason}")


def layout_of(model: Any) -> Layout:
    """The layout of the model's KV, after the probe.

    Raises `UnsupportedModelError`.
    """
    name = name_of(model)
    try:
        with _left_as_it_was(model):
            layout, reason = _probe(model)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{name}: it cannot read plain tokens: {type(error).__name__}: {error}") from error
    if layout is None:
        raise UnsupportedModelError(f"{name}: {reason}")
    return layout


def padding_is_harmless(model: Any) -> bool:
    """Is the KV of a row the same with padding on its left, also behind a rebuilt state? Tried out the way `generate`
    goes."""
    first, second, third, padding = _probe_tokens(model)
    ids = torch.tensor([[padding, first, second], [first, second, third]], device=model.device)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=model.device)
    off = dict(max_new_tokens=1, do_sample=False, num_beams=1, num_return_sequences=1, return_dict_in_generate=False)
    states = []
    try:
        with _left_as_it_was(model):
            for known in (0, 2):
                forget_requests(model)
                cache = new_cache(model)
                if known:
                    for layer, (k, v) in zip(cache.layers, states[0], strict=True):
                        layer.update(k[:, :, :known].clone(), v[:, :, :known].clone())
                record_windows(cache)
                model.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **off)
                states.append([(layer.keys, layer.values) for layer in cache.layers])
        whole, rebuilt = ([(k[:, :, -2:], v[:, :, -2:]) for k, v in state] for state in states)
        padded, plain = [(k[0, :, 1:], v[0, :, 1:]) for k, v in states[0]], [(k[1, :, :2], v[1, :, :2]) for k, v in states[0]]
    except Exception:
        return False
    return max(_worst(padded, plain), _worst(rebuilt, whole)) <= _tolerance(padded[0][0].dtype)


def _unlike_others(model: Any) -> str | None:
    """Why this object cannot be driven as a transformers model is."""
    base = inner(model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return "not all of its weights are loaded (meta tensors, or offloaded): load it whole, without offloading"
    for method in ("generate", "_sample"):
        own = getattr(getattr(base, method, None), "__func__", None)
        if own is not getattr(GenerationMixin, method, own):
            return f"it has a {method} of its own, and kvkeep knows only that of transformers"
    return None


def _unlike_causal(model: Any) -> str | None:
    """Why its configuration says that KV depends on more than the tokens before."""
    if model.config.is_encoder_decoder:
        return "an encoder-decoder reads its prompt in the encoder, which has no KV to keep"
    config = text_config(model)
    if getattr(config, "use_bidirectional_attention", None):
        return "with bidirectional attention KV depends on what follows"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "chunked attention is not supported"
    for kind in _rope_kinds(model, config):
        if any(word in kind for word in _LENGTH_DEPENDENT_ROPE):
            return f"with {kind} RoPE scaling KV depends on the prompt's length"
    return None


def _rope_kinds(model: Any, config: Any) -> Iterator[str]:
    """The kinds of RoPE that the configuration names and the modules use."""
    for attribute in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, attribute, None)
        if isinstance(parameters, dict):
            for part in (parameters, *parameters.values()):
                if isinstance(part, dict):
                    yield str(part.get("rope_type") or part.get("type") or "")
    for module in model.modules():
        kind = module.__dict__.get("rope_type")
        yield from map(str, kind.values() if isinstance(kind, dict) else () if kind is None else (kind,))


def _no_kv_by_token(model: Any) -> str | None:
    """Why its state cannot be cut by token."""
    no_kv = "its state cannot be cut by token, so no prefix of it can be reused"
    if getattr(model, "_is_stateful", False) or not inner(model)._supports_default_dynamic_cache():
        return f"{no_kv} (it keeps no DynamicCache)"
    try:
        layers = new_cache(model).layers
    except Exception as error:
        return f"{no_kv} (its configuration makes no DynamicCache: {error})"
    foreign = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if foreign:
        return f"{no_kv} (it has {', '.join(sorted(foreign))})"
    if any(layer.is_sliding for layer in layers) and Version(transformers.__version__) < _RECORDS_WINDOWS:
        return (
            f"transformers {transformers.__version__} does not keep what sliding windows forget: "
            f"upgrade it to {_RECORDS_WINDOWS} or later"
        )
    return None


def _probe(model: Any) -> tuple[Layout | None, str]:
    """Reads two rows that differ in their third token: at once, behind one rebuilt token, and behind two."""
    forget_requests(model)
    first, second, third, other = _probe_tokens(model)
    rows = [[first, second, third], [first, second, other]]
    cache = new_cache(model)
    record_windows(cache)
    logits = read(model, rows, cache)
    layout, reason = _layout(cache)
    if layout is None:
        return None, reason
    whole = [(layer.keys, layer.values) for layer in cache.layers]
    tolerance = _tolerance(layout.dtype)
    head = [(k[:, :, :2], v[:, :, :2]) for k, v in whole]
    if _worst([(k[:1], v[:1]) for k, v in head], [(k[1:], v[1:]) for k, v in head]) > tolerance / 10:
        return None, "the KV of a token depends on what follows it (attention in both directions?)"
    for known, count in ((1, 2), (2, 1)):
        forget_requests(model)
        rebuilt = new_cache(model)
        for layer, (k, v) in zip(rebuilt.layers, whole, strict=True):
            layer.update(k[:count, :, :known].clone(), v[:count, :, :known].clone())
        record_windows(rebuilt)
        again = read(model, [row[known:] for row in rows[:count]], rebuilt)
        kv = [(layer.keys, layer.values) for layer in rebuilt.layers]
        if any(k.shape[2] < 3 for k, _ in kv):
            return None, "it does not add one entry a token to its state"
        expected = [(k[:count], v[:count]) for k, v in whole]
        if max(_worst(kv, expected), _worst([(again, again)], [(logits[:count], logits[:count])])) > tolerance:
            return None, f"{known} and {3 - known} tokens leave other KV than 3 at once (a state outside the cache?)"
    reason = _sees_behind_windows(model, layout)
    return (layout, "") if reason is None else (None, reason)


def _sees_behind_windows(model: Any, layout: Layout) -> str | None:
    """Reads three tokens behind a made-up past that is longer than the window. Its first entry that the window has kept
    differs in two rows: the first token may see it, the others may not. A model that shows them more than its state
    keeps reads a prompt at once in another way than in two pieces."""
    cache = new_cache(model)
    windows = [number for number, layer in enumerate(cache.layers) if layer.is_sliding]
    if not windows:
        return None
    window = max(cache.layers[number].sliding_window for number in windows)
    if window + 8 > (getattr(text_config(model), "max_position_embeddings", None) or window + 8):
        return None  # no prompt is that long
    if window > _LONGEST_WINDOW:
        return f"its window of {window} tokens is too long to be tried out"
    first, second, third, _ = _probe_tokens(model)
    for layer, device in zip(cache.layers, layout.devices, strict=True):
        past = [
            torch.zeros((2, layout.kv_heads, window + 5, head_dim), dtype=layout.dtype, device=device)
            for head_dim in (layout.head_dim, layout.v_head_dim)
        ]
        layer.update(*past)
    for number in windows:
        cache.layers[number].values[1, :, 0] = window  # uniform attention makes one of it
    record_windows(cache)
    forget_requests(model)
    logits = read(model, [[first, second, third]] * 2, cache)
    shown: list[tuple[Any, Any]] = [(logits, logits)]
    if windows[0] + 1 < len(cache.layers):
        after = cache.layers[windows[0] + 1]
        shown = [(after.keys[:, :, -2:], after.values[:, :, -2:])]
    if _worst([(k[:1], v[:1]) for k, v in shown], [(k[1:], v[1:]) for k, v in shown]) > _tolerance(layout.dtype) / 10:
        return "tokens see more than the window of its state keeps, so reading in pieces is not reading at once"
    return None


def _layout(cache: DynamicCache) -> tuple[Layout | None, str]:
    """The layout of a state of two rows and three tokens."""
    layers = cache.layers
    if not layers or any(not layer.is_initialized or layer.keys is None or layer.values is None for layer in layers):
        return None, "not every layer keeps KV of its own in a DynamicCache"
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    if any(tensor.ndim != 4 or tensor.shape[0] != 2 or tensor.shape[2] != 3 for tensor in tensors):
        return None, "its state cannot be cut by token (three tokens do not leave three entries in every layer)"
    shapes = {(layer.keys.shape[1], layer.values.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers}
    dtypes = {tensor.dtype for tensor in tensors}
    if len(shapes) != 1 or len(dtypes) != 1:
        return None, "its layers differ in KV heads, head_dim or dtype"
    (kv_heads, v_heads, head_dim, v_head_dim), dtype = shapes.pop(), dtypes.pop()
    if kv_heads != v_heads or 0 in (kv_heads, head_dim, v_head_dim):
        return None, "its keys and values differ in heads, or one of them is empty"
    try:
        dtype_code(dtype)
    except UnsupportedTensorError as error:
        return None, str(error)
    devices = tuple(layer.keys.device for layer in layers)
    return Layout(len(layers), kv_heads, head_dim, v_head_dim, dtype, devices), ""


def _probe_tokens(model: Any) -> list[int]:
    """Four token ids that mean nothing special to the model."""
    config = text_config(model)
    special: set[int] = set()
    for part in {id(model.config): model.config, id(config): config}.values():
        for attribute, value in vars(part).items():
            if attribute.endswith(("token_id", "token_ids", "token_index")):
                special.update(number for number in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(number, int))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    usable = (token for token in range(vocabulary // 3, vocabulary) if token not in special)
    tokens = [token for token, _ in zip(usable, range(4))]
    if len(tokens) < 4:
        raise UnsupportedModelError(f"{name_of(model)}: its vocabulary has no four plain tokens to try it with")
    return tokens


def _tolerance(dtype: torch.dtype) -> float:
    return _APART.get(dtype, _APART_HALF)


def _worst(some: Sequence[tuple[Any, Any]], others: Sequence[tuple[Any, Any]]) -> float:
    """The largest difference of a layer's K or V, relative to its norm; infinite if there is no number."""
    worst = 0.0
    for pair, other_pair in zip(some, others, strict=True):
        for one, other in zip(pair, other_pair, strict=True):
            one, other = one.double(), other.double()
            apart = float((one - other).norm() / other.norm().clamp_min(1e-30)) if one.shape == other.shape else float("inf")
            worst = max(worst, apart if apart == apart else float("inf"))
    return worst


@contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Sets back the attributes, buffers and modes of all modules, and torch's random numbers."""
    modules = list(model.modules())
    before = [(dict(vars(module)), dict(module._buffers)) for module in modules]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                if module.training:
                    module.training = False  # dropout would make every reading another one
            yield
        finally:
            for module, (attributes, buffers) in zip(modules, before, strict=True):
                _set_back(vars(module), attributes)
                _set_back(module._buffers, buffers)


def _set_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if now.get(key) is not value:
            now[key] = value
