"""kvkeep.identity: what is another model has another digest, what is the same model has the same, in every process."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mutations import CHANGES, HARMLESS, _lora, _tuner_layers, ids, llama  # noqa: E402

from kvkeep.identity import ModelIdentity, weights_digest  # noqa: E402


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids()).logits[0, -8:].float()


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_has_another_identity_or_is_refused(name: str) -> None:
    """The fingerprint took in a sample of the weights and a name: an adapter, the configuration, the mode, one row, hooks and patched
    functions were not in it, and KV of one model was served to another."""
    if "adapter" in name or "prompt" in name:
        pytest.importorskip("peft")
    model = llama()
    identity = ModelIdentity(model)
    before, logits_before = identity.now(), logits(model)
    with ExitStack() as stack:
        changed = CHANGES[name](model, stack)
        torch.manual_seed(0)
        now = logits(changed)
        assert now.shape != logits_before.shape or not torch.allclose(now, logits_before, atol=1e-4), "this changes nothing: the test would see nothing"
        for after in (ModelIdentity(changed).now(), identity.now() if changed is model else None):
            if after is not None:
                assert after.refusal is not None or after.digest != before.digest, after


@pytest.mark.parametrize("name", HARMLESS)
def test_the_same_model_keeps_its_identity(name: str) -> None:
    if "adapter" in name:
        pytest.importorskip("peft")
    model = llama()
    identity = ModelIdentity(model)
    before, logits_before = identity.now(), logits(model)
    assert before.refusal is None
    with ExitStack() as stack:
        same = HARMLESS[name](model, stack)
        assert torch.allclose(logits(same), logits_before, atol=1e-5)
        after = ModelIdentity(same).now()
        assert after == before and dict(after.parts) == dict(before.parts), (after, before)
        if same is model:
            assert identity.now() == before


def test_inactive_adapters_do_not_change_the_identity() -> None:
    pytest.importorskip("peft")
    model = _lora(llama(), "one", "two")
    identity = ModelIdentity(model)
    one = identity.now()
    assert one.refusal is None
    for layer in _tuner_layers(model):
        with torch.no_grad():
            layer.lora_B["two"].weight.mul_(3)
        layer.scaling["two"] = 9.0
    assert identity.now() == one, "the other adapter is not in use"
    model.set_adapter("two")
    two = identity.now()
    assert two.digest != one.digest
    model.set_adapter("one")
    assert identity.now() == one
    model.delete_adapter("two")
    assert identity.now() == one
    with model.disable_adapter():
        assert identity.now().digest == ModelIdentity(llama()).now().digest, "with adapters off it is the base model"
    assert identity.now() == one


def test_a_switched_adapter_costs_no_reading_of_the_weights_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters in turn are a normal way to work: hashing the whole model each time would cost more than reuse saves."""
    pytest.importorskip("peft")
    import kvkeep.identity as module

    model = _lora(llama(), "one", "two")
    identity = ModelIdentity(model)
    hashed: list[int] = []
    digests = module.digests
    monkeypatch.setattr(module, "digests", lambda tensors: hashed.extend(t.numel() for t in tensors) or digests(tensors))
    model.set_adapter("two")
    identity.now()
    assert hashed and max(hashed) <= 4 * 64, "more than the adapter was hashed"
    hashed.clear()
    model.merge_adapter()
    identity.now()
    assert max(hashed) >= 64 * 64, "merging edits weights through .data: they are hashed again"


def test_prefix_tuning_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    refusal = ModelIdentity(model).now().refusal
    assert refusal is not None and "learned prompt" in refusal


IN_ANOTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from mutations import _lora, llama, transformers
from kvkeep.identity import ModelIdentity
if sys.argv[2] == "others first":
    import torch
    for config in (transformers.Qwen3Config, transformers.Gemma3TextConfig, transformers.GPT2Config):
        small = config(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        ModelIdentity(transformers.AutoModelForCausalLM.from_config(small))
model = llama()
if sys.argv[2] == "others first":
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
print(ModelIdentity(model).now().digest, ModelIdentity(_lora(model, "one")).now().digest)
"""


def test_the_identity_is_the_same_in_every_process() -> None:
    """Nothing that differs between processes may enter: addresses, the order of sets, which other models were made before."""
    pytest.importorskip("peft")
    digests = set()
    for seed, others in (("0", "none"), ("1", "none"), ("2", "others first")):
        arguments = [sys.executable, "-c", IN_ANOTHER_PROCESS, os.path.dirname(__file__), others]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        digests.add(subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout)
    model = llama()
    digests.add(f"{ModelIdentity(model).now().digest} {ModelIdentity(_lora(model, 'one')).now().digest}\n")
    assert len(digests) == 1, digests


@pytest.mark.parametrize(
    "hostile",
    [object(), iter([1]), memoryview(b"x"), (number for number in ())],
    ids=["an object without content", "an iterator", "a memoryview", "a generator"],
)
def test_what_cannot_be_read_is_refused_by_name(hostile: object) -> None:
    model = llama()
    identity = ModelIdentity(model)
    model.model.layers[0].mlp.trick = hostile
    refusal = identity.now().refusal
    assert refusal is not None and "model.layers.0.mlp.trick" in refusal
    del model.model.layers[0].mlp.trick
    assert identity.now().refusal is None


def test_an_attribute_that_raises_is_a_refusal_and_no_error() -> None:
    class Hostile:
        __slots__ = ("there",)

        def __getattribute__(self, name: str) -> Any:
            raise OSError("no")

    model = llama()
    vars(model)["trick"] = Hostile()
    assert "cannot be read" in (ModelIdentity(model).now().refusal or "")


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = llama()
    assert "not in memory" in (ModelIdentity(model).now().refusal or "")


def test_a_state_inside_an_object_inside_a_list_is_seen() -> None:
    """A list of what may change would have to name everything: everything is read, at any depth."""

    class Strength:
        def __init__(self) -> None:
            self.by_layer = [{"scale": 1.0}, {"scale": torch.ones(3)}]

    model = llama()
    model.model.layers[0].strength = Strength()
    identity = ModelIdentity(model)
    seen = {identity.now().digest}
    model.model.layers[0].strength.by_layer[0]["scale"] = 2.0
    seen.add(identity.now().digest)
    model.model.layers[0].strength.by_layer[1]["scale"][1] = 2.0
    seen.add(identity.now().digest)
    model.model.layers[0].strength.by_layer.append({})
    seen.add(identity.now().digest)
    model.model.layers[0].strength.more = True
    seen.add(identity.now().digest)
    assert len(seen) == 5


def test_the_strength_of_a_patch_is_seen_where_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched forward pass has a number in its closure or beside it, and users turn it while they work."""
    from transformers.models.llama import modeling_llama

    strengths = {"by": 1.0}
    factor = 1.0

    def turn(value: float) -> None:
        nonlocal factor
        factor = value

    original = modeling_llama.LlamaMLP.forward

    def forward(self: Any, x: Any) -> Any:
        return original(self, x) * strengths["by"] * factor

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    identity = ModelIdentity(llama())
    seen = {identity.now().digest}
    strengths["by"] = 2.0
    seen.add(identity.now().digest)
    turn(3.0)
    seen.add(identity.now().digest)
    assert len(seen) == 3


def test_what_was_hashed_once_is_recognised_and_an_edit_is_still_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new generator must cost little where the weights are known, and must not trust that they are the same: an edit of one row through
    `.data` moves no counter."""
    import kvkeep._weights as module

    hashed: list[int] = []
    blake3 = module.blake3
    monkeypatch.setattr(module, "blake3", lambda address, size: hashed.append(size) or blake3(address, size))
    model = llama(hidden_size=512, vocab_size=9000)
    before = ModelIdentity(model).now()
    large = [size for size in hashed if size > 100_000]
    hashed.clear()
    assert large and ModelIdentity(model).now() == before
    assert not [size for size in hashed if size > 100_000]
    model.model.embed_tokens.weight.data[4321] += 1
    assert ModelIdentity(model).now() != before


def test_every_byte_of_every_weight_counts() -> None:
    """Samples were blind to other added tokens, one edited row and packed weights."""
    tensor = torch.zeros(3_000_001, dtype=torch.uint8)  # more pieces than one, and no whole number of them
    big = torch.zeros(9 << 20, dtype=torch.uint8)
    seen = {weights_digest([("w", tensor)]), weights_digest([("w", big)])}
    for target, places in ((tensor, (0, 1_234_567, 3_000_000)), (big, (0, (8 << 20) - 1, 8 << 20, (9 << 20) - 1))):
        for place in places:
            target[place] = 1
            seen.add(weights_digest([("w", target)]))
            target[place] = 0
    assert len(seen) == 2 + 3 + 4


def test_shape_dtype_and_name_count_and_layout_in_memory_does_not() -> None:
    tensor = torch.arange(24, dtype=torch.int32)
    same = [tensor.view(4, 6), tensor.view(4, 6).t().contiguous().t(), torch.cat([tensor, tensor])[:24].view(4, 6)]
    assert len({weights_digest([("w", t)]) for t in same}) == 1
    other = [tensor, tensor.view(6, 4), tensor.view(torch.float32)]
    assert len({weights_digest([("w", t)]) for t in [*other, same[0]]}) == 4
    assert weights_digest([("v", tensor)]) != weights_digest([("w", tensor)])
    assert weights_digest([("v", tensor), ("w", same[0])]) == weights_digest([("w", same[0]), ("v", tensor)])
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.float64):
        assert weights_digest([("w", torch.zeros(5, dtype=dtype))]) != weights_digest([("w", torch.ones(5, dtype=dtype))])
    assert weights_digest([("w", torch.zeros(()))]) != weights_digest([("w", torch.zeros(0))])


def test_weights_that_somebody_vouches_for_are_not_read_but_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvkeep.identity as module

    hashed: list[Any] = []
    digests = module.digests
    monkeypatch.setattr(module, "digests", lambda tensors: hashed.extend(tensors) or digests(tensors))
    model = llama()
    identity = ModelIdentity(model, weights="hub/model@0123abc")
    before = identity.now()
    assert not hashed and before.digest != ModelIdentity(llama(), weights="hub/model@another").now().digest
    assert before.digest == ModelIdentity(llama(), weights="hub/model@0123abc").now().digest
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] += 1
    assert identity.now().digest != before.digest and hashed


def test_hashing_leaves_weights_free_to_be_resized() -> None:
    """What numpy has seen of a tensor torch never resizes again, and sharded training then fails."""
    model = llama()
    ModelIdentity(model).now()
    model.lm_head.weight.untyped_storage().resize_(0)


def test_a_parameter_replaced_by_an_equal_one_is_watched_too() -> None:
    """Compared by `==` the new parameter would pass for the old one, whose counter never moves again."""
    model = llama()
    model.scale = torch.nn.Parameter(torch.ones(1))
    identity = ModelIdentity(model)
    before = identity.now()
    model.scale = torch.nn.Parameter(torch.ones(1))
    model.config = copy.deepcopy(model.config)
    assert identity.now() == before
    with torch.no_grad():
        model.scale.add_(1)
    assert identity.now() != before
    with torch.no_grad():
        model.scale.sub_(1)
    assert identity.now() == before
    model.config.rms_norm_eps = 0.5
    assert identity.now() != before


def test_asking_costs_a_fraction_of_a_millisecond(capsys: pytest.CaptureFixture[str]) -> None:
    """135 M parameters in 397 modules; and what it costs to hash them."""
    model = llama(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    begin, cpu = time.perf_counter(), time.process_time()
    identity = ModelIdentity(model)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    identity.now()
    best = min(_seconds(identity.now) for _ in range(300))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with capsys.disabled():
        print(
            f"\nidentity of {size / 4e6:.0f} M parameters (float32) in {len(list(model.modules()))} modules: made in {seconds:.2f} s "
            f"({size / seconds / 1e9:.2f} GB/s, {size / cpu / 1e9:.2f} GB a CPU second), asked in {best * 1e3:.2f} ms"
        )
    # Ten times what a quiet machine shows: this is a test of the promise, not a benchmark.
    assert best < 3e-3


def _seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
