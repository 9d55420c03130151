"""Every sample of a split counted exactly once, at any world size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.correct import BoolArray
from harness.dist import Ranks


@dataclass(frozen=True)
class Evaluated:
    metrics: dict[str, float]
    """top1, top5, loss over all ranks: fractions, and mean plain cross-entropy"""
    correct: BoolArray
    """of this rank's samples, in their order: whether the first prediction is the label"""


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], samples: int, ranks: Ranks) -> Evaluated:
    """Metrics over all ranks. Collective.

    `batches` are this rank's (images uint8 (n, C, H, W), labels (n,)), in any memory format; `samples` is the size of the whole split, and
    any other count over the ranks raises RuntimeError.
    """
    top5 = loss = 0.0
    right = [np.empty(0, dtype=bool)]
    for images, labels in batches:
        labels = labels.to(ranks.device, non_blocking=True)
        logits = model.forward(images.to(ranks.device, non_blocking=True).contiguous())  # past compilation, for batches of any size
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        right.append(hits[:, 0].cpu().numpy())
        top5 += float(hits.sum())
    correct = np.concatenate(right)
    top1, top5, loss, count = ranks.sums([float(correct.sum()), top5, loss, len(correct)])
    if count != samples:
        raise RuntimeError(f"{count:.0f} samples were evaluated over {ranks.world_size} rank(s), the split has {samples}")
    return Evaluated({"top1": top1 / count, "top5": top5 / count, "loss": loss / count}, correct)
