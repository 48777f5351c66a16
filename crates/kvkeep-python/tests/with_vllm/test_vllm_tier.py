"""The tier behind vLLM's own abstract classes, without an engine: the eight promises."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from slow_disk import SlowDisk, is_possible
from tier import CHUNK_TOKENS, ROW_BYTES, Lab, content, names, request
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager

from kvkeep import DiskLockedError, DiskRefusedError
from kvkeep.vllm import KvkeepTier, _compat
from kvkeep.vllm._settings import Settings

KEYS = names(40)


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("kv-0/segment-*"))


def disk_use(root: Path) -> int:
    """As `du` sees it."""
    return sum(path.lstat().st_blocks * 512 for path in [root, *root.rglob("*")])


def test_it_is_a_tier_of_vllm_and_every_abstract_method_is_there() -> None:
    assert issubclass(KvkeepTier, SecondaryTierManager)
    assert not getattr(KvkeepTier, "__abstractmethods__", None)


def test_never_wrong__what_comes_back_is_what_was_stored(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS)
        result = lab.load(KEYS, first_row=20)
        assert result.success
        assert all((lab.rows[20 + number] == content(key)).all() for number, key in enumerate(KEYS))
        assert lab.tier.counters()["hits"] == 40


@pytest.mark.parametrize("codec", ["lossless", "int4", "k8v4", "fp8", "nf4"])
def test_never_wrong__no_codec_changes_an_engines_bytes_whoever_reads_them(tmp_path: Path, codec: str) -> None:
    """Nobody knows what in them is K: a lossy codec writes them without loss, and so whoever did not ask for it may read them."""
    with Lab(tmp_path / "kv", codec=codec) as lab:
        lab.store(KEYS)
    for other in (codec, "raw", "int8"):
        with Lab(tmp_path / "kv", codec=other) as lab:
            assert lab.load(KEYS, first_row=20).success
            assert all((lab.rows[20 + number] == content(key)).all() for number, key in enumerate(KEYS))


def test_never_wrong__a_flipped_byte_is_a_miss_that_is_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS)
        wanted = content(KEYS[7]).tobytes()
        (path,) = [path for path in segments(tmp_path / "kv") if wanted in path.read_bytes()]
        at = path.read_bytes().index(wanted) + 5000
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        context = request("meets it", KEYS)
        assert all(lab.hits(KEYS, context))
        result = lab.load(KEYS, context=context)
        assert not result.success
        if hasattr(result, "successful_keys"):
            assert set(result.successful_keys) == set(KEYS) - {KEYS[7]}
        assert (lab.rows[7] == -1).all(), "nothing of it is in the row"
        assert all((lab.rows[number] == content(key)).all() for number, key in enumerate(KEYS) if number != 7)
        assert lab.tier.counters()["damaged"] == 1
        assert lab.hits(KEYS, request("asks again", KEYS)) == [number != 7 for number in range(40)]


def test_never_wrong__what_was_swapped_between_two_keys_is_found_out(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS[:2])
        (path,) = segments(tmp_path / "kv")
        data = bytearray(path.read_bytes())
        one, other = (data.index(content(key).tobytes()) for key in KEYS[:2])
        data[one : one + ROW_BYTES], data[other : other + ROW_BYTES] = data[other : other + ROW_BYTES], data[one : one + ROW_BYTES]
        path.write_bytes(data)
        assert not lab.load(KEYS[:2]).success
        assert (lab.rows[:2] == -1).all()


def test_never_over__the_folder_stays_under_its_cap_as_du_sees_it(tmp_path: Path) -> None:
    root, cap = tmp_path / "kv", 6 << 20
    with Lab(root, rows=40, capacity_gb=cap / (1 << 30)) as lab:
        for salt in range(60):
            lab.store(names(40, salt))
            assert disk_use(root) <= cap, salt
        assert lab.tier.counters()["evictions"] > 500
        assert all(lab.hits(names(40, 59))), "it evicts and admits"
    assert disk_use(root) <= cap


def test_never_stuck__every_job_ends_once_also_with_nothing_or_nonsense_in_it(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        assert lab.ended(lab.begin_store([], [])).success
        assert lab.ended(lab.begin_load([], [])).success
        result = lab.load(KEYS)
        assert not result.success, "nothing of it is there"
        jobs = [lab.begin_store(names(8, salt), list(range(8))) for salt in range(100)]
        lab.tier.drain_jobs()
        ended = [result.job_id for result in lab.tier.get_finished_jobs()]
        assert sorted(ended) == jobs
        assert not lab.tier.has_pending_work()


def test_never_stuck__a_block_whose_load_failed_is_a_miss_for_its_request(tmp_path: Path) -> None:
    """A tier that says HIT again is asked to load again, for ever: a request then never begins."""
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS[:4])
        context = request("unlucky", KEYS[:4])
        lab.tier.on_new_request(context)
        assert all(lab.hits(KEYS[:4], context))
        lab.tier._engine.remove([KEYS[2]])
        lab.load(KEYS[:4], context=context)
        assert lab.hits(KEYS[:4], context) == [True, True, False, True]
        lab.tier.on_request_finished(context)


def test_read_your_writes__what_is_written_is_found_by_the_next_request(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        assert not any(lab.hits(KEYS))
        lab.store(KEYS[:10])
        assert lab.hits(KEYS[:11]) == [True] * 10 + [False]


def test_warm_restart__another_process_finds_it_after_a_clean_end(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS)
    with Lab(tmp_path / "kv") as lab:
        assert all(lab.hits(KEYS))
        assert lab.load(KEYS).success
        assert all((lab.rows[number] == content(key)).all() for number, key in enumerate(KEYS))


CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from tier import *
lab = Lab(Path({root!r}), **{settings!r})
keys = names(40)
"""


def child(root: Path, code: str, **settings: object) -> list[str]:
    setup = CHILD.format(here=str(Path(__file__).parent), root=str(root), settings=settings)
    return [sys.executable, "-c", setup + code]


def test_warm_restart__what_was_flushed_is_there_after_kill_9(tmp_path: Path) -> None:
    killed = subprocess.run(child(tmp_path / "kv", "lab.store(keys); os.kill(os.getpid(), 9)"), check=False)
    assert killed.returncode == -9
    with Lab(tmp_path / "kv") as lab:
        assert all(lab.hits(KEYS))
        assert lab.load(KEYS).success


def test_warm_restart__the_folder_belongs_to_one_engine_at_a_time(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv"), pytest.raises(DiskLockedError):
        Lab(tmp_path / "kv")
    Lab(tmp_path / "kv").tier.shutdown()


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "torch.float16"}, {"cache_dtype": "fp8"}, {"quantization": "awq"}, {"hidden_size": 65}, {"tp": 2}, {"hash": "sha256_cbor"},
        {"load_format": "dummy"},
    ],
    ids=str,
)  # fmt: skip
def test_private__another_engine_finds_nothing(tmp_path: Path, config: dict[str, object]) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS[:4])
    with Lab(tmp_path / "kv", config=config) as lab:
        assert not any(lab.hits(KEYS[:4]))
        assert not lab.load(KEYS[:4]).success
    with Lab(tmp_path / "kv") as lab:
        assert all(lab.hits(KEYS[:4]))


def test_private__other_weights_under_the_same_name_are_another_model(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS[:4])
    (tmp_path / "model" / "model.safetensors").write_bytes(b"WEIGHTS")
    with Lab(tmp_path / "kv") as lab:
        assert not any(lab.hits(KEYS[:4]))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    with Lab(tmp_path / "kv") as lab:
        assert all(lab.hits(KEYS[:4]))


def test_private__a_salt_keeps_apart(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", salt="one") as lab:
        lab.store(KEYS[:4])
    with Lab(tmp_path / "kv", salt="other") as lab:
        assert not any(lab.hits(KEYS[:4]))


def test_private__an_engine_whose_weights_may_change_reuses_nothing_from_before_a_reset(tmp_path: Path) -> None:
    """vLLM empties its RAM when it sleeps or gets other weights, and leaves tiers as they are: they served the old weights' KV."""
    with Lab(tmp_path / "kv", config={"enable_sleep_mode": True}) as lab:
        lab.store(KEYS[:4])
        lab.tier.drain_jobs()
        assert not any(lab.hits(KEYS[:4]))
        lab.store(KEYS[:4])
        assert all(lab.hits(KEYS[:4]))
    with Lab(tmp_path / "kv") as lab:
        lab.tier.drain_jobs()
        lab.store(KEYS[:4])
        lab.tier.drain_jobs()
        assert all(lab.hits(KEYS[:4])), "one whose weights stay keeps it"


def test_private__a_hash_with_collisions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="xxhash"):
        Lab(tmp_path / "kv", config={"hash": "xxhash"})


def test_private__what_is_encrypted_cannot_be_read_without_the_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    with Lab(tmp_path / "kv", key_file=str(key)) as lab:
        lab.store(KEYS[:4])
        assert lab.load(KEYS[:4]).success
    assert all(content(key)[:64].tobytes() not in path.read_bytes() for key in KEYS[:4] for path in segments(tmp_path / "kv"))
    with pytest.raises(DiskRefusedError, match="encrypted"):
        Lab(tmp_path / "kv")


HANG = """
lab.store(keys[:20])
print("ready", flush=True)
sys.stdin.readline()
context = request("waits", keys[:20])
lab.tier.on_new_request(context)
assert all(lab.hits(keys[:20], context))
began = time.monotonic()
result = lab.load(keys[:20], context=context)
took = time.monotonic() - began
lab.rows[:20] = 7  # the rows are the engine's again
began = time.monotonic()
hits = lab.hits(keys[:20], context) + lab.hits(keys[:20])
store = lab.ended(lab.begin_store(names(30, 9), list(range(20, 50))))
stored = time.monotonic() - began
print("waited", took, result.success, any(hits), stored, flush=True)
sys.stdin.readline()
time.sleep(1)
print("rows", bool((lab.rows[:20] == 7).all()), lab.tier.counters()["late_jobs"], all(lab.hits(keys[:20])), flush=True)
lab.tier.shutdown()
print("closed", flush=True)
"""


@pytest.mark.skipif(not is_possible(), reason="needs root on x86-64 Linux")
def test_soft_failure__a_disk_that_hangs_ends_each_job_by_its_deadline_and_no_late_read_touches_a_row(tmp_path: Path) -> None:
    """A read that the kernel has begun cannot be called back: if it went into the row, it would write over what the engine has put there since."""
    settings = {"load_timeout_s": 1, "store_timeout_s": 1, "flush_timeout_s": 2}
    disk = SlowDisk(child(tmp_path / "kv", HANG, **settings), "/segment-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said = lambda: disk.process.stdout.readline().split()  # noqa: E731
    go = lambda: (disk.process.stdin.write("\n"), disk.process.stdin.flush())  # noqa: E731
    assert said() == ["ready"]
    disk.hang()
    go()
    word, took, success, hits, stored = said()
    assert (word, success, hits) == ("waited", "False", "False")
    assert 0.9 < float(took) < 3 and float(stored) < 4, (took, stored)
    assert disk.held > 0
    disk.go_on()
    go()
    word, untouched, late, back = said()
    assert (word, untouched, back) == ("rows", "True", "True"), "a late read has written into a row"
    assert int(late) >= 1
    assert said() == ["closed"]
    assert disk.process.wait(30) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a tmpfs")
def test_soft_failure__a_disk_smaller_than_the_cap_goes_on(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with Lab(mount / "kv", capacity_gb=1) as lab:
            for salt in range(30):
                rows = list(range(40))
                for row, key in zip(rows, names(40, salt)):
                    lab.rows[row] = content(key)
                lab.ended(lab.begin_store(names(40, salt), rows))
            lab.tier._engine.flush()
            assert any(lab.hits(names(40, 29)))
            assert lab.tier._engine.stats()["disk"]["failing"] is False
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


def test_worth_it__a_prefix_that_is_computed_faster_is_a_miss_as_a_whole_and_counted(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", worth="measured") as lab:
        lab.store(KEYS)
        lab.tier.rates.measured["disk"] = ROW_BYTES / 1.0
        assert not any(lab.hits(KEYS, request("impatient", KEYS)))
        assert lab.tier.counters()["not_worth"] == 40
        lab.tier.rates.measured["disk"] = 1e12
        lab.tier.rates.prefill_tokens_per_s = 10
        assert all(lab.hits(KEYS, request("patient", KEYS)))


def test_worth_it__where_vllm_does_not_say_what_follows_the_load_itself_is_judged(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", worth="measured", prefill_tokens_per_s=1000) as lab:
        lab.store(KEYS)
        # One block is worth it, and so may be forty; a guess that long prompts pay is what lets a load begin.
        lab.tier.rates.measured["disk"] = 1e12
        context = request("of an older release")
        lab.tier.on_new_request(context)
        assert all(lab.hits(KEYS, context))
        lab.tier.rates.measured["disk"] = ROW_BYTES
        result = lab.ended(lab.begin_load(KEYS, list(range(40)), context), at_most=0.5)
        assert not result.success and not lab.tier._jobs
        assert not any(lab.hits(KEYS, context)), "it is not asked for again"
        assert lab.tier.counters()["not_worth"] == 40


def test_worth_it__where_no_load_can_pay_a_request_is_told_so_at_its_first_block_and_it_is_counted_once(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", worth="measured", prefill_tokens_per_s=1e9) as lab:
        lab.store(KEYS)
        lab.tier.rates.measured["disk"] = 1.0
        for count in (1, 2):
            context = request(f"of an older release {count}")
            lab.tier.on_new_request(context)
            assert not any(lab.hits(KEYS, context))
            assert lab.tier.counters()["not_worth"] == count
        absent = names(1, salt=9)
        assert not any(lab.hits(absent)) and lab.tier.counters()["not_worth"] == 2, "what is not there is not counted"


def test_worth_it__a_request_that_prefetches_for_others_loads_anyway(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", worth="measured") as lab:
        lab.store(KEYS)
        lab.tier.rates.measured["disk"] = 1.0
        context = request("ahead", KEYS, kv_transfer_params={"kvkeep": {"prefetch": True}})
        assert all(lab.hits(KEYS, context))


@pytest.mark.parametrize(
    ("ahead", "steps", "ends", "expected"),
    [
        (False, [0.05], True, 0.05),  # one step, and the request ends with it
        (False, [0.05, 0.01, 0.01], False, 0.05),  # it goes on to answer
        (True, [0.001, 0.05, 0.01], False, 0.051),  # the next step is scheduled before this one has ended
        (True, [0.05], True, 0.05),
    ],
)
def test_worth_it__a_pause_behind_a_prefill_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool, steps: list[float], ends: bool, expected: float
) -> None:
    """Blocks of a request that had ended came to be stored when the next one came. The pause between them counted as computing, and a load was made that took
    four times as long as computing."""
    from vllm.v1.kv_offload.base import ScheduleEndContext

    from kvkeep.vllm import _prefill

    now = [100.0]
    with Lab(tmp_path / "kv", worth="measured", config={"ahead": ahead}) as lab:
        monkeypatch.setattr(_prefill, "time", SimpleNamespace(monotonic=lambda: now[0]))
        context = request("first", KEYS)
        lab.tier.on_new_request(context)
        lab.tier.on_schedule_end(ScheduleEndContext(new_req_ids=["first"], preempted_req_ids=[]))
        for number, seconds in enumerate(steps):
            now[0] += seconds
            if ends and number == len(steps) - 1:
                lab.tier.on_request_finished(context)
            else:
                lab.tier.on_schedule_end(ScheduleEndContext(new_req_ids=[], preempted_req_ids=[]))
        now[0] += 3.0
        lab.store(KEYS, context=context)
        (each,) = lab.tier.rates.seconds_by_length.values()
        assert each * len(KEYS) * CHUNK_TOKENS == pytest.approx(expected)


def test_worth_it__both_rates_are_measured_and_known_after_a_restart(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", worth="measured") as lab:
        from vllm.v1.kv_offload.base import ScheduleEndContext

        context = request("first", KEYS)
        lab.tier.on_new_request(context)
        lab.tier.on_schedule_end(ScheduleEndContext(new_req_ids=["first"], preempted_req_ids=[]))
        time.sleep(0.2)
        lab.tier.on_schedule_end(ScheduleEndContext(new_req_ids=[], preempted_req_ids=[]))
        lab.store(KEYS, context=context)
        assert lab.load(KEYS).success
        rates = lab.tier.rates
        assert rates.measured["disk"] > 0
        assert 0.2 < rates.compute_seconds(0, 40 * CHUNK_TOKENS) + (rates.step_seconds or 0) < 1
        measured = dict(rates.measured)
    with Lab(tmp_path / "kv", worth="measured") as lab:
        assert lab.tier.rates.measured == measured
        assert lab.tier.rates.seconds_by_length == rates.seconds_by_length


def test_worth_it__a_prefill_alone_is_kept_for_the_next_engine(tmp_path: Path) -> None:
    """What was saved and what was measured shared their table, so they never differed: without a measure of the disk nothing was saved."""
    from vllm.v1.kv_offload.base import ScheduleEndContext

    with Lab(tmp_path / "kv", worth="measured") as lab:
        context = request("first", KEYS)
        lab.tier.on_new_request(context)
        lab.tier.on_schedule_end(ScheduleEndContext(new_req_ids=["first"], preempted_req_ids=[]))
        lab.tier.on_schedule_end(ScheduleEndContext(new_req_ids=[], preempted_req_ids=[]))
        lab.tier._prefills.stored(context, KEYS)
        measured = dict(lab.tier.rates.seconds_by_length)
        assert measured and not lab.tier.rates.measured and lab.tier.rates.step_seconds is None
    with Lab(tmp_path / "kv", worth="measured") as lab:
        assert lab.tier.rates.seconds_by_length == measured


def test_hints__what_is_pinned_outlives_what_is_not(tmp_path: Path) -> None:
    root, cap = tmp_path / "kv", 6 << 20
    with Lab(root, rows=40, capacity_gb=cap / (1 << 30)) as lab:
        pinned = names(4, 100)
        lab.store(pinned, context=request("pins", kv_transfer_params={"kvkeep": {"pin": True}}))
        for salt in range(40):
            lab.store(names(40, salt))
        assert all(lab.hits(pinned))
        lab.tier.touch(pinned, request("lets go", kv_transfer_params={"kvkeep": {"demote": True}}))
        for salt in range(40, 80):
            lab.store(names(40, salt))
        assert not any(lab.hits(pinned)), "demoted, they go like others"


def test_hints__actions_of_vllms_envelope_are_understood_and_others_left_alone(tmp_path: Path) -> None:
    kv_hints = pytest.importorskip("vllm.v1.kv_hints")
    action = lambda kind, payload: kv_hints.KvHintAction("1", kind, "1", payload)  # noqa: E731
    envelope = kv_hints.KvHintsEnvelope("1", "m", [action("retain", {"ttl_s": 60}), action("teleport", {}), action("prefetch", {})])
    with Lab(tmp_path / "kv") as lab:
        hints = lab.tier._request(request("hinted", kv_hints=envelope)).hints
        assert hints.is_retained and hints.retain_s == 60 and hints.always_load and hints.store


def test_hints__a_ttl_ends_what_a_request_wrote_and_low_priority_writes_nothing(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS[:4], context=request("short", kv_transfer_params={"kvkeep": {"ttl": {"ttl_s": 0.3}}}))
        assert all(lab.hits(KEYS[:4]))
        time.sleep(0.4)
        assert not any(lab.hits(KEYS[:4]))
        lab.store(KEYS[4:8], context=request("none", kv_transfer_params={"kvkeep": {"priority": "low"}}))
        assert not any(lab.hits(KEYS[4:8]))


def test_events__what_comes_and_what_goes_is_told_once_under_vllms_keys(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", events=True, enable_kv_events=True, rows=40, capacity_gb=6 / 1024) as lab:
        lab.store(KEYS)
        came, end = [], time.monotonic() + 10
        while len(came) < len(KEYS) and time.monotonic() < end:
            for event in lab.tier.take_events():
                assert not event.removed and event.medium == _compat.MEDIUM
                came += event.keys
        assert sorted(came) == sorted(KEYS)
        assert not list(lab.tier.take_events())
        for salt in range(1, 60):
            lab.store(names(40, salt))
        end, gone = time.monotonic() + 10, set()
        while KEYS[0] not in gone and time.monotonic() < end:
            gone.update(key for event in lab.tier.take_events() if event.removed for key in event.keys)
            time.sleep(0.1)
        assert set(KEYS) <= gone
        assert not any(lab.hits(KEYS))


def test_figures__vllm_gets_each_that_is_declared_and_counters_by_how_much_they_grew(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(KEYS)
        declared = KvkeepTier.build_metric_definitions({})
        first = lab.tier.get_stats().data["data"]
        assert set(first) <= set(declared)
        assert first["vllm:kvkeep_written"] == {(): 40}
        assert first["vllm:kvkeep_used_bytes"][()] > 40 * ROW_BYTES
        assert first["vllm:kvkeep_capacity_bytes"][()] < 0.1 * (1 << 30)
        assert "vllm:kvkeep_written" not in lab.tier.get_stats().data["data"]


def test_settings__what_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(ValueError, match="capacity_gb"):
        Settings.read({"root_dir": "x"})
    with pytest.raises(ValueError, match="capacity_mb"):
        Settings.read({"root_dir": "x", "capacity_gb": 1, "capacity_mb": 1})
    with pytest.raises(ValueError, match="worth"):
        Settings.read({"root_dir": "x", "capacity_gb": 1, "worth": "maybe"})
    with pytest.raises(ValueError, match="load_timeout_s"):
        Settings.read({"root_dir": "x", "capacity_gb": 1, "load_timeout_s": 0})


def test_registered__vllm_finds_the_tier_by_its_short_name() -> None:
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    from kvkeep.vllm import register

    register()
    register()
    assert SecondaryTierFactory.get_tier_class({"type": "kvkeep"}) is KvkeepTier


def test_memory__after_shutdown_vllm_can_release_its_view(tmp_path: Path) -> None:
    """vLLM releases the view of its rows after its tiers have ended: an array that still looks at it makes that an error."""
    lab = Lab(tmp_path / "kv")
    lab.store(KEYS[:4])
    lab.tier.shutdown()
    lab.tier.shutdown()
    lab.view.release()
