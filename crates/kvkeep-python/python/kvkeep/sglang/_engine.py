"""What kvkeep needs to know of the SGLang process that it is in: its arguments, its place among replicas, and when its weights change.

Invariant: nothing here asks for a version. It is asked what is there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

_generation = ""


def arguments(model_name: str | None) -> Mapping[str, Any]:
    """The engine's arguments as they are in effect. Raises RuntimeError outside of SGLang's scheduler, which alone knows them."""
    from sglang.srt.runtime_context import get_context

    context = get_context()
    try:
        given = context.server_args
    except ValueError as error:
        raise RuntimeError("kvkeep does not know which model this is: a storage backend is made in SGLang's scheduler, which has arguments") from error
    known = dict(context.resolved_server_args_dict())
    return {"model_path": model_name, **{name: value for name, value in known.items() if not name.startswith("_")}, "lora_paths": _adapters(given, context)}


def _adapters(given: Any, context: Any) -> Any:
    """As objects: a dictionary of arguments may have them as text."""
    try:
        return context.config_leaf("lora_paths")
    except (ValueError, AttributeError):
        return getattr(given, "lora_paths", None)


def place(storage: Any) -> str:
    """A name that no other process of this engine has: one folder belongs to one process."""
    from sglang.srt.runtime_context import get_parallel

    try:
        replica = get_parallel().dp_rank or 0
    except RuntimeError:  # it was not said
        replica = 0
    ranks = (replica, storage.dp_rank, storage.pp_rank, storage.attn_cp_rank, storage.tp_rank)
    return "-".join(str(rank) for rank in ranks)


def generation() -> str:
    """Another one after each change of the weights in this process; nothing before the first."""
    return _generation


_CHANGING = (
    "_select_runners", "begin_weight_update", "end_weight_update", "flush_cache_after_weight_update",
    "update_weights_from_disk", "update_weights_from_distributed", "update_weights_from_ipc", "update_weights_from_tensor",
)  # fmt: skip


def watch_weights() -> bool:
    """Has every change of the weights begin a new generation. False if this SGLang has no place for it.

    Two of them are called by SGLang through its object each time: those are met also by a backend that is attached to an engine at work.
    """
    try:
        from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Updater
    except ImportError:
        return False
    found = [name for name in _CHANGING if callable(getattr(Updater, name, None))]
    for name in found:
        method = getattr(Updater, name)
        if not getattr(method, "_kvkeep", False):
            setattr(Updater, name, _begins_a_generation(method))
    return {"_select_runners", "flush_cache_after_weight_update"} <= set(found)


def _begins_a_generation(method: Any) -> Any:
    @functools.wraps(method)
    def changing(*given: Any, **named: Any) -> Any:
        try:
            return method(*given, **named)
        finally:
            # After it, too, whatever came of it: what was computed meanwhile is of neither.
            global _generation
            _generation = os.urandom(16).hex()

    changing._kvkeep = True  # type: ignore[attr-defined]
    return changing
