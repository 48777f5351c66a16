"""What the tier for vLLM is made of and needs no vLLM: what weights are, what pays, what hints say."""

from __future__ import annotations

import json
import math
import os
from copy import deepcopy
from pathlib import Path

import pytest

from kvkeep._engines import weights
from kvkeep._engines.settings import Settings
from kvkeep._engines.worth import Rates, RatesFile
from kvkeep._worth import MARGIN
from kvkeep.vllm import _hints


def model(folder: Path, weights: bytes = b"weights" * 1000) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_weights_with_one_other_byte_or_another_config_are_others(tmp_path: Path) -> None:
    known, one = tmp_path / "known.json", model(tmp_path / "one")
    first = weights.fingerprint(str(one), None, known)
    assert first == weights.fingerprint(str(model(tmp_path / "copy")), None, known), "a copy elsewhere is the same"
    assert first != weights.fingerprint(str(model(tmp_path / "other", b"weights" * 999 + b"Weights")), None, known)
    (one / "config.json").write_text('{"rope_theta": 1}')
    assert first != weights.fingerprint(str(one), None, known)
    (one / "config.json").write_text("{}")
    (one / "tokenizer.json").write_text("another")
    assert first == weights.fingerprint(str(one), None, known), "token ids are what KV is a function of"


def test_weights_are_read_once_and_again_when_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    hashed = weights._sha256
    monkeypatch.setattr(weights, "_sha256", lambda path: (read.append(path.name), hashed(path))[1])
    folder, known = model(tmp_path / "m"), tmp_path / "known.json"
    first = weights.fingerprint(str(folder), None, known)
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert weights.fingerprint(str(folder), None, known) == first and len(read) == 2
    # The same size and the same time, as a careful copy has: a file in another's place is another file.
    before = (folder / "model.safetensors").stat()
    (folder / "new").write_bytes(b"WEIGHTS" * 1000)
    os.utime(folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(folder / "new", folder / "model.safetensors")
    assert weights.fingerprint(str(folder), None, known) != first


@pytest.mark.parametrize("text", ["", "[]", "{", '{"1 2": 3}', '{"1 2": "zz"}'])
def test_a_file_of_hashes_that_is_damaged_is_made_again(tmp_path: Path, text: str) -> None:
    folder, known = model(tmp_path / "m"), tmp_path / "known.json"
    first = weights.fingerprint(str(folder), None, known)
    known.write_text(text)
    assert weights.fingerprint(str(folder), None, known) == first
    assert len(json.loads(known.read_text())) == 2


def test_weights_that_cannot_be_read_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "nobody/nothing"):
        with pytest.raises(weights.WeightsError, match="vouch"):
            weights.fingerprint(name, None, tmp_path / "known.json")


def h100() -> Rates:
    """A Llama of 8B's shape on an H100, as measured: 51, 208 and 1,237 ms for 2,048, 8,192 and 32,768 tokens."""
    rates = Rates()
    for tokens, seconds in ((64, 0.026), (2048, 0.051), (8192, 0.208), (32768, 1.237)):
        rates.computed(tokens, seconds)
    return rates


TOKEN_BYTES = 128 << 10


@pytest.mark.parametrize("tokens", [2048, 8192, 32768])
def test_a_slow_disk_is_never_slower_than_computing(tokens: int) -> None:
    """A tier that loads whatever it has took 687 ms for 8,192 tokens and 2,400 ms for 32,768."""
    rates = h100()
    rates.loaded("disk", 1 << 30, 0.6)
    assert not rates.pays(0, tokens, {"disk": tokens * TOKEN_BYTES})
    assert not rates.could_pay(256, 256 * TOKEN_BYTES, 33_000)


def test_a_fast_disk_pays_where_its_load_is_shorter() -> None:
    rates = h100()
    rates.loaded("disk", 7 << 30, 1.0)
    assert rates.pays(0, 32768, {"disk": 32768 * TOKEN_BYTES})
    assert rates.load_seconds({"disk": 32768 * TOKEN_BYTES}) < MARGIN * rates.compute_seconds(0, 32768)
    assert not rates.pays(0, 64, {"disk": 64 * TOKEN_BYTES}), "a step takes its time anyway"


def test_each_tier_is_judged_by_its_own_rate() -> None:
    """A daemon's RAM gives ten times what a disk does: by one rate for both, the one is not read where it pays, or the other where it does not."""
    rates, size = h100(), 32768 * TOKEN_BYTES
    rates.loaded("disk", 1 << 30, 1.0)
    rates.loaded("daemon", 10 << 30, 1.0)
    assert rates.pays(0, 32768, {"daemon": size}) and not rates.pays(0, 32768, {"disk": size})
    assert rates.pays(0, 32768, {"daemon": size * 15 // 16, "disk": size // 16}), "a little of it from the disk"
    assert not rates.pays(0, 32768, {"daemon": size // 2, "disk": size // 2})
    before = rates.bytes_per_s("disk")
    rates.loaded("daemon", 1 << 30, 10.0)
    assert rates.bytes_per_s("disk") == before


def test_a_place_for_kv_is_given_and_a_folder_of_the_disk_is_not_a_must(tmp_path: Path) -> None:
    root = str(tmp_path)
    with pytest.raises(ValueError, match="no place for KV: give capacity_gb for a disk, a daemon's socket"):
        Settings.read({"root_dir": root})
    with pytest.raises(ValueError, match="daemon_token_file without daemon"):
        Settings.read({"root_dir": root, "capacity_gb": 1, "daemon_token_file": "t"})
    with pytest.raises(ValueError, match="remote has \\['size'\\]"):
        Settings.read({"root_dir": root, "remote": {"url": "file:///srv", "size": 1}})
    with pytest.raises(ValueError, match="capacity_gb is 0"):
        Settings.read({"root_dir": root, "capacity_gb": 0, "daemon": "s"})
    alone = Settings.read({"root_dir": root, "daemon": "/run/s"})
    assert alone.behind("kv-0", 5) == {"disk": None, "daemon": ("/run/s", None), "remote": None, "queue_bytes": 5}
    assert alone.guess.guesses == {"daemon": 8e9} and alone.ask_seconds == 0
    # What is encrypted on the disk is not written to a store as it is.
    both = Settings.read({"root_dir": root, "capacity_gb": 1, "remote": "redis://h", "key_file": "k"})
    remote = both.behind("kv-0", 5)["remote"]
    assert remote is not None and remote["key_file"] == "k" and both.ask_seconds == 1
    assert Settings.read({"root_dir": root, "remote": {"url": "s3://b", "deadline_seconds": 3}}).ask_seconds == 3


def test_what_lies_far_behind_is_worth_more_than_what_lies_at_the_beginning() -> None:
    rates = h100()
    assert rates.compute_seconds(24576, 32768) > 1.5 * rates.compute_seconds(0, 8192)


def test_a_short_prefill_says_nothing_of_long_ones() -> None:
    """16 tokens took a step's 28 ms: taken for the rate of all tokens, a prefix of 32,768 would take a minute to compute, and any load pay."""
    rates = Rates(prefill_tokens_per_s=20_000)
    rates.computed(16, 0.028)
    assert rates.compute_seconds(0, 32768) < 2


def test_where_all_prompts_are_long_none_of_their_time_is_a_steps() -> None:
    """The shortest prefill of all was taken for what a step takes anyway: where all prompts had one length, computing seemed to be free."""
    rates = Rates()
    rates.computed(8192, 0.208)
    assert rates.compute_seconds(0, 8192) == pytest.approx(0.208)


def test_a_step_full_of_others_is_not_what_a_step_takes_anyway() -> None:
    """192 tokens came with 800 of others, and took 6 s on a slow machine: as long as 640 tokens alone, so that no load seemed to pay."""
    rates = Rates()
    rates.computed(192, 6.0)
    rates.computed(640, 6.0)
    assert rates.compute_seconds(0, 640) > 5


def test_a_batch_that_was_slow_once_is_not_believed() -> None:
    rates = h100()
    before = rates.compute_seconds(0, 8192)
    rates.computed(8192, 5.0)
    assert rates.compute_seconds(0, 8192) < 1.1 * before
    for _ in range(200):
        rates.computed(8192, 0.4)
    assert rates.compute_seconds(0, 8192) == pytest.approx(0.4 - (rates.step_seconds or 0), rel=0.1), "what stays slower is"


def test_nonsense_is_no_measure() -> None:
    rates = h100()
    before = deepcopy(rates)
    rates.computed(0, 1)
    rates.computed(10, 0)
    rates.loaded("disk", 0, 1)
    rates.loaded("disk", 10, math.nan)
    assert rates == before


def test_rates_are_kept_by_name_and_a_damaged_file_is_a_guess(tmp_path: Path) -> None:
    path, rates = tmp_path / "rates.json", h100()
    rates.loaded("disk", 1 << 30, 0.5)
    RatesFile(path, "one").write(rates)
    RatesFile(path, "other").write(Rates())
    assert RatesFile(path, "one").read(Rates()) == rates
    assert RatesFile(path, "third").read(Rates(prefill_tokens_per_s=7)) == Rates(prefill_tokens_per_s=7)
    whole = path.read_text()
    for text in ("", "[]", "{}", whole[:-5], whole.replace("1.0", "-1.0"), whole.replace(": ", ": NaN", 3)):
        path.write_text(text)
        read = RatesFile(path, "one").read(Rates())
        assert read in (Rates(), rates) and 0 < read.bytes_per_s("disk") < math.inf


def test_hints_that_make_no_sense_are_left_out_and_the_others_hold() -> None:
    hints = _hints.read([("retain", {}), ("retain", {"ttl_s": -1}), ("priority", {"value": "urgent"}), ("pin", {}), ("unknown", {"a": 1})], 5)
    assert hints.is_retained and hints.retain_s is None and hints.store and hints.ttl_s == 5
    assert not _hints.read([("store", {"value": False})], None).store
    assert not _hints.read([("pin", {"value": False})], None).is_retained
    assert _hints.read([("retain", {"duration_s": 3})], None).retain_s == 3
