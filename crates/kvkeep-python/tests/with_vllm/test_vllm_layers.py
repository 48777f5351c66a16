"""`KvkeepConnector`: loads in the step that reads them, layer by layer. In a real engine on the CPU, where a layer is copied when it is waited for and not before;
and the order of copies and waits as a device would see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_vllm_engine import Engine, alone, long_run, model, prompts, tier_at

from kvkeep.vllm import _compat
from kvkeep.vllm._layers import ByLayer, LayerWaits

__all__ = ["alone", "model"]

LAYERS = ["layers.0", "layers.1", "layers.2"]


class Device:
    """What comes after what: streams, each in its order, and marks that one waits for in another."""

    def __init__(self) -> None:
        self._known: dict[str, set[str]] = {"compute": set(), "copies": set()}
        self._current = "compute"
        self.before: dict[str, frozenset[str]] = {}

    def does(self, what: str) -> None:
        known = self._known[self._current]
        self.before[what] = frozenset(known)
        known.add(what)

    def mark(self) -> frozenset[str]:
        return frozenset(self._known[self._current])

    def wait(self, mark: frozenset[str]) -> None:
        self._known[self._current] |= mark

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self._current, before = stream, self._current
        yield
        self._current = before


class Theirs:
    """vLLM's worker as far as a load goes through it: pieces in the order of layers, copied by one call on a stream of copies."""

    def __init__(self, device: Device, pieces: int) -> None:
        self._device, self._pieces = device, pieces
        self._load_handler = SimpleNamespace(_swap_blocks_batch=None)

    def submit_load(self, job_id: int, src: Any, dst: Any) -> bool:
        pieces = list(range(self._pieces))
        with self._device.on("copies"):
            self._load_handler._swap_blocks_batch(pieces, pieces, pieces, is_src_access_order_any=True)
        return True


class Lab:
    """One worker, and steps of a model of three layers."""

    def __init__(self, pieces: int = 6, hooked: list[str] = LAYERS) -> None:
        self.device, self._hooked = Device(), hooked
        self.worker = ByLayer(Theirs(self.device, pieces), len(LAYERS), self.device, self._swap)
        self.waits = LayerWaits(LAYERS, self.worker)
        self.step_number = 0

    def _swap(self, src: list[int], dst: list[int], sizes: list[int], is_src_access_order_any: bool) -> None:
        assert src == dst == sizes
        for piece in src:
            self.device.does(f"copy {piece} of step {self.step_number}")

    def step(self, mode: str | None = "NONE", load: bool = False, ahead: bool = False) -> None:
        self.step_number += 1
        self.device.does(f"begin {self.step_number}")
        if load or ahead:
            self.worker.submit_load(self.step_number, _compat.CPULoadStoreSpec([0]) if ahead else _compat.RowsNow([0]), None)
        self.waits.begin(context(mode))
        for name in LAYERS:
            if name in self._hooked and mode in ("NONE", "PIECEWISE"):
                self.waits.before(name)
            self.device.does(f"{name} of step {self.step_number}")
        self.waits.end()

    def waited(self, layer: int) -> set[int]:
        """The pieces that are there when this layer of the last step begins."""
        before = self.device.before[f"{LAYERS[layer]} of step {self.step_number}"]
        return {piece for piece in range(100) if f"copy {piece} of step {self.step_number}" in before}


def context(mode: str | None) -> Any:
    return SimpleNamespace(attn_metadata={"layers.0": object()} if mode else None, cudagraph_runtime_mode=SimpleNamespace(name=mode or "NONE"))


def test_never_wrong__each_layer_comes_after_its_own_copy_and_not_after_later_ones() -> None:
    lab = Lab()
    lab.step()
    lab.step(load=True)
    assert [lab.waited(layer) for layer in range(3)] == [{0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5}]


@pytest.mark.parametrize("mode", ["FULL", None])
def test_never_wrong__a_step_without_hooks_waits_for_all_before_its_first_layer(mode: str | None) -> None:
    """A graph is replayed without vLLM's hooks: its first layers would have read what was not there."""
    lab = Lab()
    lab.step()
    lab.step(mode, load=True)
    assert all(lab.waited(layer) == set(range(6)) for layer in range(3))


def test_never_wrong__hooks_are_believed_only_once_they_were_seen_and_for_each_way_to_run_by_itself() -> None:
    lab = Lab()
    lab.step(load=True)
    assert lab.waited(0) == set(range(6))
    lab.step(load=True)
    assert lab.waited(0) == {0, 1}
    lab.step("PIECEWISE", load=True)
    assert lab.waited(0) == set(range(6))
    lab.step("PIECEWISE", load=True)
    assert lab.waited(0) == {0, 1}


def test_never_wrong__a_layer_without_a_hook_means_that_none_is_believed() -> None:
    lab = Lab(hooked=LAYERS[:2])
    for _ in range(3):
        lab.step(load=True)
        assert lab.waited(0) == set(range(6))


def test_never_wrong__pieces_that_are_not_alike_for_each_layer_are_waited_for_together() -> None:
    lab = Lab(pieces=7)
    lab.step()
    lab.step(load=True)
    assert all(lab.waited(layer) == set(range(7)) for layer in range(3))


def test_never_wrong__copies_come_after_what_was_computed_in_those_blocks_and_steps_after_the_copies_before_them() -> None:
    lab = Lab()
    lab.step()
    lab.step(load=True)
    assert "layers.2 of step 1" in lab.device.before["copy 0 of step 2"]
    lab.step()
    assert "copy 5 of step 2" in lab.device.before["begin 3"]


def test_a_load_that_a_later_step_reads_is_not_waited_for() -> None:
    lab = Lab()
    lab.step()
    lab.step(ahead=True)
    assert not lab.waited(2)


@long_run
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_answers_are_the_same_cold_from_ram_by_layer_and_from_disk(model: str, alone: Engine, tmp_path: Path, prefix_caching: bool) -> None:
    asked = prompts(3, 700)
    expected = alone.generate(asked)["tokens"]
    with Engine(model, tier_at(tmp_path / "kv"), prefix_caching=prefix_caching, whole=True, layers=True) as engine:
        assert engine.generate(asked)["tokens"] == expected, "cold"
        for at in ("waited for at once", "by layer"):
            engine.ask("drop_gpu")
            warm = engine.generate(asked)
            assert warm["tokens"] == expected, at
            assert warm["cached"] == [640] * 3
        counted = engine.ask("by_layer")
        assert counted["modes"] == ["NONE"] and counted["loads"] == 6 and counted["all_by_layer"] >= 3, counted
        engine.ask("drop_ram")
        assert engine.generate(asked)["tokens"] == expected, "from disk"
        assert engine.ask("settle") == {"pending": False}
    with Engine(model, tier_at(tmp_path / "kv"), prefix_caching=prefix_caching, whole=True, layers=True) as engine:
        warm = engine.generate(asked)
        assert warm["tokens"] == expected and warm["cached"] == [640] * 3, "in a new process"


@long_run
def test_eight_requests_that_share_prefixes_and_are_loaded_in_one_step(model: str, alone: Engine, tmp_path: Path) -> None:
    """A request finds in the GPU's own cache what another one loads in the same step: each layer of it is there when that layer is read."""
    (shared,) = prompts(1, 512)
    asked = [shared + tail for tail in prompts(8, 200, seed=8)]
    expected = alone.generate(asked)["tokens"]
    with Engine(model, tier_at(tmp_path / "kv"), whole=True, layers=True) as engine:
        assert engine.generate(asked)["tokens"] == expected
        for _ in range(3):
            engine.ask("drop_gpu")
            assert engine.generate(asked)["tokens"] == expected
        assert engine.ask("by_layer")["all_by_layer"] > 0


@long_run
def test_a_prompt_that_is_there_as_a_whole_and_one_that_ends_within_a_block_go_vllms_way_or_by_layer(model: str, alone: Engine, tmp_path: Path) -> None:
    """The last token is always computed. In a prompt of whole blocks it lies in a block that is loaded, and its KV would be overwritten by the copy."""
    asked = [*prompts(1, 640, seed=3), *prompts(1, 641, seed=4), *prompts(1, 703, seed=5)]
    expected = [alone.generate([one])["tokens"] for one in asked]
    with Engine(model, tier_at(tmp_path / "kv"), whole=True, layers=True) as engine:
        for _ in range(3):
            assert [engine.generate([one])["tokens"] for one in asked] == expected
            engine.ask("drop_gpu")
        counted = engine.ask("by_layer")
        assert counted["loads"] == 4, "two of three"


@long_run
def test_requests_that_are_aborted_while_they_load_by_layer_harm_nobody(model: str, alone: Engine, tmp_path: Path) -> None:
    asked = prompts(6, 700)
    expected = alone.generate(asked)["tokens"]
    with Engine(model, tier_at(tmp_path / "kv"), whole=True, layers=True) as engine:
        engine.ask("abort", prompts=asked)
        assert engine.generate(asked)["tokens"] == expected
        for _ in range(3):
            engine.ask("drop_gpu")
            engine.ask("abort", prompts=asked)
        engine.ask("drop_gpu")
        assert engine.generate(asked)["tokens"] == expected
        assert engine.ask("settle") == {"pending": False}


@long_run
def test_the_connector_says_what_it_needs(model: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the engine has ended"):
        Engine(model, tier_at(tmp_path / "kv"), layers=True)
