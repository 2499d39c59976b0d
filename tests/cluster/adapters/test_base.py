"""The base model's name, fingerprint and linear layers, from folders that transformers itself saved."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cluster.adapters.base import read_base
from cluster.errors import BaseModelError
from cluster.layer import ModuleShape
from cluster.store.address import open_store

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}


def save_llama(folder: Path, *, shard_size: str = "1GB", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 2, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(saved, tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- Modules ------------------------------------------------------------------------------------------------


def test_modules_are_the_linear_layers_in_the_models_order(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "deep", num_hidden_layers=11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM.from_pretrained(folder)
    linear = {
        name: ModuleShape(module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert len(linear) == 77
    modules = read_base(str(folder)).modules
    assert modules == linear
    layers = [int(name.split(".")[2]) for name in modules]
    assert layers == sorted(layers)  # 2 before 10


@pytest.mark.parametrize("tied", [True, False])
def test_neither_embeddings_nor_a_head_are_modules(tmp_path: Path, saved: Path, tied: bool) -> None:
    save_llama(tmp_path / "one", tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_file(tmp_path / "one/model.safetensors")) is not tied
    base = read_base(str(tmp_path / "one"))
    assert base.modules == read_base(str(saved)).modules
    assert not [name for name in base.modules if "embed" in name or "head" in name or "norm" in name]


def test_a_base_with_transposed_projections_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"'gpt2' stores its projections transposed.*use a base whose"):
        read_base(str(tmp_path))


def test_sub_folders_and_adapters_are_not_the_base(folder: Path) -> None:
    before = read_base(str(folder))
    (folder / "original").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "original/consolidated.safetensors")
    save_file({"extra.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    assert read_base(str(folder)) == before
    assert before.size_bytes == (folder / "model.safetensors").stat().st_size


# --- Name ---------------------------------------------------------------------------------------------------


def test_the_folders_name_is_the_last_resort(folder: Path) -> None:
    assert read_base(str(folder)).name == "tiny"
    assert read_base(f"{folder}/").name == "tiny"


def test_a_recorded_hub_name_comes_before_the_folders(folder: Path) -> None:
    edit_config(folder, _name_or_path="org/recorded")
    assert read_base(str(folder)).name == "org/recorded"
    for path in ("/home/somebody/model", "./model", "../model", "", None, 5):
        edit_config(folder, _name_or_path=path)
        assert read_base(str(folder)).name == "tiny"


def test_a_hub_cache_names_its_model(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/12ab34cd"
    snapshot.mkdir(parents=True)
    for item in folder.iterdir():
        (snapshot / item.name).symlink_to(item)  # as the hub's cache does
    assert read_base(str(snapshot)).name == "HuggingFaceTB/SmolLM2-135M"


def test_a_given_name_comes_first_and_others_are_accepted_besides(folder: Path) -> None:
    edit_config(folder, _name_or_path="org/recorded")
    base = read_base(str(folder), name="org/given", accept=["org/mirror", "local"])
    assert base.name == "org/given"
    assert base.accepted_names == {"org/given", "org/mirror", "local"}


# --- Fingerprint --------------------------------------------------------------------------------------------


def test_resharding_does_not_change_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    save_llama(tmp_path / "sharded", shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one, many = read_base(str(folder)), read_base(str(tmp_path / "sharded"))
    assert one.fingerprint == many.fingerprint
    assert one.modules == many.modules


def test_who_saved_it_does_not_change_the_fingerprint(folder: Path) -> None:
    before = read_base(str(folder)).fingerprint
    edit_config(folder, transformers_version="9.9", _name_or_path="org/elsewhere", use_cache=False, architectures=None)
    text = json.dumps(json.loads((folder / "config.json").read_text()), indent=7, sort_keys=True)
    (folder / "config.json").write_text(text)
    assert read_base(str(folder)).fingerprint == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit_config(folder, rms_norm_eps=1e-5),
        lambda folder: edit_config(folder, new_key=None),
        lambda folder: edit_config(folder, rope_parameters={"rope_theta": 50000.0, "rope_type": "default"}),
        lambda folder: save_llama(folder, dtype=torch.bfloat16),
        lambda folder: save_llama(folder, intermediate_size=40),
        lambda folder: save_llama(folder, tie_word_embeddings=True),
        lambda folder: save_llama(folder, num_hidden_layers=1),
        lambda folder: save_file(
            load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(33)},
            folder / "model.safetensors",
        ),
    ],
)
def test_another_config_or_shape_changes_the_fingerprint(folder: Path, change: Callable[[Path], object]) -> None:
    before = read_base(str(folder)).fingerprint
    change(folder)
    after = read_base(str(folder)).fingerprint
    assert after.startswith("sha256:")
    assert after != before


# --- What is no base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json there"),
        (lambda folder: shutil.rmtree(folder), "no config.json there"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file there"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "0 bytes are too few"),
        (lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**12)), "claims 1000000000000"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
            "the file is cut short; download it again",
        ),
        (
            lambda folder: save_file({"norm.weight": torch.ones(2)}, folder / "model.safetensors"),
            "no linear layer in its safetensors files",
        ),
    ],
)
def test_a_folder_that_is_no_base_is_refused_by_name(folder: Path, damage: Callable[[Path], object], seen: str) -> None:
    damage(folder)
    with pytest.raises(BaseModelError) as caught:
        read_base(str(folder))
    assert seen in str(caught.value)
    assert f"base model {folder}" in str(caught.value)


def test_infinity_in_a_config_is_read_as_transformers_writes_it(folder: Path) -> None:
    before = read_base(str(folder)).fingerprint
    edit_config(folder, time_step_limit=[0.0, float("inf")])  # Mamba2's default
    assert "Infinity" in (folder / "config.json").read_text()
    assert read_base(str(folder)).fingerprint != before


def test_a_base_in_s3_is_read_by_its_headers_alone(folder: Path, s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/bases/tiny")
    for item in folder.iterdir():
        store.write(item.name, item.read_bytes())
    assert read_base(f"{s3_bucket}/bases/tiny") == read_base(str(folder))


def test_the_real_base_has_its_seven_layers_times_thirty(base_path: Path) -> None:
    base = read_base(str(base_path))
    assert len(base.modules) == 7 * 30
    assert base.modules["model.layers.29.self_attn.k_proj"] == ModuleShape(192, 576)


# --- The folder as it was downloaded ------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "sharded", shard_size="20KB")


def test_a_missing_shard_is_the_bases_fault(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BaseModelError, match=f"1 of the .* files that .* names are not there, such as '{shard.name}'"):
        read_base(str(sharded))


def test_a_shard_that_lacks_what_the_index_promises_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    lost = sorted(load_file(shard))[0]
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != lost}, shard)
    with pytest.raises(BaseModelError, match=f"{shard.name}: it lacks 1 tensors .* such as '{lost}'"):
        read_base(str(sharded))


@pytest.mark.parametrize("index", [b"{}", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": ["b"]}}', b"\xff"])
def test_an_index_that_is_none_is_named(sharded: Path, index: bytes) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(BaseModelError, match=r"model\.safetensors\.index\.json"):
        read_base(str(sharded))


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_second_copy_of_the_weights_in_another_layout_does_not_count(tmp_path: Path, shard_size: str) -> None:
    folder = save_llama(tmp_path / "model", shard_size=shard_size, tie_word_embeddings=False)
    before = read_base(str(folder))
    save_file({"layers.0.attention.wq.weight": torch.zeros(32, 32)}, folder / "consolidated.safetensors")
    assert read_base(str(folder)) == before


def test_an_index_may_name_a_tied_head_that_is_not_stored(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tied", shard_size="20KB", tie_word_embeddings=True)
    before, index = read_base(str(folder)), folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))
    assert read_base(str(folder)) == before


def test_an_index_may_name_files_in_a_folder(sharded: Path) -> None:
    before, index = read_base(str(sharded)), sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (sharded / "weights").mkdir()
    for shard in set(content["weight_map"].values()):
        (sharded / shard).rename(sharded / "weights" / shard)
    content["weight_map"] = {tensor: f"weights/{shard}" for tensor, shard in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    assert read_base(str(sharded)) == before


def test_pointers_in_place_of_files_are_called_what_they_are(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(pointer)
        with pytest.raises(BaseModelError, match=f"{name}.* is a Git LFS pointer.*git lfs pull"):
            read_base(str(folder))
