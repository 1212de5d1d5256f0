"""What the tests watch while an operator runs: memory, and waiting for the device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What waits for a GPU: reading a value, or a shape that depends on values.
SYNCHRONISING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::is_nonzero",
    "aten::equal",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
}


class Allocations(TorchDispatchMode):
    """Bytes of the storages that were made and are alive; C++ kernels' own are measured by the native tests."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.kept = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.live -= size

    def keep(self, outputs: tuple[Tensor, ...]) -> None:
        self.kept = sum(x.untyped_storage().nbytes() for x in outputs)


class NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        boolean_index = name.startswith("aten::index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool
            for x in torch.utils._pytree.tree_leaves(args[1:2])  # indices
        )
        assert name not in SYNCHRONISING, f"{name} waits for the device"
        assert not (boolean_index and name != "aten::index_fill"), f"{name} with a bool index waits for the device"
        return func(*args, **(kwargs or {}))
