"""What data of ImageNet's size and beyond cost each rank: python -m tests.benchmarks.index_scale [SAMPLES]

The samples are made up; the index is a real one, written and loaded. Nothing here depends on the number of ranks but the
share of a batch, which is checked for 1,024. What a billion samples would cost is a line through this size and a tenth of it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from harness.data.index import NAME, Index, Part, Shard

IMAGENET, CLASSES, SHARD, BILLION = 1_281_167, 1000, 1000, 10**9

LOAD = """
import os, sys, time
import numpy
from pathlib import Path
from harness.config import Data
from harness.data.index import Index
data = Data(name="x", path="x", num_classes=1000, image_size=224, train_samples=int(sys.argv[2]), val_samples=1000, mean=[0] * 3, std=[1] * 3)
def resident(key): return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith(key))
before, began, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
index = Index.load(Path(sys.argv[1]))
loaded, loaded_cpu = time.perf_counter() - began, time.process_time() - cpu
trained, held = index.train(data), index.holdout(data)
total_cpu = time.process_time() - cpu
kept = sum(getattr(index, c).nbytes for c in ("shard", "offset", "size", "extension", "label", "crc32", "holdout_rank")) / 1e6
print(f"{len(index.shard):,} samples in {len(index.shards):,} shards: file {os.path.getsize(sys.argv[1]) / 1e6:.0f} MB; "
      f"load {loaded:.2f} s ({loaded_cpu:.2f} s of CPU), with the views of {len(trained):,} trained and {len(held):,} held out {total_cpu:.2f} s of CPU; "
      f"index {kept:.0f} MB, process +{resident('VmRSS') - before:.0f} MB, at most +{resident('VmHWM') - before:.0f} MB", flush=True)
import json
from harness.data import order
resting, started = resident("VmRSS"), time.perf_counter()
permuted = order.permutation(0, 1, len(trained))
drawn, peak = time.perf_counter() - started, resident("VmHWM")
batch = permuted[: RANKS * 32]
shares = [order.share(batch, rank, RANKS) for rank in range(RANKS)]
assert (numpy.concatenate(shares) == batch).all() and len(numpy.unique(permuted)) == len(permuted)
print(f"order of an epoch: {drawn:.2f} s, kept {permuted.nbytes / 1e6:.0f} MB, at most +{peak - resting:.0f} MB; "
      f"the shares of {RANKS:,} ranks are the batch", flush=True)
print(json.dumps([len(index.shard), loaded, kept, drawn, peak - before]))
""".replace("RANKS", "1024")


def synthetic(samples: int) -> Index:
    """Train shards of 1,000 samples with ImageNet's names, and one val shard."""
    rng = np.random.default_rng(0)
    parts = []
    for number, start in enumerate([*range(0, samples, SHARD), samples]):
        is_val = start == samples
        count = SHARD if is_val else min(SHARD, samples - start)
        sizes = rng.integers(20_000, 200_000, count).astype(np.uint32)
        labels = rng.permutation(CLASSES)[:count].astype(np.int32)
        keys = np.array([f"n{label:08d}/n{label:08d}_{start + i}".encode() for i, label in enumerate(labels)], dtype=np.bytes_)
        shard = Shard(f"{'val' if is_val else 'train'}-{number:06d}.tar", "val" if is_val else "train", count, int(sizes.sum()), "0" * 64)
        offset = np.cumsum(sizes, dtype=np.int64)
        digest = rng.integers(0, 2**64, count, dtype=np.uint64)
        crc32 = rng.integers(0, 2**32, count).astype(np.uint32)
        parts.append(Part(shard, keys, np.full(count, b"jpg"), offset, sizes, labels, crc32, digest))
    return Index.make(Path(), parts)


def main(samples: int) -> None:
    smaller, larger = (_measure(size) for size in (samples // 10, samples))
    slopes = [(b - a) / (larger[0] - smaller[0]) for a, b in zip(smaller[1:], larger[1:], strict=True)]
    loaded, kept, drawn, most = (b + slope * (BILLION - larger[0]) for b, slope in zip(larger[1:], slopes, strict=True))
    print(
        f"a billion samples, projected: load {loaded:.0f} s, index {kept / 1e3:.0f} GB, order of an epoch {drawn:.0f} s, "
        f"at most {most / 1e3:.0f} GB a rank"
    )


def _measure(samples: int) -> list[float]:
    """[samples, seconds to load, MB kept, seconds for the order, MB at most]"""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / NAME
        synthetic(samples).write(file)
        made = resource.getrusage(resource.RUSAGE_SELF)
        print(f"made in {made.ru_utime:.1f} s of CPU, at most {made.ru_maxrss / 1e3:.0f} MB")
        said = subprocess.run([sys.executable, "-c", LOAD, str(file), str(samples)], check=True, stdout=subprocess.PIPE, text=True).stdout
    *lines, figures = said.splitlines()
    print("\n".join(lines), flush=True)
    return [float(figure) for figure in json.loads(figures)]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else IMAGENET)
