"""Weights that are still what their file holds have the hash that is kept for it; anything that was done to them is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from kvkeep import _files, _weights  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel says which memory is a file's")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Sizes of the pieces that were hashed, in a process that has hashed nothing before. Files count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_files, "_SETTLED_NS", 0)
    monkeypatch.setattr(_weights, "_digest_of", {})
    sizes: list[int] = []
    real = _weights.blake3
    monkeypatch.setattr(_weights, "blake3", lambda address, size: (sizes.append(size), real(address, size))[1])
    return sizes


def saved(path: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn((600, 1000), generator=generator) for name in ("a", "b")}
    safetensors_torch.save_file(weights, path)
    return path


def loaded(path: Path) -> list[Any]:
    weights = safetensors_torch.load_file(path)
    return [weights[name] for name in ("a", "b")]


def plain(tensors: list[Any]) -> list[bytes]:
    """What they hash to where nothing is kept."""
    return _weights._hash([tensor.clone() for tensor in tensors])


def as_in_a_new_process() -> None:
    _weights._digest_of.clear()


def test_weights_that_are_still_what_their_file_holds_are_not_hashed_again(tmp_path: Path, hashed: list[int]) -> None:
    path = saved(tmp_path / "m.safetensors")
    first = _weights.digests(loaded(path))
    assert sum(hashed) == 2 * 600 * 1000 * 4 and first == plain(loaded(path))
    as_in_a_new_process()
    del hashed[:]
    weights = loaded(path)
    assert _weights.digests(weights) == first and hashed == []
    assert sum(float(weight.sum()) for weight in weights) != 0 and _weights.digests(weights) == first and hashed == [], "reading is no edit"
    kept = tmp_path / "cache" / "kvkeep" / "weights.json"
    assert kept.stat().st_mode & 0o777 == 0o600 and len(json.loads(kept.read_text())) == 2


def through_numpy(weight: Any) -> None:
    weight.numpy()[599, 999] += 1


def through_data(weight: Any) -> None:
    weight.data[300, 500] += 1


def through_memory(weight: Any) -> None:
    import ctypes

    ctypes.memset(weight.data_ptr() + 4 * 1234, 0x3F, 4)


def there_and_back(weight: Any) -> None:
    """The bytes are the file's again, and the hash must be the same; that it is read again costs time alone."""
    weight.add_(1).sub_(1)


@pytest.mark.parametrize("edit", [through_numpy, through_data, through_memory, there_and_back])
def test_an_edit_in_memory_is_seen_however_it_was_made(tmp_path: Path, hashed: list[int], edit: Callable[[Any], None]) -> None:
    """A file's name, size and time say what was loaded, and not what was done to it since."""
    path = saved(tmp_path / "m.safetensors")
    first = _weights.digests(loaded(path))
    weights = loaded(path)
    edit(weights[0])
    now = _weights.digests(weights)
    assert now == plain(weights) and now[1] == first[1]
    # And what was edited was not kept as what the file holds.
    as_in_a_new_process()
    assert _weights.digests(loaded(path)) == first


def written_in_place(path: Path, other: Path) -> None:
    with path.open("r+b") as file:
        file.write(other.read_bytes())


def written_in_place_with_its_old_time(path: Path, other: Path) -> None:
    seen = path.stat()
    written_in_place(path, other)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def replaced(path: Path, other: Path) -> None:
    os.replace(other, path)


@pytest.mark.parametrize("change", [written_in_place, written_in_place_with_its_old_time, replaced])
def test_a_file_that_was_written_since_is_another(tmp_path: Path, hashed: list[int], change: Callable[[Path, Path], None]) -> None:
    path, other = saved(tmp_path / "m.safetensors"), saved(tmp_path / "other.safetensors", seed=1)
    first, second = _weights.digests(loaded(path)), plain(loaded(other))
    assert first != second and path.stat().st_size == other.stat().st_size
    change(path, other)
    assert _weights.digests(loaded(path)) == second


def test_a_file_that_is_written_under_its_mapping_is_hashed_as_it_is_now(tmp_path: Path, hashed: list[int]) -> None:
    path, other = saved(tmp_path / "m.safetensors"), saved(tmp_path / "other.safetensors", seed=1)
    weights = loaded(path)
    first = _weights.digests(weights)
    written_in_place(path, other)
    now = _weights.digests(weights)
    assert now == plain(weights) and now != first


def test_a_file_that_was_replaced_does_not_stand_for_what_is_still_mapped(tmp_path: Path, hashed: list[int]) -> None:
    path, other = saved(tmp_path / "m.safetensors"), saved(tmp_path / "other.safetensors", seed=1)
    second = _weights.digests(loaded(other))
    weights = loaded(path)
    os.replace(other, path)
    assert _weights.digests(weights) == plain(weights) != second


def test_a_file_that_was_written_just_now_is_not_kept(tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one tick of its clock a file can be written twice."""
    monkeypatch.setattr(_files, "_SETTLED_NS", 3_600_000_000_000)
    path = saved(tmp_path / "m.safetensors")
    _weights.digests(loaded(path))
    assert not (tmp_path / "cache").exists()


def test_another_dtype_shape_or_part_of_the_file_has_a_hash_of_its_own(tmp_path: Path, hashed: list[int]) -> None:
    path = saved(tmp_path / "m.safetensors")
    a, b = loaded(path)
    _weights.digests([a, b])
    for other in (a.view(torch.int32), a.reshape(1000, 600), a[:500], a[100:], a.t(), a.to(torch.float64), a.clone()):
        assert _weights.digests([other]) == plain([other])
    assert _weights.digests([a]) != _weights.digests([b])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"1 2": 3}', '{"1 2": "zz"}'])
def test_a_damaged_file_of_hashes_is_made_again(tmp_path: Path, hashed: list[int], text: str) -> None:
    path = saved(tmp_path / "m.safetensors")
    first = _weights.digests(loaded(path))
    (tmp_path / "cache" / "kvkeep" / "weights.json").write_text(text)
    as_in_a_new_process()
    assert _weights.digests(loaded(path)) == first


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = saved(tmp_path / "m.safetensors")
    assert _weights.digests(loaded(path)) == plain(loaded(path))


def test_generators_made_at_the_same_time_leave_a_whole_file_of_hashes(tmp_path: Path) -> None:
    """Threads of one process wrote into one new file, each over the other's."""
    from threading import Thread

    path, whole = tmp_path / "weights.json", []

    def keep(thread: int) -> None:
        for _ in range(40):
            hashes = _files.Hashes(path)
            for key in range(200 * (thread + 1)):
                hashes.put(f"{thread} {key}", f"{thread:02x}" * 32)
            hashes.save()
            # Whoever reads finds it whole, and something in it.
            whole.append(bool(_files.Hashes(path)._kept))

    threads = [Thread(target=keep, args=(thread,)) for thread in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    kept = json.loads(path.read_text())
    assert all(whole) and kept and all(value == f"{int(key.split()[0]):02x}" * 32 for key, value in kept.items())
    assert [file.name for file in tmp_path.iterdir()] == ["weights.json"]


SCRIPT = """
import sys, time
import transformers
from kvkeep import _files, _weights
from kvkeep.identity import ModelIdentity
_files._SETTLED_NS = 0
sizes, real = [], _weights.blake3
_weights.blake3 = lambda address, size: (sizes.append(size), real(address, size))[1]
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(ModelIdentity(model).now().digest, sum(size for size in sizes if size >= 1 << 20))
"""


def test_a_model_loaded_from_safetensors_is_hashed_once_for_all_processes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model")], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    (first, many), (again, none) = run(), run()
    assert first == again and int(many) > 10 << 20 and int(none) == 0
