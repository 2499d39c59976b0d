"""What a machine's matrix products could do at best, at exactly the shapes that a computation asks for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def wall_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Until a GPU, where there is one, has done all of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


class ProductLog(TorchDispatchMode):
    """Counts the operations of every product inside it (2 a multiply-add), and the large products by shape.

    Large: with an operand of one of the sizes in ``large_numels``, turned so that this one is on the left.
    """

    def __init__(self, large_numels: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._large_numels = large_numels
        self.large: Counter[tuple[bool, int, int, int]] = Counter()  # is the large one transposed, m, k, n
        self.operations = self.large_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            left, right = args
            operations = 2 * left.numel() * right.shape[-1]
            self.operations += operations
            if func == torch.ops.aten.mm.default and max(left.numel(), right.numel()) in self._large_numels:
                self.large_operations += operations
                if left.numel() < right.numel():
                    left, right = right.T, left.T
                self.large[not left.is_contiguous(), *left.shape, right.shape[1]] += 1
        return func(*args, **(kwargs or {}))


class BareProducts:
    """The large products of a log alone, each in the way that is fastest for its shape on this machine: the small
    operand by rows or by columns, the product as it is or as the transposed product of the transposed operands."""

    def __init__(
        self,
        log: ProductLog,
        device: str = "cpu",
        timed: Callable[[Callable[[], Any]], tuple[float, Any]] = cpu_seconds,
    ) -> None:
        self._timed = timed
        self._runs: list[tuple[int, Callable[[], Tensor]]] = []
        for (transposed, m, k, n), count in log.large.items():
            large = torch.randn(k, m, device=device).T if transposed else torch.randn(m, k, device=device)
            by_rows = torch.randn(k, n, device=device)
            by_columns = by_rows.T.contiguous().T
            ways = [partial(torch.mm, large, small) for small in (by_rows, by_columns)]
            ways += [partial(torch.mm, small.T, large.T) for small in (by_rows, by_columns)]
            seconds = [min(timed(way)[0] for _ in range(3)) for way in ways]
            self._runs.append((count, ways[seconds.index(min(seconds))]))

    def seconds(self) -> float:
        """Of all of them, each as often as it was counted; by ``timed``."""
        return self._timed(self._run)[0]

    def _run(self) -> None:
        for count, way in self._runs:
            for _ in range(count):
                way()
