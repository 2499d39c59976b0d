"""The application's argument dictionary, as a command line and as a config file write it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.errors import ConfigError
from serve_app.arguments import (
    Arguments,
    AutoscalingArguments,
    HttpArguments,
    LimitArguments,
    PlacementArguments,
    VllmArguments,
    known_keys,
    parse_arguments,
)
from tests.support.paths import REPOSITORY

NEEDED = {"bundle": "out", "base": "base"}


def test_strings_of_a_command_line_mean_what_the_yaml_of_a_config_file_means() -> None:
    flat = {
        "revision": "3",
        "dtype": "bfloat16",
        "placement.clusters_per_group": "2",
        "placement.num_cpus": "0.5",
        "placement.device_memory": "80GiB",
        "autoscaling.min": "0",
        "autoscaling.max": "3",
        "autoscaling.target_ongoing": "4.5",
        "autoscaling.upscale_delay_s": "0",
        "autoscaling.at_zero": "refuse",
        "limits.max_batch": "16",
        "limits.request_timeout_s": "2.5",
        "http.allowed_origins": "https://a.org, http://b.org:8080",
        "vllm.tool_call_parser": "hermes",
        "vllm.enable_auto_tool_choice": "true",
    }
    nested = {
        "revision": 3,
        "dtype": "bfloat16",
        "placement": {"clusters_per_group": 2, "num_cpus": 0.5, "device_memory": 80 * 2**30},
        "autoscaling": {"min": 0, "max": 3, "target_ongoing": 4.5, "upscale_delay_s": 0, "at_zero": "refuse"},
        "limits": {"max_batch": 16, "request_timeout_s": 2.5},
        "http": {"allowed_origins": ["https://a.org", "http://b.org:8080"]},
        "vllm": {"tool_call_parser": "hermes", "enable_auto_tool_choice": True},
    }
    expected = Arguments(
        "out",
        "base",
        revision=3,
        dtype="bfloat16",
        placement=PlacementArguments(clusters_per_group=2, num_cpus=0.5, device_memory=85899345920),
        autoscaling=AutoscalingArguments(3, 0, target_ongoing=4.5, upscale_delay_s=0, at_zero="refuse"),
        limits=LimitArguments(max_batch=16, request_timeout_s=2.5),
        http=HttpArguments(allowed_origins=("https://a.org", "http://b.org:8080")),
        vllm=VllmArguments(tool_call_parser="hermes", enable_auto_tool_choice=True),
    )
    assert parse_arguments(NEEDED | flat) == parse_arguments(NEEDED | nested) == expected


def test_null_means_the_default() -> None:
    assert parse_arguments({**NEEDED, "revision": None, "placement": None}) == Arguments("out", "base")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"clusters": 2}, "'clusters'"),
        ({"placement": {"gpus": 2}}, "'placement.gpus'"),
        ({"limits.max_bach": "2"}, "'limits.max_bach'"),
    ],
)
def test_an_unknown_key_is_refused_by_name_beside_the_known_ones(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(NEEDED | args)
    assert named in str(caught.value)
    assert all(key in str(caught.value) for key in known_keys())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bundle", ""),
        ("revision", "-1"),
        ("revision", True),
        ("engine", "sglang"),
        ("device", "tpu"),
        ("dtype", "int8"),
        ("placement.clusters_per_group", "0"),
        ("placement.clusters_per_group", "some"),
        ("placement.devices", 1.5),
        ("placement.replicas", "two"),
        ("placement.num_cpus", "nan"),
        ("placement.num_cpus", 0),
        ("placement.device_memory", "80 gigs"),
        ("autoscaling.min", "-1"),
        ("autoscaling.max", 0),
        ("autoscaling.target_ongoing", 0),
        ("autoscaling.upscale_delay_s", "-1"),
        ("autoscaling.downscale_delay_s", 19),
        ("autoscaling.at_zero", "queue"),
        ("limits.max_batch", 0),
        ("limits.max_inflight", "1e3"),
        ("limits.request_timeout_s", "inf"),
        ("http.sse_keep_alive_s", 0),
        ("limits.max_body", "5MiB"),
        ("limits.max_body", "0"),
        ("http.allowed_origins", "a.org"),
        ("http.allowed_origins", ["https://a.org/path"]),
        ("http.allowed_origins", 3),
        ("vllm.tool_call_parser", ""),
        ("vllm.enable_auto_tool_choice", "perhaps"),
        ("vllm.structured_outputs_backend", "lmfe"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_was_seen(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments({**NEEDED, key: value})
    assert key in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("key", ["bundle", "base"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_arguments({name: value for name, value in NEEDED.items() if name != key})


def test_tool_calls_cannot_be_chosen_without_who_takes_them_apart() -> None:
    with pytest.raises(ConfigError, match=r"vllm\.enable_auto_tool_choice is true, which needs vllm\.tool_call_parser"):
        parse_arguments(NEEDED | {"vllm": {"enable_auto_tool_choice": True}})


@pytest.mark.parametrize(
    ("autoscaling", "told"),
    [
        ({"min": 0}, "argument autoscaling.min needs autoscaling.max"),
        ({"at_zero": "refuse"}, "argument autoscaling.at_zero needs autoscaling.max"),
        ({"min": 3, "max": 2}, "autoscaling.min is 3, more than autoscaling.max 2"),
        ({"max": 2, "at_zero": "refuse"}, "no group goes to zero with autoscaling.min 1"),
    ],
)
def test_autoscaling_that_contradicts_itself_is_refused(autoscaling: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_arguments(NEEDED | {"autoscaling": autoscaling})


def test_a_fixed_number_of_replicas_and_one_that_scales_are_not_both_taken() -> None:
    with pytest.raises(ConfigError, match=r"placement\.replicas is 2, a fixed number, beside autoscaling\.max 4"):
        parse_arguments(NEEDED | {"placement": {"replicas": 2}, "autoscaling": {"max": 4}})


@pytest.mark.parametrize(
    ("args", "replicas"),
    [
        ({"placement.replicas": 3}, 3),
        ({"autoscaling": {"min": 1, "max": 4}}, 4),
        ({"autoscaling": {"min": 1, "max": 4, "share_devices": True}}, 1),
        ({"autoscaling": {"min": 0, "max": 4, "share_devices": True}}, 0),
    ],
)
def test_devices_are_planned_for_what_each_group_may_have_or_must_where_they_are_shared(
    args: dict[str, Any], replicas: int
) -> None:
    assert parse_arguments(NEEDED | args).replicas_planned == replicas


def config(args: dict[str, Any], scaling: dict[str, Any] | None = None) -> ServeApplicationSchema:
    policy = {"policy_function": "serve_app.autoscaling:by_sequences"}
    deployments = [] if scaling is None else [{"name": "group-0", "autoscaling_config": scaling | {"policy": policy}}]
    own = {"import_path": "serve_app.app:build", "args": NEEDED | args, "deployments": deployments}
    return ServeApplicationSchema.model_validate(own)


def test_serve_starts_everything_anew_for_arguments_and_not_for_a_deployments_own_numbers() -> None:
    """By Serve's own version of the code; that nothing restarts is claimed in tests/clients/test_scaling.py."""
    scaling = {"min_replicas": 1, "max_replicas": 2}
    first = get_app_code_version(config({}, scaling))
    assert get_app_code_version(config({}, scaling | {"max_replicas": 8, "downscale_delay_s": 60})) == first
    assert get_app_code_version(config({})) != first, "the first numbers of its own"
    numbers = [get_app_code_version(config({"autoscaling": {"max": most}})) for most in (2, 3)]
    assert numbers[0] != numbers[1]


def test_an_option_given_nested_and_flat_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.max_batch is given twice"):
        parse_arguments({**NEEDED, "limits": {"max_batch": 2}, "limits.max_batch": "3"})


def test_a_request_that_could_never_be_admitted_is_no_limit() -> None:
    with pytest.raises(ConfigError, match=r"max_prompts is 64, more than limits\.max_inflight 8"):
        parse_arguments({**NEEDED, "limits": {"max_inflight": 8}})
    with pytest.raises(ConfigError, match=r"limits\.max_inflight 100 shared by 2 routers"):
        parse_arguments({**NEEDED, "routers": "2", "limits": {"max_inflight": 100}})


def test_the_shipped_serve_config_is_valid_for_ray_and_for_us() -> None:
    path = REPOSITORY / "infra" / "serve.yaml"
    document = yaml.safe_load(path.read_text())
    config = ServeDeploySchema.model_validate(document)
    [application] = config.applications
    assert application.import_path == "serve_app.app:build"
    assert application.runtime_env == {}
    assert config.http_options.host == "127.0.0.1"
    arguments = parse_arguments(application.args)
    # It teaches every default, and the file says the same as the code.
    assert arguments == Arguments(arguments.bundle, arguments.base)
    groups = ("placement", "autoscaling", "start", "limits", "http", "vllm")
    flat = set(application.args) | {f"{group}.{key}" for group in groups for key in application.args[group]}
    assert set(known_keys()) - flat == {"revision"}
