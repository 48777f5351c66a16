"""Loads by layer: a layer's attention waits for its own part of a copy, while the parts of later layers are still copied.

Invariant: no layer reads what its part has not brought. Whether vLLM's hook comes before each layer's attention is not believed but seen:
until one step has called it for every layer, and in every step that runs as one graph, all parts are waited for before the first layer.
Either way the wait is the device's, and the step goes on being launched.

Copies of our own with a stream of our own were the alternative: vLLM's worker orders its copies, reuses what it needs for them, and says when they have
ended. Here it does all of that, and only the one call that copies is cut into as many as there are layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vllm.v1.kv_offload.base import OffloadingWorker

from kvkeep.vllm import _compat

_log = logging.getLogger(__name__)


class LayerWorker(Protocol):
    """A worker whose loads for this step can be waited for layer by layer."""

    def wait_layer(self, layer: int) -> None:
        """What comes after this on the device sees that layer."""

    def wait_all(self) -> None:
        """What comes after this on the device sees all layers. The step's loads are no longer this step's."""


class LayerWaits:
    """The waits of one step after the other."""

    def __init__(self, names: Sequence[str], worker: LayerWorker) -> None:
        self._layers = {name: number for number, name in enumerate(names)}
        self._worker = worker
        self._mode: str | None = None
        self._seen: set[str] = set()
        self.trusted: set[str] = set()
        """Ways to run a step in which the hook was seen for each layer."""

    def begin(self, context: Any) -> None:
        """The loads of this step are submitted, and its first layer is not yet."""
        self._mode, self._seen = _compat.hooked_mode(context), set()
        if self._mode not in self.trusted:
            self._worker.wait_all()

    def before(self, name: str) -> None:
        """This layer's attention is next."""
        layer = self._layers.get(name)
        if layer is not None:
            self._seen.add(name)
            self._worker.wait_layer(layer)

    def end(self) -> None:
        """The step's last layer is submitted. Whatever had no hook is in order with what comes next."""
        self._worker.wait_all()
        if self._mode is not None and len(self._seen) == len(self._layers):
            if self._mode not in self.trusted:
                _log.info("kvkeep: loads are waited for layer by layer (%s)", self._mode)
            self.trusted.add(self._mode)
        self._mode = None


class ByLayer(OffloadingWorker):
    """vLLM's worker for a GPU, whose loads are copied one layer after the other, with an event behind each."""

    def __init__(self, worker: Any, layers: int, cuda: Any, swap: Callable[..., None]) -> None:
        self._worker, self._layers, self._cuda, self._swap = worker, layers, cuda, swap
        self._events: list[Any] = []
        """Of the load that is being submitted."""
        self._step: list[list[Any]] = []
        """Of the loads that this step reads."""
        self._before: Any = None
        worker._load_handler._swap_blocks_batch = self._copy

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return bool(self._worker.submit_store(job_id, src_spec, dst_spec))

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, **more: Any) -> bool:
        # Not every release has a load wait for what was computed in these blocks before.
        self._before, self._events = self._cuda.mark(), []
        submitted = self._worker.submit_load(job_id, src_spec, dst_spec, **more)
        if isinstance(src_spec, _compat.RowsNow):
            self._step.append(self._events)
        return bool(submitted)

    def _copy(self, src: Any, dst: Any, sizes: Any, **how: Any) -> None:
        """What vLLM's worker calls on the stream of a load. Its pieces are in the order of layers, as many for each."""
        self._cuda.wait(self._before)
        pieces = len(src)
        layers = self._layers if pieces % self._layers == 0 else 1
        each = pieces // layers
        for first in range(0, pieces, each):
            part = slice(first, first + each)
            self._swap(src[part], dst[part], sizes[part], **how)
            self._events.append(self._cuda.mark())

    def wait_layer(self, layer: int) -> None:
        for events in self._step:
            if events:
                self._cuda.wait(events[layer] if len(events) == self._layers else events[-1])

    def wait_all(self) -> None:
        for events in self._step:
            if events:
                self._cuda.wait(events[-1])
        self._step = []

    def get_finished(self) -> list[Any]:
        return list(self._worker.get_finished())

    def wait(self, job_ids: set[int]) -> None:
        self._worker.wait(job_ids)

    def shutdown(self) -> None:
        self._step, self._events = [], []
        self._worker.shutdown()
