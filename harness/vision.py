"""The one place that imports torchvision.

The package index carries only torchvision's CUDA build. Beside a CPU build of torch its C++ library cannot load, and
`import torchvision` then fails, because its fake kernels for nms and qnms name operators that have no schema. With the
two schemas defined, import, models and v2 transforms work; torchvision's own operators and image decoders stay absent.
A matched pair (CUDA or CPU) is left untouched.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_schemas: torch.library.Library | None = None  # torch forgets the schemas when this is collected


def torchvision() -> ModuleType:
    """The torchvision package, imported."""
    global _schemas
    if _schemas is None and not _operators_load():
        _schemas = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


def _operators_load() -> bool:
    """Whether torchvision's C++ library fits this torch; torchvision would load the same file itself."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else None
    libraries = [path for folder in folders or () for path in Path(folder).glob("_C*.so")]
    try:
        for path in libraries:
            torch.ops.load_library(path)
    except OSError:
        return False
    return bool(libraries)
