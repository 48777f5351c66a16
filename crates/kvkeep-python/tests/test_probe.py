"""Which models are refused when a generator is made, and that trying them out leaves them as they were."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import SMALL, WINDOW, greedy, ids, loud, model_of  # noqa: E402

from kvkeep import KVCache  # noqa: E402
from kvkeep.transformers import CachedGenerator, UnsupportedModelError  # noqa: E402

Llama = transformers.LlamaForCausalLM


def refusal(model: Any) -> str:
    """Why the model is refused."""
    with pytest.raises(UnsupportedModelError) as raised:
        CachedGenerator(model, KVCache(max_size_gb=0.01), block_tokens=8)
    assert isinstance(raised.value, TypeError)
    assert type(model).__name__ in str(raised.value), "it is refused by name"
    return str(raised.value)


class TokenShift(Llama):
    """Mixes each token with the one before, which it remembers on the model: hidden state outside the cache."""

    last: Any = None

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        first = torch.zeros_like(embedded[:, :1]) if self.last is None or self.last.shape[0] != len(embedded) else self.last
        before = torch.cat([first, embedded[:, :-1]], dim=1)
        self.last = embedded[:, -1:]
        return super().forward(inputs_embeds=embedded + before, **kwargs)


class Scaled(Llama):
    """Scales what it reads by the number of tokens that it reads at once: KV depends on what follows."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) * input_ids.shape[1] ** 0.5, **kwargs)


class Counting(Llama):
    """Its every reading changes the next one."""

    readings = 0

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        self.readings += 1
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids).roll(self.readings, -1), **kwargs)


class Mean(Llama):
    """Adds the mean of all that it reads: bidirectional."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embedded + embedded.mean(dim=1, keepdim=True), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [TokenShift, Scaled, Counting, Mean])
def test_a_model_whose_kv_depends_on_more_than_the_tokens_before_is_refused(kind: Any, dtype: Any) -> None:
    """State outside the cache, scales by length and attention in both directions were accepted, and answered wrong."""
    assert "KV" in refusal(loud(kind(transformers.LlamaConfig(**SMALL))).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rounding_refuses_nobody(dtype: Any) -> None:
    for config in ("llama", "gemma3, three layers in four with a window", "gpt2"):
        CachedGenerator(model_of(config).to(dtype), KVCache(max_size_gb=0.01))
    experts = transformers.MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2)
    if dtype != torch.float64:  # torch has no such experts
        CachedGenerator(model_of(experts).to(dtype), KVCache(max_size_gb=0.01))


def test_bidirectional_models_are_refused() -> None:
    """BERT and its kin generate, badly, but look both ways unless they are told otherwise: accepted, and wrong."""
    bert = dict(vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    assert "what follows" in refusal(loud(transformers.BertLMHeadModel(transformers.BertConfig(**bert))))
    gemma = transformers.Gemma3TextConfig(**SMALL, head_dim=16, use_bidirectional_attention=True)
    assert "bidirectional" in refusal(model_of(gemma))


def test_a_window_that_attention_ignores_is_refused() -> None:
    """Moshi's state forgets what lies behind its window, but its attention looks there when it reads a prompt at once:
    answers behind cached tokens were other answers, and no three tokens show it."""
    config = transformers.MoshiConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, ffn_dim=128,
        sliding_window=WINDOW, max_position_embeddings=512, audio_vocab_size=50,
    )  # fmt: skip
    assert "window" in refusal(loud(transformers.MoshiForCausalLM(config)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    assert "prompt's length" in refusal(model_of(transformers.LlamaConfig(**SMALL, rope_parameters=rope)))


def test_rope_that_was_changed_on_the_model_is_refused_too() -> None:
    model = model_of("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    assert "prompt's length" in refusal(model)


def test_models_that_are_not_whole_are_refused_by_name() -> None:
    """Meta tensors and offloaded weights raised raw errors of torch."""
    with torch.device("meta"):
        meta = Llama(transformers.LlamaConfig(**SMALL))
    assert "load it whole" in refusal(meta)
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(model_of("llama"), execution_device="cpu")
    assert "load it whole" in refusal(offloaded)


def test_an_offload_to_disk_is_refused_by_name(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    assert "load it whole" in refusal(accelerate.disk_offload(model_of("llama"), str(tmp_path), execution_device="cpu"))


def test_encoder_decoders_and_other_objects_are_refused_by_name() -> None:
    small = dict(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=200, decoder_start_token_id=0)
    assert "encoder" in refusal(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)))
    with pytest.raises(UnsupportedModelError):
        CachedGenerator(torch.nn.Linear(2, 2), KVCache(max_size_gb=0.01))
    with pytest.raises(UnsupportedModelError):
        CachedGenerator(object(), KVCache(max_size_gb=0.01))


def test_a_quantised_model_is_served_right_or_refused_by_name() -> None:
    """Quantised models raised raw errors when their weights were looked at."""
    model, prompt = model_of("llama"), ids(40, 1)
    try:
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    except Exception as error:
        pytest.skip(f"this torch quantises nothing here: {error}")
    try:
        generator = CachedGenerator(model, KVCache(max_size_gb=0.1), block_tokens=8)
    except UnsupportedModelError:
        return
    expected = greedy(model, prompt, 8)
    for _ in range(2):
        assert torch.equal(generator.generate(prompt, max_new_tokens=8, do_sample=False), expected)


def test_a_generate_of_its_own_is_refused() -> None:
    class Other(Llama):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, **kwargs)

    assert "generate of its own" in refusal(loud(Other(transformers.LlamaConfig(**SMALL))))


@pytest.mark.parametrize("mode", [True, False])
def test_trying_a_model_out_leaves_it_as_it_was(mode: bool) -> None:
    """Modes, random numbers, gradients, attributes and buffers are what they were."""
    for config in ("gemma3, three layers in four with a window", "gpt2"):
        model = model_of(config).train(mode)
        for module in model.modules():
            module.training = mode if isinstance(module, torch.nn.Linear) else not mode
        before = [(dict(vars(module)), dict(module._buffers), dict(module._parameters)) for module in model.modules()]
        random, enabled = torch.get_rng_state(), torch.is_grad_enabled()
        CachedGenerator(model, KVCache(max_size_gb=0.01))
        assert torch.equal(random, torch.get_rng_state()) and torch.is_grad_enabled() == enabled
        for module, kept in zip(model.modules(), before, strict=True):
            for now, then in zip((vars(module), module._buffers, module._parameters), kept, strict=True):
                assert now.keys() == then.keys()
                assert all(now[key] is then[key] for key in then), type(module).__name__
        assert all(parameter.grad is None for parameter in model.parameters())


def test_sampling_gives_the_same_answers_with_a_seed() -> None:
    """The probe, the look-up and the store take none of the random numbers that sampling takes."""
    model, prompt = model_of("llama"), ids(40, 1)
    torch.manual_seed(7)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=True)
    torch.manual_seed(7)
    generator = CachedGenerator(model, KVCache(max_size_gb=0.1), block_tokens=8)
    for _ in range(2):
        assert torch.equal(generator.generate(prompt, max_new_tokens=12, do_sample=True), expected)
        torch.manual_seed(7)
