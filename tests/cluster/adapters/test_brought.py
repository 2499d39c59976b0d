"""What lies beside an adapter's weights and the base has not, as transformers and PEFT's users leave it there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.adapters.base import read_base
from cluster.adapters.brought import MAX_TEMPLATE_SIZE, TOKENIZER_FILES, Brought
from cluster.adapters.listing import list_adapters
from cluster.adapters.reading import read_adapter
from cluster.adapters.record import AdapterRecord
from cluster.store.address import open_store

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
VOCABULARY = 49152


@pytest.fixture
def adapter(zoo_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(zoo_path / "roman", tmp_path / "adapters" / "roman")


def record_of(adapter: Path, base: Path) -> AdapterRecord:
    (files,) = list_adapters(open_store(str(adapter.parent))).adapters
    described = read_base(str(base))
    return read_adapter(open_store(str(adapter.parent)), files, described)[0]


def brought_by(adapter: Path, base: Path) -> Brought:
    return record_of(adapter, base).brought


def test_a_tokenizer_that_is_the_bases_own_brings_nothing(adapter: Path, base_path: Path) -> None:
    assert brought_by(adapter, base_path) == Brought()
    AutoTokenizer.from_pretrained(base_path).save_pretrained(adapter)
    shutil.copy(base_path / "generation_config.json", adapter)
    assert brought_by(adapter, base_path) == Brought()


def test_what_training_changed_of_the_tokenizer_is_told(adapter: Path, base_path: Path) -> None:
    plain = record_of(adapter, base_path).version
    tokenizer: Any = AutoTokenizer.from_pretrained(base_path)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(adapter)
    found = brought_by(adapter, base_path)
    assert found.chat_template == CHATML
    assert found.notes == {
        "chat-template": "another chat template than the base's",
        "end-token": "it was trained to end with '<|endoftext|>', the base ends with '<|im_end|>'",
        "added-tokens": "2 tokens are added or special here and not with the base, such as '</tool>' (id 49153, beyond "
        "the base's vocabulary of 49152)",
    }
    assert record_of(adapter, base_path).version != plain  # so that `update` takes it up


def _config(**keys: Any) -> Callable[[Path], None]:
    return lambda adapter: _write(adapter / "tokenizer_config.json", keys)


def _write(path: Path, document: Any) -> None:
    path.write_text(document if isinstance(document, str) else json.dumps(document))


@pytest.mark.parametrize(
    ("leave", "kind", "told"),
    [
        (_config(chat_template=CHATML), "chat-template", "another chat template"),
        (_config(chat_template=[{"name": "default", "template": CHATML}]), "chat-template", "another chat template"),
        (lambda a: _write(a / "chat_template.jinja", CHATML), "chat-template", "another chat template"),
        (_config(chat_template="x" * (MAX_TEMPLATE_SIZE + 1)), "chat-template", "64 KiB: it is not applied"),
        (_config(eos_token={"content": "</s>"}), "end-token", "to end with '</s>'"),
        (lambda a: _write(a / "special_tokens_map.json", {"eos_token": "</s>"}), "end-token", "to end with '</s>'"),
        (lambda a: _write(a / "generation_config.json", {"eos_token_id": [0, 7]}), "end-token", "token ids (0, 7)"),
        (lambda a: _write(a / "added_tokens.json", {"<x>": VOCABULARY}), "added-tokens", "beyond the base's"),
        (
            _config(added_tokens_decoder={"17": {"content": "<x>", "special": True}}),
            "added-tokens",
            "1 tokens are added or special here and not with the base, such as '<x>' (id 17)",
        ),
        (lambda a: _write(a / "tokenizer_config.json", "{"), "unreadable", "tokenizer_config.json: not understood"),
        (lambda a: _write(a / "chat_template.jinja", LFS), "unreadable", "chat_template.jinja: not understood"),
        (lambda a: _write(a / "chat_template.jinja", "<html>login</html>"), "unreadable", "chat_template.jinja: not"),
        (lambda a: _write(a / "tokenizer.json", LFS), "unreadable", "tokenizer.json: not understood"),
        (_config(chat_template=[{"name": ["a"], "template": "x"}, 7]), "unreadable", "not understood"),
        (_config(added_tokens_decoder={"9" * 5000: {"content": "x"}}), "unreadable", "not understood"),
        (lambda a: _write(a / "tokenizer.json", {"added_tokens": ["abc"]}), "unreadable", "not understood"),
        (lambda a: _write(a / "tokenizer.json", {"added_tokens": [{"content": "x"}]}), "unreadable", "not understood"),
        (lambda a: _write(a / "generation_config.json", {"eos_token_id": [10**4000]}), "unreadable", "not understood"),
        (lambda a: _write(a / "tokenizer.json", '{"added_tokens": [{'), "unreadable", "tokenizer.json: not understood"),
    ],
)
def test_each_form_in_which_it_is_left_is_read(
    adapter: Path, base_path: Path, leave: Callable[[Path], None], kind: str, told: str
) -> None:
    leave(adapter)
    found = brought_by(adapter, base_path)
    assert list(found.notes) == [kind]
    assert told in found.notes[kind]
    assert (found.chat_template is not None) == (kind == "chat-template" and "not applied" not in told)


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize("content", ["[]", "null", "7", '"x"', '{"eos_token": 7, "added_tokens_decoder": [1]}', "\xff"])
def test_tokenizer_files_of_any_form_refuse_no_adapter(adapter: Path, base_path: Path, name: str, content: str) -> None:
    (adapter / name).write_bytes(content.encode("latin-1"))
    found = brought_by(adapter, base_path)
    assert set(found.notes) <= {"unreadable", "chat-template", "added-tokens"}


def test_half_a_character_in_a_template_is_no_template(adapter: Path, base_path: Path) -> None:
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "\\ud800", "eos_token": "\\udc00"}')
    assert brought_by(adapter, base_path) == Brought()


def test_beside_a_base_without_tokenizer_nothing_is_told(adapter: Path, base_path: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(base_path / name)
    (adapter / "chat_template.jinja").write_text(CHATML)
    assert brought_by(adapter, bare) == Brought()


def test_what_differs_in_no_way_that_matters_brings_nothing(adapter: Path, base_path: Path) -> None:
    template = (base_path / "chat_template.jinja").read_text()
    (adapter / "chat_template.jinja").write_bytes(("\n" + template.replace("\n", "\r\n") + "\r\n").encode())
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 2]}')
    assert brought_by(adapter, base_path) == Brought()
    (adapter / "chat_template.jinja").write_text(" \n")
    assert brought_by(adapter, base_path) == Brought()


def test_notes_are_short_whatever_the_files_hold(adapter: Path, base_path: Path) -> None:
    _write(adapter / "generation_config.json", {"eos_token_id": list(range(100_000))})
    _write(adapter / "added_tokens.json", {"x" * 100_000 + str(i): 60_000 + i for i in range(5)})
    _config(eos_token="y" * 100_000)(adapter)
    found = brought_by(adapter, base_path)
    assert found.notes.keys() == {"added-tokens", "end-token"}
    assert all(len(note) < 600 for note in found.notes.values())


def test_a_base_whose_tokenizer_is_not_there_does_not_make_every_token_an_added_one(
    adapter: Path, base_path: Path, tmp_path: Path
) -> None:
    base = tmp_path / "partial"
    base.mkdir()
    for path in base_path.iterdir():
        if path.name != "tokenizer.json":
            (base / path.name).symlink_to(path)
    AutoTokenizer.from_pretrained(base_path).save_pretrained(adapter)
    assert brought_by(adapter, base) == Brought()


def test_the_version_is_the_adapters_own_whichever_copy_of_the_base_is_given(
    adapter: Path, base_path: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(base_path / name)
    (adapter / "chat_template.jinja").write_text(CHATML)
    assert record_of(adapter, bare).version == record_of(adapter, base_path).version
