"""What an adapter's id, tensor names, shapes, dtypes and ranks must be; anything else is refused by a reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from cluster.adapters.base import BaseModel
from cluster.adapters.config import AdapterConfig
from cluster.adapters.layout import is_id
from cluster.adapters.listing import WEIGHTS_FILE, printable
from cluster.adapters.tensor_file import DTYPES, TensorPlace
from cluster.errors import AdapterRefused

MAX_RANK = 4096  # its square is allocated
_MAX_MESSAGE_SIZE = 600
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# What torch.compile, FSDP, activation checkpointing and DDP put into the names of what they wrap.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(r"^(module\.|base_model\.model\.)*")
_LORA = re.compile(r"\.lora_[AB](\.default)?\.weight$")
_DEFAULT = re.compile(r"\.lora_([AB])\.default\.weight")
# What else PEFT writes into the file, by the reason it is refused for; the first that matches counts.
_FOREIGN_TENSORS = (
    (re.compile(r"lora_magnitude_vector"), "dora", "a DoRA magnitude"),
    (
        re.compile(r"lora_embedding_|(embed_tokens|wte|wpe|word_embeddings|lm_head)\."),
        "embeddings",
        "a trained embedding or head",
    ),
    (re.compile(r"trainable_tokens"), "embeddings", "trained tokens"),
    (re.compile(r"lora_[AB]\.bias"), "lora-bias", "a bias of a LoRA factor"),
    (re.compile(r"\.bias$"), "bias", "a trained bias"),
    (
        re.compile(r"lora_[AB](\.[^.]+)?\.weight$"),
        "unknown-tensor",
        "a factor as the model holds it, not as PEFT's save_pretrained writes it",
    ),
    (re.compile(r"modules_to_save|\.weight$"), "modules-to-save", "a fully trained module"),
)  # fmt: skip


def check_id(adapter_id: str, base: BaseModel) -> None:
    """One or two plain segments, and never a name of the base: that would hide one behind the other."""
    if not is_id(adapter_id):
        raise AdapterRefused(
            adapter_id,
            "id",
            "an id is its folder's path under the collection, one or two segments of letters, digits, '_', '-' and "
            "'.', not beginning with '-' or '.'; rename or move the folder, or say by --id-pattern what names it",
        )
    if adapter_id in base.accepted_names:
        raise AdapterRefused(adapter_id, "id", "it has the base model's name; rename the folder")


class Refuse:
    def __init__(self, adapter_id: str) -> None:
        self.adapter_id = adapter_id

    def __call__(self, reason: str, message: str) -> AdapterRefused:
        # Names and numbers of the file stand in it, and the message goes into the manifest.
        if len(message) > _MAX_MESSAGE_SIZE:
            message = message[:_MAX_MESSAGE_SIZE] + "..."
        message = printable(message)
        return AdapterRefused(self.adapter_id, reason, message)


def plain_names(refuse: Refuse, names: Iterable[str], base: BaseModel) -> dict[str, str]:
    """Name in the file -> name that PEFT's save_pretrained would have written, where a module of the base leaves no
    doubt; other names stay as they are."""
    plain = {name: _plain_name(name, base) for name in names}
    if len(set(plain.values())) < len(plain):
        twice = next(name for name, count in Counter(plain.values()).items() if count > 1)
        written = sorted(name for name in plain if plain[name] == twice)
        raise refuse("unknown-tensor", f"tensors {written[0]!r} and {written[1]!r} are both {twice!r}")
    return plain


def _plain_name(name: str, base: BaseModel) -> str:
    if _is_of(name, base):
        return name
    inner = _OUTER.sub("", _DEFAULT.sub(r".lora_\1.weight", _WRAPPERS.sub("", name)))
    plain = f"base_model.model.{inner}"
    return plain if _is_of(plain, base) else name


def check_patterns(refuse: Refuse, names: Mapping[str, str], config: AdapterConfig) -> None:
    """PEFT matched the patterns with the names that the model had in training: with the wrapper's or, where it was
    wrapped later, without. They must mean the same."""
    for name, plain in names.items():
        if name != plain:
            written, module = (_LORA.sub("", n).removeprefix("base_model.model.") for n in (name, plain))
            if (config.scale(written), config.rank(written)) != (config.scale(module), config.rank(module)):
                raise refuse(
                    "pattern",
                    f"rank_pattern or alpha_pattern mean another thing for {written!r}, as the file has it, than for "
                    f"{module!r}; save the adapter from the model without its wrapper",
                )


def _is_of(name: str, base: BaseModel) -> bool:
    match = _TENSOR.fullmatch(name)
    return match is not None and match["module"] in base.modules


def paired_places(
    refuse: Refuse, places: dict[str, TensorPlace], config: AdapterConfig, base: BaseModel
) -> dict[str, tuple[TensorPlace, TensorPlace]]:
    """Module -> places of (A, B), after every check of names, shapes, dtypes and ranks."""
    found: dict[str, dict[str, TensorPlace]] = {}
    for name, place in places.items():
        match = _TENSOR.fullmatch(name)
        # lora_A / lora_B of an embedding table or head parse as well; the base has no such linear layer.
        if match is None or re.search(_FOREIGN_TENSORS[1][0], f"{match['module']}."):
            raise _foreign(refuse, name)
        found.setdefault(match["module"], {})[match["factor"]] = place
    if not found:
        raise refuse(
            "no-module",
            f"{WEIGHTS_FILE} holds no tensor; saved under DeepSpeed ZeRO-3, gather the parameters before saving",
        )
    for module in sorted(found):
        _check_module(refuse, module, found[module], config, base)
    # The base's modules that the config names but the file lacks: PEFT would train them, so they got lost.
    missing = [module for module in base.modules if module not in found and config.targets(module)]
    if missing and config.target_modules != "all-linear":
        raise refuse(
            "missing-module",
            f"its config targets {len(missing)} modules without tensors in the file, such as {missing[0]}",
        )
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(found.items())}


def _check_module(
    refuse: Refuse, module: str, pair: dict[str, TensorPlace], config: AdapterConfig, base: BaseModel
) -> None:
    if module not in base.modules:
        raise refuse("module", f"module {module} does not exist in the base {base.name}, or is no linear layer")
    if len(pair) == 1:
        raise refuse("partner", f"module {module} has lora_{next(iter(pair))} without its partner")
    for place in pair.values():
        if place.dtype not in DTYPES:
            raise refuse("dtype", f"module {module} is stored as {place.dtype}, expected one of {', '.join(DTYPES)}")
    if not config.targets(module):
        raise refuse("no-module", f"module {module} has tensors, but the config's target_modules do not match it")
    shape, rank = base.modules[module], config.rank(module)
    A, B = pair["A"].shape, pair["B"].shape
    if len(A) != 2 or len(B) != 2 or A[1] != shape.d_in or B[0] != shape.d_out or A[0] != B[1]:
        raise refuse(
            "shape",
            f"module {module} has A {list(A)} and B {list(B)}, "
            f"expected [r, {shape.d_in}] and [{shape.d_out}, r] of one rank r",
        )
    if A[0] > MAX_RANK:
        raise refuse("rank", f"module {module} has rank {A[0]}, at most {MAX_RANK} is accepted")
    if A[0] != rank:
        raise refuse("rank", f"module {module} has rank {A[0]} in its tensors, {rank} in its config")


def _foreign(refuse: Refuse, tensor: str) -> AdapterRefused:
    for pattern, reason, what in _FOREIGN_TENSORS:
        if pattern.search(tensor):
            return refuse(reason, f"tensor {tensor!r} is {what}; only LoRA factors of linear layers are supported")
    return refuse("unknown-tensor", f"tensor {tensor!r} is not one that PEFT's LoRA writes")


def tensor_name(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"
