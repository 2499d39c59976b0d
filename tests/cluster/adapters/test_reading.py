"""Adapters that PEFT itself saved: what is refused, and that what is accepted is read as PEFT applies it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import BdLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import EvaConfig, KasaConfig, VeloraConfig
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.adapters.base import BaseModel, read_base
from cluster.adapters.checks import check_id
from cluster.adapters.factors import Factors, factored_energy
from cluster.adapters.listing import list_adapters
from cluster.adapters.reading import MAX_WEIGHTS_BYTES, read_adapter, read_modules
from cluster.adapters.record import AdapterFiles, AdapterRecord
from cluster.errors import AdapterChanged, AdapterRefused
from cluster.hashing import hash_tensors
from cluster.store.address import open_store
from cluster.store.local import LocalStore
from tests.support.paths import REPOSITORY

NAME = "org/tiny"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


def make_model(**changes: Any) -> LlamaForCausalLM:
    """Two layers of Llama, d = 32, untied head."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **changes}))
    model.name_or_path = NAME
    return model


def save_adapter(folder: Path, config: Any) -> PeftModel:
    """An adapter of random weights as PEFT saves it into ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on unusual configs
        model = get_peft_model(make_model(), config)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    return read_base(str(folder), name=NAME)


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_adapter(folder, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    return folder


@pytest.fixture
def good(tmp_path: Path, good_folder: Path) -> Path:
    """A collection's folder with the one adapter ``one``, to be damaged."""
    shutil.copytree(good_folder, tmp_path / "one")
    return tmp_path / "one"


def read_only_one(collection: Path, base: BaseModel) -> tuple[AdapterRecord, dict[str, Factors]]:
    store = open_store(str(collection))
    (files,) = list_adapters(store).adapters
    return read_adapter(store, files, base)


def refusal(collection: Path, base: BaseModel) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        read_only_one(collection, base)
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


# --- What PEFT saves and we refuse --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason", "seen", "expected"),
    [
        ({"use_dora": True}, "dora", "use_dora = True", "expected False"),
        ({"bias": "all"}, "bias", "bias = 'all'", "expected 'none'"),
        ({"bias": "lora_only"}, "bias", "bias = 'lora_only'", "expected 'none'"),
        ({"lora_bias": True}, "lora-bias", "lora_bias = True", "expected False"),
        ({"modules_to_save": ["norm"]}, "modules-to-save", "['norm']", "expected None"),
        ({"modules_to_save": ["lm_head"]}, "modules-to-save", "['lm_head']", "expected None"),
        ({"trainable_token_indices": [1, 2]}, "trainable-token-indices", "[1, 2]", "expected None"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embeddings", "embed_tokens", "LoRA factors of linear"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embeddings", "lm_head", "LoRA factors of linear"),
        ({"init_lora_weights": "pissa"}, "init-lora-weights", "'pissa'", "expected True"),
        ({"init_lora_weights": "olora"}, "init-lora-weights", "'olora'", "expected True"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer-replication", "[[0, 2], [0, 2]]", "expected None"),
        ({"alora_invocation_tokens": [5]}, "alora-invocation-tokens", "[5]", "expected None"),
        ({"use_bdlora": BdLoraConfig(["o_proj"], ["q_proj"], 2, False)}, "bdlora", "nblocks", "expected False or None"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target-parameters", "q_proj.weight", "None"),
        ({"kasa_config": KasaConfig()}, "kasa-config", "kasa_config = {", "expected None"),
        ({"velora_config": VeloraConfig()}, "velora-config", "velora_config = {", "expected None"),
    ],
)  # fmt: skip
def test_what_peft_trains_besides_plain_lora_is_refused(
    tmp_path: Path, base: BaseModel, config: dict[str, Any], reason: str, seen: str, expected: str
) -> None:
    defaults = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    save_adapter(tmp_path / "one", LoraConfig(**(defaults | config)))
    error = refusal(tmp_path, base)
    assert error.reason == reason
    assert "adapter 'one' refused" in str(error)
    assert seen in str(error)
    assert expected in str(error)


@pytest.mark.parametrize(
    ("config", "switch", "reason"),
    [
        ({"use_dora": True}, {"use_dora": False}, "dora"),
        ({"lora_bias": True}, {"lora_bias": False}, "lora-bias"),
        ({"modules_to_save": ["norm"]}, {"modules_to_save": None}, "modules-to-save"),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": None}, "embeddings"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": None}, "embeddings"),
        ({"trainable_token_indices": {"lm_head": [1]}}, {"trainable_token_indices": None}, "embeddings"),
    ],
)
def test_a_config_that_hides_what_was_trained_does_not_help(
    tmp_path: Path, base: BaseModel, config: dict[str, Any], switch: dict[str, Any], reason: str
) -> None:
    save_adapter(tmp_path / "one", LoraConfig(r=4, target_modules=["q_proj"], **config))
    edit_config(tmp_path / "one", **switch)
    error = refusal(tmp_path, base)
    assert error.reason == reason
    assert "tensor 'base_model.model." in error.message
    assert "only LoRA factors of linear layers" in error.message


def test_another_peft_method_is_refused(tmp_path: Path, base: BaseModel) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    save_adapter(tmp_path / "one", config)
    error = refusal(tmp_path, base)
    assert error.reason == "unknown-key"  # IA3's own keys; with them gone, its type
    edit = json.loads((tmp_path / "one/adapter_config.json").read_text())
    kept = {key: value for key, value in edit.items() if key in LoraConfig.__dataclass_fields__}
    (tmp_path / "one/adapter_config.json").write_text(json.dumps(kept))
    error = refusal(tmp_path, base)
    assert (error.reason, "'IA3'" in error.message, "'LORA'" in error.message) == ("peft-type", True, True)


# --- What is wrong with a file ------------------------------------------------------------------------------


def _set(name: str, value: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def _each(change: Callable[[Tensor], Tensor], only: str = "") -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(t) for name, t in tensors.items() if only in name})


def _drop(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def _put(value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = value
        return tensor

    return put


@pytest.mark.parametrize(
    ("edit", "reason", "seen", "expected"),
    [
        (_drop("0.self_attn.q_proj.lora_A"), "partner", "layers.0.self_attn.q_proj has lora_B", "its partner"),
        (_drop("1.self_attn.v_proj.lora_B"), "partner", "layers.1.self_attn.v_proj has lora_A", "its partner"),
        (_drop("layers.1.self_attn.v_proj"), "missing-module", "model.layers.1.self_attn.v_proj", "targets 1 modules"),
        (_drop(""), "no-module", "holds no tensor", "adapter_model.safetensors"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(4, 31)), "shape", "A [4, 31] and B [32, 4]", "expected [r, 32]"),
        (_set(f"{Q0}.lora_B.weight", torch.ones(33, 4)), "shape", "A [4, 32] and B [33, 4]", "and [32, r]"),
        (_set(f"{Q0}.lora_B.weight", torch.ones(32, 3)), "shape", "B [32, 3]", "of one rank r"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(4, 32, 1)), "shape", "A [4, 32, 1]", "expected [r, 32]"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(())), "shape", "A []", "expected [r, 32]"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.int8)), "dtype", "I8", "F64, F32, F16, BF16"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(4, 32).to(torch.float8_e4m3fn)), "dtype", "F8_E4M3", "F32"),
        (lambda t: t.update({k.replace("layers.1", "layers.2"): t.pop(k) for k in list(t) if "layers.1" in k}),
         "module", "model.layers.2.self_attn.q_proj does not exist", "in the base org/tiny"),
        (lambda t: t.update({k.replace("self_attn.q_proj", "input_layernorm"): t.pop(k) for k in list(t)}),
         "module", "input_layernorm", "no linear layer"),
        (_each(_put(float("nan")), "lora_A"), "not-finite", "self_attn.q_proj holds NaN", "or infinity"),
        (_each(_put(float("-inf")), "lora_B"), "not-finite", "self_attn.q_proj holds NaN", "or infinity"),
        (_each(lambda t: t * 1e16), "not-finite", "squared norm", "at most 1e30"),
        (_each(lambda t: t * 0), "zero", "changes nothing", "was it trained"),
        (_each(lambda t: t * 0, "lora_B"), "zero", "B A is zero in every module", "was it trained"),
        (_set(f"{Q0}.bias", torch.ones(32)), "bias", "q_proj.bias", "only LoRA factors"),
        (_set("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 64)), "embeddings",
         "embed_tokens.lora_embedding_A", "only LoRA factors"),
        (_set("anything", torch.ones(1)), "unknown-tensor", "'anything'", "PEFT's LoRA writes"),
        (_set(f"{Q0}.lora_A.default.weight", torch.ones(4, 32)), "unknown-tensor", "lora_A.default", "are both"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_adapters_are_refused(
    good: Path, base: BaseModel, edit: Callable[[Tensors], object], reason: str, seen: str, expected: str
) -> None:
    edit_tensors(good, edit)
    error = refusal(good.parent, base)
    assert error.reason == reason
    assert "adapter 'one' refused" in str(error)
    assert seen in str(error)
    assert expected in str(error)


@pytest.mark.parametrize(
    ("changes", "reason", "seen", "expected"),
    [
        ({"r": 8}, "rank", "rank 4 in its tensors", "8 in its config"),
        ({"rank_pattern": {"v_proj": 2}}, "rank", "v_proj has rank 4", "2 in its config"),
        ({"target_modules": ["q_proj"]}, "no-module", "v_proj has tensors", "do not match"),
        ({"target_modules": ["nothing"]}, "no-module", "q_proj has tensors", "do not match"),
        ({"exclude_modules": ["v_proj"]}, "no-module", "v_proj has tensors", "do not match"),
        ({"layers_to_transform": [0]}, "no-module", "layers.1.self_attn.q_proj has tensors", "do not match"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "missing-module", "o_proj", "targets 2 modules"),
        ({"base_model_name_or_path": "org/other"}, "base", "'org/other'", "--accept-base 'org/other'"),
        ({"revision": "v2"}, "base", "'org/tiny@v2'", "this base is org/tiny"),
        ({"base_model_name_or_path": None}, "base", "names no base", "--accept-unnamed-base"),
        ({"base_model_name_or_path": ""}, "base", "names no base", "--accept-unnamed-base"),
        ({"base_model_name_or_path": ["x"]}, "config", "base_model_name_or_path = ['x']", "not valid"),
        ({"fan_in_fan_out": True}, "fan-in-fan-out", "True", "expected False"),
        ({"use_qalora": True}, "qalora", "True", "expected False"),
        ({"task_type": "SEQ_CLS"}, "task-type", "'SEQ_CLS'", "'CAUSAL_LM'"),
        ({"init_lora_weights": "loftq"}, "init-lora-weights", "'loftq'", "expected True"),
        ({"init_lora_weights": "corda"}, "init-lora-weights", "'corda'", "expected True"),
        ({"init_lora_weights": "lora_ga"}, "init-lora-weights", "'lora_ga'", "expected True"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq-config", "loftq_bits", "expected None"),
        ({"corda_config": {"corda_method": "ipm"}}, "corda-config", "ipm", "expected None"),
        ({"megatron_config": {"a": 1}}, "megatron-config", "{'a': 1}", "expected None"),
        ({"ensure_weight_tying": True}, "ensure-weight-tying", "True", "expected False"),
        ({"from_the_future": 1}, "unknown-key", "'from_the_future' = 1", "unknown key"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    good: Path, base: BaseModel, changes: dict[str, Any], reason: str, seen: str, expected: str
) -> None:
    edit_config(good, **changes)
    error = refusal(good.parent, base)
    assert error.reason == reason
    assert "adapter 'one' refused" in str(error)
    assert seen in str(error)
    assert expected in str(error)


def test_a_folder_without_its_config_or_weights_is_refused(good: Path, base: BaseModel) -> None:
    (good / "adapter_config.json").rename(good / "kept")
    error = refusal(good.parent, base)
    assert (error.reason, "no adapter_config.json" in error.message) == ("no-config", True)
    (good / "kept").rename(good / "adapter_config.json")
    (good / "adapter_model.safetensors").unlink()
    error = refusal(good.parent, base)
    assert (error.reason, "no adapter_model.safetensors" in error.message) == ("no-weights", True)


class _Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_pickle_is_never_loaded(good: Path, base: BaseModel, name: str) -> None:
    marker = good / "executed"
    (good / "adapter_model.safetensors").unlink()
    (good / name).write_bytes(pickle.dumps(_Bomb(str(marker))))
    error = refusal(good.parent, base)
    assert error.reason == "pickle"
    assert "adapter_model.safetensors" in error.message
    assert not marker.exists()
    pickle.loads((good / name).read_bytes())  # the payload is live: loading it would have shown
    assert marker.exists()


def test_a_pickle_beside_good_weights_does_not_matter(good: Path, base: BaseModel) -> None:
    (good / "adapter_model.bin").write_bytes(b"anything")
    read_only_one(good.parent, base)


ELSE: dict[str, tuple[bytes, str, str]] = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer",
        "lfs pull",
    ),
    "html": (b"\r\n<!DOCTYPE html><html><title>Sign in</title>", "an HTML page", "upload the file itself"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document", "upload the file"),
    "gzip": (gzip.compress(b"weights"), "a gzip archive", "that is in it"),
}


@pytest.mark.parametrize("kind", ELSE)
@pytest.mark.parametrize(
    ("file", "reason"), [("adapter_model.safetensors", "corrupt"), ("adapter_config.json", "config")]
)
def test_a_file_that_is_something_else_is_called_what_it_is(
    good: Path, base: BaseModel, kind: str, file: str, reason: str
) -> None:
    data, what, remedy = ELSE[kind]
    (good / file).write_bytes(data)
    error = refusal(good.parent, base)
    assert error.reason == reason
    assert f"{file} is {what}" in error.message
    assert remedy in error.message


def test_an_index_under_the_weights_name_is_called_one(good: Path, base: BaseModel) -> None:
    (good / "adapter_model.safetensors").write_bytes(b'{"metadata": {}, "weight_map": {"a": "b"}}')
    assert "is the index of a file in shards; save it as one" in refusal(good.parent, base).message


def test_what_torch_saves_under_a_safetensors_name_is_called_a_pickle(good: Path, base: BaseModel) -> None:
    for is_zip in (True, False):
        path = good / "adapter_model.safetensors"
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=is_zip)
        assert refusal(good.parent, base).reason == "pickle"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("adapter_model.safetensors", b"weights")
    assert "a zip archive" in refusal(good.parent, base).message


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("adapter_model-00001-of-00002.safetensors", "in shards"),
        ("adapter_model.safetensors.index.json", "in shards"),
        ("adapters.safetensors", "saved by MLX"),
        ("adapters.npz", "saved by MLX"),
    ],
)
def test_weights_in_a_form_that_is_not_read_are_called_what_they_are(
    good: Path, base: BaseModel, name: str, what: str
) -> None:
    (good / "adapter_model.safetensors").rename(good / name)
    error = refusal(good.parent, base)
    assert error.reason == "no-weights"
    assert what in error.message
    assert name in error.message


def test_a_file_without_tensors_says_what_makes_such_files(good: Path, base: BaseModel) -> None:
    save_file({}, good / "adapter_model.safetensors")
    error = refusal(good.parent, base)
    assert error.reason == "no-module"
    assert "ZeRO-3" in error.message


# --- Names as wrappers write them ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        (r"\.lora_([AB])\.weight$", r".lora_\1.default.weight"),
        (r"^base_model\.model\.", r"base_model.model._orig_mod."),
        (r"^base_model\.model\.", r"_orig_mod.base_model.model."),
        (r"^base_model\.model\.", r"module.base_model.model."),
        (r"^base_model\.model\.", r"base_model.model.module."),
        (r"^base_model\.model\.", r""),
        (r"^base_model\.model\.", r"module.module."),
        (r"^base_model\.model\.", r"module._orig_mod.module.base_model.model."),
        (r"\.self_attn\.", r"._fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."),
    ],
)
def test_a_wrappers_names_are_the_same_adapter(good: Path, base: BaseModel, pattern: str, written: str) -> None:
    plain, factors = read_only_one(good.parent, base)
    weights = good / "adapter_model.safetensors"
    wrapped = {re.sub(pattern, written, name): tensor for name, tensor in load_file(weights).items()}
    assert not wrapped.keys() & load_file(weights).keys()
    save_file(wrapped, weights)
    record, found = read_only_one(good.parent, base)
    assert record.version == plain.version
    assert found.keys() == factors.keys()
    assert all(torch.equal(a, b) for m in factors for a, b in zip(found[m], factors[m], strict=True))
    again = read_modules(open_store(str(good.parent)), record, list(factors))
    assert all(torch.equal(a, b) for m in factors for a, b in zip(again[m], factors[m], strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "key", ["model.layers.0._orig_mod.self_attn.q_proj", r"layers\.\d+\._orig_mod\.self_attn\.q_proj"]
)
def test_a_pattern_that_means_the_wrapped_name_is_refused_and_not_passed_over(
    tmp_path: Path, base: BaseModel, key: str
) -> None:
    model = make_model()
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], alpha_pattern={key: 64})
    trained = get_peft_model(model, config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    assert trained.get_submodule("base_model.model.model.layers.0._orig_mod.self_attn.q_proj").scaling == {
        "default": 32
    }
    trained.save_pretrained(tmp_path / "one")
    edit_config(tmp_path / "one", base_model_name_or_path=NAME)
    error = refusal(tmp_path, base)
    assert error.reason == "pattern"
    assert "alpha_pattern" in error.message


def test_one_factor_under_two_names_is_refused(good: Path, base: BaseModel) -> None:
    edit_tensors(good, lambda t: t.update({n.replace(".weight", ".default.weight"): t[n] + 1 for n in list(t)}))
    error = refusal(good.parent, base)
    assert error.reason == "unknown-tensor"
    assert "are both" in error.message


def test_a_factor_of_an_adapter_by_another_name_is_refused_for_what_it_is(good: Path, base: BaseModel) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".mine.weight")] = tensors.pop(name)

    edit_tensors(good, rename)
    error = refusal(good.parent, base)
    assert error.reason == "unknown-tensor"
    assert "save_pretrained" in error.message


# --- What the base is called --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "accepted", "is_accepted"),
    [
        ("unsloth/tiny-bnb-4bit", "unsloth/*-bnb-4bit", True),
        ("/scratch/job-17/tiny", "/scratch/*", True),
        ("other/tiny", "unsloth/*", False),
        ("unsloth/tiny", "unsloth/tin", False),
        (None, "*", False),
        ("", "", True),
        (None, "", True),
        ("org/other", "", False),
        ("org/other@v2", "org/*", False),
        ("org/other@v2", "org/*@v2", True),
    ],
)
def test_a_base_answers_to_names_and_patterns(
    good: Path, tmp_path_factory: pytest.TempPathFactory, named: str | None, accepted: str, is_accepted: bool
) -> None:
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    edit_config(good, base_model_name_or_path=named)
    base = read_base(str(folder), name=NAME, accept=[accepted])
    if is_accepted:
        read_only_one(good.parent, base)
    else:
        assert refusal(good.parent, base).reason == "base"


@pytest.mark.parametrize("name", ["org/it's", "$(touch x)/`id`", "a b"])
def test_the_option_that_accepts_a_name_is_quoted_for_a_shell(good: Path, base: BaseModel, name: str) -> None:
    edit_config(good, base_model_name_or_path=name)
    assert shlex.split(refusal(good.parent, base).message)[-2:] == ["--accept-base", name]


@pytest.mark.parametrize("name", ["*", "org/*", "x --accept-base *", "a\nb"])
def test_no_option_is_offered_for_a_name_that_would_mean_more_than_itself(
    good: Path, base: BaseModel, name: str
) -> None:
    edit_config(good, base_model_name_or_path=name)
    assert refusal(good.parent, base).message.endswith("; correct the name in its config")


def test_files_beyond_the_limits_are_refused_unread(good: Path, base: BaseModel) -> None:
    os.truncate(good / "adapter_model.safetensors", MAX_WEIGHTS_BYTES + 1)  # sparse: no bytes on the disk
    error = refusal(good.parent, base)
    assert error.reason == "too-large"
    assert f"{MAX_WEIGHTS_BYTES + 1} bytes, at most {MAX_WEIGHTS_BYTES}" in error.message
    edit_config(good, peft_version="9" * (1 << 20))
    assert refusal(good.parent, base).reason == "too-large"


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_weights_are_corrupt(good: Path, base: BaseModel, keep: int) -> None:
    path = good / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    error = refusal(good.parent, base)
    assert (error.reason, "upload it again" in error.message) == ("corrupt", True)


def _lying_files() -> dict[str, bytes]:
    """A safetensors file each, that claims 10^12 bytes where there are none."""

    def file(header: object, length: int | None = None, data: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    names = (f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight")
    place = {"dtype": "F32", "shape": [500_000, 500_000], "data_offsets": [0, 10**12]}
    small = {"dtype": "F32", "shape": [500_000, 500_000], "data_offsets": [0, 4]}
    empty = {"dtype": "F32", "shape": [500_000, 500_000], "data_offsets": [0, 0]}
    four = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    deep = b"[" * 1_000_000
    return {
        # Numbers whose product takes hours, or that torch cannot hold; JSON that recurses; names of megabytes.
        "dimensions": file({names[0]: {**empty, "shape": [2**62] * 300_000}}),
        "zero-by-int64": file({name: {**empty, "shape": [0, 2**63]} for name in names}),
        "zero-overflowing": file({name: {**empty, "shape": [2**62, 2**62, 0]} for name in names}),
        "negative": file({names[0]: {**four, "data_offsets": [-4, 0]}}, data=b"abcd"),
        "nested": file({names[0]: {**four, "shape": [[1]]}}, data=b"abcd"),
        "deep": struct.pack("<Q", len(deep)) + deep,
        "long-name": file({"x" * 5_000_000: 5}),
        "many-names": file(dict.fromkeys(map(str, range(100_000)), 5)),
        # Which of two tensors of one name counts, the library and we might see differently.
        "duplicate": file(
            json.dumps({names[0]: four, "x": four}).replace('"x"', f'"{names[0]}"').encode(), data=b"abcd"
        ),
        "overlap": file({names[0]: four, names[1]: {**four, "data_offsets": [2, 6]}}, data=b"abcdef"),
        "hole": file({names[0]: four, names[1]: {**four, "data_offsets": [6, 10]}}, data=b"abcdefghij"),
        "tail": file({names[0]: four, names[1]: {**four, "data_offsets": [4, 8]}}, data=b"abcdefgh+more"),
        "header": file({}, 10**12),
        "header-within-8-bytes": struct.pack("<Q", 10**12),
        "offsets": file({names[0]: place}),
        "shape": file(dict.fromkeys(names, small), data=b"abcd"),
        "shape-of-nothing": file(dict.fromkeys(names, empty)),
        "dtype-unknown": file({name: {**small, "dtype": "F4"} for name in names}, data=b"abcd"),
        "beyond-int64": file({names[0]: {**place, "data_offsets": [0, 10**30]}}),
    }


_READ_ALL = """
import resource, sys
from cluster.adapters.base import BaseModel, read_base
from cluster.adapters.listing import list_adapters
from cluster.adapters.reading import read_adapter
from cluster.errors import AdapterRefused, BaseModelError
from cluster.layer import ModuleShape
from cluster.store.address import open_store
shape = ModuleShape(500_000, 500_000)  # so that the lie fits the base
base = BaseModel("org/tiny", "", {"model.layers.0.self_attn.q_proj": shape}, frozenset(["org/tiny"]), 0)
store = open_store(sys.argv[1])
files = list_adapters(store).adapters
import torch
torch.ones(64, 64) @ torch.ones(64, 64)  # its threads' stacks are no part of what a file costs
used_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (96 << 20),) * 2)
for adapter in files:
    try:
        read_adapter(store, adapter, base)
    except AdapterRefused as error:
        print(adapter.adapter_id, error.reason)
        assert len(str(error)) < 1000
    try:
        read_base(f"{sys.argv[2]}/{adapter.adapter_id}")
    except BaseModelError as error:
        print("base", adapter.adapter_id)
"""


def test_headers_that_claim_a_terabyte_allocate_nothing(tmp_path: Path, good_folder: Path) -> None:
    lies = _lying_files()
    for name, data in lies.items():
        for collection, file in (("adapters", "adapter_model.safetensors"), ("bases", "model.safetensors")):
            (tmp_path / collection / name).mkdir(parents=True)
            (tmp_path / collection / name / file).write_bytes(data)
        shutil.copy(good_folder / "adapter_config.json", tmp_path / "adapters" / name)
        (tmp_path / "bases" / name / "config.json").write_text("{}")
    # The process may take 96 MiB more than it has, and two minutes: whatever the header claims would fail otherwise.
    command = [sys.executable, "-c", _READ_ALL, str(tmp_path / "adapters"), str(tmp_path / "bases")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False)
    lines = done.stdout.splitlines()
    assert {line for line in lines if not line.startswith("base")} == {f"{name} corrupt" for name in lies}, done.stderr
    # A dtype that is not ours says nothing about a base, where its tensors are never read.
    unseen = {"dtype-unknown", "zero-overflowing", "overlap", "hole", "tail"}
    assert {line for line in lines if line.startswith("base")} >= {f"base {name}" for name in lies.keys() - unseen}


def test_a_rank_whose_square_would_fill_the_memory_is_refused(good: Path, base: BaseModel) -> None:
    def widen(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.repeat(2500, 1) if "lora_A" in name else tensor.repeat(1, 2500)

    edit_tensors(good, widen)
    edit_config(good, r=10_000)
    error = refusal(good.parent, base)
    assert (error.reason, "has rank 10000, at most 4096" in error.message) == ("rank", True)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(?:\w|\w\w|.)+m"},
        {"rank_pattern": {"(?:.|.|.)*(?:.|.)*m": 4}},
        {"alpha_pattern": {"(?:(.)|(.)|[^x])+m": 4}},
        {"exclude_modules": r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6m"},
        {"layers_to_transform": [0, 1], "layers_pattern": ["(?:.|.|.)*(?:.|.)*[a-r]"]},
        {"target_modules": "((a{1000}){1000}){1000}"},
        {"rank_pattern": {"(?:a|b|(?R))*": 4}},
        {"rank_pattern": {"a{99999999999999999999}": 4}},
        {"rank_pattern": {"(": 4}},
        {"target_modules": "(" * 20_000 + ")" * 20_000},
        {"target_modules": "a|" * 200_000},
        {"rank_pattern": {f"(.?|..?|{number})(.|..)*(.?|..)q": 4 for number in range(100_000, 120_000)}},
    ],
)
def test_a_catastrophic_pattern_is_refused(
    good: Path, base: BaseModel, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.adapters.config._PATTERNS_TIMEOUT_S", 0.3)  # each would take for ever
    edit_config(good, **changes)
    error = refusal(good.parent, base)
    assert error.reason == "pattern"
    assert "list the names instead" in error.message
    assert len(error.message) < 1000


# --- Ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_id", ["a", "number-en", "tenant/name", "A_1.b-c", "_x", "0", "x" * 128, "a.b/c.d"])
def test_plain_ids_are_accepted(base: BaseModel, adapter_id: str) -> None:
    check_id(adapter_id, base)


@pytest.mark.parametrize(
    "adapter_id",
    [
        *("", "/", "a/", "/a", "a//b", "a/b/c", ".", "..", "../a", "a/..", ".hidden", "-rf", "a/-b", "a b", "a\n"),
        *("ü", "a\\b", "a:b", "a%2Fb", "a\0", "x" * 129, "a\udcff", "org/tiny"),
    ],
)
def test_other_ids_are_refused_by_name(base: BaseModel, adapter_id: str) -> None:
    with pytest.raises(AdapterRefused, match="rename") as caught:
        check_id(adapter_id, base)
    assert (caught.value.reason, caught.value.adapter_id) == ("id", adapter_id)
    assert repr(adapter_id) in str(caught.value)


def test_folders_at_every_depth_are_listed_and_judged_by_their_id(
    tmp_path: Path, good_folder: Path, base: BaseModel
) -> None:
    for name in ("one", "tenant/two", "a/b/three", "org/tiny", "with space"):
        shutil.copytree(good_folder, tmp_path / name)
    shutil.copytree(good_folder, tmp_path / os.fsdecode(b"not-utf8-\xff"))
    for item in good_folder.iterdir():
        shutil.copy(item, tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("no adapter")
    store = open_store(str(tmp_path))
    accepted, refused = set(), {}
    for files in list_adapters(store).adapters:
        try:
            accepted.add(read_adapter(store, files, base)[0].adapter_id)
        except AdapterRefused as error:
            refused[error.adapter_id] = error.reason
            str(error).encode()  # goes into the manifest
    assert accepted == {"one", "tenant/two"}
    assert refused == dict.fromkeys(["", "a/b/three", "org/tiny", "with space", "not-utf8-\\udcff"], "id")


def test_a_base_name_that_is_no_text_can_still_be_reported(good: Path, base: BaseModel) -> None:
    edit_config(good, base_model_name_or_path="\ud800")
    error = refusal(good.parent, base)
    assert error.reason == "base"
    str(error).encode()


def test_another_name_of_the_base_is_accepted_when_given(good: Path, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "the-base")
    edit_config(good, base_model_name_or_path="org/mirror", revision="v2")
    collection = tmp_path / "adapters"
    collection.mkdir()
    good.rename(collection / "one")
    assert refusal(collection, read_base(str(tmp_path / "the-base"), accept=["org/mirror"])).reason == "base"
    read_only_one(collection, read_base(str(tmp_path / "the-base"), accept=["org/mirror@v2"]))


# --- What is accepted is what PEFT applies ------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 12},
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
        {"alpha_pattern": {"q_proj": 2.5, "v_proj": 40}, "use_rslora": True},
        {"rank_pattern": {r"layers\.[01]\.self_attn\.(q|v)_proj": 3, "q_proj": 5}, "alpha_pattern": {"^model.*": 9}},
        {"rank_pattern": {"": 5, "proj": 3, "q_pro": 3}, "alpha_pattern": {"": 5, "model.layers.0": 3}},
        {"target_modules": r".*layers\.1\..*(gate|down)_proj", "rank_pattern": {"down_proj": 6}},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.(o|up)_proj"},
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"], "target_modules": ["up_proj", "o_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "model.layers.0.self_attn.k_proj"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)},
        {"init_lora_weights": False, "lora_alpha": -3.5},
    ],
)
def test_factors_are_what_peft_adds_to_each_module(tmp_path: Path, base: BaseModel, config: dict[str, Any]) -> None:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = save_adapter(tmp_path / "one", LoraConfig(**(defaults | config)))
    deltas = {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert deltas
    record, factors = read_only_one(tmp_path, base)
    assert factors.keys() == record.modules.keys() == deltas.keys()
    for name, delta in deltas.items():
        A, B = factors[name]
        assert A.dtype == B.dtype == torch.float32
        torch.testing.assert_close(B @ A, delta, rtol=1e-6, atol=1e-7)
        assert record.modules[name].rank == len(A)
        assert record.modules[name].energy == pytest.approx(float(delta.double().square().sum()), rel=1e-6)
    assert record.energy == pytest.approx(sum(float(d.double().square().sum()) for d in deltas.values()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_is_widened_exactly(good: Path, base: BaseModel, dtype: torch.dtype) -> None:
    edit_tensors(good, _each(lambda tensor: tensor.to(dtype)))
    tensors = load_file(good / "adapter_model.safetensors")
    _, factors = read_only_one(good.parent, base)
    A, B = factors["model.layers.0.self_attn.q_proj"]
    assert torch.equal(A, tensors[f"{Q0}.lora_A.weight"].float())
    assert torch.equal(B, tensors[f"{Q0}.lora_B.weight"].float() * 2.0)


def test_the_version_changes_with_the_source_and_with_nothing_else(good: Path, base: BaseModel) -> None:
    def version() -> str:
        return read_only_one(good.parent, base)[0].version

    first = version()
    path = good / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"by": "somebody else"})
    assert version() == first
    edit_tensors(good, _each(lambda t: t.clone().fill_(0.5), f"{Q0}.lora_A"))
    second = version()
    edit_config(good, lora_alpha=9)
    assert len({first, second, version()}) == 3


def test_hash_tensors_sees_names_dtypes_shapes_and_bytes_but_no_order() -> None:
    one, two = torch.arange(4.0), torch.ones(2)
    assert hash_tensors({"a": one, "b": two}) == hash_tensors({"b": two, "a": one})
    others = [{"a": two, "b": one}, {"a": one.reshape(2, 2), "b": two}, {"a": one.view(torch.int32), "b": two}]
    assert len({hash_tensors({"a": one, "b": two}), *map(hash_tensors, others)}) == 4


def test_factored_energy_is_the_squared_norm_of_the_product() -> None:
    generator = torch.Generator().manual_seed(3)
    A, B = torch.randn(5, 70, generator=generator), torch.randn(40, 5, generator=generator)
    assert factored_energy(A, B) == pytest.approx(float((B.double() @ A.double()).square().sum()), rel=1e-12)


# --- Reading again, by ranges -------------------------------------------------------------------------------


class _CountingStore(LocalStore):
    """A folder that notes what ranges it is asked for."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.ranges: list[tuple[int, int]] = []

    def read_range(self, key: str, start: int, length: int, *, if_match: str | None = None) -> bytes:
        self.ranges.append((start, length))
        return super().read_range(key, start, length, if_match=if_match)


def assert_same_factors(seen: dict[str, Factors], expected: dict[str, Factors]) -> None:
    assert seen.keys() == expected.keys()
    for name, (A, B) in expected.items():
        assert torch.equal(seen[name][0], A)
        assert torch.equal(seen[name][1], B)


def test_ranged_reads_of_a_real_adapter_are_bit_equal_and_one_request_a_layer(zoo_path: Path, base_path: Path) -> None:
    real_base = read_base(str(base_path), name="HuggingFaceTB/SmolLM2-135M-Instruct")
    store = _CountingStore(str(zoo_path))
    files = next(files for files in list_adapters(store).adapters if files.adapter_id == "number-en")
    record, factors = read_adapter(store, files, real_base)
    assert store.ranges == []
    for layer in (0, 7, 29):
        store.ranges.clear()
        modules = [name for name in real_base.modules if name.startswith(f"model.layers.{layer}.")]
        seen = read_modules(store, record, modules)
        assert len(store.ranges) == 1
        assert_same_factors(seen, {name: factors[name] for name in modules if name in factors})
        wanted_bytes = sum(
            place.end - place.start for name in seen for place in (record.modules[name].A, record.modules[name].B)
        )
        assert store.ranges[0][1] == wanted_bytes  # side by side: nothing else comes along
    store.ranges.clear()
    assert_same_factors(read_modules(store, record, real_base.modules), factors)
    assert len(store.ranges) == 1
    assert read_modules(store, record, []) == {}
    assert read_modules(store, record, ["model.layers.0.mlp.up_proj", "no.such"]) == {}


def test_far_modules_are_read_apart(tmp_path: Path) -> None:
    model = make_model(hidden_size=512, intermediate_size=512)
    model.save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    peft_model.save_pretrained(tmp_path / "adapters/one", save_embedding_layers=False)
    store = _CountingStore(str(tmp_path / "adapters"))
    record, factors = read_adapter(
        store, list_adapters(store).adapters[0], read_base(str(tmp_path / "base"), name=model.name_or_path)
    )
    wanted = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert_same_factors(read_modules(store, record, wanted), {name: factors[name] for name in wanted})
    assert len(store.ranges) == 2


def test_ranged_reads_work_on_a_real_s3(s3_bucket: str, good_folder: Path, base: BaseModel) -> None:
    store = open_store(s3_bucket)
    for item in good_folder.iterdir():
        store.write(f"tenant/one/{item.name}", item.read_bytes())
    (files,) = list_adapters(store).adapters
    assert files.adapter_id == "tenant/one"
    record, factors = read_adapter(store, files, base)
    assert_same_factors(read_modules(store, record, base.modules), factors)
    tensors = load_file(good_folder / "adapter_model.safetensors")
    store.write(record.key, save({name: tensor + 1 for name, tensor in tensors.items()}))
    with pytest.raises(AdapterChanged, match="tenant/one") as caught:
        read_modules(store, record, base.modules)
    assert caught.value.adapter_id == "tenant/one"


@pytest.mark.parametrize("change", ["same-length", "shorter", "gone"])
def test_a_file_replaced_between_the_passes_is_noticed(good: Path, base: BaseModel, change: str) -> None:
    record, _ = read_only_one(good.parent, base)
    path = good / "adapter_model.safetensors"
    if change == "gone":
        path.unlink()
    elif change == "shorter":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        (good / "new").write_bytes(path.read_bytes())
        (good / "new").replace(path)
    with pytest.raises(AdapterChanged, match="'one' changed during the job"):
        read_modules(open_store(str(good.parent)), record, list(record.modules))


class BeingUploaded(LocalStore):
    """A folder in which each file is written to, in place, while it is read."""

    @contextmanager
    def _opened(self, key: str, if_match: str | None) -> Iterator[tuple[BinaryIO, os.stat_result]]:
        with super()._opened(key, if_match) as (file, info):
            yield file, info
            os.utime(self._path(key), ns=(0, info.st_mtime_ns + 1))


def test_a_file_that_is_being_written_refuses_its_own_adapter_alone(good: Path, base: BaseModel) -> None:
    store = BeingUploaded(str(good.parent))
    (files,) = list_adapters(store).adapters
    with pytest.raises(AdapterRefused, match="let its writer finish") as caught:
        read_adapter(store, files, base)
    assert caught.value.reason == "changed"


# --- Fuzz ---------------------------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def accepted_or_refused(collection: Path, base: BaseModel) -> None:
    try:
        record, factors = read_only_one(collection, base)
    except AdapterRefused as error:
        assert error.adapter_id == "one"
        assert len(str(error).encode()) < 1000
    else:
        for name, (A, B) in factors.items():
            shape = base.modules[name]
            assert (B @ A).shape == (shape.d_out, shape.d_in)
            assert record.modules[name].scale != 0


@FUZZ
@given(data=st.binary(max_size=200), config=st.binary(max_size=50))
def test_random_bytes_are_refused_and_nothing_else(
    good: Path, good_folder: Path, base: BaseModel, data: bytes, config: bytes
) -> None:
    (good / "adapter_model.safetensors").write_bytes(data)
    shutil.copy(good_folder / "adapter_config.json", good)
    assert refusal(good.parent, base).reason == "corrupt"
    (good / "adapter_config.json").write_bytes(config)
    assert refusal(good.parent, base).reason == "config"


@FUZZ
@given(data=st.data())
def test_flipped_bytes_are_accepted_or_refused_and_nothing_else(
    good: Path, good_folder: Path, base: BaseModel, data: st.DataObject
) -> None:
    weights = bytearray((good_folder / "adapter_model.safetensors").read_bytes())
    header_end = 8 + int.from_bytes(weights[:8], "little")
    flips = st.tuples(st.integers(0, header_end + 100), st.integers(0, 255))
    for position, value in data.draw(st.lists(flips, min_size=1, max_size=4)):
        weights[position] = value
    (good / "adapter_model.safetensors").write_bytes(weights)
    accepted_or_refused(good.parent, base)


@FUZZ
@given(data=st.data())
def test_any_header_is_accepted_or_refused_and_nothing_else(
    good: Path, good_folder: Path, base: BaseModel, data: st.DataObject
) -> None:
    weights = (good_folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    numbers = st.integers(-1, 10**20) | st.sampled_from([0, 4, 16, 32, 128, 512, 2**63, 2**64])
    dtypes = st.sampled_from(["F32", "F64", "BF16", "F16", "I8", "U64", "BOOL", "F8_E5M2", "C64", "F4", "X"])
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=2, unique=True)):
        value = {
            "dtype": data.draw(dtypes | JSON),
            "shape": data.draw(st.lists(numbers, max_size=3) | JSON),
            "data_offsets": data.draw(st.lists(numbers, min_size=2, max_size=2) | JSON),
        }
        header[name] = data.draw(st.just(value) | st.just(header[name] | {"dtype": value["dtype"]}) | JSON)
        if data.draw(st.booleans()):
            header[data.draw(st.text(max_size=8) | st.just(name * 50) | st.just(name + "\ud800"))] = header.pop(name)
    text = json.dumps(header).encode()
    (good / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + weights[8 + length :])
    accepted_or_refused(good.parent, base)


@FUZZ
@given(data=st.data())
def test_a_file_with_something_cut_out_is_accepted_or_refused_and_nothing_else(
    good: Path, good_folder: Path, base: BaseModel, data: st.DataObject
) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (good_folder / name).read_bytes()
        start = data.draw(st.integers(0, min(len(whole), 2000)) | st.integers(0, len(whole)))
        end = data.draw(st.integers(start, min(len(whole), start + 100)) | st.just(len(whole)))
        (good / name).write_bytes(whole[:start] + data.draw(st.binary(max_size=4)) + whole[end:])
    accepted_or_refused(good.parent, base)


@FUZZ
@given(data=st.data())
def test_any_config_is_accepted_or_refused_and_nothing_else(
    good: Path, good_folder: Path, base: BaseModel, data: st.DataObject
) -> None:
    config = json.loads((good_folder / "adapter_config.json").read_text())
    patterns = st.text("()[]{}.*+?|\\^$ap_q0,-<>=!:PR&", max_size=12)
    values = JSON | patterns | st.dictionaries(patterns, st.integers(0, 9) | st.just(10**400), max_size=2)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(values | st.just(10**400))
    (good / "adapter_config.json").write_text(json.dumps(config))
    accepted_or_refused(good.parent, base)


def test_a_record_survives_pickling(good: Path, base: BaseModel) -> None:
    record, _ = read_only_one(good.parent, base)
    assert pickle.loads(pickle.dumps(record)) == record
    assert replace(record, etag="other") != record
    files = AdapterFiles("one")
    assert pickle.loads(pickle.dumps(files)) == files
