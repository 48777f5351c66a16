"""Small models with random weights, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = dict(
    vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
WINDOW = 24
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "mistral, all layers with a window": lambda: transformers.MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma3, three layers in four with a window": lambda: transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=200, n_embd=64, n_layer=4, n_head=4, n_positions=1024, bos_token_id=1, eos_token_id=None
    ),
}


def loud(model: Any, seed: int = 0) -> Any:
    """The model with larger weights: small random ones answer the same token over and over."""
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model.eval()


def model_of(config: Any, seed: int = 0) -> Any:
    if isinstance(config, str):
        config = CONFIGS[config]()
    return loud(transformers.AutoModelForCausalLM.from_config(config), seed)


def vision_model() -> Any:
    """A model of the mRoPE family, with eyes."""
    text = dict(SMALL, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]})
    vision = dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8
    )
    return loud(transformers.Qwen2VLForConditionalGeneration(config))


def image_request() -> dict[str, Any]:
    """Arguments of `generate` with one picture of eight tokens' worth, four by eight patches, merged two by two."""
    picture = [7, *[5] * 8, 8]
    prompt = torch.tensor([[20, 21, 22, *picture, 23, 24, 25]])
    return dict(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        mm_token_type_ids=(prompt == 5).int(),
        pixel_values=torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
        image_grid_thw=torch.tensor([[1, 4, 8]]),
    )


def ids(count: int, seed: int) -> Any:
    """A prompt, `[1, count]`, without special tokens."""
    return torch.randint(10, 200, (1, count), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, prompt: Any, tokens: int = 24) -> Any:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
