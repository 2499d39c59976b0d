"""The linear layers of a model, each adding the deltas of the homes that are resident.

Hooked onto the model's own ``nn.Linear`` modules: the base's weights and the way through the model stay
what they are, and rows of the base model get exactly the base's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cluster.bundle.serving_map import home_of
from cluster.errors import BundleError
from cluster.layer import ModuleWeights, TokenGroup, add_compressed_delta


class AdaptedLinears:
    """All linear layers of ``model``. ``groups`` says whose the tokens of the next forward pass are.

    ``add`` and ``remove`` must not run beside a forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups: Sequence[TokenGroup] = ()
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._weights: dict[str, dict[str, ModuleWeights]] = {}  # module -> home -> weights

    def prepare(
        self,
        home: str,
        weights: Mapping[str, ModuleWeights],
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, ModuleWeights]:
        """The same weights on the model's device; what of a cluster's basis is there already, by another revision's
        ``home``, is not there twice. Raises BundleError when they do not fit the model, or have fewer than the
        ``num_slots`` slots that the serving map speaks of."""
        for name, module_weights in weights.items():
            self._check(home_of(home), name, module_weights, num_slots)
        return {name: self._shared(home, name, own.to(device, dtype)) for name, own in weights.items()}

    def add(self, home: str, weights: Mapping[str, ModuleWeights]) -> None:
        self.remove(home)
        for name, module_weights in weights.items():
            if name not in self._weights:
                self._weights[name] = {}
                self._linears[name].register_forward_hook(self._hook(self._weights[name]))
            self._weights[name][home] = module_weights

    def remove(self, home: str) -> None:
        for by_home in self._weights.values():
            by_home.pop(home, None)

    def _shared(self, home: str, name: str, weights: ModuleWeights) -> ModuleWeights:
        for other, own in list(self._weights.get(name, {}).items()):
            of_a_basis = weights.cores is not None and home_of(other) == home_of(home)
            if of_a_basis and torch.equal(own.U, weights.U) and torch.equal(own.V, weights.V):
                return replace(weights, U=own.U, V=own.V)
        return weights

    def _hook(self, by_home: Mapping[str, ModuleWeights]) -> Any:
        def add_deltas(linear: nn.Linear, inputs: tuple[Tensor], out: Tensor) -> None:
            x = inputs[0].reshape(-1, linear.in_features)
            add_compressed_delta(out.view(-1, linear.out_features), x, self.groups, by_home)

        return add_deltas

    def _check(self, home: str, name: str, weights: ModuleWeights, num_slots: int) -> None:
        linear = self._linears.get(name)
        if linear is None:
            raise BundleError(
                f"home {home!r} changes module {name!r}, which is no linear layer of the base model loaded here; "
                "serve the bundle on the base it was made for"
            )
        weights.check(home, name, linear.in_features, linear.out_features)
        if weights.num_slots < num_slots:
            raise BundleError(
                f"home {home!r}: {weights.num_slots} slots at module {name!r}, the serving map has {num_slots}"
            )
