"""What compression leaves out of one adapter, in the three figures of a manifest entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.adapters.record import AdapterRecord


@dataclass(frozen=True)
class AdapterError:
    """Squared and relative: sum_m ||M - M^||^2 / sum_m ||M||^2 over the adapter's modules; the plain mean of the
    modules' own figures; the worst of them."""

    error: float
    unweighted: float
    worst_module: float

    @staticmethod
    def of(record: AdapterRecord, squared_errors: Mapping[str, float]) -> AdapterError:
        """``squared_errors``: module -> ||M - M^||^2, for every module in which the adapter is not zero."""
        touched = {module: places.energy for module, places in record.modules.items() if places.energy > 0}
        relative = [squared_errors[module] / energy for module, energy in touched.items()]
        total = math.fsum(squared_errors[module] for module in touched) / math.fsum(touched.values())
        return AdapterError(total, math.fsum(relative) / len(relative), max(relative))
