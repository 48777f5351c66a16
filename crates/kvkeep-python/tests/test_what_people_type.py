"""Small things that people type: each is what it looks like, or an error that says what to do."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvkeep
from kvkeep import ConfigError, DiskConfig, KVCache, LayerOutOfRangeError, Namespace, SimpleKVCache, TokenIdError

ONES = np.ones((2, 3), np.float32)


@pytest.fixture
def namespace() -> Namespace:
    return Namespace("m", layers=2, kv_heads=1, head_dim=4, dtype=np.float32, block_tokens=2)


def layers_of(namespace: Namespace, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    shape = namespace.shape(tokens, 4)
    return [(np.full(shape, layer + 1, np.float32), np.full(shape, -layer - 1, np.float32)) for layer in range(namespace.layers)]


@pytest.mark.parametrize("door", [SimpleKVCache, KVCache])
def test_every_cache_has_a_repr_also_when_it_is_closed(door: type) -> None:
    """The repr of a closed cache raised, so that a traceback or a notebook's last line did."""
    cache = door(0.01)
    assert repr(cache).startswith(f"<{door.__name__} 0 entries")
    assert "<table>" in cache._repr_html_() and "Requests" in cache._repr_html_()
    cache.close()
    assert repr(cache) == f"<{door.__name__}, closed>" and "closed" in cache._repr_html_()


@pytest.mark.parametrize("layer", [-1, 10**30, 1 << 40])
def test_a_layer_out_of_range_is_that_and_no_overflow(layer: int, namespace: Namespace) -> None:
    """`layer=-1` raised an OverflowError about C types."""
    cache, tokens = SimpleKVCache(0.01), KVCache(0.01)
    calls = [
        lambda: cache.get_cached_kv("p", layer), lambda: cache.cache_kv("p", layer, ONES, ONES), lambda: cache.evict("p", layer),
        lambda: cache.get_all_layers("p", layer), lambda: cache.cache_all_layers("p", {0: (ONES, ONES), layer: (ONES, ONES)}),
        lambda: tokens.load_layers(namespace, [1, 2], layers_of(namespace, 2), first_layer=layer),
    ]  # fmt: skip
    tokens.store(namespace, [1, 2], layers_of(namespace, 2))
    calls.append(lambda: tokens.lookup(namespace, [1, 2]).load(layers_of(namespace, 2), first_layer=layer))
    for call in calls:
        with pytest.raises(LayerOutOfRangeError, match="out of range"):
            call()
    with pytest.raises(TypeError):
        cache.get_cached_kv("p", "0")  # type: ignore[arg-type]
    assert cache.stats()["entries"] == 0


def test_a_batch_of_one_prompt_is_that_prompt(namespace: Namespace) -> None:
    """`tokenizer(..., return_tensors=...)` gives `(1, n)`, which was refused."""
    cache, row = KVCache(0.01), [5, 6, 7, 8]
    for tokens in (np.array([row]), row, np.array(row)):
        cache.store(namespace, tokens, layers_of(namespace, 4))
        with cache.lookup(namespace, tokens) as match:
            assert match.cached_tokens == 4
        assert cache.look(namespace, tokens).ram_tokens == 4 and cache.prefetch(namespace, tokens) == 0
    assert cache.stats()["entries"] == 2
    for wrong in ([row], [row, row], np.zeros((1, 1, 4), np.int64), np.zeros((4, 1), np.int64)):
        with pytest.raises(TokenIdError, match="one dimension"):
            cache.lookup(namespace, wrong)
    with pytest.raises(TokenIdError, match="first_token is -1"):
        cache.store(namespace, row, layers_of(namespace, 4), first_token=-1)


@pytest.mark.parametrize("door", [SimpleKVCache, KVCache])
def test_a_disk_is_given_whole_or_in_parts_and_never_ignored(door: type, tmp_path: Path) -> None:
    """`disk_size_gb` without a path was ignored, and nothing was kept over the restart."""
    with pytest.raises(ConfigError, match="disk_size_gb without disk_path"):
        door(0.01, disk_size_gb=5)
    with pytest.raises(ConfigError, match="disk_key_file without disk_path"):
        door(0.01, disk_path=None, disk_key_file="key")
    with pytest.raises(ConfigError, match="both given"):
        door(0.01, disk=DiskConfig(tmp_path / "a"), disk_size_gb=1)
    with pytest.raises(TypeError, match="disk_sise_gb.*disk_size_gb"):
        door(0.01, disk_path=tmp_path / "a", disk_sise_gb=1)
    with pytest.raises(ConfigError, match="disk_write is .sometimes"):
        door(0.01, disk=DiskConfig(tmp_path / "a", write="sometimes"))
    assert door(0.01, disk_path=None).stats()["disk"] is None
    for number, how in enumerate(({"disk": DiskConfig(tmp_path / "b", size_gb=0.25)}, {"disk_path": tmp_path / "b", "disk_size_gb": 0.25})):
        with door(0.01, **how) as cache:
            disk = cache.stats()["tiers"]["disk"]
            assert disk["capacity_bytes"] == 1 << 28 and cache.stats()["disk"] == disk, number
            assert "Tier disk" in cache._repr_html_()
    with door(0.01, disk=str(tmp_path / "b")) as cache:
        assert cache.stats()["disk"] is not None


def test_policies_quotas_and_priorities_are_those_of_the_core(namespace: Namespace) -> None:
    """They were missing from Python."""
    with pytest.raises(ConfigError, match="policy is .lrru.: give one of lru, s3fifo, arc, lru2, adaptive"):
        KVCache(0.01, policy="lrru")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weight 0"):
        KVCache(0.01, quotas={namespace: 0})
    other = Namespace("m", layers=2, kv_heads=1, head_dim=4, dtype=np.float32, block_tokens=2, salt="other")
    blocks = 8
    cache = KVCache(blocks * 4096 / 2**30, policy="lru", quotas={namespace: 1.0, other: 1.0})
    for prompt in range(blocks // 4):
        cache.store(namespace, [prompt, 1], layers_of(namespace, 2))
    for prompt in range(3 * blocks):
        cache.store(other, [prompt, 2], layers_of(namespace, 2))
    kept = [cache.look(namespace, [prompt, 1]).ram_tokens for prompt in range(blocks // 4)]
    assert kept == [2] * (blocks // 4), "a namespace loses nothing of its share to others"
    with pytest.raises(ConfigError, match="priority is .high.: give 'drop-first', 'normal' or 'keep-longer'"):
        cache.store(other, [1, 2], layers_of(namespace, 2), priority="high")  # type: ignore[arg-type]
    keeper = KVCache(blocks * 4096 / 2**30, policy="lru")
    keeper.store(namespace, [1, 1], layers_of(namespace, 2), priority="keep-longer")
    for prompt in range(3 * blocks):
        keeper.store(namespace, [prompt, 2], layers_of(namespace, 2))
    assert keeper.look(namespace, [1, 1]).ram_tokens == 2


def test_a_look_and_layers_by_themselves(namespace: Namespace, tmp_path: Path) -> None:
    """`look` and `load_layers` were missing from Python."""
    with KVCache(0.01, disk=str(tmp_path / "kv")) as cache:
        cache.store(namespace, [1, 2, 3, 4], layers_of(namespace, 4))
    with KVCache(0.01, disk=str(tmp_path / "kv")) as cache:
        before = cache.stats()
        look = cache.look(namespace, [1, 2, 3, 4, 5])
        assert (look.ram_tokens, look.load_tokens, look.worth_tokens, look.tiers["disk"]) == (0, 4, 4, 4)
        assert cache.stats()["total_requests"] == before["total_requests"], "a look is no request"
        into = layers_of(namespace, 4)
        into[1][0][...] = 0
        assert cache.load_layers(namespace, [1, 2, 3, 4, 5], into[1:], first_layer=1) == 4
        assert (into[1][0] == 2).all() and (into[1][1] == -2).all()
        assert cache.look(namespace, [1, 2, 3, 4]).ram_tokens == 0, "nothing is kept in RAM"
    assert KVCache(0.01).look(namespace, [1, 2]) == kvkeep.Look(0, 0, 0, 0.0, {"ram": 0})


def test_what_the_core_warns_of_reaches_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A failing disk was silent in Python."""
    import shutil

    folder = tmp_path / "kv"
    with caplog.at_level(logging.INFO, logger="kvkeep"):
        cache = SimpleKVCache(0.01, disk=str(folder))
        cache.cache_kv("p", 0, ONES, ONES)
        cache.flush()
        shutil.rmtree(folder)
        cache.cache_kv("q", 0, ONES, ONES)
        with pytest.raises(kvkeep.DiskError):
            cache.flush()
        # At once the disk takes nothing, a little later it fails again: either way what was stored is lost with RAM.
        with pytest.raises(kvkeep.DiskError):
            cache.close()
    said = [record for record in caplog.records if record.name == "kvkeep.core"]
    assert any(record.levelno == logging.WARNING and str(folder) in record.getMessage() for record in said), caplog.records


def test_a_handler_that_uses_the_cache_or_raises_harms_nothing(tmp_path: Path) -> None:
    program = f"""
import logging, shutil, sys
import numpy as np
from kvkeep import SimpleKVCache

class Handler(logging.Handler):
    def emit(self, record):
        cache.stats()
        sys.stdout.write("said\\n")
        raise RuntimeError("a handler of mine")

sys.unraisablehook = lambda unraisable: None
logging.getLogger("kvkeep").addHandler(Handler())
cache = SimpleKVCache(0.01, disk={str(tmp_path / "kv")!r})
cache.cache_kv("p", 0, np.ones(3), np.ones(3))
cache.flush()
shutil.rmtree({str(tmp_path / "kv")!r})
cache.cache_kv("q", 0, np.ones(3), np.ones(3))
try:
    cache.flush()
except OSError:
    print("flushed not")
assert cache.get_cached_kv("q", 0) is not None
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "said" in ended.stdout and "flushed not" in ended.stdout


def test_a_package_that_is_missing_is_named_with_what_to_do() -> None:
    """Without torch there was a bare "No module named 'torch'"."""
    program = """
import sys
for name in ("torch", "ml_dtypes"):
    sys.modules[name] = None
import kvkeep
def told(call):
    try:
        call()
    except ImportError as error:
        return str(error)
n = kvkeep.Namespace("m", layers=1, kv_heads=1, head_dim=4, dtype="bfloat16")
match = kvkeep.KVCache(0.01).lookup(n, [1])
print(told(lambda: __import__("kvkeep.transformers")))
print(told(match.to_torch))
print(told(match.to_numpy))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "kvkeep.transformers needs torch, which is not installed: pip install torch"
    assert said[1] == "Match.to_torch needs torch, which is not installed: pip install torch"
    assert said[2] == "bfloat16 in numpy needs ml_dtypes, which is not installed: pip install ml_dtypes"


def test_a_cache_of_the_wrong_kind_is_refused_when_a_generator_is_made() -> None:
    """It was found at the first call, as an attribute that there is not."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from small_models import model_of

    from kvkeep.transformers import CachedGenerator

    with pytest.raises(TypeError, match="cache is a SimpleKVCache: give a kvkeep.KVCache"):
        CachedGenerator(model_of("llama"), SimpleKVCache(0.01))  # type: ignore[arg-type]
    generator = CachedGenerator(model_of("llama"), KVCache(0.01))
    assert repr(generator) == "<CachedGenerator of LlamaForCausalLM>"
