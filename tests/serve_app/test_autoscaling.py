"""How many replicas each group gets, as pure data; that Serve does it is claimed in tests/clients/test_scaling.py."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve_app.autoscaling import (
    KEEP,
    SEQUENCES,
    GroupLoad,
    ShareDevices,
    by_sequences,
    crowd_p99,
    share_devices,
    wanted_replicas,
)

loads = st.one_of(st.just(0.0), st.floats(0.01, 500))
group_strategy = st.builds(
    lambda load, replicas, least, more, target: GroupLoad(load, replicas, least, max(least + more, 1), target),
    loads,
    st.integers(0, 8),
    st.integers(0, 2),
    st.integers(0, 8),
    st.floats(1, 40),
)
groups_strategy = st.lists(group_strategy, min_size=1, max_size=8).map(
    lambda groups: {f"group-{index}": group for index, group in enumerate(groups)}
)


def spare_devices(groups: dict[str, GroupLoad], spare: int) -> int:
    return sum(group.least for group in groups.values()) + spare


@given(group_strategy)
def test_a_group_wants_what_its_load_needs_and_stays_within_its_bounds(group: GroupLoad) -> None:
    wanted = wanted_replicas(group)
    assert group.least <= wanted <= group.most
    if wanted < group.most:
        assert group.load <= wanted * group.target * (1 + 1e-9)
    if not group.load:
        assert wanted == group.least
    if group.load and group.most:
        assert wanted >= 1


@given(group_strategy, loads)
def test_a_group_never_wants_less_for_more_load(group: GroupLoad, more: float) -> None:
    assert wanted_replicas(replace(group, load=group.load + more)) >= wanted_replicas(group)


@given(st.integers(2, 40), st.floats(0.1, 1.2), st.floats(2, 40))
def test_what_a_group_gives_up_it_does_not_ask_back_for_the_same_requests(
    replicas: int, share: float, target: float
) -> None:
    """An engine with n sequences gives n / (target / 3 + n) of the most it can. Requests come at the same rate on."""

    def load_on(number: int, rate: float) -> float:
        busy = rate / number
        return number * (target / 3) * busy / (1 - busy) if busy < 1 else math.inf

    before = GroupLoad(share * target, replicas, 0, 100, target)
    rate = replicas * (before.load / replicas) / (target / 3 + before.load / replicas)
    seen = [replicas]
    for _ in range(60):
        load = load_on(seen[-1], rate)
        assert load < math.inf, f"{seen}: too few for what is asked"
        seen.append(wanted_replicas(replace(before, load=load, replicas=seen[-1])))
    assert seen == sorted(seen, reverse=True)


@given(groups_strategy, st.integers(0, 12))
def test_devices_are_never_exceeded_not_even_while_those_given_up_are_still_held(
    groups: dict[str, GroupLoad], spare: int
) -> None:
    devices = spare_devices(groups, spare)
    shared = share_devices(groups, devices)
    assert sum(shared.values()) <= devices
    begun = sum(max(group.replicas, group.least) for group in groups.values())
    assert sum(max(shared[name], group.replicas) for name, group in groups.items()) <= max(devices, begun)


@given(groups_strategy, st.integers(0, 12))
def test_no_group_gets_less_than_its_least_or_more_than_it_wants(groups: dict[str, GroupLoad], spare: int) -> None:
    shared = share_devices(groups, spare_devices(groups, spare))
    assert all(group.least <= shared[name] <= wanted_replicas(group) for name, group in groups.items())


@given(groups_strategy, st.integers(0, 12), loads, st.data())
def test_no_group_gets_less_for_more_load_of_its_own(
    groups: dict[str, GroupLoad], spare: int, more: float, data: st.DataObject
) -> None:
    devices, name = spare_devices(groups, spare), data.draw(st.sampled_from(sorted(groups)))
    raised = groups | {name: replace(groups[name], load=groups[name].load + more)}
    assert share_devices(raised, devices)[name] >= share_devices(groups, devices)[name]


@given(groups_strategy)
def test_with_devices_enough_every_group_gets_what_it_wants(groups: dict[str, GroupLoad]) -> None:
    wanted = {name: wanted_replicas(group) for name, group in groups.items()}
    enough = sum(max(wanted[name], group.replicas) for name, group in groups.items())
    assert share_devices(groups, enough) == wanted


@settings(deadline=None)
@given(groups_strategy, st.integers(1, 12), st.integers(0, 10**6))
def test_under_noise_no_device_goes_to_and_fro(groups: dict[str, GroupLoad], spare: int, seed: int) -> None:
    """Within [load, load / KEEP] each move happens once: after as many rounds as there are places, nothing moves."""
    devices, noise = spare_devices(groups, spare), random.Random(seed)

    def rounds(count: int, groups: dict[str, GroupLoad]) -> list[dict[str, int]]:
        seen = []
        have = {name: group.replicas for name, group in groups.items()}
        for _ in range(count):
            # The ends are the worst cases.
            factors = {name: noise.choice([1.0, noise.uniform(1.0, 1 / KEEP), (1 - 1e-9) / KEEP]) for name in groups}
            now = {n: replace(g, load=g.load * factors[n], replicas=have[n]) for n, g in groups.items()}
            have = share_devices(now, devices)
            seen.append(have)
        return seen

    seen = rounds(300, groups)
    moves = sum(before != after for before, after in itertools.pairwise(seen))
    places = sum(math.ceil(group.load / (KEEP**2 * group.target)) + group.replicas for group in groups.values())
    assert moves <= 2 * places
    settled = seen[-1]
    again = rounds(100, {name: replace(group, replicas=settled[name]) for name, group in groups.items()})
    assert sum(before != after for before, after in itertools.pairwise([settled, *again])) <= places


def test_devices_go_where_they_lower_the_p99_of_the_most() -> None:
    """Against every other way to share them out."""
    groups = {name: GroupLoad(load, 0, 1, 9, 2.0) for name, load in (("a", 30.0), ("b", 12.0), ("c", 11.0), ("d", 0.5))}
    shared = share_devices(groups, 9)

    def cost(replicas: dict[str, int]) -> float:
        return sum(group.load * crowd_p99(group.load, replicas[name]) for name, group in groups.items())

    ways = (dict(zip(groups, way, strict=True)) for way in itertools.product(range(1, 7), repeat=4) if sum(way) == 9)
    assert cost(shared) == pytest.approx(min(map(cost, ways)))


def test_a_first_replica_comes_before_any_second_one() -> None:
    groups = {"busy": GroupLoad(500.0, 3, 0, 8, 4.0), "cold": GroupLoad(0.1, 0, 0, 8, 4.0)}
    # What is busy gives one up first; only what is free then is given away.
    assert share_devices(groups, 3) == {"busy": 2, "cold": 0}
    assert share_devices(groups | {"busy": replace(groups["busy"], replicas=2)}, 3) == {"busy": 2, "cold": 1}


# As Serve calls it.


def context(name: str, load: float, target: int, queued: float = 0.0, running: int | None = None) -> AutoscalingContext:
    deployment = DeploymentID(name, "app")
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name=name,
        app_name="app",
        current_num_replicas=target if running is None else running,
        target_num_replicas=target,
        running_replicas=[],
        # Serve counts calls: a question for the state that a sample has caught.
        total_num_requests=queued or 0.2,
        total_queued_requests=queued,
        aggregated_metrics={SEQUENCES: {f"{name}#{i}": load / target for i in range(target)}} if target else {},  # type: ignore[dict-item]
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(
            min_replicas=0, max_replicas=4, target_ongoing_requests=8, upscale_delay_s=0, downscale_delay_s=0
        ),
    )


def serve_decides(devices: int, *contexts: AutoscalingContext) -> dict[str, int]:
    """By Serve's own wrapper, without delays."""
    policy = _apply_app_level_autoscaling_config(ShareDevices(devices))
    decided, _ = policy({own.deployment_id: own for own in contexts})
    return {deployment.name: number for deployment, number in decided.items()}


def test_a_question_for_the_state_is_no_load() -> None:
    assert by_sequences(context("a", load=0.0, target=1)) == (0, {})
    assert by_sequences(context("a", load=0.01, target=1)) == (1, {})


def test_serve_wakes_what_waits_at_zero_only_where_a_device_is_free() -> None:
    waiting = context("cold", load=0, target=0, queued=3.0)
    assert serve_decides(2, context("a", 6, 1), waiting) == {"a": 1, "cold": 1}
    assert serve_decides(2, context("a", 30, 2), waiting) == {"a": 1}
    assert serve_decides(1, context("a", 6, 1), waiting) == {"a": 1}


@pytest.mark.parametrize("policy", [by_sequences, ShareDevices])
def test_the_controller_needs_none_of_our_code(policy: Any) -> None:
    pickled = AutoscalingPolicy(policy_function=policy).get_serialized_policy_def()
    assert pickled is not None
    assert cloudpickle.loads(pickled).__name__ == policy.__name__
    assert b"serve_app." not in pickled.replace(b"serve_app.autoscaling", b"")
    assert "import serve_app" not in inspect.getsource(inspect.getmodule(policy) or policy)


@pytest.mark.parametrize("devices", [0, "8", True, 1.5])
def test_a_wrong_number_of_devices_is_refused(devices: Any) -> None:
    with pytest.raises(ValueError, match=r"policy_kwargs.devices is .*, expected a whole number of at least 1"):
        ShareDevices(devices)
