"""A Llama of about 100 million parameters with random weights, and adapters for it: made here, loaded from nowhere."""

from __future__ import annotations

import json
from pathlib import Path


def llama(folder: Path, seed: int = 1, layers: int = 12) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=16384, hidden_size=640, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=10, num_key_value_heads=2,
            head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, initializer_range=0.08,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def tokenizer(folder: Path, words: int = 16384) -> None:
    """One word a token: a server wants to turn tokens into text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        made = Tokenizer(models.WordLevel({f"t{number}": number for number in range(words)}, unk_token="t0"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=made, bos_token="t1", eos_token="t2", unk_token="t0").save_pretrained(folder)


def lora(folder: Path, seed: int, layers: int = 12) -> str:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        for name, out in (("q_proj", 640), ("v_proj", 128)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(8, 640, generator=draw).to(torch.bfloat16)
            weights[f"{at}.lora_B.weight"] = torch.randn(out, 8, generator=draw).to(torch.bfloat16) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none", "task_type": "CAUSAL_LM"})
    )
    return str(folder)
