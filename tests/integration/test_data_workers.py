"""Training images that Python augments, read by processes: the same batches as without, and processes that are well-behaved."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import BadInput, Trial
from harness.data import loader, order, workers
from harness.data.index import CorruptSample, Index
from harness.store import Store
from harness.train import train
from harness.vision import torchvision
from tests.integration.ranks import Ranks, history
from tests.integration.test_train import SGDW, small
from tests.photographs import BATCH, GROWING, a_trial, make, opened, same, steps

RAND, TRIVIAL = {"name": "randaugment", "num_ops": 3, "magnitude": 15}, {"name": "trivialaugment"}


def augmented(few: Path, augment: dict[str, Any] | None, **data: Any) -> Trial:
    t = small(few, recipe={"translate": 2, "flip": True, "augment": augment}, **SGDW)
    described = t.workload.data.model_copy(update=data)
    return t.model_copy(update={"workload": t.workload.model_copy(update={"data": described})})


def batches(t: Trial, threads: int, rank: int = 0, world_size: int = 1, stop: int = 9) -> list[loader.Batch]:
    dataset = loader.open_data(t.workload.data, t.workload.recipe, threads=threads)
    return list(loader.train_batches(dataset, t, rank, world_size, 0, stop))


def children() -> list[int]:
    """Worker processes of this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
    return found


def gone(pids: list[int], seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("augment", [RAND, TRIVIAL], ids=lambda augment: augment["name"])
def test_the_same_global_batches_whatever_reads_them(few: Path, augment: dict[str, Any]) -> None:
    """Two epochs, against each image by itself; by this process and by two others, whole and as two ranks."""
    t = augmented(few, augment)
    plain, ours = batches(augmented(few, None), 0), batches(t, 0)
    torchvision()
    from torchvision.transforms import v2

    apply = v2.RandAugment(3, 15) if augment is RAND else v2.TrivialAugmentWide()
    changed, samples, per_epoch = 0, t.workload.data.trained_samples, 7
    for step, ((before, labels), (after, same_labels)) in enumerate(zip(plain, ours, strict=True)):
        assert torch.equal(labels, same_labels)
        for image, found, position in zip(before, after, order.batch_positions(0, step, per_epoch, 100, samples).tolist(), strict=True):
            torch.manual_seed(order.ops_seed(0, step // per_epoch, position))
            assert torch.equal(found, apply(image.clone()))
            changed += not torch.equal(found, image)
    assert changed > 100 * len(ours) // 2
    state = torch.get_rng_state()
    for rank in range(2):
        share = batches(t, 2, rank, 2)
        for (images, labels), (whole, whole_labels) in zip(share, ours, strict=True):
            assert torch.equal(images, whole[50 * rank : 50 * (rank + 1)])
            assert torch.equal(labels, whole_labels[50 * rank : 50 * (rank + 1)])
    assert torch.equal(torch.get_rng_state(), state), "the trial's own generator"


def test_signals_for_the_rank_leave_its_workers_alone(few: Path) -> None:
    t = augmented(few, RAND)
    running = loader.train_batches(loader.open_data(t.workload.data, t.workload.recipe, threads=2), t, 0, 1, 0, 200)
    next(running)
    pids = children()
    assert len(pids) == 2
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        for pid in pids:
            os.kill(pid, number)
        next(running)
    assert children() == pids
    running.close()
    assert gone(pids)


def test_a_killed_worker_is_an_error_and_not_a_hang(few: Path) -> None:
    t = augmented(few, RAND)
    running = loader.train_batches(loader.open_data(t.workload.data, t.workload.recipe, threads=2), t, 0, 1, 0, 500)
    next(running)
    pids = children()
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        list(running)
    assert len(pids) == 2 and gone(pids)


@pytest.mark.parametrize("end", ["killed", "an error"])
def test_workers_end_with_their_rank(few: Path, tmp_path: Path, end: str) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.integration.test_data_workers import *\n"
        "if __name__ == '__main__':\n"
        "    t = augmented(Path(sys.argv[1]), RAND)\n"
        "    running = loader.train_batches(loader.open_data(t.workload.data, t.workload.recipe, threads=2), t, 0, 1, 0, 10**6)\n"
        "    next(running); print(*children(), flush=True)\n"
        "    for _ in running:\n"
        f"        if {end != 'killed'}: raise RuntimeError('of the trial')\n"
    )
    script = tmp_path / "rank.py"
    script.write_text(program)
    with subprocess.Popen(
        [sys.executable, str(script), str(few)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}
    ) as rank:
        assert rank.stdout is not None
        pids = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(pids) == 2
        if end == "killed":
            rank.kill()
        assert rank.wait(30) != 0
        assert gone(pids, 20)


def test_workers_end_with_a_rank_that_is_killed_while_they_start(few: Path, tmp_path: Path) -> None:
    program = (
        "import sys, threading; from pathlib import Path; from tests.integration.test_data_workers import *\n"
        "def kill():\n"
        "    while len(pids := children()) < 2: time.sleep(0.01)\n"
        "    print(*pids, flush=True); time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    t = augmented(Path(sys.argv[1]), RAND)\n"
        "    threading.Thread(target=kill).start()\n"
        "    next(loader.train_batches(loader.open_data(t.workload.data, t.workload.recipe, threads=2), t, 0, 1, 0, 10**6))\n"
    )
    script = tmp_path / "rank.py"
    script.write_text(program)
    run = [sys.executable, str(script), str(few)]
    rank = subprocess.run(run, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}, timeout=120)
    pids = [int(pid) for pid in rank.stdout.split()]
    assert rank.returncode == -signal.SIGKILL and len(pids) == 2
    assert gone(pids, 60)


def test_random_crops_of_photographs(tmp_path: Path) -> None:
    """As they are trained on: crop of a size that grows, flip and operations in colour; resumed at any step; evaluated meanwhile."""
    photographs = make(tmp_path)
    t = a_trial(photographs, GROWING | {"augment": RAND})
    whole = steps(t, stop=8)
    assert [images.shape[-1] for images, _ in whole] == [16, 16, 20, 20, 24, 24, 28, 28]
    assert not same(whole, steps(a_trial(photographs, GROWING), stop=8))
    for processes, world in ((1, 1), (4, 3), (2, 8)):
        share = steps(t, world - 1, world, stop=8, threads=processes)  # the last rank's; a process takes seconds to start
        part = slice((world - 1) * BATCH // world, BATCH)
        assert same(share, [(images[part], labels[part]) for images, labels in whole]), (processes, world)
    dataset = opened(t, threads=2)
    for start in (1, 5):
        running = loader.train_batches(dataset, t, 0, 1, start, 8)
        resumed = [next(running)]
        evaluated = list(loader.eval_batches(dataset.val, 0, 1, 4))
        assert same([*resumed, *running], whole[start:])
        assert same(evaluated, list(loader.eval_batches(opened(t).val, 0, 1, 4)))


def test_too_little_shared_memory_is_said_before_it_is_a_bus_error(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    workers.check_memory(free // 4, 1, tmp_path)
    with pytest.raises(BadInput, match=r"MB free, and workload.recipe.augment needs .* --shm-size"):
        workers.check_memory(free // 4, 4, tmp_path)
    workers.check_memory(free, 4, tmp_path / "absent")


def test_damage_is_found_and_counted(few: Path, tmp_path: Path) -> None:
    """raise: one line that names it. substitute: the same batches and the same list as without processes."""
    folder = tmp_path / "damaged"
    shutil.copytree(few, folder)
    index = Index.load(folder)
    t = augmented(folder, RAND)
    number = int(index.train(t.workload.data)[5])
    with open(folder / index.shards[index.shard[number]].name, "r+b") as shard:
        shard.seek(int(index.offset[number]) + int(index.size[number]) // 2)
        shard.write(b"\xff\x00\xff")
    with pytest.raises(CorruptSample, match=r"crc32") as stopped:
        batches(t, 2)
    assert "\n" not in str(stopped.value)
    substituting = augmented(folder, RAND, on_corrupt="substitute")
    found = []
    for threads in (0, 2):
        dataset = loader.open_data(substituting.workload.data, substituting.workload.recipe, threads=threads)
        read = list(loader.train_batches(dataset, substituting, 0, 1, 0, 9))
        found.append((dataset.substituted, read))
    assert found[0][0] == found[1][0]
    assert [s.number for s in found[0][0]] == [number]
    assert all(torch.equal(a, b) for x, y in zip(found[0][1], found[1][1], strict=True) for a, b in zip(x, y, strict=True))


def test_kill_9_leaves_no_trace(few: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kill: {seed}")
    t = augmented(few, RAND)
    calm, store = Store(tmp_path / "calm"), Store(tmp_path / "killed")
    undisturbed = train(t, calm)
    ranks = Ranks(t, store, 1, daemon=False)
    ranks.wait_for_step(random.Random(seed).randrange(1, 18))
    ranks.signal(0, signal.SIGKILL)
    assert ranks.wait() != [0]
    again = train(t, store)
    assert again["attempts"] == 2
    assert again["weights_sha256"] == undisturbed["weights_sha256"]
    assert history(store.trial(t.study, t.trial_id)) == history(calm.trial(t.study, t.trial_id))
