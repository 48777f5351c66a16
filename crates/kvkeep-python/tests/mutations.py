"""Ways to change a model: each takes a model and makes it another one, or leaves KV as it is.

Each is a function that takes (model, stack) and returns the model to run; `stack` is an `ExitStack` that undoes what reaches beyond it.
`CHANGES` are those after which KV is another; `HARMLESS` those after which it is the same and reuse must go on.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import transformers
from transformers.models.llama import modeling_llama

Mutation = Callable[[Any, ExitStack], Any]

SMALL: dict[str, Any] = dict(
    vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def llama(seed: int = 0, **config: Any) -> Any:
    """A small model whose every token counts."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def ids(count: int = 48, seed: int = 1) -> Any:
    return torch.randint(3, 200, (1, count), generator=torch.Generator().manual_seed(seed))


def _built_with(**config: Any) -> Mutation:
    """Another configuration from the start, and the same weights."""

    def change(model: Any, stack: ExitStack) -> Any:
        other = llama(**config)
        other.load_state_dict(model.state_dict())
        return other

    return change


def _set(path: str, value: Any) -> Mutation:
    """An attribute of a module, set afterwards."""

    def change(model: Any, stack: ExitStack) -> Any:
        owner, _, name = path.rpartition(".")
        setattr(functools.reduce(lambda at, step: at[int(step)] if step.isdigit() else getattr(at, step), owner.split("."), model), name, value)
        return model

    return change


def _run(change: Callable[[Any], Any]) -> Mutation:
    """A change made in place."""

    def mutation(model: Any, stack: ExitStack) -> Any:
        with torch.no_grad():
            change(model)
        return model

    return mutation


def _patch(target: Any, name: str, make: Callable[[Any], Any]) -> Mutation:
    """A function or a class's method, replaced from outside."""

    def mutation(model: Any, stack: ExitStack) -> Any:
        stack.enter_context(mock.patch.object(target, name, make(getattr(target, name))))
        return model

    return mutation


def _within(context: Callable[[], Any]) -> Mutation:
    def mutation(model: Any, stack: ExitStack) -> Any:
        stack.enter_context(context())
        return model

    return mutation


def _doubled(function: Any) -> Any:
    def twice(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    return twice


def _rope(**parameters: Any) -> Mutation:
    return _built_with(rope_parameters={"rope_theta": 10000.0, **parameters})


def _every(model: Any, kind: type) -> Any:
    return [module for module in model.modules() if isinstance(module, kind)]


def _swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def _swap_layers_and_their_numbers(model: Any) -> None:
    _swap_layers(model)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number


def _drop_layer(model: Any) -> None:
    del model.model.layers[2]
    model.config.num_hidden_layers = 2


def _double_layer(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1


def _swap_weights(model: Any) -> None:
    one, other = (model.model.layers[layer].self_attn.q_proj for layer in (0, 1))
    one.weight, other.weight = other.weight, one.weight


def _swap_rows(model: Any) -> None:
    weight = model.model.embed_tokens.weight
    weight[[5, 6]] = weight[[6, 5]]


def _train_a_step(model: Any) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _data(edit: Callable[[Any], None]) -> Callable[[Any], None]:
    """An edit through `.data`, which bumps no version counter."""
    return lambda model: edit([parameter.data for parameter in model.parameters()])


def _replace_module(model: Any) -> None:
    model.model.norm = torch.nn.LayerNorm(64)
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)


def _quantize_embedding(model: Any) -> None:
    weight = model.model.embed_tokens.weight
    weight.copy_((weight * 8).round() / 8)


def _parametrize(model: Any) -> None:
    class Half(torch.nn.Module):
        def forward(self, weight: Any) -> Any:
            return weight / 2

    torch.nn.utils.parametrize.register_parametrization(model.model.layers[0].self_attn.k_proj, "weight", Half())


def _steer(model: Any, stack: ExitStack) -> Any:
    vector = torch.ones(64)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + vector)
    return model


def _steer_before(model: Any, stack: ExitStack) -> Any:
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    return model


def _steer_everything(model: Any, stack: ExitStack) -> Any:
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, modeling_llama.LlamaMLP) else None
    )
    stack.callback(hook.remove)
    return model


def _own_forward(model: Any, stack: ExitStack) -> Any:
    attention = model.model.layers[0].self_attn
    attention.forward = types.MethodType(_doubled(type(attention).forward), attention)
    return model


def _own_class(model: Any, stack: ExitStack) -> Any:
    class Doubled(modeling_llama.LlamaMLP):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    for layer in model.model.layers:
        layer.mlp.__class__ = Doubled
    return model


def _method_of_instance_class(model: Any, stack: ExitStack) -> Any:
    strength = {"value": 2.0}

    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * strength["value"]

    stack.enter_context(mock.patch.object(modeling_llama.LlamaMLP, "forward", forward))
    return model


def _tensor_method(model: Any, stack: ExitStack) -> Any:
    stack.enter_context(mock.patch.object(torch.Tensor, "cos", _doubled(torch.Tensor.cos)))
    return model


def _shadowed_call(model: Any, stack: ExitStack) -> Any:
    stack.enter_context(mock.patch.object(modeling_llama.LlamaMLP, "__call__", _doubled(torch.nn.Module.__call__), create=True))
    return model


def _registered_attention(model: Any, stack: ExitStack) -> Any:
    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    stack.enter_context(mock.patch.dict(registry._global_mapping, {"sdpa": _doubled(registry["sdpa"])}))
    return model


class _Scaled(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return out * 2 if function is torch.nn.functional.silu else out


def _default_dtype() -> Any:
    stack = ExitStack()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    stack.callback(torch.set_default_dtype, before)
    return stack


def _lora(model: Any, *names: str, seed: int = 7, **config: Any) -> Any:
    import peft

    torch.manual_seed(seed)
    make = lambda: peft.LoraConfig(  # noqa: E731
        **{"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False, "lora_alpha": 64, **config}
    )
    made = peft.get_peft_model(model, make(), adapter_name=names[0])
    for name in names[1:]:
        made.add_adapter(name, make())
    return made.eval()


def _with_lora(change: Callable[[Any], Any] = lambda model: None, **config: Any) -> Mutation:
    """An adapter on top of the model, and then something done with it."""

    def mutation(model: Any, stack: ExitStack) -> Any:
        made = _lora(model, "one", "two", **config)
        with torch.no_grad():
            return change(made) or made

    return mutation


def _tuner_layers(model: Any) -> list[Any]:
    import peft

    return _every(model, peft.tuners.lora.LoraLayer)


def _scale(model: Any) -> None:
    for layer in _tuner_layers(model):
        layer.scaling["one"] *= 2


def _edit_adapter(model: Any) -> None:
    for layer in _tuner_layers(model):
        layer.lora_B["one"].weight.mul_(2)


def _anew(model: Any) -> None:
    import peft

    model.set_adapter("two")
    model.delete_adapter("one")
    torch.manual_seed(99)
    model.add_adapter("one", peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, lora_alpha=64))
    model.set_adapter("one")
    model.eval()


def _prompt_tuning(model: Any, stack: ExitStack) -> Any:
    import peft

    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()


def _ia3(model: Any, stack: ExitStack) -> Any:
    import peft

    config = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config).eval()


def _quantize_dynamically(model: Any, stack: ExitStack) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})


CHANGES: dict[str, Mutation] = {
    # The configuration, before the model is built.
    "RoPE's base": _rope(rope_type="default", rope_theta=500.0),
    "RoPE scaled linearly": _rope(rope_type="linear", factor=4.0),
    "RoPE scaled by YaRN": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    "RoPE scaled as Llama 3": _rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "the norm's epsilon": _built_with(rms_norm_eps=0.1),
    "the activation": _built_with(hidden_act="relu"),
    # The configuration and attributes, afterwards.
    "an epsilon set on one norm": _set("model.layers.0.input_layernorm.variance_epsilon", 0.5),
    "an epsilon set on the last norm": _set("model.norm.variance_epsilon", 0.5),
    "attention's scale": _set("model.layers.1.self_attn.scaling", 1.0),
    "attention's groups": _run(lambda m: [setattr(layer.self_attn, "is_causal", False) for layer in m.model.layers[:1]]),
    "RoPE's attention factor": _set("model.rotary_emb.attention_scaling", 2.0),
    "RoPE's frequencies in place": _run(lambda m: m.model.rotary_emb.inv_freq.mul_(0.5)),
    "RoPE's frequencies replaced": _run(lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 0.5)),
    "the activation of one layer": _set("model.layers.0.mlp.act_fn", torch.nn.ReLU()),
    # Weights.
    "a training step": _run(_train_a_step),
    "other weights loaded": _run(lambda m: m.load_state_dict(llama(seed=9).state_dict())),
    "other weights assigned": _run(lambda m: m.load_state_dict(llama(seed=9).state_dict(), assign=True)),
    "one row of the embedding": _run(lambda m: m.model.embed_tokens.weight[int(ids()[0, 3])].add_(1)),
    "one element of a weight": _run(lambda m: m.model.layers[0].self_attn.v_proj.weight[3, 5].add_(50)),
    "a norm's weight": _run(lambda m: m.model.layers[0].input_layernorm.weight.mul_(2)),
    "two rows of the embedding swapped": _run(
        lambda m: m.model.embed_tokens.weight.__setitem__(ids()[0, [3, 4]], m.model.embed_tokens.weight[ids()[0, [4, 3]]])
    ),
    "a parameter replaced": _run(
        lambda m: setattr(m.model.layers[0].self_attn.k_proj, "weight", torch.nn.Parameter(m.model.layers[0].self_attn.k_proj.weight * 2))
    ),
    "weights through .data, in place": _run(_data(lambda ts: [t.mul_(1.5) for t in ts])),
    "weights through .data, one matrix": _run(lambda m: m.model.layers[1].mlp.up_proj.weight.data.mul_(2)),
    "weights through .data, assigned": _run(
        lambda m: setattr(m.model.layers[0].mlp.up_proj.weight, "data", m.model.layers[0].mlp.up_proj.weight.data * 2)
    ),
    "weights of two modules swapped": _run(_swap_weights),
    "weights pruned": _run(lambda m: m.model.layers[0].mlp.down_proj.weight[:, ::2].zero_()),
    "the embedding rounded": _run(_quantize_embedding),
    "a bias added": _run(lambda m: setattr(m.model.layers[0].self_attn.k_proj, "bias", torch.nn.Parameter(torch.ones(32) * 3))),
    "all weights scaled": _run(lambda m: [p.mul_(1.1) for p in m.parameters()]),
    "to bfloat16": _run(lambda m: m.to(torch.bfloat16)),
    "to bfloat16 and back": _run(lambda m: m.to(torch.bfloat16).float()),
    "half the model in another dtype": _run(lambda m: m.model.layers[0].mlp.up_proj.weight.copy_(m.model.layers[0].mlp.up_proj.weight.half())),
    "quantised dynamically": _quantize_dynamically,
    "weights through numpy": _run(lambda m: m.model.layers[1].mlp.down_proj.weight.detach().numpy().__imul__(2)),
    "one element of a norm, through .data": _run(lambda m: m.model.layers[0].input_layernorm.weight.data[7:8].mul_(50)),
    "RoPE's frequencies, through .data": _run(lambda m: m.model.rotary_emb.inv_freq.data.mul_(0.5)),
    "weights as one vector": _run(
        lambda m: torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(m.parameters()) * 1.2, m.parameters())
    ),
    "tokens added": _run(lambda m: m.resize_token_embeddings(220)),
    "embeddings tied": _run(lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight)),
    "weights pruned by a mask": _run(lambda m: torch.nn.utils.prune.l1_unstructured(m.model.layers[0].mlp.up_proj, "weight", amount=0.5) and None),
    # The tree.
    "layers swapped": _run(_swap_layers),
    "layers swapped, with their numbers": _run(_swap_layers_and_their_numbers),
    "a layer removed": _run(_drop_layer),
    "a layer doubled": _run(_double_layer),
    "modules replaced": _run(_replace_module),
    "a norm removed": _set("model.layers.0.input_layernorm", torch.nn.Identity()),
    "a parametrisation": _run(_parametrize),
    "the spectral norm": _run(lambda m: torch.nn.utils.parametrizations.spectral_norm(m.model.layers[0].self_attn.v_proj).eval() and None),
    "dropout that is on": _run(lambda m: [setattr(layer.self_attn, "attention_dropout", 0.5) for layer in m.model.layers] + [m.train()]),
    "training mode of one module": _run(
        lambda m: [setattr(m.model.layers[0].self_attn, "attention_dropout", 0.5), m.model.layers[0].self_attn.train()]
    ),
    "a dropout module": _run(lambda m: setattr(m.model.layers[0], "input_layernorm", torch.nn.Sequential(m.model.layers[0].input_layernorm, torch.nn.Dropout(0.5).train()))),
    # Code.
    "a class's forward": _patch(modeling_llama.LlamaAttention, "forward", _doubled),
    "a class's forward, with a strength outside": _method_of_instance_class,
    "a norm's forward": _patch(modeling_llama.LlamaRMSNorm, "forward", _doubled),
    "torch.nn.Linear's forward": _patch(torch.nn.Linear, "forward", _doubled),
    "a function of the model's file": _patch(modeling_llama, "rotate_half", _doubled),
    "RoPE's function": _patch(modeling_llama, "apply_rotary_pos_emb", _doubled),
    "a function of torch": _patch(torch.nn.functional, "silu", _doubled),
    "torch's attention": _patch(torch.nn.functional, "scaled_dot_product_attention", _doubled),
    "torch's linear": _patch(torch.nn.functional, "linear", _doubled),
    "a method of tensors": _tensor_method,
    "a method put in front of an inherited one": _shadowed_call,
    "the registered attention": _registered_attention,
    "a forward of one module's own": _own_forward,
    "another class for a module": _own_class,
    "a forward hook": _steer,
    "a forward pre-hook": _steer_before,
    "a hook for all modules": _steer_everything,
    # The mode.
    "autocast": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a mode that sees every function": _within(_Scaled),
    # Adapters.
    "an adapter": _with_lora(),
    "another adapter in use": _with_lora(lambda m: m.set_adapter("two")),
    "an adapter's scale": _with_lora(_scale),
    "an adapter's weights": _with_lora(_edit_adapter),
    "two adapters at once": _with_lora(lambda m: m.base_model.set_adapter(["one", "two"])),
    "an adapter merged": _with_lora(lambda m: m.merge_adapter()),
    "an adapter merged for good": _with_lora(lambda m: m.merge_and_unload()),
    "an adapter with DoRA": _with_lora(use_dora=True),
    "an adapter that is scaled by its rank's root": _with_lora(use_rslora=True),
    "an adapter of the same name, made anew": _with_lora(_anew),
    "an adapter on all layers": _with_lora(target_modules="all-linear"),
    "an adapter on the embedding": _with_lora(target_modules=["embed_tokens"]),
    "an adapter that saves a module": _with_lora(
        lambda m: [p.mul_(2) for n, p in m.named_parameters() if "modules_to_save.one" in n] and None, modules_to_save=["embed_tokens"]
    ),
    "an adapter of another kind": _ia3,
    "a learned prompt": _prompt_tuning,
}  # fmt: skip


def _saved_and_loaded(model: Any, stack: ExitStack) -> Any:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def _adapter_off(model: Any, stack: ExitStack) -> Any:
    made = _lora(model, "one")
    stack.enter_context(made.disable_adapter())
    return made


def _generate(model: Any, stack: ExitStack) -> Any:
    model.generate(ids(), max_new_tokens=3, do_sample=False)
    return model


HARMLESS: dict[str, Mutation] = {
    "nothing": lambda model, stack: model,
    "answers": _generate,
    "hidden states asked for": _run(lambda m: m(input_ids=ids(), output_hidden_states=True)),
    "how it decodes": _run(lambda m: m.generation_config.update(max_new_tokens=77, temperature=0.3, do_sample=True)),
    "gradient checkpointing": _run(lambda m: m.gradient_checkpointing_enable()),
    "gradients off": _run(lambda m: m.requires_grad_(False)),
    "another folder": _saved_and_loaded,
    "another name": _set("config._name_or_path", "elsewhere/name"),
    "a copy": lambda model, stack: copy.deepcopy(model),
    "the same weights loaded again": _run(lambda m: m.load_state_dict(llama().state_dict())),
    "to where it is": _run(lambda m: m.to("cpu")),
    "training and back": _run(lambda m: m.train().eval()),
    "an adapter that is off": _adapter_off,
    "names of classes": _set("config.id2label", {0: "no", 1: "yes"}),
}
