"""The table of config keys against PEFT's own, and how patterns resolve against PEFT's own functions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from cluster.adapters.config import _NEUTRAL, _SUPPORTED, _WITHOUT_EFFECT, AdapterConfig, parse_adapter_config
from cluster.errors import AdapterRefused

MINIMAL = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny", "target_modules": ["q_proj"]}
# PEFT before 0.4 wrote these.
OLD_KEYS = {"merge_weights", "enable_lora"}
MODULES = [
    *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 10, 11) for name in "qkvo"),
    *(f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 1) for expert in (0, 1, 2)),
    *("layers.1.q_proj", "q_proj", "h.0.attn.q_proj", "transformer.h.1.attn.c_attn", "xq_proj", "encoder.q_proj.0"),
]


def parse(**changes: Any) -> AdapterConfig:
    return parse_adapter_config("one", json.dumps(MINIMAL | changes).encode())


def refusal(**changes: Any) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        parse(**changes)
    return caught.value


# --- The table ----------------------------------------------------------------------------------------------


def test_every_key_of_the_installed_peft_stands_in_one_table() -> None:
    tables = [_SUPPORTED, _WITHOUT_EFFECT, set(_NEUTRAL)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert {field.name for field in dataclasses.fields(LoraConfig)} == set().union(*tables) - OLD_KEYS


def test_what_a_default_peft_config_writes_is_neutral(tmp_path: Path) -> None:
    LoraConfig(base_model_name_or_path="org/tiny", target_modules=["q_proj"]).save_pretrained(tmp_path)
    data = (tmp_path / "adapter_config.json").read_bytes()
    written = json.loads(data)
    assert set(_NEUTRAL) - set(written) == {"enable_lora"}
    for key, values in _NEUTRAL.items():
        assert any(type(written.get(key)) is type(value) and written.get(key) == value for value in values), key
    config = parse_adapter_config("one", data)
    assert (config.base_name, config.r, config.lora_alpha, config.use_rslora) == ("org/tiny", 8, 8.0, False)
    assert config.target_modules == ("q_proj",)
    assert config.rank_pattern == config.alpha_pattern == {}
    assert config.layers_to_transform == config.layers_pattern == config.exclude_modules == ()


def test_keys_that_an_older_peft_left_out_have_pefts_defaults() -> None:
    config = parse()
    default = LoraConfig()
    assert (config.r, config.lora_alpha, config.use_rslora) == (default.r, default.lora_alpha, default.use_rslora)


@pytest.mark.parametrize("key", sorted(_NEUTRAL))
@pytest.mark.parametrize("value", [1, 0, "x", ["x"], {"x": 1}, 0.0, True, False, "", [], {}, None])
def test_only_the_listed_values_of_a_key_are_neutral(key: str, value: object) -> None:
    if any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[key]):
        parse(**{key: value})
    else:
        error = refusal(**{key: value})
        assert error.reason == key.removeprefix("use_").replace("_", "-")
        assert f"{key} = {value!r} is not supported; expected {_NEUTRAL[key][0]!r}" in error.message


@pytest.mark.parametrize("key", sorted(_WITHOUT_EFFECT))
def test_keys_without_effect_may_hold_anything(key: str) -> None:
    assert parse(**{key: {"x": [1, None]}}) == parse()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in (0, -1, 1.0, "8", True, None, [8])),
        *(("lora_alpha", value) for value in (0, 0.0, "8", True, None, math.nan, math.inf, 10**400, [8])),
        *(("use_rslora", value) for value in (0, 1, None, "false")),
        *(("rank_pattern", value) for value in (["q"], {"q": 0}, {"q": 2.0}, {"q": None}, {"q": True}, "q")),
        *(("alpha_pattern", value) for value in (["q"], {"q": 0}, {"q": "2"}, {"q": math.inf}, {"q": -(10**400)})),
        *(("target_modules", value) for value in (None, [], "", 5, {"q": 1}, ["q", 5], [["q"]])),
        *(("exclude_modules", value) for value in (5, {"q": 1}, ["q", None])),
        *(("layers_to_transform", value) for value in ("0", [0, "1"], [True], 1.0, True, {"0": 1})),
        *(("layers_pattern", value) for value in (5, ["h", 5], {"h": 1})),
        *(("base_model_name_or_path", value) for value in (5, ["x"])),
        *(("revision", value) for value in (5, ["main"])),
    ],
)
def test_values_of_a_wrong_type_or_range_are_refused(key: str, value: object) -> None:
    error = refusal(**{key: value})
    assert error.reason == "config"
    assert f"{key} = " in error.message


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "no peft_type"),
    ],
)
def test_what_is_no_config_is_refused(data: bytes, seen: str) -> None:
    with pytest.raises(AdapterRefused, match=seen) as caught:
        parse_adapter_config("one", data)
    assert caught.value.reason == "config"


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_key_at_an_empty_value_asks_for_nothing(value: object) -> None:
    assert parse(from_a_newer_peft=value) == parse()


@pytest.mark.parametrize("value", [True, 1, 0.5, "no", [0], {"a": None}])
def test_an_unknown_key_at_any_other_value_is_refused(value: object) -> None:
    assert refusal(from_a_newer_peft=value).reason == "unknown-key"


def test_long_values_are_shortened_in_messages() -> None:
    for changes in ({"x" * 5000: 1}, {"unknown": "x" * 5000}, {"bias": "x" * 5000}, {"r": "x" * 5000}):
        assert len(str(refusal(**changes))) < 400


@pytest.mark.parametrize(
    ("revision", "name"), [(None, "org/tiny"), ("", "org/tiny"), ("main", "org/tiny"), ("v2", "org/tiny@v2")]
)
def test_a_base_at_another_revision_has_another_name(revision: str | None, name: str) -> None:
    assert parse(revision=revision).base_name == name


# --- Patterns resolve as PEFT's -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["attn.q_proj", "v_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.1\.self_attn\.q_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": "(?i).*Q_PROJ"},
        {"target_modules": r".*(?<!x)q_proj"},
        {"target_modules": r".*layers\.\d{2}\..*"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": ["experts"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": ["nothing"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": ["h|layers"]},
        {"target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"], "layers_to_transform": [0]},
    ],
)
def test_targets_are_pefts(changes: dict[str, Any]) -> None:
    ours, theirs = parse(**changes), LoraConfig(**changes)
    expected = {module: bool(check_target_module_exists(theirs, module)) for module in MODULES}
    assert {module: ours.targets(module) for module in MODULES} == expected


PATTERNS = st.sampled_from(
    [
        *("q_proj", "", "proj", "model", r"layers\.1", r".*\.0\..*", r"(q|k)_proj", "^q_proj", "q_proj$", "up_proj"),
        *("o_proj|v_proj", r"self_attn\..*", r"model.layers.1.self_attn.q_proj", r"[^.]*_proj", r"layers\.\d+\..*q.*"),
    ]
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    ranks=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(PATTERNS, st.floats(0.5, 64), max_size=4),
    rslora=st.booleans(),
)
def test_rank_and_scale_are_pefts(ranks: dict[str, int], alphas: dict[str, float], rslora: bool) -> None:
    config = parse(r=5, lora_alpha=7, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    for module in MODULES:
        rank = ranks.get(get_pattern_key(ranks.keys(), module), 5)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), 7)
        assert config.rank(module) == rank
        assert config.scale(module) == pytest.approx(alpha / (rank**0.5 if rslora else rank), rel=1e-15)


@pytest.mark.parametrize("pattern", [r"\p{L}+", "(?R)", r"(?1)", r"(?<n>a)", "q{e<=1}", "q{e}_proj", r"\L<names>"])
def test_what_only_the_regex_library_understands_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterRefused, match="list the names instead") as caught:
        parse(target_modules=pattern).targets("model.layers.0.self_attn.q_proj")
    assert caught.value.reason == "pattern"


def test_hundreds_of_patterns_fit_the_allowance() -> None:
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(80) for name in "qkvo"]
    ranks = {name: 1 + index for index, name in enumerate(reversed(names))}
    config = parse(rank_pattern=ranks)
    assert [config.rank(name) for name in names] == [ranks[name] for name in names]
