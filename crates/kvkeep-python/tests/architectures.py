"""Every causal architecture of the installed transformers, small and with random weights: what kvkeep does with it.

    python architectures.py store DIR PART PARTS     cold and warm, in a fresh disk cache under DIR; one JSON line each
    python architectures.py reuse DIR PART PARTS     the same models again in this process, from what is on the disk
    python architectures.py table DIR FILE           the page docs/models.md, from what both have found

A configuration is made small by the names of its fields (`shrink`), and where that is not enough by `PATCHES`. What
cannot be built that way, or does not generate from text alone, is listed with the reason, not left out.
`test_architectures.py` runs it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from kvkeep import KVCache
from kvkeep.transformers import CachedGenerator, UnsupportedModelError

VOCABULARY, LAYERS, WINDOW, BLOCK = 160, 4, 16, 8
SHARED, NEW = 48, 6
"""Tokens that the prompts share, three windows, and tokens that are generated."""

_SIZES: list[tuple[str, int]] = [
    # The first pattern that matches a field's whole name wins.
    (r"vocab_size|n_vocab|padded_vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"(num_)?(hidden_|decoder_|encoder_)?layers|n_layers?|num_layers|depth|num_decoder_layers", LAYERS),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_target_positions", 1024),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num|swa_num_key_value_heads|global_num_key_value_heads", 2),
    (r"num_attention_heads|n_heads?|num_heads|(decoder|encoder)_attention_heads|swa_num_attention_heads", 4),
    (r"(global_|attention_|swa_)?head_dim|kv_channels|v_head_dim|qk_nope_head_dim|qk_rope_head_dim|mamba_d_head|d_kv", 16),
    (r"qk_head_dim", 32),
    (r"rotary_dim", 8),
    (r"linear_(key|value)_head_dim|index_head_dim", 16),
    (r"linear_num_(key|value)_heads|index_n_heads", 4),
    (r"kv_lora_rank", 24),
    (r"q_lora_rank|o_lora_rank|rank|lora_rank", 32),
    (r"hidden_size_per_layer_input", 16),
    (r".*(intermediate|ffn|inner|mlp).*(size|dim)|d_ff|n_inner|dim_ff|ffn_hidden_size", 96),
    (r"(.*_)?hidden_size|d_model|n_embd|n_embed|embedding_size|embed_dim|dim|word_embed_proj_dim|emb_dim|out_hidden_size|model_dim", 64),
    (r"(num|n)_(local_|routed_)?experts|num_moe_experts|moe_num_experts|num_routed_experts", 4),
    (r".*experts_per_tok(en)?|.*top_?k(_experts)?|moe_k|num_selected_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group|mamba_n_groups|n_groups", 1),
    (r"sliding_window|attention_window|attention_chunk_size|window_size|sliding_window_size|local_window_size", WINDOW),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_head_dim", 16),
    (r"mamba_d_ssm", 128),
    (r"(mamba_|ssm_)?(d_state|state_size|state_dim)", 8),
    (r"image_size|patch_size", 0),
]
"""How large fields are made, by name; 0 leaves them."""

_NEEDED = "head_dim|num_key_value_heads|n_group|topk_group|num_experts_per_tok|n_routed_experts|n_shared_experts"
"""Fields that may be None, where small models need a number."""

_SECTIONS = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}}
_HALF_SECTIONS = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
}
_HYBRID = dict(attn_layer_indices=[1, 3])
PATCHES: dict[str, dict[str, Any]] = {
    "bamba": _HYBRID,
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2, mamba_n_heads=8, mamba_d_head=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "mamba2": dict(num_heads=8, head_dim=16, n_groups=1),
    "zamba2": dict(n_mamba_heads=8, mamba_headdim=16, hybrid_layer_ids=[1, 3], adapter_rank=8),
    "reformer": dict(is_decoder=True),
    "nemotron": dict(head_dim=16),
    "glm5_next": dict(num_key_value_heads=4),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm46v", "glmga", "glm4v", "glm_ocr"), _SECTIONS),
    "glm4v_moe": _HALF_SECTIONS,
    "llama4_text": dict(layer_types=["full_attention"] * LAYERS),
}
"""What the names of the fields do not tell, by model type."""


def shrink(fields: dict[str, Any], layers: int | None = None) -> dict[str, Any]:
    """The fields of a configuration, smaller; lists with an entry for each layer keep every kind that they have."""
    count = next((fields[name] for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if isinstance(fields.get(name), int)), layers)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "per_layer_config" and value:
            other = shrink(next(iter(value.values())), count)
            if "head_dim" in other:
                other["head_dim"] *= 2  # as in the large ones: layers that differ
            small[name] = {layer: other for layer in (1, 3)}
        elif isinstance(value, dict):
            small[name] = shrink(value, count) if name.endswith("config") or "model_type" in value else _rope(value)
        elif isinstance(value, list) and value and len(value) == count:
            small[name] = _pattern(value)
        elif name.endswith(("token_id", "token_ids", "token_index")):
            small[name] = _token(name)
        elif name == "is_decoder":
            small[name] = True  # otherwise BERT and its kin look both ways, and do not generate
        elif value is None and not re.fullmatch(_NEEDED, name):
            continue
        elif value is None:
            small[name] = next(size for pattern, size in _SIZES if re.fullmatch(pattern, name))
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = next((size or value for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)
        else:
            small[name] = value
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small.get("num_attention_heads", 4)  # latent attention expands to all heads
    return small


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings for heads of 16."""
    value = {name: _rope(part) if isinstance(part, dict) else part for name, part in value.items()}
    if value.get("mrope_section"):
        value["mrope_section"] = [2, 3, 3]
    if "rope_theta" in value and value["rope_theta"] is None:
        value["rope_theta"] = 10000.0
    return value


def _pattern(values: list[Any]) -> list[Any]:
    """As many as there are layers, each kind at least once where there are not too many."""
    kinds = [value for number, value in enumerate(values) if value not in values[:number]]
    return [kinds[number % len(kinds)] for number in range(LAYERS)]


def _token(name: str) -> int | None:
    """Special tokens: none that ends an answer, the others all different and never in a prompt."""
    if name.startswith("eos"):
        return None
    known = {"pad_token_id": 0, "bos_token_id": 1}
    return known.get(name, 2 + zlib.crc32(name.encode()) % 17)


def config_of(model_type: str) -> Any:
    """A small configuration of this type."""
    kind = transformers.CONFIG_MAPPING[model_type]
    fields = _merged(shrink(kind().to_dict()), PATCHES.get(model_type, {}))
    for name in ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype"):
        fields.pop(name, None)
    config = kind(**fields)
    config._name_or_path = ""
    return config


def _merged(fields: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    nested = {name: _merged(fields[name], value) for name, value in patch.items() if isinstance(value, dict) and isinstance(fields.get(name), dict)}
    return fields | patch | nested


def model_of(model_type: str, class_name: str) -> Any:
    """A small model of this type. Its weights depend on their names and shapes alone, and make every token count."""
    config = config_of(model_type)
    torch.manual_seed(0)
    model = _built(getattr(transformers, class_name), config)
    generator = torch.Generator().manual_seed(zlib.crc32(model_type.encode()))
    tied = set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point() and id(parameter) not in tied:
                tied.add(id(parameter))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def _built(kind: Any, config: Any) -> Any:
    """A model of this class; the text's part of the configuration where the class wants that. Built without memory first:
    what the names of the fields leave large takes the machine's."""
    with torch.device("meta"):
        try:
            parameters = sum(parameter.numel() for parameter in kind(config).parameters())
        except AttributeError:
            config = config.get_text_config(decoder=True)
            parameters = sum(parameter.numel() for parameter in kind(config).parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"the names of its fields leave it large, {parameters / 1e6:.0f} million parameters")
    return kind(config).float().eval()


_MOST_PARAMETERS = 50_000_000


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts that share their beginning."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(24, VOCABULARY, (1, SHARED + 40), generator=generator)
    return ids[:, : SHARED + 9], torch.cat([ids[:, :SHARED], ids[:, SHARED + 9 : SHARED + 26]], dim=1)


def answer(generate: Any, ids: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits, greedy."""
    output = generate(ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **more)
    return output.sequences, torch.stack(output.logits, dim=1)


def architectures() -> list[tuple[str, str]]:
    """Model types and classes, by name: all causal ones, and those that take images and text."""
    found: dict[str, str] = {}
    for names in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, class_name in names.items():
            found.setdefault(model_type, class_name if isinstance(class_name, str) else class_name[0])
    return sorted(found.items())


class Finding(Exception):
    """Why there is nothing to compare: an outcome and its reason."""


def store(model_type: str, class_name: str, cache: KVCache) -> dict[str, Any]:
    """Cold and warm in one process: how far the logits of warm answers are from those of plain `generate`."""
    with _finding("cannot be built"):
        model = model_of(model_type, class_name)
    first, second = prompts()
    with _finding("does not generate from text alone"):
        expected = [answer(model.generate, ids) for ids in (first, second)]
        if not all(bool(torch.isfinite(logits).all()) for _, logits in expected):
            raise ValueError("its logits are not numbers")
    changed = first.clone()
    changed[0, SHARED - 3] = changed[0, SHARED - 3] - 1
    sees = float((answer(model.generate, changed)[1] - expected[0][1]).abs().max())
    try:
        generator = CachedGenerator(model, cache, block_tokens=BLOCK)
    except UnsupportedModelError as error:
        return {"outcome": "refused", "why": str(error).split(": ", 1)[-1]}
    apart, cached = _compare(generator, [first, second, first], [*expected, expected[0]])
    outcome = _outcome(generator)
    padded = _padded(model, generator, first, second)
    return {"outcome": outcome, "apart": apart,
            "cached": cached, "sees": sees, "padded": padded, "tokens": expected[1][0].tolist(), "logits": expected[1][1].tolist()}  # fmt: skip


def reuse(model_type: str, class_name: str, cache: KVCache, before: dict[str, Any]) -> dict[str, Any]:
    """The same model in a new process, with what the other one left on the disk."""
    model = model_of(model_type, class_name)
    generator = CachedGenerator(model, cache, block_tokens=BLOCK)
    apart, cached = _compare(generator, [prompts()[1]], [(torch.tensor(before["tokens"]), torch.tensor(before["logits"]))])
    return {"outcome": _outcome(generator), "apart": apart, "cached": cached}


def _compare(generator: CachedGenerator, prompts: list[Any], expected: list[Any]) -> tuple[float | None, list[int]]:
    """The largest difference of the logits, None if tokens differ, and how many tokens were cached each time."""
    apart, cached = 0.0, []
    for ids, (tokens, logits) in zip(prompts, expected, strict=True):
        got, got_logits = answer(generator.generate, ids)
        if not torch.equal(got, tokens):
            return None, cached
        apart = max(apart, float((got_logits - logits).abs().max()))
        cached.append(generator.last.cached_tokens if generator.last else 0)
    return apart, cached


def _padded(model: Any, generator: CachedGenerator, first: torch.Tensor, second: torch.Tensor) -> dict[str, Any]:
    """Both prompts at once, the shorter one padded on its left."""
    width = second.shape[1]
    ids = torch.cat([torch.nn.functional.pad(first, (width - first.shape[1], 0)), second])
    mask = (ids != 0).long()
    try:
        tokens, logits = answer(model.generate, ids, attention_mask=mask)
    except Exception as error:
        return {"plain": f"{type(error).__name__}"}
    got, got_logits = answer(generator.generate, ids, attention_mask=mask)
    assert generator.last is not None
    return {
        "apart": float((got_logits - logits).abs().max()) if torch.equal(got, tokens) else None,
        "cached": list(generator.last.row_cached_tokens),
        "why": generator.last.plain,
    }


def _outcome(generator: CachedGenerator) -> str:
    assert generator.last is not None
    return "plain" if generator.last.plain else "reuses"


@contextlib.contextmanager
def _finding(outcome: str) -> Any:
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        raise Finding(outcome, f"{type(error).__name__}: {text}"[:160]) from error


class Patient(KVCache):
    """A cache that does not know how fast small models compute: it would not load what is computed sooner."""

    def store(self, *args: Any, **kwargs: Any) -> Any:
        return super().store(*args, **kwargs | {"compute_seconds": None})


def run(phase: str, folder: Path, part: int, parts: int) -> None:
    """One phase for every `parts`-th architecture; prints a JSON line for each and keeps them in the folder."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    lines = folder / f"{phase}-{part}.jsonl"
    stored = {line["type"]: line for line in read_lines(folder / f"store-{part}.jsonl")} if phase == "reuse" else {}
    only = os.environ.get("ARCHITECTURES", "")
    with Patient(max_size_gb=0.25, disk_path=folder / f"cache-{part}", disk_size_gb=2) as cache, lines.open("w") as out:
        for model_type, class_name in architectures()[part::parts]:
            before = stored.get(model_type, {})
            if (only and model_type not in only.split(",")) or (phase == "reuse" and before.get("outcome") != "reuses"):
                continue
            begin = time.perf_counter()
            try:
                if phase == "store":
                    found = store(model_type, class_name, cache)
                else:
                    found = reuse(model_type, class_name, cache, before)
            except Finding as finding:
                found = {"outcome": finding.args[0], "why": finding.args[1]}
            except Exception as error:
                found = {"outcome": "error", "why": f"{type(error).__name__}: {error}"}
            found = {"type": model_type, "class": class_name, "seconds": round(time.perf_counter() - begin, 2)} | found
            print(json.dumps(found), file=out, flush=True)
            print(json.dumps({key: value for key, value in found.items() if key not in ("tokens", "logits")}), flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(folder: Path) -> str:
    """docs/models.md: what the sweep found, in words."""
    reused = {line["type"]: line for path in sorted(folder.glob("reuse-*.jsonl")) for line in read_lines(path)}
    found = sorted((line for path in folder.glob("store-*.jsonl") for line in read_lines(path)), key=lambda line: str(line["type"]))
    rows, counts = [], dict.fromkeys(OUTCOMES, 0)
    for line in found:
        counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
        why = line.get("why") or ""
        if line["outcome"] == "reuses":
            apart = max(line["apart"], reused[line["type"]]["apart"], line["padded"].get("apart") or 0.0)
            why = f"logits within {apart:.0e}" + ("; padded batches run plain" if line["padded"].get("why") else "")
            if reused[line["type"]]["cached"] != [SHARED + 16]:
                why += "; computed again in the new process"
        why = re.sub(r"[|\n]", " ", why.removeprefix("StrictDataclassClassValidationError: Class validation error for validator "))
        rows.append(f"| `{line['type']}` | {line['class']} | {line['outcome']} | {why} |")
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    return _PAGE.format(version=transformers.__version__, summary=summary, rows="\n".join(rows))


OUTCOMES = ("reuses", "refused", "does not generate from text alone", "cannot be built")

_PAGE = """# Which architectures kvkeep works with

Every architecture that transformers {version} lists for causal language models, and for images with text, built small with random
weights: {summary}.

- **reuses**: cold, warm, warm with longer and shorter prompts, in a batch with padding on the left, and warm in a new process from the
  disk, the answers are the same tokens, and the logits (float32, of the order of ten) are as close as is written here.
- **refused**: `CachedGenerator` raises an `UnsupportedModelError` with this reason when it is made.
- **does not generate from text alone**, **cannot be built**: the small model does not, so nothing is known; the error is written here. The
  probe that runs when a generator is made decides.

The prompts are longer than the small models' sliding windows. `crates/kvkeep-python/tests/architectures.py` makes this page:
`make sweep` fails if it is not what it
finds, and `make test-integrations` tries each fourth.

| model type | class | kvkeep | |
|---|---|---|---|
{rows}
"""


if __name__ == "__main__" and sys.argv[1] == "table":
    Path(sys.argv[3]).write_text(table(Path(sys.argv[2])))
elif __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
