"""The Ray Serve application: ``serve run serve_app.app:build bundle=<out> base=<model>``.

Opens the bundle, checks that the base is the one it was made for, plans the placement, refuses what does not
fit, and only then hands Serve a router and a deployment for each group. Nothing is loaded here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.adapters.base import read_base
from cluster.bundle.manifest import Manifest
from cluster.bundle.reading import Bundle
from cluster.errors import ConfigError
from cluster.store.address import open_store
from serve_app.arguments import Arguments, VllmArguments, parse_arguments
from serve_app.autoscaling import by_sequences
from serve_app.engine.vllm.plugin.compatibility import NOT_INSTALLED, vllm_version
from serve_app.http.routes import BodyLimits, make_api
from serve_app.placement import Group, check_fit, count_needs, home_sizes, plan_groups
from serve_app.replica.base_files import check_base, is_hub_id
from serve_app.replica.replica import GroupReplica, ReplicaSpec
from serve_app.routing.own_replicas import DRAIN_LOOK_S, PLAN, OwnReplicas
from serve_app.routing.router import Router, RouterSpec

ROUTER_CPUS = 0.1
# Status and health calls, and answers being cancelled, come on top of what the router lets through. Serve's
# own limit must never show: it would hold requests back without a word, where the router says 429.
SPARE_CALLS = 64
SPARE_REQUESTS = 1024
# Calls may be under way for so long after a replica was told to go, besides what a request may take.
SPARE_S = 30.0
DAY_S = 86_400.0
# Serve replaces a replica, and a router, that failed three in a row: one that hangs within some 30 seconds.
HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S = 2, 6
# Serve's settings for throughput keep a thousand lines of a process's log in memory; errors alone go out at once. A
# process that is killed would take along why.
LOG_AT_ONCE = {"env_vars": {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1"}}


def build(args: dict[str, Any]) -> Application:
    """The application for ``args`` (see ``serve_app.arguments``), its bundle and revision pinned.

    Raises ConfigError, BundleError, StoreError, BaseModelError, and PlacementError when it does not fit.
    """
    arguments = parse_arguments(args)
    bundle = Bundle.open(arguments.bundle, arguments.revision)
    base = arguments.base if is_hub_id(arguments.base) else open_store(arguments.base).uri
    device = choose_device(arguments.device)
    dtype = arguments.dtype if arguments.dtype != "auto" else {"cuda": "bfloat16", "cpu": "float32"}[device]
    groups = plan(arguments, bundle.manifest, base, device, dtype)
    engine = choose_engine(arguments.engine)
    if engine != "vllm" and arguments.vllm != VllmArguments():
        raise ConfigError(f"arguments vllm.* are of the engine vllm, and the engine is {engine}; leave them out")
    homes = {group.name: group.homes for group in groups}
    unnamed = [replica_spec(arguments, bundle, base, group, homes, engine, device, dtype) for group in groups]
    plan_name = name_plan(unnamed)
    specs = [replace(spec, plan=plan_name) for spec in unnamed]
    handles = {
        spec.name: replica_deployment(arguments, spec, group.replicas).bind(spec)
        for spec, group in zip(specs, groups, strict=True)
    }
    limits = arguments.limits
    router = RouterSpec(
        plan=plan_name,
        bundle=bundle.address,
        revision=bundle.manifest.revision,
        homes=homes,
        ready_share=arguments.start.ready_share,
        start_timeout_s=arguments.start.timeout_s,
        max_inflight=arguments.inflight_of_a_router,
        max_prompts=limits.max_prompts,
        request_timeout_s=limits.request_timeout_s,
        sse_keep_alive_s=arguments.http.sse_keep_alive_s,
        max_model_len=limits.max_model_len,
        refresh_interval_s=arguments.refresh_interval_s,
        follows=arguments.revision is None,
        adapter_chat_templates=arguments.adapter_chat_templates,
        at_zero=arguments.autoscaling.at_zero if arguments.can_be_at_zero else None,
    )
    origins = arguments.http.allowed_origins
    bodies = BodyLimits(limits.max_body, arguments.http.receive_timeout_s)
    return serve.deployment(
        serve.ingress(lambda: make_api(bodies, origins))(Router),
        name="router",
        num_replicas=arguments.routers,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=limits.request_timeout_s + SPARE_S,
        ray_actor_options={"num_cpus": ROUTER_CPUS, "runtime_env": LOG_AT_ONCE},
        max_ongoing_requests=len(groups) * arguments.inflight_of_a_router + SPARE_REQUESTS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
    ).bind(router, handles)


def name_plan(specs: Sequence[ReplicaSpec]) -> str:
    """Other for another plan: routers ask the replicas of their own. A package's version is part of it, for what they
    say to each other may change with that."""
    told = repr((version("compress-then-serve"), sorted(specs, key=lambda spec: spec.name)))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def plan(arguments: Arguments, manifest: Manifest, base: str, device: str, dtype: str) -> tuple[Group, ...]:
    """The groups; their fit is checked as far as this machine can know the base and the device's memory."""
    placement, limits, replicas = arguments.placement, arguments.limits, arguments.replicas_planned
    devices: int | None = placement.devices if placement.devices != "auto" else None
    if devices is None and placement.clusters_per_group == "auto":
        devices = max(count_devices(device), replicas)
    groups = plan_groups(home_sizes(manifest, dtype), placement.clusters_per_group, devices, replicas)
    if is_hub_id(base):
        return groups  # only the replica sees its files
    model = read_base(base)
    check_base(base, model.fingerprint, manifest.base)
    memory = placement.device_memory if placement.device_memory != "auto" else memory_of(device)
    if memory is not None:
        config: Mapping[str, Any] = json.loads(open_store(base).read("config.json").data)
        needs = count_needs(config, model.size_bytes, dtype, limits.max_batch, limits.max_model_len)
        num_replicas = len(groups) * (arguments.autoscaling.max or placement.replicas)
        if arguments.autoscaling.share_devices and devices is not None:
            num_replicas = min(num_replicas, devices)
        check_fit(groups, needs, memory, -(-num_replicas // max(1, count_devices("cpu"))) if device == "cpu" else 1)
    return groups


def replica_spec(
    arguments: Arguments,
    bundle: Bundle,
    base: str,
    group: Group,
    homes: Mapping[str, tuple[str, ...]],
    engine: str,
    device: str,
    dtype: str,
) -> ReplicaSpec:
    return ReplicaSpec(
        name=group.name,
        bundle=bundle.address,
        revision=bundle.manifest.revision,
        base=base,
        homes=homes,
        engine=engine,
        device=device,
        dtype=dtype,
        max_batch=arguments.limits.max_batch,
        max_model_len=arguments.limits.max_model_len,
        num_threads=max(1, int(arguments.placement.num_cpus)),
        headroom=arguments.placement.headroom,
        ready_share=arguments.start.ready_share,
        follows=arguments.revision is None,
        adapter_chat_templates=arguments.adapter_chat_templates,
        vllm=arguments.vllm,
    )


def replica_deployment(arguments: Arguments, spec: ReplicaSpec, replicas: int) -> serve.Deployment:
    return serve.deployment(
        GroupReplica,
        name=spec.name,
        **scaling(arguments, replicas),
        ray_actor_options={
            "num_cpus": arguments.placement.num_cpus,
            "num_gpus": 1 if spec.device == "cuda" else 0,
            "runtime_env": LOG_AT_ONCE,
        },
        max_ongoing_requests=arguments.limits.max_inflight + SPARE_CALLS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_surge_percent=arguments.placement.max_surge_percent,
        # Routers of the deploy before need it until the new ones have started, which they may never do. What bounds its
        # end is that of its calls; one that hangs ends itself, or is killed (RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS).
        graceful_shutdown_timeout_s=DAY_S,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
        request_router_config=RequestRouterConfig(
            request_router_class=OwnReplicas, request_router_kwargs={PLAN: spec.plan}
        ),
        # The router asks for the status every second.
        logging_config=LoggingConfig(enable_access_log=False),
    )


def scaling(arguments: Arguments, replicas: int) -> dict[str, Any]:
    """How many replicas a group has, as a deployment's options."""
    own = arguments.autoscaling
    if own.max is None:
        return {"num_replicas": replicas}
    config = AutoscalingConfig(
        min_replicas=own.min,
        max_replicas=own.max,
        target_ongoing_requests=own.target_ongoing,
        upscale_delay_s=own.upscale_delay_s,
        downscale_delay_s=own.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=by_sequences),
    )
    return {"autoscaling_config": config}


def choose_engine(engine: str) -> str:
    """vLLM where it is installed, else transformers. Raises ConfigError for a vLLM that is asked for and not there:
    better here, by name, than in each replica's log."""
    if engine == "auto":
        return "vllm" if vllm_version() is not None else "transformers"
    if engine == "vllm" and vllm_version() is None:
        raise ConfigError(NOT_INSTALLED)
    return engine


def choose_device(device: str) -> str:
    if device != "auto":
        return device
    if ray.is_initialized():
        return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def count_devices(device: str) -> int:
    """GPUs, or machines on CPU, of the Ray cluster; of this machine where Ray is not connected yet."""
    if ray.is_initialized():
        if device == "cuda":
            return int(ray.cluster_resources().get("GPU", 0))
        return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0)
    return torch.cuda.device_count() if device == "cuda" else 1


def memory_of(device: str) -> int | None:
    """Bytes of this machine's first such device; None where it has none to look at."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
