"""report.html: self-contained, escaped, whatever is missing, the same for the same, and right in what it says."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cluster.bundle.manifest import Adapter, Base, Cluster, Manifest, Method, Refused
from cluster.layer import ModuleShape
from compress_jobs.__main__ import main
from compress_jobs.report import costs as report_costs
from compress_jobs.report import errors as report_errors
from compress_jobs.report import plots as report_plots
from compress_jobs.report.facts import verdict_on_svd
from compress_jobs.report.gate import gate
from compress_jobs.report.page import Section
from compress_jobs.report.render import render
from compress_jobs.report.summary import ErrorFigure
from tests.support.paths import REPOSITORY

LEFT_OUT = "does not have the form expected"
# Key of report.json -> anchors of the sections that stand or fall with it.
SECTIONS = {
    "module_errors": {"modules"},
    "similarity": {"similarity"},
    "tradeoff": {"trade-off"},
    "choices": {"choices"},
    "seconds": {"time"},
}
OTHER_KEYS = {
    "bytes_before", "bytes_after", "served", "on_basis", "clustering", "random_split", "svd_equal_bytes",
    "target_error",
    "bytes_read", "peak_task_memory_bytes", "cluster_sizes",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would find in a page, by the standard library's parser."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self._open: list[str] = []
        self._cell: list[str] | None = None
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        content = "".join(self._cell or [])
        if tag == "caption":
            self._caption, self._cell = content, None
        elif tag in ("td", "th"):
            self._rows[-1].append(content)
            self._cell = None
        elif tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        self.texts.append(data)
        if self._cell is not None:
            self._cell.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def anchors(self) -> set[str]:
        return {str(attributes["id"]) for tag, attributes in self.tags if tag == "section"}


def sha(number: int) -> str:
    return f"sha256:{number:064x}"


def make_manifest(num_adapters: int = 12, num_clusters: int = 3, **changes: Any) -> Manifest:
    """Every fifth adapter is truncated, every seventh raw (half of those by wish), the others on a basis."""
    chance = random.Random(num_adapters)
    adapters, slots, objects = {}, Counter[str](), {}
    for i in range(num_adapters):
        error = chance.uniform(0.01, 0.19)
        figures = {"error_unweighted": error * 1.2, "error_worst_module": error * 2}
        common: dict[str, Any] = {"version": sha(i), "etag": "e", "served": sha(i)} | figures
        if i % 5 == 4 or i % 7 == 6:
            mode, error = ("raw", 0.0) if i % 7 == 6 else ("truncated", error)
            adapters[f"t/a{i:04}"] = Adapter(mode=mode, error=error, factors=sha(10_000 + i), rank=4, **common)
            objects[sha(10_000 + i)] = 700 + i
        else:
            home = str(i % num_clusters)
            adapters[f"t/a{i:04}"] = Adapter(mode="core", error=error, cluster=home, slot=slots[home], **common)
            slots[home] += 1
    clusters = {name: Cluster(sha(20_000 + int(name)), sha(30_000 + int(name)), n) for name, n in slots.items()}
    objects |= {cluster.basis: 9000 for cluster in clusters.values()} | {c.cores: 300 for c in clusters.values()}
    kinds = [f"self_attn.{kind}_proj" for kind in "qkv"] + ["mlp.experts.0.w1", "mlp.experts.1.w1"]
    fields: dict[str, Any] = {
        "bundle": "b-0123456789abcdef",
        "revision": 0,
        "parent": None,
        "base": Base("org/base", sha(7)),
        "method": Method("jd-full", num_clusters, 8, 0, "bfloat16", 0.2, ("t/a0006",)),
        "modules": {f"model.layers.{layer}.{kind}": ModuleShape(8, 8) for layer in range(14) for kind in kinds},
        "clusters": clusters,
        "adapters": adapters,
        "refused": {},
        "objects": objects,
    }
    return Manifest(**(fields | changes))


def make_report(manifest: Manifest) -> dict[str, Any]:
    """Every key that a report.json may have."""
    chance = random.Random(0)
    k = len(manifest.clusters)
    options = [
        {"method": method, "clusters": c, "rank": r, "bytes": 1000 * r * (c or 9), "error": 0.5 / (r * (c or 4))}
        for method, c in (("jd-full", 1), ("jd-full", 3), ("jd-diag", 3), ("svd", 0))
        for r in (2, 4, 8)
    ]
    return {
        "bytes_before": 100_000,
        "bytes_after": manifest.resident_bytes(),
        "served": {"mean": 0.05, "worst": 0.19, "worst_adapter": "t/a0001"},
        "on_basis": {"mean": 0.06, "worst": 0.4, "worst_adapter": "t/a0004"},
        "clustering": {"mean": 0.06, "worst": 0.4, "worst_adapter": "t/a0002"},
        "random_split": {"mean": 0.08, "worst": 0.5, "worst_adapter": "t/a0002"},
        "svd_equal_bytes": {"mean": 0.04, "worst": 0.1, "worst_adapter": "t/a0003"},
        "module_errors": {module: chance.random() / 5 for module in manifest.modules},
        "similarity": [[0.5 + i / 100 if i == j else 0.1 for j in range(k)] for i in range(k)],
        "cluster_sizes": {name: cluster.num_slots for name, cluster in manifest.clusters.items()},
        "tradeoff": options,
        "choices": [
            {key: option[key] for key in ("method", "clusters", "rank", "error")}
            | {"size_bytes": option["bytes"], "confirmed_error": 0.041 if i == 5 else None, "chosen": i == 5}
            for i, option in enumerate(options)
        ],
        "target_error": 0.05,
        "seconds": {"inspect": 3.0, "cluster": 1.0, "fit": 6.0},
        "bytes_read": 200_000,
        "peak_task_memory_bytes": 300 << 20,
    }


def body_of(section: Section | None) -> str:
    assert section is not None
    return section.body


@pytest.fixture(scope="module")
def whole() -> tuple[Manifest, dict[str, Any], str]:
    manifest = make_manifest(refused={"bad": Refused("dora", "use_dora is true, expected false")})
    report = make_report(manifest)
    return manifest, report, render(manifest, report)


def test_the_page_needs_nothing_from_elsewhere(whole: tuple[Manifest, dict[str, Any], str]) -> None:
    text = whole[2]
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("href", "src", "xlink:href", "action", "srcset", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not re.search(r"https?:|@import|@font-face|javascript:", text)


def test_the_page_can_be_walked_without_seeing_it(whole: tuple[Manifest, dict[str, Any], str]) -> None:
    page = Page(whole[2])
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 7
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert dict(page.tags)["html"] == {"lang": "en"}
    assert "<title>Compression report: b-0123456789abcdef revision 0</title>" in whole[2]
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    used = [value[1:] for _, a in page.tags for key in ("href", "xlink:href") if (value := a.get(key) or "")[:1] == "#"]
    used += re.findall(r"url\(#([^)]*)\)", whole[2])
    assert set(used) <= set(ids)
    assert all(page.tables.values()), "a table without rows"


def test_everything_that_report_json_may_hold_is_shown(whole: tuple[Manifest, dict[str, Any], str]) -> None:
    manifest, report, text = whole
    page = Page(text)
    always = {"identity", "adapters", "clusters", "bytes", "grades"}
    assert page.anchors == always.union(*SECTIONS.values())
    assert set(report) == set(SECTIONS) | OTHER_KEYS
    assert LEFT_OUT not in text
    for sentence in (
        "plain truncation by SVD wins at equal bytes: mean error of this bundle 0.0500 against 0.0400.",
        "Clustering lowers the error of a random balanced split by 25.0% (mean 0.0600 against 0.0800).",
        "within clusters the mean cosine is 0.510, across 0.100",
        "10.0 seconds in all, 60% of them in fit. 200 kB were read, 2.00 times the adapters' files.",
        "The largest task held 300 MiB.",
        "It chose jd-full, 3 clusters of rank 8: 24 kB, predicted error 0.0208, confirmed on all modules 0.0410, "
        "within the target. The smallest SVD option that meets the target takes 36 kB, 1.50 times that.",
    ):
        assert sentence in page.text
    rows = {row[0]: row[1:] for row in page.tables["Bytes"]}
    assert rows["after, all together"][0] == f"{manifest.resident_bytes():,}"
    parts = sum(int(rows[part][0].replace(",", "")) for part in ("bases", "cores", "truncated", "raw"))
    assert parts == manifest.resident_bytes()
    by_layer = {row[0]: row[1:] for row in page.tables["Error by layer"]}
    assert by_layer["layer"] == ["q_proj", "k_proj", "v_proj", "mlp.experts.*.w1"]
    errors = report["module_errors"]
    assert by_layer["13"][1] == f"{errors['model.layers.13.self_attn.k_proj']:.4f}"
    experts = [errors[f"model.layers.13.mlp.experts.{i}.w1"] for i in (0, 1)]
    assert by_layer["13"][3] == f"{sum(experts) / 2:.4f}"


@pytest.mark.parametrize("bit", range(5))
def test_keys_that_report_json_lacks_take_only_their_own_sections_along(
    whole: tuple[Manifest, dict[str, Any], str], bit: int
) -> None:
    """The keys whose number has this bit are missing, or null: of any two keys, some page has only one."""
    manifest, report, text = whole
    keys = [*SECTIONS, *sorted(OTHER_KEYS)]
    assert len(keys) < 1 << 5
    gone = {key for i, key in enumerate(keys) if i >> bit & 1}
    less = {key: None if key in gone else value for key, value in report.items() if bit % 2 or key not in gone}
    thinner = render(manifest, less)
    assert LEFT_OUT not in thinner
    assert Page(thinner).anchors == Page(text).anchors - set[str]().union(*(SECTIONS.get(key, set()) for key in gone))


@pytest.mark.parametrize("method", ["jd-full", "svd"])
def test_the_manifest_alone_gives_a_page(method: str) -> None:
    manifest = make_manifest(40)
    if method == "svd":
        cut = {
            name: replace(adapter, mode="truncated", cluster=None, slot=None, factors=sha(1), rank=2)
            for name, adapter in manifest.adapters.items()
        }
        manifest = replace(
            manifest,
            method=replace(manifest.method, name="svd", clusters=0),
            adapters=cut,
            clusters={},
            objects={sha(1): 5},
        )
    page = Page(text := render(manifest, {}))
    assert LEFT_OUT not in text
    assert page.anchors == {"identity", "adapters", "bytes", "grades"} | ({"clusters"} if manifest.clusters else set())


def test_a_revision_that_lost_all_its_adapters_gives_a_page() -> None:
    assert Page(render(make_manifest(adapters={}, clusters={}, objects={}), {})).anchors == {"identity", "grades"}


def test_a_key_of_another_form_is_said_and_the_rest_stands(whole: tuple[Manifest, dict[str, Any], str]) -> None:
    manifest, report, text = whole
    odd_ones = {"tradeoff": [{"method": "svd"}], "seconds": 7, "served": {"mean": "low"}, "module_errors": None}
    odd = render(manifest, report | odd_ones)
    page = Page(odd)
    assert odd.count(LEFT_OUT) == 4  # the overview, the errors by adapter, the trade-off, the seconds
    assert "Choices weighed" in page.text
    assert page.tables["Clusters"] == Page(text).tables["Clusters"]


HOSTILE = "<script>alert(1)</script>\"' onload='x' $x_1$ &amp; ]]> --> \u65e5\u672c \u202egpj.exe\x00\ud800"
SHOWN = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd").replace("\ud800", "\ufffd")


def test_what_a_stranger_named_is_text_and_nothing_else() -> None:
    plain = make_manifest()
    first, *others = plain.clusters.values()
    adapters = dict(plain.adapters)
    adapters[HOSTILE] = replace(adapters.pop("t/a0000"), cluster=HOSTILE)
    adapters[HOSTILE + "2"] = adapters.pop("t/a0004")
    manifest = replace(
        plain,
        base=Base(HOSTILE, sha(7)),
        method=replace(plain.method, raw=(HOSTILE,)),
        modules={**plain.modules, f"layers.0.{HOSTILE}": ModuleShape(1, 1)},
        clusters={HOSTILE: first, "1": others[0], "2": others[1], "0": first},
        adapters=adapters,
        refused={HOSTILE: Refused(HOSTILE, HOSTILE)},
    )
    report = make_report(manifest)
    report["served"]["worst_adapter"] = HOSTILE
    report["seconds"][HOSTILE] = 1.0
    report["tradeoff"][0]["method"] = report["choices"][0]["method"] = HOSTILE
    text = render(manifest, report)
    text.encode()
    page = Page(text)
    assert LEFT_OUT not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.tables[f"Refused, not served: 1 (1 {SHOWN})"][1] == [SHOWN] * 3
    assert [row for row in page.tables["All adapters, the worst first"] if row[0] == SHOWN]
    # In a figure both ends of the long name are left.
    assert f"{SHOWN[:17]}…{SHOWN[-8:]}" in page.texts


@pytest.mark.slow
def test_the_same_revision_gives_the_same_bytes_whatever_the_process_and_the_order_of_keys(
    whole: tuple[Manifest, dict[str, Any], str], tmp_path: Path
) -> None:
    manifest, report, text = whole

    (tmp_path / "manifest.json").write_text(json.dumps(_reversed_keys(json.loads(manifest.to_json()))))
    (tmp_path / "report.json").write_text(json.dumps(_reversed_keys(report)))
    program = (
        "import json, sys; from pathlib import Path; from cluster.bundle.parsing import parse_manifest;"
        "from compress_jobs.report.render import render; folder = Path(sys.argv[1]);"
        "manifest = parse_manifest((folder / 'manifest.json').read_bytes(), 'test');"
        "sys.stdout.buffer.write(render(manifest, json.loads((folder / 'report.json').read_text())).encode())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo"},
    )
    assert elsewhere.stdout == text.encode()


def _reversed_keys(value: Any) -> Any:
    return {key: _reversed_keys(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


def test_every_adapter_that_is_not_on_a_basis_stands_there_with_its_reason() -> None:
    refused = {f"bad-{i:02}": Refused(f"reason-{i}", f"tensor {i} holds NaN; train it again") for i in range(30)}
    manifest = make_manifest(60, refused=refused)
    page = Page(body_of(report_costs.grades(manifest, {})))
    (title,) = [title for title in page.tables if title.startswith("Refused, not served: 30 (1 reason-0, ")]
    assert sorted(page.tables[title][1:]) == [[name, r.reason, r.message] for name, r in refused.items()]
    for mode in ("truncated", "raw"):
        own = sorted(name for name, adapter in manifest.adapters.items() if adapter.mode == mode)
        assert len(own) > 3
        rows = {row[0]: row[-1] for row in page.tables[f"{mode.capitalize()}: {len(own)}"][1:]}
        assert list(rows) == own
        for name, why in rows.items():
            reason = "--raw t/a0006" if name == "t/a0006" else "beyond the gate of 0.2"
            assert reason in why, name


def test_a_thousand_adapters_stay_small_and_the_worst_are_named() -> None:
    manifest = make_manifest(1000, 24)
    text = render(manifest, make_report(manifest))
    assert len(text.encode()) < 1_500_000
    assert LEFT_OUT not in text
    page = Page(text)
    worst = sorted(manifest.adapters, key=lambda name: -manifest.adapters[name].error)[:20]
    assert [row[0] for row in page.tables["The worst 20 of 1,000 adapters"][1:]] == worst
    # Clusters by number, though JSON's keys sort 10 before 2.
    rows = {row[0]: row[1] for row in page.tables["Mean cosine"][1:]}
    assert list(rows) == [str(i) for i in range(24)]
    assert rows["10"] == "0.600"
    assert rows["2"] == "0.520"


@pytest.mark.parametrize("num_adapters", [12, 60])
@pytest.mark.parametrize(("gate", "expected"), [(0.2, "gate 0.2"), (0.9, "gate 0.9: beyond this axis")])
def test_the_gate_is_drawn_or_said_to_lie_beyond(num_adapters: int, gate: float, expected: str) -> None:
    errors = {name: (a.mode, a.error) for name, a in make_manifest(num_adapters).adapters.items()}
    texts = Page(report_plots.error_by_adapter(errors, gate, {}, "label")).texts
    assert [text for text in texts if text.startswith(expected)]
    assert "truncated" in texts
    assert "raw" in texts


def test_adapters_over_the_gate_and_those_added_later_are_counted() -> None:
    manifest = make_manifest()
    on_basis = [name for name, adapter in manifest.adapters.items() if adapter.mode == "core"]
    errors = dict.fromkeys(on_basis, 0.1) | {on_basis[0]: 0.3, on_basis[1]: 0.05}
    adapters = {
        name: replace(adapter, error=errors.get(name, 0.0), added=2 if name in on_basis[:2] else None)
        for name, adapter in manifest.adapters.items()
    }
    text = Page(body_of(report_errors.adapters(replace(manifest, adapters=adapters), {}))).text
    assert f"1 of {len(on_basis)} on a basis are above the gate of 0.2." in text
    assert "2 adapters came after the fit, onto bases fitted without them: mean error 0.1750" in text
    assert "of those on a basis from the start 0.1000" in text


@pytest.mark.parametrize(
    ("joint", "svd", "expected"),
    [
        (0.05, 0.04, "plain truncation by SVD wins at equal bytes"),
        (0.04, 0.05, "loses 20.0% less than plain truncation by SVD"),
        (0.04, 0.0401, "within 1% of each other"),
    ],
)
def test_the_verdict_on_svd_follows_the_figures(joint: float, svd: float, expected: str) -> None:
    verdict = verdict_on_svd(ErrorFigure(joint, joint, "a"), ErrorFigure(svd, svd, "a"))
    assert expected in verdict
    assert f"{joint:.4f} against {svd:.4f}" in verdict


def test_clustering_no_better_than_a_random_split_is_not_praised(whole: tuple[Manifest, dict[str, Any], str]) -> None:
    manifest, report, _ = whole
    same = {"clustering": report["random_split"] | {"mean": 0.0796}, "similarity": [[0.1] * 3] * 3}
    text = Page(body_of(report_errors.clusters(manifest, report | same))).text
    assert "Clustering is no better than a random balanced split (mean 0.0796 against 0.0800)" in text
    text = Page(body_of(report_errors.similarity(manifest, report | same))).text
    assert "adapters are no more like those of their own cluster than like others" in text


def test_the_trade_off_counts_joint_options_that_beat_svd() -> None:
    points: list[Mapping[str, Any]] = [
        {"method": "svd", "rank": 1, "bytes": 100, "error": 0.5},
        {"method": "svd", "rank": 2, "bytes": 200, "error": 0.2},
        {"method": "jd-full", "clusters": 1, "rank": 1, "bytes": 50, "error": 0.9},  # no SVD option is as small
        {"method": "jd-full", "clusters": 1, "rank": 2, "bytes": 150, "error": 0.4},  # better than 0.5
        {"method": "jd-diag", "clusters": 1, "rank": 9, "bytes": 200, "error": 0.3},  # worse than 0.2
        {"method": "jd-diag", "clusters": 1, "rank": 9, "bytes": 250, "error": 0.25},  # worse too
        {
            "method": "jd-full",
            "clusters": 1,
            "rank": 9,
            "bytes": 300,
            "error": 0.0,
        },  # lossless has no place on the axis
    ]
    body = body_of(report_costs.trade_off(make_manifest(), {"tradeoff": points}))
    assert "1 of 3 joint options has a lower error than the best SVD option of no more bytes." in body


def test_the_frontier_is_what_nothing_beats() -> None:
    chance = random.Random(3)
    points = [(chance.randrange(1, 50), chance.randrange(1, 50) / 50) for _ in range(200)]
    unbeaten = {(b, e) for b, e in points if not any(b2 <= b and e2 <= e and (b2, e2) != (b, e) for b2, e2 in points)}
    assert report_plots.frontier(points) == sorted(unbeaten)


def test_the_command_writes_the_page_of_a_published_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, manifest = tmp_path / "bundle", make_manifest().with_own_id()
    revision = out / "bundles" / manifest.bundle / "revisions" / "0"
    revision.mkdir(parents=True)
    (revision / "manifest.json").write_bytes(manifest.to_json())
    (out / "CURRENT").write_text(json.dumps({"bundle": manifest.bundle, "revision": 0, "token": "test"}))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(out)]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert (tmp_path / "report.html").read_bytes() == render(manifest, {}).encode()

    notes = revision / "report.json"
    notes.write_text(json.dumps({"seconds": {"fit": 2.0}}))
    assert main(["report", f"{out}/bundles/{manifest.bundle}", "--to", str(tmp_path / "other.html")]) == 0
    assert "time" in Page((tmp_path / "other.html").read_text()).anchors

    assert main(["report", str(out), "--to", str(tmp_path)]) == 2
    assert f"--to {tmp_path}" in capsys.readouterr().err
    for broken in ("{", "[]", "7"):
        notes.write_text(broken)
        assert main(["report", str(out)]) == 1
        assert "report.json is not a JSON object" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 1


def test_the_gate_is_drawn_with_what_it_was_chosen_by(whole: tuple[Manifest, dict[str, Any], str]) -> None:
    manifest, _, text = whole
    assert "gate" not in Page(text).anchors, "it was given"
    level = {"kept": 0.995, "at_least": 0.991, "worst": 0.97, "worst_adapter": "t/<b>", "on_basis": 3}
    way = {"how": "basis", "error": 0.2, "kept": -50.0, "agreement": 0.9}
    notes = {
        "gate": {
            "keep": 0.99,
            "levels": [level | {"gate": gate} for gate in (0.1, manifest.method.gate)],
            "judged": [{"adapter_id": "t/<b>", "ways": [way], "by_level": [0, 0]}],
            "reason": "",
        }
    }
    probed = replace(manifest, method=replace(manifest.method, evidence="probe", keep=0.99))
    section = Page(body_of(gate(probed, notes)))
    assert "1 sampled adapters were judged by a probe" in section.text
    assert "0.995 is kept in the mean, and 0.970 of the worst, t/<b>; 0.99 was asked for" in section.text
    papers = replace(manifest, method=replace(manifest.method, evidence="paper", keep=0.99))
    without = {"gate": {"keep": 0.99, "levels": [], "judged": [], "reason": "no <base>"}}
    assert "no evidence of this collection: no <base>" in Page(body_of(gate(papers, without))).text
