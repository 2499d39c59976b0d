"""A collection that holds every shape in which people have adapters, the sound and the unsound.

python -m tests.support.every_case FOLDER      # FOLDER/adapters and FOLDER/base, and how each ends
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infra.bench.collection import Collection, write
from tests.support.jobs import rewrite

SERVED = "served"
LEFT_OUT = "left out"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
XML = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
Change = Callable[[Path], None]


@dataclass
class EveryCase:
    """``ends``: id, or folder where there is no id -> SERVED, LEFT_OUT, or the reason it is refused for.
    ``brought``: id -> kinds of what it brought along."""

    adapters: Path
    base: Path
    ends: dict[str, str] = field(default_factory=dict)
    brought: dict[str, set[str]] = field(default_factory=dict)


def make(generated: Path, root: Path) -> EveryCase:
    """From ``base`` and ``adapters``/a0 to a11 of ``generated``."""
    made = EveryCase(root / "adapters", root / "base")
    shutil.copytree(generated / "base", made.base)
    tokenizer = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    (made.base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (made.base / "added_tokens.json").write_text('{"</s>": 2}')
    sources = sorted((generated / "adapters").iterdir())

    def add(folder: str, end: str, change: Change | None = None) -> None:
        target = made.adapters / folder
        shutil.copytree(sources[len(made.ends) % len(sources)], target)
        made.ends[folder] = end
        if change is not None:
            change(target)

    add("plain", SERVED)
    add("tenant-a/plain", SERVED)
    for folder in ("plain/checkpoint-20", "plain/best", "tenant-a/plain/checkpoint-500"):
        add(folder, LEFT_OUT)
    for name, change in _SOUND.items():
        add(f"sound-{name}", SERVED, change)
    for name, (kind, change) in _BROUGHT.items():
        add(f"brought-{name}", SERVED, change)
        made.brought[f"brought-{name}"] = {kind}
    for name, (reason, change) in _UNSOUND.items():
        add(f"unsound-{name}", reason, change)
    for number in range(5):
        add(f"team-b/other-base-{number}", "base", _other_base(f"/scratch/run-{number}/model"))
    add("hub/models--org--deep/snapshots/0f3c", "id")
    return made


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def rewritten(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return rewritten


def _renamed(rename: Callable[[str], str]) -> Change:
    return _tensors(lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def _config(**changes: object) -> Change:
    return lambda folder: rewrite(folder, **changes)


def _other_base(name: str | None) -> Change:
    return _config(base_model_name_or_path=name)


def _file(name: str, data: bytes) -> Change:
    def written(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return written


def _json(name: str, document: object) -> Change:
    return _file(name, json.dumps(document).encode())


def _instead(*names: str) -> Change:
    """Other files in place of the weights."""

    def replaced(folder: Path) -> None:
        weights = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).unlink()
        for name in names:
            (folder / name).write_bytes(weights)

    return replaced


def _pickled() -> bytes:
    data = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, data)
    return data.getvalue()


def _zipped(names: tuple[str, ...]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 100)
    return data.getvalue()


_OUTER = "base_model.model."
_SOUND: dict[str, Change] = {
    "default": _renamed(lambda name: name.replace(".weight", ".default.weight")),
    "compiled": _renamed(lambda name: name.replace(_OUTER, f"{_OUTER}_orig_mod.")),
    "fsdp": _renamed(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
    "ddp": _renamed(lambda name: f"module.{name}"),
    "no-prefix": _renamed(lambda name: name.removeprefix(_OUTER)),
    "unknown-null": _config(a_key_of_tomorrow=None),
    "unknown-false": _config(another=False, a_list=[], a_text="", an_object={}, a_number=0),
}
_BROUGHT: dict[str, tuple[str, Change]] = {
    "template": ("chat-template", _file("chat_template.jinja", TEMPLATE.encode())),
    "end": ("end-token", _json("tokenizer_config.json", {"eos_token": "<|im_end|>"})),
    "tokens": ("added-tokens", _json("added_tokens.json", {"<tool>": 10**6})),
}
_UNSOUND: dict[str, tuple[str, Change]] = {
    "unknown-key": ("unknown-key", _config(a_key_of_tomorrow=7)),
    "wrapped-otherwise": ("unknown-tensor", _renamed(lambda name: name.replace("model.layers", "trunk.stages") + ".x")),
    "lfs": ("corrupt", _file(WEIGHTS, LFS)),
    "lfs-config": ("config", _file(CONFIG, LFS)),
    "html": ("corrupt", _file(WEIGHTS, HTML)),
    "xml": ("corrupt", _file(WEIGHTS, XML)),
    "zip": ("corrupt", _file(WEIGHTS, _zipped(("adapter_model.safetensors",)))),
    "gzip": ("corrupt", _file(WEIGHTS, gzip.compress(b"x" * 1000))),
    "pickle": ("pickle", _file(WEIGHTS, _pickled())),
    "bin": ("pickle", _instead("adapter_model.bin")),
    "shards": (
        "no-weights",
        _instead("adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"),
    ),
    "mlx": ("no-weights", _instead("adapters.safetensors")),
    "zero-3": ("no-module", _tensors(lambda tensors: {})),
    "null-base": ("base", _other_base(None)),
    "empty-base": ("base", _other_base("")),
}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        collection = Path(folder) / "made"
        write(Collection(adapters=12, layers=1, hidden=32, kv_width=16, rank=2), collection)
        every = make(collection, Path(sys.argv[1]))
    print(json.dumps(every.ends, indent=1))
