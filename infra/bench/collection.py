"""Make a large collection of LoRA adapters with known structure, and a base model that exists by its headers only.

    python -m infra.bench.collection build/thousand --adapters 1000 --layers 4

writes ``build/thousand/base`` and ``build/thousand/adapters/adapter-0000`` ...: PEFT folders in bfloat16, ready for

    python -m compress_jobs run --adapters build/thousand/adapters --base build/thousand/base --out build/bundle

Trained adapters are not independent: public collections reuse an init, tasks come in families, and all of them teach
the same base to answer. So each row of A and each left singular direction of M = B A is a mix of three, by energy:

    common  from a few directions that all adapters draw from          20%   --common
    family  from a few that the adapters of its family draw from       20%   --family
    own     the rest, Gaussian

On the input side these are the shares of what A has moved (--moved, 20% of its energy); the rest is A's init, one and
the same for a share of the adapters (--shared-init). Squared singular values fall as j^-p, j = 1 .. rank:

    lightly trained  p = 2.8, fitted to the 40-step adapters of infra/zoo: energy shares of their rank-16 q_proj
                     0.80 0.096 0.038 0.020 ..., of the power law 0.81 0.116 0.037 0.017 ...
    long-trained     p = 2.0. None are at hand: chosen, with the shares above, so that JD-Full's error on a hundred of
                     them in one cluster comes out where it is published for real rank-16 adapters of Mistral-7B:
                          r = 16, 32, 64  here               published
                          distinct inits  0.890 0.779 0.576  0.85-0.90, 0.72-0.81, 0.50-0.65
                          one init        0.837 0.709 0.515  0.64-0.86, 0.44-0.75, 0.25-0.59

The shares agree with the zoo too (common and family from the overlap of leading directions within and across families;
two adapters of one init have A's with a cosine of 0.69 to 0.89 there, 0.8 here).
What this lacks: real adapters differ in rank, in modules and in how strongly each layer changes, and their structure is
not the same at every module. A figure on such a collection states the choices it was made with: they are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.errors import ConfigError

NAME = "generated/base"
LIGHT_EXPONENT, LONG_EXPONENT, EXPONENT_SPREAD = 2.8, 2.0, 0.15
_NORM_SPREAD = 0.5  # of the logarithm of an adapter's norm


def _choice(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _need(condition: bool, name: str, seen: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"--{name.replace('_', '-')} is {seen}; expected {expected}")


@dataclass(frozen=True)
class Collection:
    """The choices that make a collection. The shapes are Mistral-7B's q, k and v. An adapter depends on the seed and
    its own index only: a smaller collection is the beginning of a larger one. Raises ConfigError."""

    adapters: int = _choice(64, "number of adapters")
    layers: int = _choice(32, "layers of the base")
    hidden: int = _choice(4096, "hidden size: d_in of q, k, v and d_out of q")
    kv_width: int = _choice(1024, "d_out of k and v")
    rank: int = _choice(16, "rank of every adapter")
    shared_init: float = _choice(
        0.38, "share of the adapters with one common init of A (0.38 in a count of public ones)"
    )
    families: int = _choice(20, "number of families")
    common: float = _choice(0.2, "share of energy in directions common to all")
    family: float = _choice(0.2, "share of energy in the family's directions")
    moved: float = _choice(0.2, "share of A's energy that has left its init")
    light: float = _choice(0.0, "share of lightly trained adapters, the others being long-trained")
    seed: int = _choice(0, "seed")

    def __post_init__(self) -> None:
        for name in ("adapters", "layers", "hidden", "kv_width", "rank", "families"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _need(self.rank <= min(self.hidden, self.kv_width), "rank", self.rank, "at most the hidden size and --kv-width")
        for name in ("shared_init", "common", "family", "moved", "light"):
            _need(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share, 0 to 1")
        _need(self.common + self.family <= 1, "family", self.family, f"at most 1 - --common ({1 - self.common:g})")

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Module -> (d_out, d_in)."""
        widths = {"q_proj": self.hidden, "k_proj": self.kv_width, "v_proj": self.kv_width}
        return {
            f"model.layers.{layer}.self_attn.{kind}": (width, self.hidden)
            for layer in range(self.layers)
            for kind, width in widths.items()
        }


@dataclass(frozen=True)
class Traits:
    """What is decided for an adapter as a whole. Squared singular values fall as j^-exponent."""

    family: int
    shares_init: bool
    is_light: bool
    exponent: float
    norm: float


def traits(spec: Collection, index: int) -> Traits:
    generator = _generator(spec.seed, "traits", index)
    family, init, light = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    exponent, norm = torch.randn(2, generator=generator, dtype=torch.float64).tolist()
    typical = LIGHT_EXPONENT if light < spec.light else LONG_EXPONENT
    return Traits(
        family=int(family * spec.families),
        shares_init=init < spec.shared_init,
        is_light=light < spec.light,
        exponent=typical * math.exp(EXPONENT_SPREAD * exponent),
        norm=math.exp(_NORM_SPREAD * norm),
    )


def spectrum(rank: int, exponent: float) -> Tensor:
    """Singular values (rank,), float64: squares j^-exponent, of sum 1."""
    energies = torch.arange(1, rank + 1, dtype=torch.float64) ** -exponent
    return (energies / energies.sum()).sqrt()


def factors(spec: Collection, index: int, module: str) -> tuple[Tensor, Tensor]:
    """(A (rank, d_in), B (d_out, rank)), float32: M = B A has exactly the adapter's norm and spectrum.

    A has the size of PEFT's init (uniform, variance 1 / (3 d_in)), as B alone starts from zero.
    """
    own = traits(spec, index)
    d_out, d_in = spec.modules[module]
    generator = _generator(spec.seed, module, index)
    one_init = _directions(spec.seed, f"{module}/init", spec.rank, d_in)
    init = one_init if own.shares_init else _gaussian(spec.rank, d_in, generator)
    learnt = _learnt(spec, own.family, f"{module}/in", d_in, generator)
    A = (math.sqrt(1 - spec.moved) * init + math.sqrt(spec.moved) * learnt) / math.sqrt(3)
    left = torch.linalg.qr(_learnt(spec, own.family, f"{module}/out", d_out, generator).T.double()).Q
    # B = left diag(s) Q^T L^-1 with A A^T = L L^T and a random rotation Q: the rows of L^-1 A are orthonormal.
    L = torch.linalg.cholesky(A.double() @ A.double().T)
    rotation = torch.linalg.qr(torch.randn(spec.rank, spec.rank, generator=generator, dtype=torch.float64)).Q
    B = left * spectrum(spec.rank, own.exponent) * own.norm
    return A, torch.linalg.solve_triangular(L, B @ rotation.T, upper=False, left=False).float().contiguous()


def _learnt(spec: Collection, family: int, side: str, d: int, generator: torch.Generator) -> Tensor:
    """(rank, d) rows of norm near 1: the stated shares of common, family and own energy."""
    mixed = math.sqrt(1 - spec.common - spec.family) * _gaussian(spec.rank, d, generator)
    for share, owner in ((spec.common, "common"), (spec.family, f"family-{family}")):
        # Twice the rank: directions enough that two adapters rarely draw the same mix.
        shared = _directions(spec.seed, f"{side}/{owner}", 2 * spec.rank, d)
        weights = torch.randn(spec.rank, 2 * spec.rank, generator=generator) / math.sqrt(2 * spec.rank)
        mixed += math.sqrt(share) * (weights @ shared)
    return mixed


@lru_cache(maxsize=1024)
def _directions(seed: int, name: str, count: int, d: int) -> Tensor:
    return _gaussian(count, d, _generator(seed, name))


def _gaussian(count: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, d, generator=generator) / math.sqrt(d)


def _generator(*names: object) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def write_adapters(spec: Collection, folder: Path) -> None:
    """PEFT folders ``adapter-0000`` ...; scale 1."""
    config = {
        "peft_type": "LORA", "base_model_name_or_path": NAME, "r": spec.rank, "lora_alpha": spec.rank,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    }  # fmt: skip
    for index in range(spec.adapters):
        tensors = {}
        for module in spec.modules:
            for letter, factor in zip("AB", factors(spec, index, module), strict=True):
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor.to(torch.bfloat16)
        target = folder / f"adapter-{index:04}"
        target.mkdir(parents=True)
        save_file(tensors, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(config) + "\n")


def write_base(spec: Collection, folder: Path) -> None:
    """config.json and a safetensors file of the right length whose weights are a hole: all zeros, no disk."""
    folder.mkdir(parents=True)
    header: dict[str, object] = {}
    end = 0
    for module, shape in spec.modules.items():
        start, end = end, end + 2 * math.prod(shape)
        header[f"{module}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {"model_type": "llama", "_name_or_path": NAME, "hidden_size": spec.hidden}
    (folder / "config.json").write_text(json.dumps(config) + "\n")


def write(spec: Collection, folder: Path) -> None:
    """``folder``/base and ``folder``/adapters. Raises ConfigError when ``folder`` exists."""
    if folder.exists():
        raise ConfigError(f"{folder} exists; give a new folder, or remove it")
    write_base(spec, folder / "base")
    write_adapters(spec, folder / "adapters")


def parse_arguments() -> tuple[Path, Collection]:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.collection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="new folder to write")
    for spec in dataclasses.fields(Collection):
        parser.add_argument(
            "--" + spec.name.replace("_", "-"), type=type(spec.default), default=spec.default, metavar="X",
            help=f"{spec.metadata['help']} (default: {spec.default})",
        )  # fmt: skip
    values = vars(parser.parse_args())
    return values.pop("folder"), Collection(**values)


def main() -> None:
    # Two threads on matrices this small only wait for each other; and one thread gives the same bits everywhere.
    torch.set_num_threads(1)
    try:
        folder, spec = parse_arguments()
        started = time.perf_counter()
        write(spec, folder)
    except ConfigError as error:
        sys.exit(f"collection: {error}")
    size = sum(file.stat().st_size for file in (folder / "adapters").rglob("*.safetensors"))
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({**asdict(spec), "adapters_bytes": size, "seconds": seconds}))


if __name__ == "__main__":
    main()
