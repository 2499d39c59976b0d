"""``adapter_config.json`` at the border: an allow-list over every key that PEFT writes.

A key is supported, or without effect on what the adapter computes, or at its neutral value. An unknown key at an empty
value asks for nothing. Anything else is refused by key and value, for a key that is ignored is an adapter that silently
answers wrong.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

from cluster.adapters.mistaken import mistaken_for
from cluster.errors import AdapterRefused

# Patterns come from outside; one that backtracks for ever must not hold the job. For all of an adapter's together.
_PATTERNS_TIMEOUT_S = 10.0
# Characters times counted repeats, which the regex library unrolls: ((a{1000}){1000}){1000} would fill the memory.
_MAX_PATTERN_SIZE = 100_000

_SUPPORTED = {
    "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip

# What they hold says how the adapter came about, or belongs to a feature whose own switch stands below.
_WITHOUT_EFFECT = {
    "peft_version", "inference_mode", "lora_dropout", "auto_mapping", "megatron_core", "qalora_group_size",
    "runtime_config", "merge_weights", "eva_config",
}  # fmt: skip

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    # Of PEFT's initialisations, those that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
    # change its weights, so their adapters may stand on a base that nobody else has.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "loftq_config": (None, {}),
    "corda_config": (None, {}),
    "lora_ga_config": (None, {}),
    "velora_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "arrow_config": (None, {}),
    "megatron_config": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "ensure_weight_tying": (False, None),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "enable_lora": (None,),
}


@dataclass(frozen=True)
class AdapterConfig:
    """The supported part of a config. Rank and scale are by module, as PEFT resolves them. ``base_name`` is "" where
    the config names none."""

    adapter_id: str
    base_name: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    patterns: _Patterns = field(repr=False, compare=False)

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(self._pattern_key(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        alpha = self.alpha_pattern.get(self._pattern_key(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put this adapter on ``module``."""
        if self._listed(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return True
        if not self._listed(self.target_modules, module):
            return False
        # PEFT looks at the layer only where a name in a list matched the end of the module's.
        if not self.layers_to_transform or isinstance(self.target_modules, str) or module in self.target_modules:
            return True
        return self._layer(module) in self.layers_to_transform

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if found := self.patterns.match(pattern, module):
                return None if found["idx"] is None else int(found["idx"])
        return None

    def _listed(self, names: str | tuple[str, ...], module: str) -> bool:
        if isinstance(names, str):
            return bool(names) and self.patterns.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _pattern_key(self, patterns: Mapping[str, Any], module: str) -> str:
        return next((key for key in patterns if self.patterns.match(rf"(.*\.)?({key})$", module)), module)


class _Patterns:
    """An adapter's patterns, each compiled once, all of them within one allowance of time."""

    def __init__(self, adapter_id: str) -> None:
        self.adapter_id = adapter_id
        self._compiled: dict[str, Any] = {}
        self._left_s = _PATTERNS_TIMEOUT_S

    def match(self, pattern: str, module: str) -> Any:
        return self._timed(pattern, module, "match")

    def fullmatch(self, pattern: str, module: str) -> Any:
        return self._timed(pattern, module, "fullmatch")

    def _timed(self, pattern: str, module: str, method: str) -> Any:
        start_s = time.thread_time()
        try:
            if self._left_s <= 0:
                raise TimeoutError(f"the patterns together take more than {_PATTERNS_TIMEOUT_S} s")
            if pattern not in self._compiled:
                self._compiled[pattern] = _compile(pattern)
            found = getattr(self._compiled[pattern], method)(module, timeout=self._left_s)
        except (re.error, regex.error, TimeoutError, RecursionError, ValueError, OverflowError, MemoryError) as error:
            raise AdapterRefused(
                self.adapter_id,
                "pattern",
                f"pattern {_shorten(pattern)} of adapter_config.json cannot be used: {error!r}; list the names instead",
            ) from None
        self._left_s -= time.thread_time() - start_s
        return found


def _compile(pattern: str) -> Any:
    counts = (max(int(count), 1) for count in re.findall(r"[{,](\d+)", pattern))
    if len(pattern) > _MAX_PATTERN_SIZE or len(pattern) * math.prod(counts) > _MAX_PATTERN_SIZE:
        raise ValueError(f"its length times its counted repeats is above {_MAX_PATTERN_SIZE}")
    # `re` is what PEFT uses: what it refuses (recursion, \\p{...}) or takes literally must mean nothing else here.
    re.compile(pattern)
    if re.search(r"\{(?!,?\d)", pattern):
        raise ValueError("a brace that is no counted repeat")
    return regex.compile(pattern)


def parse_adapter_config(adapter_id: str, data: bytes) -> AdapterConfig:
    """Raises AdapterRefused, naming key and value, unless every key is understood."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        what = mistaken_for(data) or "not JSON; upload it again"
        raise AdapterRefused(adapter_id, "config", f"adapter_config.json is {what}") from None
    if not isinstance(config, dict):
        raise AdapterRefused(adapter_id, "config", "adapter_config.json is not a JSON object")
    for key, value in config.items():
        _check_key(adapter_id, key, value)
    if "peft_type" not in config:
        raise AdapterRefused(adapter_id, "config", "adapter_config.json has no peft_type; expected 'LORA'")
    return _Reader(adapter_id, config).read()


def _check_key(adapter_id: str, key: str, value: Any) -> None:
    if key in _SUPPORTED or key in _WITHOUT_EFFECT:
        return
    if key not in _NEUTRAL:
        if not value:  # null, false, 0, "", [], {}: a newer PEFT's feature, not used
            return
        raise AdapterRefused(
            adapter_id, "unknown-key", f"adapter_config.json has the unknown key {_shorten(key)} = {_shorten(value)}"
        )
    # `in` would take 0 for False and 1 for True.
    if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[key]):
        raise AdapterRefused(
            adapter_id,
            key.removeprefix("use_").replace("_", "-"),
            f"{key} = {_shorten(value)} is not supported; expected {' or '.join(map(repr, _NEUTRAL[key]))}",
        )


class _Reader:
    def __init__(self, adapter_id: str, config: dict[str, Any]) -> None:
        self.adapter_id, self.config = adapter_id, config

    def read(self) -> AdapterConfig:
        rank_pattern = self.config.get("rank_pattern") or {}
        alpha_pattern = self.config.get("alpha_pattern") or {}
        self.need(isinstance(rank_pattern, dict) and all(map(_is_rank, rank_pattern.values())), "rank_pattern")
        self.need(isinstance(alpha_pattern, dict) and all(map(_is_alpha, alpha_pattern.values())), "alpha_pattern")
        r, alpha = self.config.get("r", 8), self.config.get("lora_alpha", 8)
        self.need(_is_rank(r), "r")
        self.need(_is_alpha(alpha), "lora_alpha")
        rslora = self.config.get("use_rslora", False)
        self.need(isinstance(rslora, bool), "use_rslora")
        base_name = self.config.get("base_model_name_or_path")
        self.need(base_name is None or isinstance(base_name, str), "base_model_name_or_path")
        revision = self.config.get("revision")
        self.need(revision is None or isinstance(revision, str), "revision")
        layers = self.config.get("layers_to_transform")
        layers = [layers] if type(layers) is int else layers or []
        self.need(isinstance(layers, list) and all(type(layer) is int for layer in layers), "layers_to_transform")
        layers_pattern = self.config.get("layers_pattern") or ()
        target_modules = self.names("target_modules")
        self.need(bool(target_modules), "target_modules")
        return AdapterConfig(
            adapter_id=self.adapter_id,
            # A base at another revision is another base, unless it is accepted by that very name.
            base_name=(base_name or "") + ("" if revision in (None, "", "main") else f"@{revision}"),
            r=r,
            lora_alpha=float(alpha),
            use_rslora=rslora,
            rank_pattern=rank_pattern,
            alpha_pattern={key: float(value) for key, value in alpha_pattern.items()},
            target_modules=target_modules,
            exclude_modules=self.names("exclude_modules"),
            layers_to_transform=tuple(layers),
            layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else self.names("layers_pattern"),  # type: ignore[arg-type]
            patterns=_Patterns(self.adapter_id),
        )

    def names(self, key: str) -> str | tuple[str, ...]:
        value = self.config.get(key) or ()
        if isinstance(value, str):
            return value
        self.need(isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value), key)
        return tuple(value)

    def need(self, condition: bool, key: str) -> None:
        if not condition:
            raise AdapterRefused(
                self.adapter_id,
                "config",
                f"{key} = {_shorten(self.config.get(key))} in adapter_config.json is not valid",
            )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    # Not isfinite: an int may be too large for a float.
    return type(value) in (int, float) and 0 < abs(value) <= sys.float_info.max


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
