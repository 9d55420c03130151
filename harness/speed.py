"""How fast a trial trains: its clock, how long its steps take, and what it gets out of its device."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.config import Trial
from harness.dist import Ranks

PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12}
"""FLOP a second of a device's matrix units in bf16, dense, by words of its name, the first that fit: NVIDIA's data sheets"""


def peak(device: str) -> float | None:
    """FLOP a second of the device of that name; None where it is not known, and of a part of a device."""
    if "MIG" in device:
        return None
    return next((found for name, found in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)


def flops_an_image(model: nn.Module, channels: int, size: int) -> float:
    """Multiplications and additions that an image of size x size costs in a training step: matrix products and convolutions.

    Three times the forward pass, as is usual: the backward pass takes a product by the weights and one by the inputs for each of its
    products. Counted in a pass of one black image; the model (harness.models.build's, in evaluation mode) is left as it is. Not on
    torch's meta device, which costs no pass but imports its compiler. torch's own count of the backward pass is wrong for grouped
    convolutions: ConvNeXt-T has 77 GFLOP by it, and not 27.
    """
    net = model.get_submodule("net")  # behind autocast and compilation
    weight = next(net.parameters())
    # with gradients, without which torch's attention is one operation that is not counted, and in its plain form
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, channels, size, size, dtype=weight.dtype, device=weight.device))
    return 3 * float(counter.get_total_flops())


class Clock:
    """Seconds of training over all attempts, which evaluating and saving stop, and what this attempt does with them.

    A step lasts from the end of the one before, or of what stopped the clock, to its own end on the device. What it waits for, data
    or a peer, is part of it; so is, in an attempt's first, what starts with the attempt: workers, compilation, the choice of kernels.
    On CUDA the ends are events, for the host runs ahead of the device and its times measure neither step nor wait. They are read where the
    loop has waited for the device anyway, at logged points and stops, so timing makes no step wait.
    """

    def __init__(self, trial: Trial, ranks: Ranks, seconds: float, waited: float) -> None:
        """seconds, waited: of the attempts before."""
        self._trial, self._ranks, self._cuda = trial, ranks, ranks.device.type == "cuda"
        self._origin = time.perf_counter() - seconds
        self.waited = waited
        """of these, seconds spent waiting for data"""
        self._logged, self._unlogged = seconds, 0
        """seconds at the last logged point; steps since"""
        self._ends: list[Any] = [self._now()]
        """of steps, the first of the one before those that are not in `_steps` yet: seconds, or CUDA events"""
        self._steps: list[float] = []
        """seconds of each step since the last evaluation"""
        self._sizes: list[int] = []
        """of the images of these steps, pixels"""
        self._flops: dict[int, float] = {}
        """of an image of that size"""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(ranks.device)

    def seconds(self) -> float:
        return time.perf_counter() - self._origin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        if self._cuda:
            torch.cuda.synchronize(self._ranks.device)
        start = time.perf_counter()
        self._read()
        yield
        self._origin += time.perf_counter() - start
        self._ends = [self._now()]

    def step_done(self, size: int) -> None:
        """To be called when all of a step is with the device; size: of its images, pixels."""
        self._sizes.append(size)
        self._ends.append(self._now())
        self._unlogged += 1

    def logged(self) -> dict[str, float]:
        """What every logged point says, once the device has done the step: images_per_second is of all ranks since the one before."""
        self._read()
        now = self.seconds()
        rate = self._unlogged * self._trial.budget.global_batch_size / (now - self._logged)
        self._logged, self._unlogged = now, 0
        return {"time/train_seconds": now, "data/wait_fraction": self.waited / now, "speed/images_per_second": rate}

    def evaluated(self, model: nn.Module) -> dict[str, float]:
        """Of the steps of this attempt since the last evaluation; `model` is the evaluated one. Collective.

        Step times and TFLOP/s are this rank's, the latter over all of these steps. peak_fraction is the share of the device's bf16
        peak, whatever the precision, where that is known. peak_bytes is what torch's allocator gave at most in this attempt, on the
        rank where that is most; there is none on a CPU, where a process's peak has the shards' pages in it.
        """
        for size in set(self._sizes) - self._flops.keys():
            self._flops[size] = flops_an_image(model, self._trial.workload.data.channels, size)
        images = self._trial.budget.global_batch_size / self._ranks.world_size
        p50, p99 = np.quantile(self._steps, (0.5, 0.99))
        rate = images * sum(self._flops[size] for size in self._sizes) / sum(self._steps)
        self._steps.clear()
        self._sizes.clear()
        out = {"speed/step_p50_seconds": float(p50), "speed/step_p99_seconds": float(p99), "speed/tflop_per_second": rate / 1e12}
        if self._cuda:
            if (limit := peak(torch.cuda.get_device_name(self._ranks.device))) is not None:
                out["speed/peak_fraction"] = rate / limit
            out["memory/peak_bytes"] = float(max(self._ranks.gathered(torch.cuda.max_memory_allocated(self._ranks.device))))
        return out

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        for start, end in itertools.pairwise(self._ends):
            self._steps.append(start.elapsed_time(end) / 1000 if self._cuda else end - start)
        del self._ends[:-1]
