"""The benchmark of homes: the bundles that it starts engines with."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.adapters.base import read_base
from cluster.errors import ConfigError
from infra.bench.homes import write_bundle, write_cores, write_truncated
from infra.bench.slot_rank import slot_rank
from serve_app.placement import home_sizes


def test_a_bundle_of_either_kind_holds_as_many_adapters_as_asked_on_all_of_q_k_and_v(
    base_path: Path, tmp_path: Path
) -> None:
    base = read_base(str(base_path))
    made = {
        "cores": write_bundle(f"{tmp_path}/cores", base, lambda store, shapes: write_cores(store, shapes, 4)),
        "alone": write_bundle(f"{tmp_path}/alone", base, lambda store, shapes: write_truncated(store, shapes, 3, 2)),
    }
    assert {name: len(bundle.manifest.adapters) for name, bundle in made.items()} == {"cores": 4, "alone": 3}
    assert made["alone"].serving_map.homes() == ["factors:2.0"]
    assert len(made["cores"].serving_map.homes()) == 4
    for bundle in made.values():
        for home in bundle.serving_map.homes()[:1]:
            loaded = bundle.load_home(home)
            assert not loaded.failed
            assert len(loaded.weights) == 90
        assert home_sizes(bundle.manifest, "float32").keys() == set(bundle.serving_map.homes())
    again = write_bundle(f"{tmp_path}/alone", base, lambda store, shapes: write_truncated(store, shapes, 5, 2))
    assert again.manifest == made["alone"].manifest


def test_a_rank_takes_the_smallest_slot_that_vllm_has_and_beyond_is_refused() -> None:
    assert [slot_rank(rank) for rank in (1, 8, 9, 64, 300, 512)] == [8, 8, 16, 64, 320, 512]
    with pytest.raises(ConfigError, match="rank 513"):
        slot_rank(513)
