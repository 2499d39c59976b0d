"""Placement, as pure data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bundle.serving_map import ServedAdapter, ServingMap
from cluster.errors import BaseModelError, PlacementError
from serve_app.placement import Group, Needs, check_fit, count_needs, homes_by_group, plan_groups

sizes_strategy = st.builds(
    lambda clusters, factors: (
        {f"cluster:{i}": size for i, size in enumerate(clusters)}
        | {f"factors:2.{i}": size for i, size in enumerate(factors)}
    ),
    st.lists(st.integers(1, 1000), max_size=9),
    st.lists(st.integers(1, 50), max_size=12),
)


def clusters_of(group: Group) -> list[str]:
    return [home for home in group.homes if home.startswith("cluster:")]


@given(sizes_strategy, st.one_of(st.just("auto"), st.integers(1, 10)), st.integers(1, 12), st.integers(1, 3))
def test_every_home_lies_in_exactly_one_group(
    sizes: dict[str, int], per_group: int | str, devices: int, replicas: int
) -> None:
    groups = plan_groups(sizes, per_group, devices if per_group == "auto" and devices >= replicas else None, replicas)
    assert sorted(home for group in groups for home in group.homes) == sorted(sizes)
    assert [group.name for group in groups] == [f"group-{i}" for i in range(len(groups))]
    assert all(group.resident_bytes == sum(sizes[home] for home in group.homes) for group in groups)
    assert all(group.replicas == replicas for group in groups)
    counts = [len(clusters_of(group)) for group in groups]
    assert max(counts) - min(counts) <= 1


@given(sizes_strategy, st.integers(1, 10))
def test_no_group_holds_more_clusters_than_asked(sizes: dict[str, int], per_group: int) -> None:
    groups = plan_groups(sizes, per_group, None, 1)
    assert all(len(clusters_of(group)) <= per_group for group in groups)
    num_clusters = sum(home.startswith("cluster:") for home in sizes)
    assert len(groups) == max(1, -(-num_clusters // per_group))


@pytest.mark.parametrize(
    ("devices", "replicas", "counts"),
    [(8, 1, [1, 1, 1, 1, 1]), (5, 1, [1, 1, 1, 1, 1]), (3, 1, [2, 2, 1]), (1, 1, [5]), (4, 2, [3, 2])],
)
def test_auto_is_a_cluster_a_group_while_devices_last_else_packed_evenly(
    devices: int, replicas: int, counts: list[int]
) -> None:
    groups = plan_groups({f"cluster:{i}": 10 for i in range(5)}, "auto", devices, replicas)
    assert sorted((len(group.homes) for group in groups), reverse=True) == counts


def test_groups_that_go_to_zero_may_be_more_than_the_devices_that_they_share() -> None:
    sizes = {f"cluster:{i}": 10 for i in range(5)}
    assert len(plan_groups(sizes, 1, 2, 0)) == 5
    assert len(plan_groups(sizes, "auto", 2, 0)) == 2


def test_factors_level_the_groups_by_bytes() -> None:
    sizes = {"cluster:0": 100, "cluster:1": 40} | {f"factors:4.{i}": 10 for i in range(10)}
    groups = plan_groups(sizes, 1, None, 1)
    assert [group.resident_bytes for group in groups] == [120, 120]


@pytest.mark.parametrize("sizes", [{}, {"factors:1.0": 1, "factors:2.0": 2}])
def test_a_bundle_without_clusters_still_gets_a_group(sizes: dict[str, int]) -> None:
    [group] = plan_groups(sizes, "auto", 4, 1)
    assert sorted(group.homes) == sorted(sizes)


def test_more_groups_than_devices_are_refused_with_both_numbers() -> None:
    with pytest.raises(PlacementError, match=r"6 devices in all; there are 4"):
        plan_groups({f"cluster:{i}": 1 for i in range(3)}, 1, 4, 2)


def test_needs_of_a_llama_with_grouped_heads_are_those_counted_by_hand() -> None:
    config = {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "dtype": "bfloat16",
    }
    needs = count_needs(config, stored_bytes=269_060_552, dtype="float32", max_batch=8, max_model_len=512)
    # One token: keys and values (2) of 30 layers, 3 heads of 576 / 9 = 64 numbers, 4 bytes each.
    assert needs == Needs(base_bytes=2 * 269_060_552, kv_bytes=8 * 512 * 46_080)


def test_a_config_that_hides_its_attention_is_refused() -> None:
    with pytest.raises(BaseModelError, match="num_hidden_layers"):
        count_needs({"num_attention_heads": 8, "hidden_size": 64}, 1, "float32", 1, 1)


def test_a_plan_fits_up_to_nine_tenths_of_a_device_and_no_byte_more() -> None:
    gib = 2**30
    groups = [Group("group-0", ("cluster:0",), 1, 1 * gib), Group("group-1", ("cluster:1",), 1, 2 * gib)]
    check_fit(groups, Needs(base_bytes=4 * gib, kv_bytes=3 * gib), 10 * gib)
    with pytest.raises(PlacementError) as caught:
        check_fit(groups, Needs(base_bytes=4 * gib, kv_bytes=3 * gib + 1), 10 * gib)
    for figure in ("group-1", "base 4.00 GiB", "adapters 2.00 GiB", "3.00 GiB", "10.00 GiB"):
        assert figure in str(caught.value)


def test_replicas_on_one_machine_share_its_memory() -> None:
    gib = 2**30
    groups = [Group(f"group-{index}", (f"cluster:{index}",), 1, gib) for index in range(3)]
    needs = Needs(base_bytes=gib, kv_bytes=gib)
    check_fit(groups, needs, 11 * gib, replicas_per_device=3)
    with pytest.raises(PlacementError, match=r"3 replicas share 9\.00 GiB"):
        check_fit(groups, needs, 9 * gib, replicas_per_device=3)


def test_homes_stay_where_they_were_planned_and_new_ones_go_to_the_same_group_whoever_asks() -> None:
    planned = {"group-0": ("cluster:0", "factors:2.0"), "group-1": ("cluster:1",), "group-2": ("cluster:2",)}

    def served(*homes: str) -> ServingMap:
        return ServingMap("base", {home: ServedAdapter(home, home, 0, "raw", None, "s", "v", 0.0) for home in homes})

    assert homes_by_group(planned, served("cluster:0", "cluster:1", "cluster:2", "factors:2.0")) == planned
    new = [f"factors:{rank}.0" for rank in range(3, 40)]
    placed = homes_by_group(planned, served("cluster:1", *new))
    assert placed["group-1"][0] == "cluster:1"
    assert sorted(home for homes in placed.values() for home in homes) == sorted(["cluster:1", *new])
    assert all(len(homes) >= 5 for homes in placed.values())
    alone = {home: group for home in new for group, homes in homes_by_group(planned, served(home)).items() if homes}
    assert alone == {home: group for group, homes in placed.items() for home in homes if home in new}
