"""`KvkeepConnector`: vLLM's offloading connector, whose loads from RAM run in the step that reads them, layer by layer.

    "kv_connector": "KvkeepConnector", "kv_connector_module_path": "kvkeep.vllm", and the rest as for `KvkeepOffloadingSpec`

vLLM's own connector has a request wait until its blocks are there, and schedules it in a later step. Here it is scheduled at once.

Invariant: a load runs in the step that reads it only if it brings whole blocks into which that step writes nothing, for the one group of layers that there is, on
one device. Every other load goes vLLM's way. The scheduler's half and the worker's need not agree: a load is waited for, by layer or at once.

A connector of our own was the alternative: vLLM's is 2,000 lines that know its schedulers.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from kvkeep.vllm import _compat
from kvkeep.vllm._layers import LayerWaits
from kvkeep.vllm._manager import KvkeepManager
from kvkeep.vllm._spec import KvkeepOffloadingSpec

_log = logging.getLogger(__name__)


class KvkeepConnector(OffloadingConnector):
    """For `KvkeepOffloadingSpec` alone."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        ours = [getattr(self.connector_worker, "spec", None), getattr(self.connector_scheduler, "manager", None)]
        if not any(isinstance(one, (KvkeepOffloadingSpec, KvkeepManager)) for one in ours):
            raise ValueError("kvkeep: KvkeepConnector loads from kvkeep's RAM alone: set spec_name to KvkeepOffloadingSpec, or kv_connector to OffloadingConnector")
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._now: set[str] = set()
        """Requests whose load, if it is made in this step, is read by it."""
        self._now_jobs: set[int] = set()
        self._now_requests: dict[int, str] = {}
        self._waits: LayerWaits | None = None
        problem = _compat.no_same_step(vllm_config, kv_cache_config)
        self._is_now = problem is None
        if role == KVConnectorRole.SCHEDULER and problem is not None:
            _log.warning("kvkeep: loads are vLLM's, a step ahead: %s", problem)

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """Asked by releases that would lay the layers of a block side by side: a head at a time, so that no layer is in one piece."""
        return False

    # The worker's half.

    def register_kv_caches(self, kv_caches: Any) -> None:
        if self._is_now:
            names = list(self._kv_cache_config.kv_cache_groups[0].layer_names)
            self.connector_worker.spec.layers = len(names)
        super().register_kv_caches(kv_caches)
        if self._is_now:
            self._waits = LayerWaits(names, self.connector_worker.worker)

    def start_load_kv(self, forward_context: Any, **more: Any) -> None:
        for job_id, job in self._connector_metadata.load_jobs.items():
            if isinstance(job.src_spec, _compat.RowsNow):
                self._now_requests[job_id] = job.req_id
        super().start_load_kv(forward_context, **more)
        if self._waits is not None:
            self._waits.begin(forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._waits is not None:
            self._waits.before(layer_name)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[Any, Any]:
        if self._waits is not None:
            self._waits.end()
        sent, received = super().get_finished(finished_req_ids)
        # Nobody waits for these: their requests run.
        done = self.connector_worker._connector_worker_meta.completed_jobs
        ours = {self._now_requests.pop(job_id) for job_id in list(self._now_requests) if job_id in done}
        return sent, received - ours

    # The scheduler's half.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens, is_ahead = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self._now.discard(request.request_id)
        if not (tokens and is_ahead and self._is_now):
            return tokens, is_ahead
        end = num_computed_tokens + tokens
        if num_computed_tokens % self._block_tokens or end % self._block_tokens or end >= request.num_tokens:
            return tokens, is_ahead
        self._now.add(request.request_id)
        return tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if request.request_id not in self._now or num_external_tokens == 0:
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            return
        self._now.discard(request.request_id)
        half = self.connector_scheduler
        before = set(half._current_batch_load_jobs)
        first = half._req_status[request.request_id].num_locally_computed_tokens // self._block_tokens
        super().update_state_after_alloc(request, _as_if_ahead(blocks, first), num_external_tokens)
        for job_id in set(half._current_batch_load_jobs) - before:
            job = half._current_batch_load_jobs[job_id]
            job.src_spec = _compat.RowsNow(job.src_spec.block_ids.tolist())
            _compat.beside_stores(half._jobs[job_id], job.dst_spec.block_ids.tolist())
            self._now_jobs.add(job_id)

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        for job_id, count in (meta.completed_jobs if meta is not None else {}).items():
            status = self.connector_scheduler._jobs.get(job_id)
            # Each worker says so by itself. What the last one ends is a load again.
            if job_id in self._now_jobs and (status is None or status.pending_count == count):
                self._now_jobs.discard(job_id)
                if status is not None:
                    status.is_store = False
        super().update_connector_output(connector_output)

    def reset_cache(self) -> bool | None:
        self._now_jobs = set()
        return super().reset_cache()


def _as_if_ahead(blocks: Any, first: int) -> Any:
    """A request's blocks, with those from `first` on as they are before anybody may find them.

    What is loaded in the step that reads it can be found by others in that step, so these blocks have their hashes already. vLLM's connector takes blocks
    with a hash for computed ones, and would load nothing.
    """
    groups = [
        [
            SimpleNamespace(block_id=block.block_id, is_null=block.is_null, block_hash=block.block_hash or b"?" if at < first else None)
            for at, block in enumerate(group)
        ]
        for group in blocks.blocks
    ]
    return SimpleNamespace(blocks=tuple(groups))
