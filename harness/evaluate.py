"""Every sample of a split counted exactly once, at any world size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.dist import Ranks


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], samples: int, ranks: Ranks) -> dict[str, float]:
    """{top1, top5, loss} over all ranks: fractions, and mean plain cross-entropy. Collective.

    `batches` are this rank's (images uint8 (n, C, H, W), labels (n,)), in any memory format; `samples` is the size of the whole split, and
    any other count over the ranks raises RuntimeError.
    """
    top1 = top5 = loss = count = 0.0
    for images, labels in batches:
        labels = labels.to(ranks.device, non_blocking=True)
        logits = model(images.to(ranks.device, non_blocking=True).contiguous())
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        top1 += float(hits[:, 0].sum())
        top5 += float(hits.sum())
        count += len(labels)
    top1, top5, loss, count = ranks.sums([top1, top5, loss, count])
    if count != samples:
        raise RuntimeError(f"{count:.0f} samples were evaluated over {ranks.world_size} rank(s), the split has {samples}")
    return {"top1": top1 / count, "top5": top5 / count, "loss": loss / count}
