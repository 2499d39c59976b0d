"""One collection with every shape in which people have adapters: each ends as it should, and a person is told what to
do."""

from __future__ import annotations

import io
import shlex
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.bundle.manifest import Manifest
from cluster.bundle.reading import Bundle
from compress_jobs.job import ray_cluster
from tests.support.every_case import LEFT_OUT, SERVED, EveryCase, make
from tests.support.place import Place

pytestmark = pytest.mark.usefixtures("ray_for_jobs")

_SCREEN = 24


@dataclass(frozen=True)
class Published:
    place: Place
    case: EveryCase
    manifest: Manifest
    out: list[str]
    err: list[str]


@pytest.fixture(scope="module")
def published(generated: Path, tmp_path_factory: pytest.TempPathFactory, ray_for_jobs: None) -> Published:
    root = tmp_path_factory.mktemp("every-case")
    case = make(generated, root)
    place = Place(generated, root, 0)
    place.base = case.base
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray_cluster, "connect", lambda _: None)
        with redirect_stderr(io.StringIO()) as err:
            assert place.call("run") == 1  # far more than a tenth are refused
        assert not (place.out / "CURRENT").exists()
        assert "--max-refused" in err.getvalue()
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            assert place.call("run", "--max-refused", "100%") == 0
    lines = out.getvalue().splitlines(), err.getvalue().splitlines()
    return Published(place, case, Bundle.open(str(place.out)).manifest, *lines)


def test_each_ends_as_stated(published: Published) -> None:
    ends = dict.fromkeys(published.manifest.adapters, SERVED)
    ends |= {adapter_id: refused.reason for adapter_id, refused in published.manifest.refused.items()}
    ends |= dict.fromkeys(published.case.ends.keys() - ends.keys(), LEFT_OUT)
    assert ends == published.case.ends


def test_the_first_screen_says_what_was_refused_and_which_options_accept_it(published: Published) -> None:
    top = published.out[:_SCREEN]
    refused = Counter(end for end in published.case.ends.values() if end not in (SERVED, LEFT_OUT))
    told = f"{refused.total()} of {len(published.manifest.adapters) + refused.total()} adapters were refused"
    assert top[0].startswith(f"warning    {told} and are not served: {refused['base']} base, ")
    options = [line for line in top if line.startswith("accept ")]
    assert len(options) == 2
    assert "--accept-base '/scratch/*' --accept-unnamed-base" in options[0]
    assert "hub/models--{tenant}--{name}/snapshots/*" in options[1]
    assert any(line.startswith("brought    3 adapters came with") for line in top)
    assert any("left out 3 folders within adapters' folders" in line for line in published.err)


def test_each_refusal_is_printed_once_those_of_one_reason_together(published: Published) -> None:
    lines = [line for line in published.out + published.err if line.startswith("refused    ")]
    assert len(lines) == len(published.manifest.refused)
    reasons = [line.partition("(")[2].partition(")")[0] for line in lines]
    assert reasons == sorted(reasons)


def test_files_that_are_something_else_are_named_with_the_remedy(published: Published) -> None:
    messages = {name: refused.message for name, refused in published.manifest.refused.items()}
    for name, what, remedy in (
        ("lfs", "Git LFS pointer", "git lfs pull"),
        ("lfs-config", "Git LFS pointer", "git lfs pull"),
        ("html", "HTML page", "upload"),
        ("xml", "XML document", "upload"),
        ("zip", "zip archive", "upload the file itself that is in it"),
        ("gzip", "gzip archive", "upload the file itself that is in it"),
        ("pickle", "pickle", "save it with safetensors"),
        ("bin", "pickled", "save them as adapter_model.safetensors"),
        ("shards", "in shards", "save them as one"),
        ("mlx", "saved by MLX", "convert it to PEFT's"),
        ("zero-3", "holds no tensor", "gather the parameters"),
    ):
        message = messages[f"unsound-{name}"]
        assert what in message
        assert remedy in message


def test_what_was_brought_along_is_in_the_manifest(published: Published) -> None:
    for adapter_id, kinds in published.case.brought.items():
        assert published.manifest.adapters[adapter_id].brought.keys() == kinds
    assert len(published.manifest.templates) == 1


def test_what_the_first_screen_says_accepts_them(
    published: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_cluster, "connect", lambda _: None)
    options = [line.partition(": ")[2] for line in published.out if line.startswith("accept ")]
    more = [word for line in options for word in shlex.split(line)]
    place = Place(published.place.generated, tmp_path, 0)
    place.adapters, place.base = published.case.adapters, published.case.base
    assert place.call("run", "--max-refused", "100%", *more) == 0
    expected = {i for i, end in published.case.ends.items() if end in (SERVED, "base")} | {"org/deep"}
    assert place.served() == expected
