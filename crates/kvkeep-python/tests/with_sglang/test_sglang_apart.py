"""Private: what is not the same model, part of a page, adapter or tenant finds nothing, and not even that there is something."""

from __future__ import annotations

import importlib
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import LAYERS, PAGE_TOKENS, Lab, as_key, begin, config, flip, model, page_bytes, prompt
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_storage_hash_str

from kvkeep.sglang import _engine


def identity(tmp_path: Path, arguments: dict[str, Any] | None = None, weights: str | None = None, **ranks: Any) -> str:
    begin(tmp_path / "model", **arguments or {})
    said: dict[str, Any] = dict(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
                                enable_storage_metrics=False, is_page_first_layout=True, model_name=str(tmp_path / "model"))  # fmt: skip
    extra = config(tmp_path / "kv", **({"weights": weights} if weights else {}))
    storage = StorageBackendFactory.create_backend("dynamic", HiCacheStorageConfig(**{**said, **ranks}, extra_config=extra), None)
    return str(storage.identity)  # type: ignore[attr-defined]


def test_private__the_same_engine_has_the_same_identity_in_another_place(tmp_path: Path) -> None:
    first = identity(tmp_path)
    assert first == identity(tmp_path)
    (tmp_path / "model").rename(tmp_path / "moved")
    (tmp_path / "model").symlink_to("moved")
    assert first == identity(tmp_path, {"max_running_requests": 3}), "what decides no byte does not matter"


@pytest.mark.parametrize(
    "other",
    [
        {"arguments": {"kv_cache_dtype": "fp8_e4m3"}},
        {"arguments": {"dtype": "float32"}},
        {"arguments": {"json_model_override_args": '{"rope_theta": 1}'}},
        {"arguments": {"attention_backend": "triton"}},
        {"weights": "a revision"},
        {"tp_rank": 1, "tp_size": 2},
        {"tp_size": 2},
        {"pp_size": 2},
        {"pp_rank": 1, "pp_size": 2},
        {"attn_cp_size": 2},
        {"is_mla_model": True},
    ],
)
def test_private__what_decides_a_byte_makes_another_identity(tmp_path: Path, other: dict[str, Any]) -> None:
    assert identity(tmp_path) != identity(tmp_path, **other)


@pytest.mark.parametrize("mla", [False, True])
def test_private__each_rank_has_an_identity_of_its_own(tmp_path: Path, mla: bool) -> None:
    """Of a model whose ranks have the same KV, states beside it are still each rank's part."""
    assert len({identity(tmp_path, tp_rank=rank, tp_size=2, is_mla_model=mla) for rank in (0, 1)}) == 2


def test_private__other_weights_under_the_same_name_find_nothing(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(prompt(20))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"others.")
    with Lab(tmp_path / "kv") as lab:
        assert lab.load(prompt(20)) == 0
        assert lab.store(prompt(20)) == 20 * PAGE_TOKENS
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    with Lab(tmp_path / "kv") as lab:
        assert lab.load(prompt(20)) == 20 * PAGE_TOKENS, "both are kept"


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float16},  # pages have one size
        {"layout": "page_first_direct"},
        {"layout": "layer_first"},
        {"v1": False},
        {"kind": "mla"},
        {"page_tokens": 32},
        {"salt": "tenant"},
    ],
)
def test_private__another_layout_precision_or_salt_finds_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(prompt(20))
    with Lab(tmp_path / "kv", **other) as lab:
        assert lab.hits(prompt(20)) == lab.load(prompt(20)) == 0
        assert lab.store(prompt(20)) == 20 * PAGE_TOKENS and lab.load(prompt(20)) == 20 * PAGE_TOKENS


def test_private__an_adapter_or_a_salt_of_a_request_finds_nothing_of_anothers(tmp_path: Path) -> None:
    keys = [RadixKey(array("q", prompt(10)), **named) for named in ({}, {"extra_key": "lora"}, {"extra_key": "other"}, {"cache_salt": "tenant"})]
    with Lab(tmp_path / "kv") as lab:
        for number, key in enumerate(keys):
            assert [lab.load(one) for one in keys] == [10 * PAGE_TOKENS if at < number else 0 for at in range(len(keys))]
            lab.store(key)


def test_private__an_adapter_that_was_trained_on_under_its_name_and_path_finds_nothing(tmp_path: Path) -> None:
    """SGLang's number of an adapter is made of its name and path. The engine that was started with a retrained one had its predecessor's KV."""
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"r": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}')
    (lora / "adapter_model.safetensors").write_bytes(b"first")
    arguments = {"lora_paths": [f"a={lora}"], "max_lora_rank": 8, "lora_target_modules": ["q_proj"], "disable_radix_cache": False}
    key = RadixKey(array("q", prompt(10)), extra_key="a")
    with Lab(tmp_path / "kv", arguments=arguments) as lab:
        lab.store(key)
    with Lab(tmp_path / "kv", arguments=arguments) as lab:
        assert lab.load(key) == 10 * PAGE_TOKENS, "it is warm"
    (lora / "adapter_model.safetensors").write_bytes(b"again")
    with Lab(tmp_path / "kv", arguments=arguments) as lab:
        assert lab.load(key) == 0


def test_private__ranks_have_folders_of_their_own_also_where_sglang_has_one_rank_write_for_all(tmp_path: Path) -> None:
    """Of a model whose ranks all have the same KV, SGLang has the first rank alone write it. The others had an empty folder, and all of them together no hit."""
    for rank in (0, 1):
        with Lab(tmp_path / "kv", "mla", arguments={"tp_rank": rank, "tp_size": 2}) as lab:
            assert lab.controller.storage_config.tp_rank == rank and not lab.controller.backup_skip
            assert lab.store(prompt(20)) == 20 * PAGE_TOKENS
    assert len(list((tmp_path / "kv").glob("kv-*"))) == 2
    for rank in (1, 0):
        with Lab(tmp_path / "kv", "mla", arguments={"tp_rank": rank, "tp_size": 2}) as lab:
            assert lab.load(prompt(20)) == 20 * PAGE_TOKENS


RANK = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
import torch
from lab import Lab, meet, prompt
root, rank = Path({root!r}), {rank}
meet(torch.distributed.FileStore(str(root.parent / "meets"), 2), rank, 2)
lab = Lab(root, "mla", arguments={{"tp_rank": rank, "tp_size": 2}})
print("stored", lab.store(prompt(20)), flush=True)
for _ in range(2):
    input()
    print("loaded", lab.load(prompt(20)), flush=True)
lab.controller.detach_storage_backend()
"""


def test_never_wrong__ranks_that_start_and_ask_at_once_agree_on_what_all_of_them_have(tmp_path: Path) -> None:
    """Two processes with one model: both hash its files at once, each stores, and SGLang takes what the one that has least of it has."""
    model(tmp_path / "model")
    programs = [RANK.format(here=str(Path(__file__).parent), root=str(tmp_path / "kv"), rank=rank) for rank in (0, 1)]
    ranks = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for program in programs]

    def said(word: str) -> list[int]:
        return [next(int(line.split()[1]) for line in iter(rank.stdout.readline, "") if line.startswith(word)) for rank in ranks if rank.stdout is not None]

    def go() -> None:
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()

    assert said("stored") == [20 * PAGE_TOKENS] * 2
    go()
    assert said("loaded") == [20 * PAGE_TOKENS] * 2
    seventh = get_storage_hash_str(as_key(prompt(20)), None, page_size=PAGE_TOKENS)[7]
    flip(tmp_path / "kv" / "kv-0-0-0-0-1", page_bytes(seventh, LAYERS * PAGE_TOKENS * 128 * 2).numpy().tobytes())
    go()
    assert said("loaded") == [7 * PAGE_TOKENS] * 2, "one of them has a page less"
    assert [rank.wait(60) for rank in ranks] == [0, 0]


@pytest.mark.parametrize("how", ["update_weights_from_disk", "update_weights_from_tensor", "end_weight_update", "_select_runners"])
def test_never_wrong__weights_that_change_in_a_running_engine_find_nothing_of_the_old_ones(tmp_path: Path, how: str) -> None:
    updater = importlib.import_module("sglang.srt.managers.scheduler_components.weight_updater").SchedulerWeightUpdaterManager
    with Lab(tmp_path / "kv") as lab:
        lab.store(prompt(20))
        assert lab.load(prompt(20)) > 0
        before = _engine.generation()
        with pytest.raises(Exception):  # noqa: B017  It has no engine to update: what failed may have changed half of the weights.
            getattr(updater, how)(None)
        assert _engine.generation() != before
        assert lab.load(prompt(20)) == 0
        assert lab.store(prompt(20)) == 20 * PAGE_TOKENS and lab.load(prompt(20)) == 20 * PAGE_TOKENS


@pytest.fixture(autouse=True)
def _weights_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process has the weights of its files."""
    monkeypatch.setattr(_engine, "_generation", "")
