"""How one transformers engine runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineSettings:
    """``max_batch`` requests run at once; ``max_model_len`` bounds prompt and answer together, in tokens.

    ``num_threads`` is for torch on a CPU; None leaves torch's own choice. Raises ConfigError.
    """

    device: str = "cpu"
    dtype: str = "float32"
    max_batch: int = 32
    max_model_len: int = 2048
    num_threads: int | None = None

    def __post_init__(self) -> None:
        try:
            supported = torch.device(self.device).type in ("cpu", "cuda")
        except RuntimeError:
            supported = False
        if not supported:
            raise ConfigError(f"device is {self.device!r}, expected cpu, cuda or cuda:<index>")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        for name, least in (("max_batch", 1), ("max_model_len", 2), ("num_threads", 1)):
            value = getattr(self, name)
            if not (value is None and name == "num_threads") and (type(value) is not int or value < least):
                raise ConfigError(f"{name} is {value!r}, expected an integer of at least {least}")
