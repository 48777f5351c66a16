"""`KvkeepOffloadingSpec`: vLLM's GPU worker over kvkeep's RAM, with kvkeep's eviction in charge of it, and a disk, a daemon or a remote store below.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
      {"spec_name": "KvkeepOffloadingSpec", "spec_module_path": "kvkeep.vllm", "cpu_bytes_to_use": 34359738368, "block_size": 256,
       "kvkeep": {"root_dir": "/var/lib/kvkeep", "capacity_gb": 500}}}'

Invariant: sizes, layouts and parallelism are vLLM's own (`TieringOffloadingSpec`), so a row here has the bytes of a row there, and one folder serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingWorker
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvkeep import _kvkeep
from kvkeep._cuda import Cuda
from kvkeep._engines.worth import RatesFile
from kvkeep.vllm import _compat, _identity, _metrics
from kvkeep.vllm._layers import ByLayer
from kvkeep.vllm._manager import KvkeepManager
from kvkeep.vllm._rows import Registered, Rows, RowsWorker, find, publish
from kvkeep.vllm._settings import RamSettings


class KvkeepOffloadingSpec(TieringOffloadingSpec):
    """RAM and what is below it as one cache. Settings under `kvkeep`: `kvkeep.vllm._settings.RamSettings`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.extra_config.get("secondary_tiers"):
            raise ValueError("kvkeep: KvkeepOffloadingSpec has its tiers below RAM already: give it no secondary_tiers")
        self.settings = RamSettings.read(dict(self.extra_config.get("kvkeep") or {}))
        self.layers = 0
        """So many layers are loaded one after the other; 0: all at once. Set by a connector that waits for each."""
        self._rows_manager: KvkeepManager | None = None
        self._rows_worker: OffloadingWorker | None = None

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return _metrics.definitions(ram=True)

    def get_manager(self) -> OffloadingManager:
        if self._rows_manager is None:
            self._rows_manager = self._made_manager()
        return self._rows_manager

    def _made_manager(self) -> KvkeepManager:
        config, settings = _compat.vllm_config(), self.settings
        rows, row_bytes = _compat.rows_of_spec(self)
        if rows < 1:
            raise ValueError("kvkeep: RAM has no room for a single block: raise cpu_bytes_to_use")
        namespace, identity = _identity.namespace(settings, config, self, row_bytes)
        times = (settings.load_timeout_s, settings.flush_timeout_s)
        ram, behind = (rows * row_bytes, settings.eviction_policy), settings.tiers(config, rows * row_bytes)
        engine = _kvkeep.EngineRam(namespace, ram, behind, times, settings.tells(self))
        descriptor, _ = engine.memory()
        place = publish(settings.root, self.config.engine_id, descriptor, rows)
        tokens = [tokens * self.blocks_per_chunk for tokens in self.tokens_per_block]
        file = RatesFile(settings.root / "rates.json", identity)
        return KvkeepManager(engine, settings, config, row_bytes, tokens, file, identity, closed=lambda: place.unlink(missing_ok=True))

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._rows_worker is None:
            self._rows_worker = RowsWorker(self._maker(kv_caches))
        return self._rows_worker

    def _maker(self, kv_caches: CanonicalKVCaches) -> Callable[[Callable[[], bool]], tuple[OffloadingWorker, Registered | None]]:
        driver = Cuda()  # of the device that is current here; the thread that registers has another one

        def make(is_over: Callable[[], bool]) -> tuple[OffloadingWorker, Registered | None]:
            rows = self._map(is_over)
            registered = Registered(rows, driver.register, driver.unregister)
            worker, swap = _compat.gpu_worker(self, kv_caches, rows)
            return ByLayer(worker, self.layers, driver, swap) if self.layers else worker, registered

        return make

    def _map(self, is_over: Callable[[], bool]) -> Rows:
        count, row_bytes = _compat.rows_of_spec(self)
        rank = 0 if getattr(self, "replicated_layout", False) else self.config.parallel.rank
        descriptor = find(self.settings.root, self.config.engine_id, count, is_over)
        return Rows(descriptor, count, row_bytes, rank, self.cpu_page_size_per_worker)
