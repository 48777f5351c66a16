"""kvkeep.transformers on small random models: the same tokens with and without reuse."""

from __future__ import annotations

import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import CONFIGS, SMALL, WINDOW, greedy, ids, model_of  # noqa: E402

from kvkeep import KVCache  # noqa: E402
from kvkeep.transformers import CachedGenerator, UnsupportedModelError  # noqa: E402


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
        # With a mask: without one a generated token that looks like padding would be hidden, as in plain `generate`.
        answer = generator.generate(
            with_reuse, attention_mask=torch.ones_like(with_reuse), max_new_tokens=24, do_sample=False
        )
        with_reuse = torch.cat([answer, ids(9, 50 + turn)], dim=1)
        assert torch.equal(plain, with_reuse)
        if turn:
            # All but the last turn's words, the token that was generated last and the partial block.
            assert generator.last.cached_tokens >= (before - 9 - 1) // 8 * 8, generator.last


def test_a_padding_token_in_a_prompt_counts_where_plain_generate_lets_it_count() -> None:
    """Without a mask `generate` hides every token that looks like padding: a prompt with one in its middle was read
    otherwise with reuse than without."""
    model = model_of("qwen2", seed=3).double()
    generator = CachedGenerator(model, KVCache(max_size_gb=0.1), block_tokens=8)
    prompt = ids(60, 5)
    prompt[0, 20] = 0
    for _ in range(2):
        assert torch.equal(
            generator.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False),
            greedy(model, prompt, 12),
        )
    assert generator.last is not None and generator.last.cached_tokens == 56
    hidden = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert not torch.equal(hidden, greedy(model, prompt, 12)), "this test would see nothing"
    assert torch.equal(generator.generate(prompt, max_new_tokens=12, do_sample=False), hidden)
    assert "hides more than padding on the left" in (generator.last.plain or "")


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
    one, other = (CachedGenerator(model_of("llama", seed), cache, block_tokens=8) for seed in (1, 2))
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
    model = model_of("llama").to(torch.bfloat16)
    generator = CachedGenerator(model, KVCache(max_size_gb=0.1), block_tokens=8)
    for _ in range(2):
        torch.manual_seed(0)
        output = generator.generate(ids(60, 1), max_new_tokens=5, do_sample=True, return_dict_in_generate=True)
        assert output.sequences.shape == (1, 65)
    assert generator.last is not None and generator.last.cached_tokens == 56
    assert generator.namespace.dtype == "bf16"


def test_answers_are_not_stored_if_not_wanted() -> None:
    generator = CachedGenerator(
        model_of("llama"), KVCache(max_size_gb=0.1), block_tokens=8, store_answers=False
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
