"""kvkeep.transformers on small random models: the same tokens with and without reuse."""

from __future__ import annotations

import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvkeep  # noqa: E402
from kvkeep import KVCache  # noqa: E402
from kvkeep.transformers import CachedGenerator, UnsupportedModelError  # noqa: E402

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


def model_of(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    # Small random weights answer the same token over and over; larger ones make every token count.
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def ids(count: int, seed: int) -> Any:
    return torch.randint(3, 200, (1, count), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, prompt: Any, tokens: int = 24) -> Any:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_greedy_answers_are_the_same_tokens_with_and_without_reuse(config: Any) -> None:
    model = model_of(config())
    generator = CachedGenerator(model, KVCache(max_size_gb=0.1), block_tokens=8)
    shared = ids(100, 1)
    prompts = [torch.cat([shared, ids(rest, 10 + rest)], dim=1) for rest in (30, 7, 1, 60)]
    # Prefixes of what was stored that end before, inside and behind the window.
    prompts += [shared[:, :10], shared[:, : WINDOW + 2], shared[:, :64], shared, shared]
    answers = set()
    for number, prompt in enumerate(prompts):
        expected = greedy(model, prompt)
        got = generator.generate(prompt, max_new_tokens=24, do_sample=False)
        assert torch.equal(got, expected), f"prompt {number}, {generator.last}"
        assert generator.last is not None and generator.last.prompt_tokens == prompt.shape[1]
        if number:
            shared_tokens = min(prompt.shape[1] - 1, 100)
            assert generator.last.cached_tokens >= shared_tokens // 8 * 8, generator.last
        answers.add(tuple(got[0, -24:].tolist()))
    assert len(answers) > 5, "the answers hardly depend on the prompts: this test would see nothing"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_turns_of_a_chat_reuse_the_answers_before_them(config: Any) -> None:
    # In double precision: torch's kernels round by the shape of a batch, so KV made while decoding differs from KV
    # made by prefill in its last bits, and in single precision a near tie between two tokens may fall otherwise.
    model = model_of(config(), seed=3).double()
    generator = CachedGenerator(model, KVCache(max_size_gb=0.1), block_tokens=8)
    plain = with_reuse = ids(40, 5)
    for turn in range(4):
        plain = torch.cat([greedy(model, plain), ids(9, 50 + turn)], dim=1)
        before = with_reuse.shape[1]
        answer = generator.generate(with_reuse, max_new_tokens=24, do_sample=False)
        with_reuse = torch.cat([answer, ids(9, 50 + turn)], dim=1)
        assert torch.equal(plain, with_reuse)
        if turn:
            # All but the last turn's words, the token that was generated last and the partial block.
            assert generator.last.cached_tokens >= (before - 9 - 1) // 8 * 8, generator.last


def test_a_generated_padding_token_is_a_token_like_others() -> None:
    """Without a mask `generate` hides every token that looks like padding, so a prompt with a generated padding
    token in it was read otherwise the second time."""
    model = model_of(CONFIGS["qwen2"](), seed=3).double()
    generator = CachedGenerator(model, KVCache(max_size_gb=0.1), block_tokens=8)
    prompt = ids(60, 5)
    prompt[0, 20] = 0
    for _ in range(2):
        assert torch.equal(generator.generate(prompt, max_new_tokens=12, do_sample=False), greedy(model, prompt, 12))
    assert generator.last is not None and generator.last.cached_tokens == 56


def test_time_to_first_token_falls(capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = model_of(config)
    generator = CachedGenerator(model, KVCache(max_size_gb=1), block_tokens=16)
    shared = ids(1024, 1)

    def ttft(generate: Any, prompt: Any) -> float:
        begin = time.perf_counter()
        generate(prompt, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - begin

    generator.generate(torch.cat([shared, ids(32, 2)], dim=1), max_new_tokens=1, do_sample=False)
    prompts = [torch.cat([shared, ids(32, 3 + number)], dim=1) for number in range(3)]
    cold = sorted(ttft(model.generate, prompt) for prompt in prompts)[1]
    warm = sorted(ttft(generator.generate, prompt) for prompt in prompts)[1]
    with capsys.disabled():
        print(f"\nTTFT of 1,056 tokens, 1,024 of them cached: {cold * 1e3:.0f} ms without, {warm * 1e3:.0f} ms with "
              f"reuse: {cold / warm:.1f}x")  # fmt: skip
    assert generator.last is not None and generator.last.cached_tokens == 1024
    assert warm < cold, "reuse that does not pay"


def test_two_models_with_one_name_never_share_kv() -> None:
    cache = KVCache(max_size_gb=0.1)
    one, other = (CachedGenerator(model_of(CONFIGS["llama"](), seed), cache, block_tokens=8) for seed in (1, 2))
    assert one.namespace.id != other.namespace.id
    prompt = ids(40, 1)
    one.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        other.generate(prompt, max_new_tokens=8, do_sample=False), greedy(other.model, prompt, 8)
    )
    assert other.last is not None and other.last.cached_tokens == 0
    salted = CachedGenerator(one.model, cache, block_tokens=8, salt="tenant")
    salted.generate(prompt, max_new_tokens=4, do_sample=False)
    assert salted.last is not None and salted.last.cached_tokens == 0
    again = CachedGenerator(one.model, cache, block_tokens=8)
    again.generate(prompt, max_new_tokens=4, do_sample=False)
    assert again.last is not None and again.last.cached_tokens == 32, "the same model is the same"


def test_bfloat16_models_and_sampling_work() -> None:
    model = model_of(CONFIGS["llama"]()).to(torch.bfloat16)
    generator = CachedGenerator(model, KVCache(max_size_gb=0.1), block_tokens=8)
    for _ in range(2):
        torch.manual_seed(0)
        output = generator.generate(ids(60, 1), max_new_tokens=5, do_sample=True, return_dict_in_generate=True)
        assert output.sequences.shape == (1, 65)
    assert generator.last is not None and generator.last.cached_tokens == 56
    assert generator.namespace.dtype == "bf16"


def test_answers_are_not_stored_if_not_wanted() -> None:
    generator = CachedGenerator(
        model_of(CONFIGS["llama"]()), KVCache(max_size_gb=0.1), block_tokens=8, store_answers=False
    )
    generator.generate(ids(16, 1), max_new_tokens=30, do_sample=False)
    assert generator.cache.stats()["entries"] == 2


@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=4),
        lambda: transformers.Mamba2Config(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=16, n_groups=1
        ),
        lambda: transformers.FalconH1Config(
            **SMALL, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1
        ),
        lambda: transformers.LlamaConfig(
            **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        ),
    ],
    ids=["mamba", "mamba2", "falcon-h1 (hybrid)", "llama with dynamic RoPE"],
)
def test_a_model_whose_state_cannot_be_cut_by_token_is_refused(config: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config())
    with pytest.raises(UnsupportedModelError) as raised:
        CachedGenerator(model, KVCache(max_size_gb=0.01))
    assert isinstance(raised.value, TypeError)
    assert any(word in str(raised.value) for word in ("cut by token", "depends on the prompt's length"))


def test_arguments_that_go_against_reuse_are_refused() -> None:
    generator = CachedGenerator(model_of(CONFIGS["llama"]()), KVCache(max_size_gb=0.01))
    prompt = ids(20, 1)
    for wrong in (
        dict(num_beams=2),
        dict(num_return_sequences=2, do_sample=True),
        dict(use_cache=False),
        dict(attention_mask=torch.tensor([[0] * 5 + [1] * 15])),
        dict(past_key_values=transformers.DynamicCache()),
    ):
        with pytest.raises(kvkeep.KvkeepError):
            generator.generate(prompt, max_new_tokens=2, **wrong)
    for bad in (ids(20, 1).repeat(2, 1), ids(20, 1)[0], [[1, 2]]):
        with pytest.raises(kvkeep.KvkeepError):
            generator.generate(bad, max_new_tokens=2)
    assert generator.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2).shape == (1, 22)
    assert generator.generate(ids(1, 1), max_new_tokens=2).shape == (1, 3)
