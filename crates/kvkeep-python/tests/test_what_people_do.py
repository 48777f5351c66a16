"""The table of docs/transformers.md, row by row: what people do with models, and what kvkeep then does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import SMALL, greedy, ids, image_request, loud, model_of, vision_model  # noqa: E402

from kvkeep import KVCache  # noqa: E402
from kvkeep.transformers import CachedGenerator, UnsupportedModelError  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
ROWS: dict[str, Callable[[], set[str]]] = {}
PROMPT = ids(40, 1)
ONES = torch.ones_like(PROMPT)
GREEDY = dict(max_new_tokens=6, do_sample=False)
Config = transformers.GenerationConfig


def row(what: str) -> Callable[[Callable[[], set[str]]], Callable[[], set[str]]]:
    """The function that does what a row of the table says, and returns what kvkeep did."""

    def register(function: Callable[[], set[str]]) -> Callable[[], set[str]]:
        ROWS[what] = function
        return function

    return register


def rows_of_the_page() -> dict[str, str]:
    if not PAGE.exists():
        return {}
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {line[0]: re.split(r"\W", line[1])[0] for line in lines if len(line) == 2 and line[0] != "what you do"}


@pytest.mark.parametrize("what", rows_of_the_page() or ["no page"])
def test_what_the_table_says_is_what_happens(what: str) -> None:
    if not PAGE.exists():
        pytest.skip("the docs are not here")
    assert ROWS[what]() == {rows_of_the_page()[what]}


def test_every_row_of_the_table_is_tested_and_every_test_is_a_row() -> None:
    if PAGE.exists():
        assert ROWS.keys() == rows_of_the_page().keys()


def generator_of(model: Any = None, cache: KVCache | None = None, **more: Any) -> CachedGenerator:
    return CachedGenerator(model or model_of("llama"), cache or KVCache(max_size_gb=0.05), block_tokens=8, **more)


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        assert type(one) is type(other) and one.keys() == other.keys()
        one, other = one.sequences, other.sequences
    return torch.equal(one, other)


def twice(generator: CachedGenerator, *args: Any, **call: Any) -> str:
    """Makes a call twice, compares with plain `generate`, and says what was done."""
    call = GREEDY | call
    before, kept, outcome = dict(call), generator.cache.stats()["entries"], ""
    for turn in range(2):
        torch.manual_seed(turn)
        expected = generator.model.generate(*args, **call)
        torch.manual_seed(turn)
        assert same(generator.generate(*args, **call), expected), generator.last
        assert call == before or any(isinstance(value, torch.Tensor) for value in call.values())
        assert generator.last is not None
        outcome = "plain" if generator.last.plain else "reuses" if generator.last.cached_tokens else "recomputes"
    assert (generator.cache.stats()["entries"] == kept) == (outcome == "plain"), "what is plain stores nothing"
    return outcome


def after(change: Callable[[Any], Any], model: Any = None, **call: Any) -> set[str]:
    """Changes a model whose KV is stored: what the same generator and a new one then do at first."""
    generator = generator_of(model)
    model = generator.model
    twice(generator, PROMPT, **call)
    model = change(model) or model
    expected, outcomes = model.generate(PROMPT, **GREEDY), set()
    for one in (generator, generator_of(model, generator.cache)):
        one.model = model
        assert same(one.generate(PROMPT, **GREEDY), expected)
        assert one.last is not None
        outcomes.add("plain" if one.last.plain else "reuses" if one.last.cached_tokens else "recomputes")
        if outcomes == {"recomputes"}:
            break  # the other one now finds what this one has stored
    return outcomes


def in_all_places(**setting: Any) -> set[str]:
    """A setting as an argument, in a configuration object, and in the model's own."""
    outcomes = {twice(generator_of(), PROMPT, **setting)}
    generator = generator_of()
    with_config = dict(max_new_tokens=None, do_sample=None, generation_config=Config(**GREEDY, **setting))
    outcomes.add(twice(generator, PROMPT, **with_config))
    for name, value in setting.items():
        setattr(generator.model.generation_config, name, value)
    outcomes.add(twice(generator, PROMPT))
    # What was stored plainly by nobody poisons nobody: misaligned KV was stored, and later plain requests were wrong.
    for name in setting:
        setattr(generator.model.generation_config, name, None)
    assert twice(generator, PROMPT) == "reuses"
    return outcomes


@row("the same prompt, or one that begins like it")
def _() -> set[str]:
    generator = generator_of()
    twice(generator, PROMPT)
    return {twice(generator, torch.cat([PROMPT[:, :33], ids(9, 2)], dim=1)), twice(generator, PROMPT[:, :20])}


@row("the next turn of a chat")
def _() -> set[str]:
    generator = generator_of(model_of("llama").double())
    answer = generator.generate(PROMPT, max_new_tokens=20, do_sample=False)
    turn = torch.cat([answer, ids(5, 3)], dim=1)
    outcome = twice(generator, turn, attention_mask=torch.ones_like(turn))
    assert generator.last is not None and generator.last.cached_tokens >= 56
    return {outcome}


@row("`**tokenizer(...)`: ids and mask by name")
def _() -> set[str]:
    return {twice(generator_of(), **transformers.BatchEncoding({"input_ids": PROMPT, "attention_mask": ONES}))}


@row("`inputs=`, or a `generation_config` by position")
def _() -> set[str]:
    config = Config(**GREEDY)
    return {twice(generator_of(), inputs=PROMPT), twice(generator_of(), PROMPT, config, max_new_tokens=None, do_sample=None)}


def padded() -> dict[str, Any]:
    batch = torch.cat([PROMPT, torch.nn.functional.pad(ids(29, 2), (11, 0))])
    return dict(input_ids=batch, attention_mask=(batch != 0).long())


@row("prompts of different lengths, padded on the left")
def _() -> set[str]:
    generator = generator_of(model_of("llama").double())
    outcome = twice(generator, **padded())
    assert generator.last is not None and generator.last.row_cached_tokens == (32, 24)
    return {outcome}


@row("no mask, and padding on the left")
def _() -> set[str]:
    return {twice(generator_of(model_of("llama").double()), padded()["input_ids"])}


@row("no mask, and a padding token inside the prompt")
def _() -> set[str]:
    prompt = PROMPT.clone()
    prompt[0, 20] = 0
    return {twice(generator_of(), prompt)}


@row("a mask with holes, or padding on the right")
def _() -> set[str]:
    holes, right = ONES.clone(), ONES.clone()
    holes[0, 5], right[0, 30:] = 0, 0
    return {twice(generator_of(), PROMPT, attention_mask=mask) for mask in (holes, right)}


@row("sampling, penalties, `bad_words_ids`, processors, stop strings, a streamer")
def _() -> set[str]:
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Any) -> None: ...

        def end(self) -> None: ...

    class Processor(transformers.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores.roll(1, -1)

    calls: list[dict[str, Any]] = [
        dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.9),
        dict(repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[50], [60]], min_new_tokens=2),
        dict(logits_processor=transformers.LogitsProcessorList([Processor()]), eos_token_id=77, pad_token_id=0),
        dict(streamer=Streamer(), max_time=60.0),
    ]
    return {twice(generator_of(), PROMPT, **call) for call in calls}


@row("`return_dict_in_generate` with scores and logits")
def _() -> set[str]:
    return {twice(generator_of(), PROMPT, return_dict_in_generate=True, output_scores=True, output_logits=True)}


@row("the state that it returns is used to go on")
def _() -> set[str]:
    model = model_of("gemma3, three layers in four with a window").double()
    generator = generator_of(model)
    name = next(name for name in ("cache", "past_key_values") if name in model.generate(PROMPT, return_dict_in_generate=True, **GREEDY))
    outcomes = set()
    for _ in range(2):
        output = generator.generate(PROMPT, return_dict_in_generate=True, **GREEDY)
        assert generator.last is not None
        outcomes.add("reuses" if generator.last.cached_tokens else "")
        more = torch.cat([output.sequences, ids(4, 9)], dim=1)
        mask = torch.ones_like(more)
        assert torch.equal(
            model.generate(more, attention_mask=mask, **{name: output[name]}, **GREEDY), greedy(model, more, 6)
        )
    return outcomes - {""}


@row("`output_attentions`, `output_hidden_states`")
def _() -> set[str]:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    return {
        twice(generator_of(model), PROMPT, return_dict_in_generate=True, **{name: True})
        for name in ("output_attentions", "output_hidden_states")
    }


@row("`num_beams`, as an argument, in a `generation_config` or the model's own")
def _() -> set[str]:
    return in_all_places(num_beams=2)


@row("`num_beams` in the model's own settings, turned off by an argument")
def _() -> set[str]:
    generator = generator_of()
    generator.model.generation_config.num_beams = 3
    return {twice(generator, PROMPT, num_beams=1)}


@row("`num_return_sequences`")
def _() -> set[str]:
    return {twice(generator_of(), PROMPT, num_return_sequences=2, do_sample=True)}


@row("`prompt_lookup_num_tokens`, as an argument, in a `generation_config` or the model's own")
def _() -> set[str]:
    return in_all_places(prompt_lookup_num_tokens=3)


@row("an assistant model")
def _() -> set[str]:
    return {twice(generator_of(), PROMPT, assistant_model=model_of("llama", seed=2))}


@row("`guidance_scale`")
def _() -> set[str]:
    return {twice(generator_of(), PROMPT, guidance_scale=1.5)}


@row('`cache_implementation="static"`')
def _() -> set[str]:
    return {twice(generator_of(), PROMPT, cache_implementation="static")}


@row('`cache_implementation="hybrid"` in the model\'s own settings')
def _() -> set[str]:
    generator = generator_of()
    generator.model.generation_config.cache_implementation = "hybrid"
    return {twice(generator, PROMPT)}


@row("`use_cache=False`")
def _() -> set[str]:
    return in_all_places(use_cache=False)


@row("a state of your own (`past_key_values`, `cache`)")
def _() -> set[str]:
    generator, outcomes = generator_of(), set()
    for name in ("past_key_values", "cache"):
        expected = generator.model.generate(PROMPT, **GREEDY)
        try:
            generator.model.generate(PROMPT, **{name: transformers.DynamicCache()}, **GREEDY)
        except ValueError:
            continue  # this release of transformers does not know the name
        got = generator.generate(PROMPT, **{name: transformers.DynamicCache()}, **GREEDY)
        assert torch.equal(got, expected) and generator.last is not None
        outcomes.add("plain" if generator.last.plain else "")
    return outcomes


@row("`inputs_embeds`, `position_ids`, `token_type_ids`")
def _() -> set[str]:
    generator, gpt = generator_of(), generator_of(model_of("gpt2"))
    embeds = generator.model.get_input_embeddings()(PROMPT).detach()
    return {
        twice(generator, inputs_embeds=embeds),
        twice(generator, PROMPT, inputs_embeds=embeds),
        twice(generator, PROMPT, position_ids=torch.arange(5, 45)[None]),
        # The zeros that a tokenizer returns are no zeros to GPT-2: it adds the embedding of token 0.
        twice(gpt, PROMPT, token_type_ids=torch.zeros_like(PROMPT)),
    }


@row("`prefill_chunk_size`")
def _() -> set[str]:
    return {twice(generator_of(), PROMPT, prefill_chunk_size=16)}


@row("`custom_generate`")
def _() -> set[str]:
    def own(model: Any, input_ids: Any, **_: Any) -> Any:
        return input_ids + 1

    return {twice(generator_of(), PROMPT, custom_generate=own)}


@row("a setting that this version of kvkeep does not know")
def _() -> set[str]:
    return in_all_places_but_arguments(rolls_back_every_third_token=True)


def in_all_places_but_arguments(**setting: Any) -> set[str]:
    """An argument that the model does not know is an error of plain `generate`, and of ours."""
    generator = generator_of()
    with pytest.raises(ValueError) as plain:
        generator.model.generate(PROMPT, **GREEDY, **setting)
    with pytest.raises(ValueError) as ours:
        generator.generate(PROMPT, **GREEDY, **setting)
    assert str(plain.value) == str(ours.value)
    config = Config(**GREEDY)
    for name, value in setting.items():
        setattr(config, name, value)
    outcomes = {twice(generator, PROMPT, max_new_tokens=None, do_sample=None, generation_config=config)}
    for name, value in setting.items():
        setattr(generator.model.generation_config, name, value)
    return outcomes | {twice(generator, PROMPT)}


@row("an image, audio or video with the prompt")
def _() -> set[str]:
    return {twice(generator_of(vision_model()), **image_request())}


@row("text alone, to a model that also sees images")
def _() -> set[str]:
    model = vision_model()
    model.generate(**image_request(), **GREEDY)
    return {twice(generator_of(model), PROMPT)}


@row("a training step, edited or other weights")
def _() -> set[str]:
    def step(model: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=PROMPT, labels=PROMPT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def edit(model: Any) -> None:
        with torch.no_grad():
            model.get_input_embeddings().weight[int(PROMPT[0, 3]), 5] += 1.0

    def other(model: Any) -> None:
        model.load_state_dict(model_of("llama", seed=5).state_dict())

    return after(step) | after(edit) | after(other)


@row("another LoRA adapter, none, or one that is merged")
def _() -> set[str]:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model_of("llama"), config, adapter_name="one")
        model.add_adapter("two", config)
        return model.eval()

    def off(model: Any) -> None:
        model.base_model.disable_adapter_layers()

    return after(lambda model: model.set_adapter("two"), adapted()) | after(off, adapted()) | after(
        lambda model: model.merge_adapter(["two"]), adapted()
    )


@row("`model.to(torch.bfloat16)`")
def _() -> set[str]:
    return after(lambda model: model.to(torch.bfloat16))


@row("another RoPE base or another norm epsilon")
def _() -> set[str]:
    cache, outcomes = KVCache(max_size_gb=0.05), set()
    twice(generator_of(cache=cache), PROMPT)
    for change in (dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), dict(rms_norm_eps=0.1)):
        model = model_of(transformers.LlamaConfig(**SMALL | change))
        generator = generator_of(model, cache)
        assert torch.equal(generator.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
        assert generator.last is not None
        outcomes.add("recomputes" if generator.last.cached_tokens == 0 else "reuses")

    def epsilon(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.1

    return outcomes | after(epsilon)


@row("another attention implementation")
def _() -> set[str]:
    return after(lambda model: model.set_attn_implementation("eager"))


@row("under `torch.autocast`, where K and V get different dtypes")
def _() -> set[str]:
    generator = generator_of()
    twice(generator, PROMPT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(generator.generate(PROMPT, **GREEDY), generator.model.generate(PROMPT, **GREEDY))
    assert generator.last is not None
    return {"plain" if generator.last.plain else "reuses" if generator.last.cached_tokens else "recomputes"}


@row("`model.train()` with dropout")
def _() -> set[str]:
    model = loud(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=200, n_embd=64, n_layer=2, n_head=4)))
    return {twice(generator_of(model.train()), PROMPT)}


@row("the same weights from another folder")
def _() -> set[str]:
    def moved(model: Any) -> None:
        model.config._name_or_path = model.name_or_path = "/models/copy"

    return after(moved)


@row("a salt of another tenant")
def _() -> set[str]:
    generator = generator_of(salt="one")
    twice(generator, PROMPT)
    other = generator_of(generator.model, generator.cache, salt="two")
    other.generate(PROMPT, **GREEDY)
    assert other.last is not None
    return {"reuses" if other.last.cached_tokens else "recomputes"}


@row("a cache that was closed, or a disk that fails")
def _() -> set[str]:
    generator = generator_of()
    generator.cache.close()
    assert same(generator.generate(PROMPT, **GREEDY), generator.model.generate(PROMPT, **GREEDY))
    return {"plain" if generator.last and generator.last.plain else ""}


def refused(*models: Any) -> set[str]:
    outcomes = set()
    for model in models:
        with pytest.raises(UnsupportedModelError, match=type(model).__name__):
            generator_of(model)
        outcomes.add("refuses")
    return outcomes


@row("a model whose state is not KV by token (Mamba, hybrids)")
def _() -> set[str]:
    mamba = transformers.MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=4)
    hybrid = transformers.FalconH1Config(
        **SMALL, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1
    )
    return refused(model_of(mamba), model_of(hybrid))


@row("a model that looks in both directions")
def _() -> set[str]:
    bert = transformers.BertConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return refused(loud(transformers.BertLMHeadModel(bert)))


@row("RoPE that depends on the prompt's length (`dynamic`, `longrope`)")
def _() -> set[str]:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return refused(model_of(transformers.LlamaConfig(**SMALL, rope_parameters=rope)))


@row("an encoder-decoder")
def _() -> set[str]:
    config = transformers.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=200)
    return refused(transformers.T5ForConditionalGeneration(config))


@row("meta tensors, or weights offloaded to CPU or disk")
def _() -> set[str]:
    with torch.device("meta"):
        meta = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    accelerate = pytest.importorskip("accelerate")
    return refused(meta, accelerate.cpu_offload(model_of("llama"), execution_device="cpu"))
