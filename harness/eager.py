"""Keeps torch._dynamo from being imported by ranks that compile nothing.

torch's optimizers, DistributedDataParallel and DeepSpeed import torch._dynamo on their first call, to tell it to leave them
alone. With all that is behind it (sympy, torch._inductor) that takes longer than torch itself (python -X importtime -c "import
torch._dynamo" tells), at every start of a rank and after every preemption again. Networks of torchvision and FSDP's sharded tensors
do ask for more, and get it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


@contextmanager
def without_compiler(compiles: bool) -> Iterator[None]:
    """A stand-in for torch._dynamo, unless it is wanted (or there already): it gives way to the real one when more is asked of it."""
    if compiles or NAME in sys.modules:
        yield
        return
    stand_in, finder = _StandIn(NAME), _Submodules()
    sys.modules[NAME] = torch._dynamo = stand_in
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if sys.modules.get(NAME) is stand_in:
            _withdraw()


def _withdraw() -> None:
    del sys.modules[NAME], torch._dynamo


def _real() -> ModuleType:
    if isinstance(sys.modules.get(NAME), _StandIn):
        _withdraw()
    return importlib.import_module(NAME)


class _Part:
    """A submodule of it, of which eager training asks no more than is given here."""

    def __init__(self, name: str, **given: Any) -> None:
        self._name = name
        self.__dict__ |= given

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(getattr(_real(), self._name), name)


class _StandIn(ModuleType):
    """What eager training asks of torch._dynamo, and where nothing is traced the answer is to do nothing."""

    __path__: list[str] = []  # noqa: RUF012  # a package: imports of submodules come to the finder
    trace_rules = _Part("trace_rules", clear_lru_cache=lambda: None)  # at the start of a process group; nothing is cached
    utils = _Part("utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")  # the default; only python_reducer changes DDP itself

    @staticmethod
    def disable(function: Any = None, recursive: bool = True, **_: Any) -> Any:
        return function or (lambda decorated: decorated)

    @staticmethod
    def graph_break(message: str = "") -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect looks at the __file__ of every module
            raise AttributeError(name)
        return getattr(_real(), name)


class _Submodules(MetaPathFinder, Loader):
    """Has torch._dynamo.x imported from the real package, once; the import that asked for it is then given what is there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{NAME}.") or not isinstance(sys.modules.get(NAME), _StandIn):
            return None
        _real()
        self._spec = importlib.import_module(name).__spec__
        return spec_from_loader(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
