"""Shards over http: the same bytes from a server that drops and stalls connections, one clear error from one that is gone."""

import os
import shutil
import time

import numpy as np
import pytest
import yaml

from harness.config import BadInput
from harness.data import remote, shards
from harness.data.index import Address, Index
from harness.data.remote import Cache, RemoteShard, Unreachable
from harness.data.verify import verify
from tests import tars
from tests.http_server import serving

SIZE = 200_123


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 2048)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(remote, "WAIT_SECONDS", 0.01)


@pytest.fixture
def content(tmp_path):
    content = np.random.default_rng(1).bytes(SIZE)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "train-0.tar").write_bytes(content)
    return content


def test_the_same_bytes_from_a_server_that_drops_and_stalls(tmp_path, content):
    with serving(tmp_path / "www", seed=3, drop=0.02, stall=0.02, stall_seconds=0.5) as (address, faults):
        shard = RemoteShard(f"{address}/train-0.tar", Cache(tmp_path / "cache"))
        assert shard.size == SIZE
        rng = np.random.default_rng(2)
        for offset, size in [
            (0, SIZE),
            (0, SIZE),
            (SIZE - 5, 100),
            (2047, 2),
            (2048, 2048),
            (7, 0),
            *rng.integers(0, SIZE, (50, 2)).tolist(),
        ]:
            assert shard.read(offset, size) == content[offset : offset + size]
    assert {"drop", "stall"} == set(faults.made)


def test_what_is_in_the_cache_needs_no_server(tmp_path, content):
    with serving(tmp_path / "www") as (address, _):
        shard = RemoteShard(f"{address}/train-0.tar", Cache(tmp_path / "cache"))
        shard.read(0, 100_000)
    assert shard.read(20_000, 50_000) == content[20_000:70_000]
    block = next((tmp_path / "cache").glob("*/3"))
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(Unreachable):
        shard.read(3 * 2048, 10)


def test_a_server_that_is_gone(tmp_path, content):
    with serving(tmp_path / "www") as (address, _):
        shard = RemoteShard(f"{address}/train-0.tar", Cache(tmp_path / "cache"))
    with pytest.raises(Unreachable) as caught:
        shard.read(0, 10)
    assert str(caught.value).startswith(f"{address}/train-0.tar: cannot be read after 5 attempts: ") and "\n" not in str(caught.value)
    with pytest.raises(Unreachable, match=r"train-1.tar: cannot be read after 5 attempts"):
        RemoteShard(f"{address}/train-1.tar", Cache(tmp_path / "cache"))


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago(tmp_path, content):
    with serving(tmp_path / "www") as (address, _):
        shard = RemoteShard(f"{address}/train-0.tar", Cache(tmp_path / "cache", 10 * 2048))
        for number in range(30):
            shard.read(number * 2048, 1)
            shard.read(0, 1)
            assert sum(f.stat().st_size for f in (tmp_path / "cache").glob("*/*")) <= 10 * 2048
    kept = {f.name for f in (tmp_path / "cache").glob("*/*")}
    assert kept == {"0", *map(str, range(21, 30))}


def test_another_file_at_the_same_address_is_read_and_not_what_was_kept(tmp_path, content):
    with serving(tmp_path / "www") as (address, _):
        assert RemoteShard(f"{address}/train-0.tar", Cache(tmp_path / "cache")).read(0, 100) == content[:100]
        (tmp_path / "www" / "train-0.tar").write_bytes(content[::-1])
        os.utime(tmp_path / "www" / "train-0.tar", (1, 1))
        assert RemoteShard(f"{address}/train-0.tar", Cache(tmp_path / "cache")).read(0, 100) == content[::-1][:100]


def test_index_and_verify_read_what_the_server_holds_now(tmp_path, monkeypatch):
    """Of a shard that changed and kept its length and date, with blocks of before in the cache."""
    monkeypatch.setenv("WRBENCH_CACHE", str(tmp_path / "cache"))
    folder = tars.small(tmp_path / "www")
    shard = folder / "val-000000.tar"
    with serving(folder) as (address, _):
        before = shards.index_shards(f"{address}/{{train-{{000000..000001}},val-000000}}.tar", tmp_path / "remote")
        for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
            remote.reader(Address(address) / name).read(0, 10**9)
        kept = {f.parent.name for f in (tmp_path / "cache").glob("*/*")}
        times = shard.stat().st_mtime_ns
        tars.overwrite(shard, tars.member(shard, "v004.png")[0], bytes(20))
        os.utime(shard, ns=(times, times))
        found = [str(f) for f in verify(tmp_path / "remote").findings]
        assert any("sample v004: its image changed since it was indexed" in f for f in found)
        assert any("another sha256" in f for f in found)
        after = shards.index_shards(f"{address}/{{train-{{000000..000001}},val-000000}}.tar", tmp_path / "again")
        assert after.sha256 != before.sha256
    assert {f.parent.name for f in (tmp_path / "cache").glob("*/*")} == kept and len(list((tmp_path / "cache").iterdir())) == 3


def test_a_block_that_another_process_is_writing_makes_no_room(tmp_path, content):
    with serving(tmp_path / "www") as (address, _):
        shard = RemoteShard(f"{address}/train-0.tar", Cache(tmp_path / "cache", 2 * 2048))
        shard.read(0, 1)
        folder = next((tmp_path / "cache").iterdir())
        now, left = folder / ".7.1.1", folder / ".8.1.1"
        for file, age in ((now, 100), (left, 7200)):
            file.write_bytes(bytes(2048))
            os.utime(file, (time.time() - age,) * 2)
        for number in range(1, 6):
            shard.read(number * 2048, 1)
    assert now.exists() and not left.exists()


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_shard(tmp_path, monkeypatch):
    full = tmp_path / "cache"
    full.write_bytes(b"a file")
    monkeypatch.setenv("WRBENCH_CACHE", str(full))
    tars.small(tmp_path / "www")
    with serving(tmp_path / "www") as (address, _), pytest.raises(Unreachable, match=r"000.tar: cannot be kept in .*cache: Not a dir"):
        shards.index_shards(f"{address}/train-000000.tar", tmp_path / "remote")


def test_what_is_no_shard(tmp_path, content):
    with serving(tmp_path / "www") as (address, _), pytest.raises(BadInput, match=r"absent.tar: does not exist"):
        RemoteShard(f"{address}/absent.tar", Cache(tmp_path / "cache"))
    for bad in ("pipe:touch x", "file:///etc/passwd", "ftp://x/y.tar", "x.tar"):
        with pytest.raises(BadInput, match="shards are read from http, https, s3, gs, hf addresses"):
            RemoteShard(bad, Cache(tmp_path / "cache"))


def test_an_index_of_remote_shards_is_that_of_local_ones(tmp_path, monkeypatch):
    """Made and verified through a server that drops connections."""
    monkeypatch.setenv("WRBENCH_CACHE", str(tmp_path / "cache"))
    folder = tars.small(tmp_path / "www")
    local = shards.index_shards(folder, tmp_path / "local")
    with serving(folder, seed=5, drop=0.05) as (address, faults):
        listed = f"{address}/{{train-{{000000..000001}},val-000000}}.tar"
        made = shards.index_shards(listed, tmp_path / "remote")
        assert (made.sha256, made.shards, str(made.folder)) == (local.sha256, local.shards, address)
        loaded = Index.load(tmp_path / "remote")
        assert (loaded.folder, type(loaded.folder)) == (address, Address) and loaded.shards == local.shards
        assert verify(listed).findings == [] and verify(tmp_path / "remote").findings == []
        (folder / "train-000001.tar").unlink()
        (found,) = verify(tmp_path / "remote").findings
        assert str(found) == f"fault: {address}/train-000001.tar: missing, with the 64 samples that the index has of it"
        with pytest.raises(BadInput, match=r"train-000001.tar: does not exist"):
            shards.index_shards(listed, tmp_path / "x")
        with pytest.raises(BadInput, match="with --out DIR"):
            shards.index_shards(listed)
    assert faults.made
    with pytest.raises(Unreachable, match="cannot be read after 5 attempts"):
        shards.index_shards(listed, tmp_path / "x")


def test_a_plan_warns_of_shards_that_a_node_cannot_keep(tmp_path, monkeypatch):
    from harness.config import Local
    from harness.study import load
    from launch.plan import plan_warnings

    monkeypatch.setenv("WRBENCH_CACHE", str(tmp_path / "cache"))
    folder = tars.small(tmp_path / "www")
    shards.index_shards(folder)
    with serving(folder) as (address, _):
        shards.index_shards(f"{address}/{{train-{{000000..000001}},val-000000}}.tar", tmp_path / "remote")

        def warnings(path):
            data = tars.DATA | {"path": str(path)}
            study = {
                "workload": {"name": "mnist5k_cnn", "data": data},
                "arms": {"A": {"optimizer": {"name": "adam", "lr": 0.001}, "schedule": {"name": "cosine"}}},
            }
            study |= {"search": {"seeds": 1}, "budget": {"epochs": 1, "global_batch_size": tars.BATCH}}
            (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
            return [line for line in plan_warnings(load(tmp_path / "study.yaml"), Local(executor="local")) if "WRBENCH_CACHE_GB" in line]

        assert warnings(tmp_path / "remote") == []
        monkeypatch.setenv("WRBENCH_CACHE_GB", "0")
        (line,) = warnings(tmp_path / "remote")
        assert line.startswith(f"{address}: has ") and line.endswith("on the nodes set WRBENCH_CACHE_GB=1 or more")
        assert warnings(folder) == []


def test_an_epoch_over_http_is_that_of_local_shards(tmp_path, monkeypatch):
    """Equal batches from a server that drops and stalls connections; one that is gone is an error, and never substituted."""
    import torch

    from harness.data import loader
    from tests.trials import trial

    monkeypatch.setenv("WRBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loader, "DECODED_BYTES", 0)
    folder = tars.small(tmp_path / "www")
    shards.index_shards(folder)

    def epochs(path):
        over = tars.DATA | {"path": str(path), "on_corrupt": "substitute"}
        one = trial(data=over, budget={"epochs": 2, "global_batch_size": tars.BATCH})
        dataset = loader.open_data(one.workload.data)
        return [*loader.train_batches(dataset, one, 0, 1, 0, 8), *loader.eval_batches(dataset.val, 0, 1, 10)], dataset

    with serving(folder, seed=7, drop=0.05, stall=0.02, stall_seconds=0.5) as (address, faults):
        shards.index_shards(f"{address}/{{train-{{000000..000001}},val-000000}}.tar", tmp_path / "remote")
        shutil.rmtree(tmp_path / "cache")
        remote_batches, dataset = epochs(tmp_path / "remote")
        shutil.rmtree(tmp_path / "cache")
    local_batches, _ = epochs(folder)
    assert faults.made and len(remote_batches) == len(local_batches) > 8
    assert all(torch.equal(a, b) for one, other in zip(remote_batches, local_batches, strict=True) for a, b in zip(one, other, strict=True))
    assert not dataset.substituted
    with pytest.raises(Unreachable, match=r"000.tar: cannot be read after 5 attempts"):
        list(loader.eval_batches(dataset.val, 0, 1, 10))
    with pytest.raises(Unreachable, match=r"tar: cannot be read after 5 attempts"):
        epochs(tmp_path / "remote")
