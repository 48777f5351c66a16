"""Each release of vLLM that the tier works with: its abstract classes, read from its own wheel, and the tier built on them.

The folders come from `make test-vllm`, which unpacks the wheels' Python files (`KVKEEP_VLLM_RELEASES` names the folder above them). Only what
a tier touches is imported; what that imports of the engine is stubbed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RELEASES = Path(os.environ.get("KVKEEP_VLLM_RELEASES", ""))

PROGRAM = """
import dataclasses, importlib.machinery, inspect, logging, sys, types
from pathlib import Path

root = Path({root!r})

def stub(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module

def folder(name):
    # The folder of a package, without running its __init__.
    module = types.ModuleType(name)
    module.__path__ = [str(root / name.replace(".", "/"))]
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = module

logger = logging.getLogger("vllm")
logger.info_once = logger.warning_once = lambda *_, **__: None
for name in ("vllm", "vllm.v1", "vllm.v1.kv_offload", "vllm.v1.kv_offload.tiering", "vllm.v1.metrics", "vllm.distributed",
             "vllm.distributed.kv_transfer", "vllm.distributed.kv_transfer.kv_connector", "vllm.distributed.kv_transfer.kv_connector.v1",
             "vllm.distributed.kv_transfer.kv_connector.v1.offloading", "vllm.v1.kv_offload.cpu", "vllm.v1.kv_offload.cpu.policies"):
    folder(name)
sys.modules["vllm"].__version__ = {version!r}
stub("vllm.logger", init_logger=lambda name: logger)
stub("vllm.config", VllmConfig=object)
@dataclasses.dataclass
class Stats:
    data: dict = dataclasses.field(default_factory=dict)
stub("vllm.distributed.kv_transfer.kv_connector.v1.metrics", KVConnectorPromMetrics=object, KVConnectorStats=Stats, PromMetric=object, PromMetricT=object)
stub("vllm.v1.kv_offload.factory", OffloadingSpecFactory=object)
stub("vllm.v1.kv_offload.cpu.shared_offload_region", SharedOffloadRegion=object)
stub("vllm.distributed.kv_events", MEDIUM_CPU="CPU")

sys.path.insert(0, {here!r})
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from kvkeep.vllm import KvkeepTier, register
import kvkeep.vllm, tier

assert Path(inspect.getfile(SecondaryTierManager)).is_relative_to(root)
assert not KvkeepTier.__abstractmethods__, KvkeepTier.__abstractmethods__

# What the base class has, we have with its parameters, in their order, under their names.
for name, theirs in inspect.getmembers(SecondaryTierManager, inspect.isfunction):
    ours = getattr(KvkeepTier, name)
    if name.startswith("_") or ours is theirs:
        continue
    expected, found = (list(inspect.signature(function).parameters) for function in (theirs, ours))
    assert found[: len(expected)] == expected, (name, expected, found)
    print("same", name)

# The factory's own call, with the arguments that this release gives.
register()
config = {{"type": "kvkeep", "root_dir": {work!r}, "capacity_gb": 0.1, "worth": "always"}}
assert SecondaryTierFactory.get_tier_class(config) is KvkeepTier
from pathlib import Path
import numpy as np
vllm_config = tier.engine_config(Path({work!r}).parent / "model")
made = SecondaryTierFactory.create_secondary_tier(config, memoryview(np.zeros((8, tier.ROW_BYTES), np.int8)), tier.offloading_spec())
made.shutdown()

# And a round: store, look up, load, in a second life.
keys = tier.names(6)
for life in range(2):
    with tier.Lab(Path({work!r}), rows=8) as lab:
        if life == 0:
            lab.store(keys)
        assert all(lab.hits(keys, tier.request("asks", keys)))
        assert lab.load(keys).success
        assert all((lab.rows[row] == tier.content(key)).all() for row, key in enumerate(keys))
        assert set(lab.tier.get_stats().data["data"]) <= set(KvkeepTier.build_metric_definitions({{}}))
print("round done")

# This release's own manager over its own RAM tier: a promotion that comes, one that is damaged, one that is not worth it.
from vllm.v1.kv_offload.base import LookupResult, ScheduleEndContext
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

def manager_over(lab):
    size = {{name: 8 for name in ("num_chunks", "num_blocks") if name in inspect.signature(CPUPrimaryTierOffloadingManager).parameters}}
    region = types.SimpleNamespace(create_kv_memoryview=lambda: lab.view, cleanup=lambda: None)
    return TieringOffloadingManager(CPUPrimaryTierOffloadingManager(mmap_region=region, **size), [lab.tier])

def step(manager, context):
    manager.on_schedule_end(ScheduleEndContext(new_req_ids=[], preempted_req_ids=[]))

def found(manager, keys, context, steps=400):
    # As vLLM's scheduler asks: each block in order up to the first miss, again at each step while something is on its way.
    for _ in range(steps):
        answers = []
        for key in keys:
            answers.append(manager.lookup(key, context))
            if answers[-1] is LookupResult.MISS:
                break
        step(manager, context)
        if not set(answers) & {{LookupResult.RETRY, LookupResult.HIT_PENDING}}:
            return answers.count(LookupResult.HIT)
        time.sleep(0.01)
    raise AssertionError("it is asked for ever")

import time
for what, worth, expected in (("comes", "always", {{6}}), ("slow", "measured", {{0}}), ("damaged", "always", {{3}})):
    with tier.Lab(Path({work!r}), rows=8, worth=worth) as lab:
        if what == "damaged":
            lab.tier._engine.remove(keys[3:4])
        if what == "slow":
            lab.tier.rates.measured["disk"] = 1e3
        manager, context = manager_over(lab), tier.request("asks", keys)
        manager.on_new_request(context)
        assert found(manager, keys, context) in expected, what
        if what == "comes":
            assert all(bytes(lab.rows[row]) in [bytes(tier.content(key)) for key in keys] for row in range(6))
            manager.on_request_finished(context)
            manager.reset_cache()
            manager.get_stats()
print("manager done")

# The other way: kvkeep's RAM, whose manager and worker are built on this release's classes.
import ram
from vllm.v1.kv_offload.base import OffloadingManager, OffloadingWorker
from kvkeep.vllm._manager import KvkeepManager
from kvkeep.vllm._rows import RowsWorker

for ours, theirs in ((KvkeepManager, OffloadingManager), (RowsWorker, OffloadingWorker)):
    assert not ours.__abstractmethods__, ours.__abstractmethods__
    for name, function in inspect.getmembers(theirs, inspect.isfunction):
        if name.startswith("_") or getattr(ours, name) is function:
            continue
        expected, found = (inspect.signature(function).parameters for function in (function, getattr(ours, name)))
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values())
        assert all(parameter in found or takes_more for parameter in expected), (ours, name)
with ram.Ram(Path({work!r}).parent / "ram") as lab:
    assert lab.store(keys) == keys and lab.found(keys) == 6
    lab.on_disk()
    assert lab.found(keys, "again") == 6
    lab.manager.touch(keys, tier.request("touches", keys))
    lab.manager.reset_cache()
    lab.manager.get_stats()
print("ram done")
"""


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.0"])
def test_the_tier_fits_this_releases_abstract_classes(version: str, tmp_path: Path) -> None:
    root = RELEASES / version
    if not (root / "vllm").is_dir():
        pytest.skip(f"the wheel of vLLM {version} is not unpacked: make test-vllm does it")
    program = PROGRAM.format(root=str(root), version=version, here=str(Path(__file__).parent), work=str(tmp_path / "kv"))
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"same lookup", "same submit_store", "same submit_load", "same get_finished_jobs", "round done", "manager done", "ram done"} <= set(done.stdout.splitlines())


RUNS = [
    {"connector": connector, "seed": seed, "blocks": blocks, "prefix_caching": prefix_caching}
    for connector, seed, blocks, prefix_caching in [
        ("KvkeepConnector", 1, 200, True), ("KvkeepConnector", 2, 60, True), ("KvkeepConnector", 3, 60, False), ("OffloadingConnector", 4, 60, True),
    ]
]  # fmt: skip


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.0"])
def test_each_layer_reads_what_was_computed_under_this_releases_own_scheduler(version: str, tmp_path: Path) -> None:
    """Blocks of a load in its own step have their hashes already: vLLM's connector took them for computed, and loaded nothing. And vLLM's scheduler ended where such a
    request stored, or was preempted, before its load was counted as ended."""
    root = RELEASES / version
    if not (root / "vllm").is_dir():
        pytest.skip(f"the wheel of vLLM {version} is not unpacked: make test-vllm does it")
    given = {"root": str(tmp_path), "early_aborts": version != "0.26.0", "runs": RUNS}
    path = [str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, str(Path(__file__).with_name("schedules.py")), json.dumps(given)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(seen) == len(RUNS) and sum(run["preemptions"] for run in seen) > 0, seen
    by_layer = sum(run["all_by_layer"] for run in seen)
    assert by_layer > 20 if version != "0.33.0" else by_layer == 0, seen
