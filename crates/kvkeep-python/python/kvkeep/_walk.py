"""Objects to text: everything that is reachable from a model, read in one order that is the same in every process.

Invariant: equal texts mean that the next forward pass computes the same KV (given tokens, positions and weights of the same digest); and
whatever could change the text later is in `read`, `tensors` or `code`, so that a change is seen by comparing pointers.

What is read is not listed: everything is, module by module, attribute by attribute, into every dict, list and object. Listed is only
what is left out, each with its reason. What cannot be read is a refusal, never a guess. A list of what may change (configuration,
adapters, norms) was the alternative that lost: a list has to be complete, and an attribute that nobody thought of was then a wrong answer.
"""

from __future__ import annotations

import collections
import contextvars
import enum
import hashlib
import logging
import pathlib
import re
import sys
import threading
import types
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvkeep._code import Code
from kvkeep._weights import refusal_of

if TYPE_CHECKING:
    import torch

__all__ = ["Seen", "Walk"]

_NOT_READ_IN_MODULES = {
    "training": "refused where a module's code asks for it; without effect elsewhere",
    "_parameters": "read as weights", "_buffers": "read as weights", "_modules": "read as modules",
    "_non_persistent_buffers_set": "says what is saved, not what is computed",
    "_backward_hooks": "gradients only", "_backward_pre_hooks": "gradients only", "_is_full_backward_hook": "gradients only",
    "_forward_hooks": "refused", "_forward_pre_hooks": "refused",
    "_forward_hooks_with_kwargs": "belongs to hooks", "_forward_hooks_always_called": "belongs to hooks", "_forward_pre_hooks_with_kwargs": "belongs to hooks",
    "_state_dict_hooks": "saving and loading only", "_state_dict_pre_hooks": "saving and loading only",
    "_load_state_dict_pre_hooks": "saving and loading only", "_load_state_dict_post_hooks": "saving and loading only",
    "gradient_checkpointing": "gradients only: KV is the same", "_gradient_checkpointing_func": "gradients only",
    "_require_grads_hook": "gradients only", "_require_grads_hooks": "gradients only",
    "generation_config": "decides which token comes next, not what a token's KV is",
    "name_or_path": "where weights came from: they are hashed themselves",
    "_is_hf_initialized": "loading only", "warnings_issued": "which warnings were printed",
    "_keep_in_fp32_modules": "loading only: dtypes are read from the weights", "_keep_in_fp32_modules_strict": "loading only",
    "_keys_to_ignore_on_load_unexpected": "loading only", "_keys_to_ignore_on_load_missing": "loading only",
    "_keys_to_ignore_on_save": "saving only", "_no_split_modules": "placement only",
    "_skip_keys_device_placement": "placement only", "hf_device_map": "placement only",
    "_tp_plan": "placement only", "_ep_plan": "placement only", "_pp_plan": "placement only", "_fsdp_plan": "placement only",
    "loss_type": "losses are no KV", "_loss_function": "losses are no KV",
    "peft_config": "the layers hold what of it counts; prompt learning is refused",
    "_active_adapter": "the adapters in use are read as such", "_disable_adapters": "as _active_adapter",
    "_hf_peft_config_loaded": "the layers hold the adapters", "targeted_module_names": "how layers were found", "targeted_parameter_names": "how layers were found",
    "_use_kernels": "kernels replace forward functions, which are read", "_weight_conversions": "loading only",
    "_output_capturing_hooks_installed": "its hooks copy and change nothing",
}  # fmt: skip
"""Attributes of a module that cannot change KV, or that are read in another way, each with its reason."""

_NOT_READ_IN_CONFIGS = {
    "_name_or_path": "where weights came from: they are hashed themselves", "name_or_path": "as _name_or_path",
    "_commit_hash": "as _name_or_path", "transformers_version": "the version that runs counts, not the one that saved",
    "model_type": "the configuration's class is read",
    "architectures": "the class that runs is read", "output_hidden_states": "what is returned, not what is computed",
    "_output_attentions": "as output_hidden_states", "return_dict": "as output_hidden_states", "use_cache": "whether KV is kept, not what it is",
    "id2label": "names of classes", "label2id": "names of classes", "problem_type": "losses are no KV",
}  # fmt: skip
"""Attributes of a transformers configuration that cannot change KV, each with its reason."""

_NOT_READ_IN_TENSORS = {
    "_is_hf_initialized": "loading only", "_no_reinit": "loading only", "_is_buffer": "read as weights", "_is_param": "read as weights",
    "persistent": "says what is saved, not what is computed",
}  # fmt: skip
"""Attributes of a tensor that cannot change KV, each with its reason."""

_WITHOUT_CONTENT = (
    logging.Logger, types.ModuleType, contextvars.ContextVar, threading.local, weakref.WeakKeyDictionary, weakref.WeakValueDictionary,
    type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event,
)  # fmt: skip
"""Known by their type alone: they synchronise, print or remember, and hold nothing that a forward pass computes with."""

_NO_WEIGHTS_EDITED = frozenset(["config"])
"""Attributes whose change does not cast doubt on the module's weights, nor do an adapter's numbers. A change of any other one does: merging an adapter edits weights
through `.data`, which no counter counts, and tells it by an attribute."""

_HARMLESS_HOOKS = {
    "transformers.utils.output_capturing.install_output_capuring_hook.<locals>.output_capturing_hook": "copies what passes",
    "transformers.modeling_utils.PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads": "gradients only",
}
"""Forward hooks that change nothing, each with its reason. Of all others nobody knows what they do."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A weight as the walk found it."""

    name: str
    tensor: Any
    module: str
    in_adapter: bool


class Walk:
    """One reading of a model."""

    def __init__(self, model: Any) -> None:
        self.lines: dict[str, str] = {}
        """A module's path → its text."""
        self.doubt: dict[str, str] = {}
        """A module's path → the part of its text whose change casts doubt on its weights."""
        self.tensors: list[Seen] = []
        self.refusals: list[str] = []
        self.read: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        """Every dict and object dictionary that was read, and which keys of it counted."""
        self.sequences: list[Any] = []
        """Every list and set that was read."""
        self.empty: list[Any] = []
        """Every dict that was empty."""
        self.adapter_lines: list[str] = []
        self.code = Code(self.token)
        import torch

        self._dtype = getattr(model, "dtype", None)
        self._paths: dict[int, str] = {}
        self._tokens: dict[int, str] = {}
        self._kept: list[Any] = []
        self._modules: list[tuple[str, Any]] = []
        self.classes: list[tuple[Any, type]] = []
        """Every module and its class, which can be set like an attribute."""
        self._in_code = False
        """What a module holds must be readable; what code merely names is noted by its type where it is not."""
        self._walk_module("", model, in_adapter=False)
        self.code.reach_class(torch.Tensor, in_tree=True)  # its methods are as good as functions
        self._in_code = True
        self.code_digest = self.code.digest()
        self._check_training()

    def token(self, value: Any, where: str) -> str:
        """The text of any value: short, and the same in every process."""
        plain = _plain(value)
        if plain is not None:
            return plain
        if isinstance(value, type):
            return f"class {self.code.reach_class(value)}"
        if self.code.is_callable(value):
            return f"code {self.code.reach(value, where)}"
        known = self._tokens.get(id(value))
        if known is None:
            self._tokens[id(value)] = f"cycle {type(value).__qualname__}"
            self._kept.append(value)
            known = self._tokens[id(value)] = self._compound(value, where)
        return known

    def _compound(self, value: Any, where: str) -> str:
        import torch

        if isinstance(value, torch.nn.Module):
            if id(value) not in self._paths:
                self._walk_module(f"{where} (aside)", value, in_adapter=False)
            return f"module {self._paths[id(value)]}"
        if isinstance(value, torch.Tensor):
            return f"tensor {self._tensor(where, value, '', False)}"
        if isinstance(value, _WITHOUT_CONTENT):
            return f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, (tuple, list, collections.deque)):
            if not isinstance(value, tuple):
                self.sequences.append(value)
            return _short(type(value).__qualname__, [self.token(part, f"{where}[{i}]") for i, part in enumerate(value)])
        if isinstance(value, (set, frozenset)):
            if isinstance(value, set):
                self.sequences.append(value)
            return _short("set", sorted(self.token(part, where) for part in value))
        if isinstance(value, (dict, types.MappingProxyType)):
            self._watch(value, value)
            return _short("dict", self._pairs(value, where)) + self._attributes_beside(value, where)
        return self._object(value, where)

    def _object(self, value: Any, where: str) -> str:
        if isinstance(value, weakref.ref):
            return f"weak {self.token(value(), where)}"
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype != object:
            return _short("numpy", [str(value.dtype), str(value.shape), hashlib.sha256(numpy.ascontiguousarray(value).tobytes()).hexdigest()])
        packed = _unpacked(value)
        if packed is not None:
            return f"packed {self.token(packed, where)}"
        attributes = getattr(value, "__dict__", None)
        slots = _slots(value)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if self._in_code and self.code.is_trusted_class(type(value)):
            return f"{kind} {getattr(value, '__name__', '')}"
        if not isinstance(attributes, dict) and not slots:
            if not self._in_code:
                self._refuse(f"{where} is a {kind}, which cannot be read")
            return f"unreadable {kind}"
        name = kind if _is_config(value) else self.code.reach_class(type(value))
        pairs = [f"{key} {self.token(part, f'{where}.{key}')}" for key, part in sorted(slots.items())]
        if isinstance(attributes, dict):
            left_out = _NOT_READ_IN_CONFIGS if _is_config(value) else {}
            counts = {key: part for key, part in attributes.items() if key not in left_out}
            self._watch(attributes, counts)
            if _is_config(value):
                counts = {key: self._dtype_in_config(part) if key in ("dtype", "torch_dtype") else part for key, part in counts.items()}
            pairs += self._pairs(counts, where)
        return _short(name, pairs)

    def _dtype_in_config(self, dtype: Any) -> str:
        """Written as text, as torch's object or not at all, until the model is saved once."""
        return str(dtype or self._dtype).removeprefix("torch.")

    def _attributes_beside(self, value: Any, where: str) -> str:
        """What a subclass of dict keeps beside its entries."""
        attributes = getattr(value, "__dict__", None)
        if type(value) in (dict, collections.OrderedDict) or not isinstance(attributes, dict) or isinstance(value, types.MappingProxyType):
            return ""
        self._watch(attributes, attributes)
        return _short(self.code.reach_class(type(value)), self._pairs(attributes, where))

    def _pairs(self, mapping: Any, where: str) -> list[str]:
        # The entries themselves: a subclass's own `[]` may make a new object each time.
        items = dict.items(mapping) if isinstance(mapping, dict) else mapping.items()
        pairs = [(self.token(key, where), key, value) for key, value in items]
        return [f"{text} {self.token(value, f'{where}.{key}')}" for text, key, value in sorted(pairs, key=lambda pair: pair[0])]

    def _walk_module(self, path: str, module: Any, in_adapter: bool) -> None:
        if id(module) in self._paths:
            self.lines[path] = f"as {self._paths[id(module)]}"
            return
        self._paths[id(module)] = path
        self.classes.append((module, type(module)))
        inner = _stands_in_for(module)
        if inner is not None:
            self._watch_aside(module)
            if _is_compiled(module):
                self.lines[f"{path} (compiled)"] = "torch.compile"
            self._check_prompt_learning(module)
            self._walk_module(path, inner, in_adapter)
            return
        self._modules.append((path, module))
        attributes = vars(module)
        tables = [key for key in ("_parameters", "_buffers", "_modules") if attributes.get(key)]
        tables += [key for key in ("_active_adapter", "_disable_adapters") if key in attributes]
        self._watch(attributes, [*tables, *(key for key in attributes if key not in _NOT_READ_IN_MODULES)])
        self._check_hooks(path, module)
        hidden = _adapters_of(module)
        texts = [f"class {self.code.reach_class(type(module), in_tree=True)}"]
        doubt = list(texts)
        if hidden is not _NO_NAMES:
            texts.append(f"adapters {hidden.used}")
        for key in sorted(attributes):
            if key in _NOT_READ_IN_MODULES:
                continue
            value = attributes[key]
            of_adapters = isinstance(value, dict) and bool(value) and value.keys() <= hidden.all
            if of_adapters:
                self._watch(value, value)
                value = {name: part for name, part in value.items() if name not in hidden}
                self._kept.append(value)
            text = f"{key} {self.token(value, f'{path}.{key}')}"
            texts.append(text)
            if key not in _NO_WEIGHTS_EDITED and not of_adapters:
                doubt.append(text)
        self._check_prompt_learning(module)
        self._check_own_forward(path, attributes)
        self._walk_weights(path, module, in_adapter)
        children = attributes.get("_modules") or {}
        self._watch(children, children)
        texts.append(f"children {[name for name in children if name not in hidden]}")
        self.lines[path], self.doubt[path] = "\n".join(texts), "\n".join(doubt)
        for name, child in children.items():
            if child is not None and name not in hidden:
                self._walk_child(f"{path}.{name}" if path else name, child, in_adapter, hidden)

    def _walk_child(self, path: str, child: Any, in_adapter: bool, hidden: _Hidden) -> None:
        names = vars(child).get("_modules") or {}
        tables = {**names, **(vars(child).get("_parameters") or {}), **(vars(child).get("_buffers") or {})}
        if hidden is not _NO_NAMES and tables and tables.keys() <= hidden.all:
            self._walk_adapters(path, child, hidden)
        else:
            self._walk_module(path, child, in_adapter)

    def _walk_adapters(self, path: str, table: Any, hidden: _Hidden) -> None:
        """A table of adapters, by name: those in use alone."""
        self._watch_aside(table)
        self._paths[id(table)] = path
        for name, child in vars(table)["_modules"].items():
            if name not in hidden:
                self._walk_module(f"{path}.{name}", child, in_adapter=True)
        for kind in ("_parameters", "_buffers"):
            for name, tensor in vars(table)[kind].items():
                if name not in hidden and tensor is not None:
                    self._tensor(f"{path}.{name}", tensor, path, True)

    def _watch_aside(self, module: Any) -> None:
        """Watches a module that is not read: what it hides may come into use."""
        self._kept.append(module)
        self._watch(vars(module), vars(module))
        for value in vars(module).values():
            if isinstance(value, dict):
                self._watch(value, value)
            elif isinstance(value, list):
                self.sequences.append(value)

    def _walk_weights(self, path: str, module: Any, in_adapter: bool) -> None:
        for kind in ("_parameters", "_buffers"):
            table = vars(module).get(kind) or {}
            self._watch(table, table)
            for name, tensor in table.items():
                if tensor is not None:
                    self._tensor(f"{path}.{name}" if path else name, tensor, path, in_adapter)

    def _tensor(self, name: str, tensor: torch.Tensor, module: str, in_adapter: bool) -> str:
        """Notes a weight; of a wrapper around other tensors (quantised ones), those."""
        why = refusal_of(tensor)
        if why is not None:
            self._refuse(f"{name}: {why}")
            return "unreadable"
        beside = {key: value for key, value in (getattr(tensor, "__dict__", None) or {}).items() if key not in _NOT_READ_IN_TENSORS}
        if beside:
            self._watch(tensor.__dict__, beside)
            self.lines[f"{name} (beside)"] = "\n".join(self._pairs(beside, name))
        if hasattr(tensor, "__tensor_flatten__"):
            inner, context = tensor.__tensor_flatten__()
            self.lines[f"{name} (wrapper)"] = f"{type(tensor).__module__}.{type(tensor).__qualname__} {self.token(context, name)}"
            return ", ".join(self._tensor(f"{name}.{key}", getattr(tensor, key), module, in_adapter) for key in inner)
        if tensor.is_quantized:
            self._refuse(f"{name}: weights quantised by torch.ao cannot be read: quantise with torchao, bitsandbytes or GPTQ")
            return "unreadable"
        self.tensors.append(Seen(name, tensor, module, in_adapter))
        return name

    def _check_hooks(self, path: str, module: Any) -> None:
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = vars(module).get(kind)
            if not hooks:
                self._watch(hooks, ())
                continue
            self._watch(hooks, hooks)
            for hook in hooks.values():
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                if f"{getattr(hook, '__module__', None)}.{name}" not in _HARMLESS_HOOKS:
                    self._refuse(f"{path or 'the model'} has a forward hook ({name}), which may change anything: remove it")

    def _check_own_forward(self, path: str, attributes: dict[str, Any]) -> None:
        for key in ("forward", "_compiled_call_impl"):
            value = attributes.get(key)
            if value is not None and key == "forward":
                self._refuse(f"{path or 'the model'} has a forward of its own, not its class's, which may change anything")

    def _check_prompt_learning(self, module: Any) -> None:
        """Soft prompts are KV that no token stands for."""
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if getattr(config, "is_prompt_learning", False) and name == getattr(module, "active_adapter", name):
                self._refuse(f"adapter {name} is a learned prompt, which is KV without tokens: use an adapter of another kind")

    def _check_training(self) -> None:
        asks = {cls: self.code.mentions(cls, "training") for cls in {type(module) for _, module in self._modules}}
        random = [(path, module) for path, module in self._modules if asks[type(module)]]
        for _, module in random:
            self._watch(vars(module), ["training"] if "training" in vars(module) else ())
        where = [path for path, module in random if module.training]
        if where:
            self._refuse(f"{where[0] or 'the model'} is in training mode, which may compute at random: call model.eval()")

    def _watch(self, mapping: Any, keys: Any) -> None:
        """Notes that these entries of a dict were read, and that there were no others that count."""
        if mapping is None:
            return
        if not mapping:
            self.empty.append(mapping)
            return
        known = self.read.get(id(mapping))
        before = known[1] if known else ()
        self.read[id(mapping)] = (mapping, (*before, *(key for key in keys if key not in before)))

    def _refuse(self, why: str) -> None:
        if why not in self.refusals:
            self.refusals.append(why)


class _Hidden(frozenset):  # type: ignore[type-arg]
    """The adapters of a PEFT layer that are not in use, by name; `all` of them, and those that are `used`, in their order."""

    all: frozenset[str] = frozenset()
    used: tuple[str, ...] = ()


_NO_NAMES = _Hidden()


def _peft(module: str, name: str) -> Any:
    """A class of PEFT, or nothing that anything could be an instance of."""
    return getattr(sys.modules.get(f"peft.{module}"), name, ())


def _adapters_of(module: Any) -> _Hidden:
    """The adapters that a PEFT layer has. Of any other module: none."""
    if not isinstance(module, (_peft("tuners.tuners_utils", "BaseTunerLayer"), _peft("utils.other", "AuxiliaryTrainingWrapper"))):
        return _NO_NAMES
    tables = [*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())]
    entries = [getattr(module, table, None) for table in tables]
    names = {name for table in entries if table is not None and hasattr(table, "keys") for name in table.keys()}
    active = [] if module.disable_adapters else module.active_adapters
    used = dict.fromkeys([*([active] if isinstance(active, str) else active), *getattr(module, "merged_adapters", ())])
    hidden = _Hidden(names - used.keys())
    hidden.all, hidden.used = frozenset(names), tuple(name for name in used if name in names)
    return hidden


def _stands_in_for(module: Any) -> Any:
    """The module that a wrapper computes the same as: torch.compile's, PEFT's around a model, and a PEFT layer none of whose adapters is
    in use. None for any other module."""
    children = vars(module).get("_modules") or {}
    if _is_compiled(module):
        return children.get("_orig_mod")
    if isinstance(module, _peft("peft_model", "PeftModel")) and type(module).__module__.startswith("peft."):
        return children.get("base_model")
    if isinstance(module, _peft("tuners.tuners_utils", "BaseTuner")) and type(module).__module__.startswith("peft."):
        return children.get("model")
    adapters = _adapters_of(module)
    if adapters is _NO_NAMES or adapters.used:
        return None
    return children.get("base_layer", children.get("original_module"))


def _is_compiled(module: Any) -> bool:
    optimized = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    return isinstance(module, optimized)


def _plain(value: Any) -> str | None:
    """The text of a value that cannot change; None for others."""
    import torch

    if value is None or value is ... or value is NotImplemented:
        return repr(value)
    if type(value) in (bool, int, float, complex, str, bytes):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f"device {value.type}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if isinstance(value, (int, float, str, bytes)):
        base: Any = next(kind for kind in (int, float, str, bytes) if isinstance(value, kind))
        return f"{type(value).__qualname__} {base(value)!r}"
    if isinstance(value, re.Pattern):
        return f"pattern {value.pattern!r} {value.flags}"
    if isinstance(value, (pathlib.PurePath, range, slice)):
        return f"{type(value).__qualname__} {value!s}"
    return None


def _short(kind: str, parts: list[str]) -> str:
    joined = "\0".join(parts)
    return f"{kind} {len(parts)} {hashlib.sha256(joined.encode()).hexdigest()[:32]}"


def _is_config(value: Any) -> bool:
    return hasattr(type(value), "model_type") and hasattr(value, "to_dict")


def _slots(value: Any) -> dict[str, Any]:
    names = [name for cls in type(value).__mro__ for name in _names_in_slots(cls)]
    return {name: getattr(value, name) for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)}


def _names_in_slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _unpacked(value: Any) -> Any:
    """What is in the packed weights of torch.ao's quantised layers."""
    return None
