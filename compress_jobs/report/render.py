"""report.html: what a revision holds and what it lost, as one self-contained page.

    python -m compress_jobs report s3://lora/bundle --to report.html

Figures come from the manifest, and from report.json where it has them: revisions made by ``add`` and ``remove``, or by
older builds, have less of it, and the page then has fewer sections.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from cluster.bundle.manifest import Manifest
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import revision_key
from cluster.errors import BundleError, StoreMissing
from compress_jobs.report.brought import brought
from compress_jobs.report.facts import Notes, error_figure, gate_text, served_error, verdict_on_svd
from compress_jobs.report.page import Section, cards, count, error_text, page, paragraph, size_text, table

SectionMaker = Callable[[Manifest, Notes], Section | None]


def read_notes(bundle: Bundle) -> dict[str, Any]:
    """report.json beside the manifest, {} where there is none. Raises BundleError when it is not a JSON object."""
    key = revision_key(bundle.manifest.bundle, bundle.manifest.revision, "report.json")
    try:
        notes = json.loads(bundle.store.read(key).data)
    except StoreMissing:
        return {}
    except (ValueError, RecursionError) as error:
        notes = str(error)
    if not isinstance(notes, dict):
        raise BundleError(
            f"{bundle.store.uri}/{key} is not a JSON object; delete it to get the report that the manifest alone gives"
        )
    return notes


def render(manifest: Manifest, report: Mapping[str, Any]) -> str:
    """The page. The same content of ``manifest`` and ``report``, in whatever order of keys, gives the same text.

    ``report`` is report.json, {} where there is none. A key that is missing or null leaves its section out; one of an
    unexpected form is said on the page, for neither a run nor a reader should lose the rest by it. Raises nothing.
    """
    # Here, for matplotlib is slow to import and --help should not be.
    from compress_jobs.report import costs, errors
    from compress_jobs.report.gate import gate

    makers: tuple[tuple[str, SectionMaker], ...] = (
        ("What this is", _identity),
        ("Error by adapter", errors.adapters),
        ("The gate", gate),
        ("Error by layer and module kind", errors.modules),
        ("Clusters", errors.clusters),
        ("Similarity", errors.similarity),
        ("Trade-off", costs.trade_off),
        ("Choices weighed", costs.choices),
        ("Bytes", costs.sizes),
        ("Grades", costs.grades),
        ("Brought along", brought),
        ("Seconds", costs.seconds),
    )
    try:
        top = _overview(manifest, report)
    except _UNEXPECTED as error:
        top = _overview(manifest, {}) + _left_out(error)
    return page(
        f"Compression report: {manifest.bundle} revision {manifest.revision}",
        top,
        [section for title, make in makers if (section := _attempt(title, make, manifest, report))],
        "Made from the revision's manifest.json and report.json alone; the same files give the same page.",
    )


_UNEXPECTED = (ValueError, TypeError, KeyError, AttributeError, IndexError)


def _attempt(title: str, make: SectionMaker, manifest: Manifest, report: Notes) -> Section | None:
    try:
        return make(manifest, report)
    except _UNEXPECTED as error:
        return Section(title.lower().replace(" ", "-"), title, _left_out(error))


def _left_out(error: Exception) -> str:
    seen = f"{type(error).__name__}: {error}"
    return paragraph(f"Left out: report.json does not have the form expected here ({seen}).", "note")


def _overview(manifest: Manifest, report: Notes) -> str:
    method = manifest.method
    modes = [adapter.mode for adapter in manifest.adapters.values()]
    served, svd = served_error(manifest, report), error_figure(report, "svd_equal_bytes")
    before, after = report.get("bytes_before"), manifest.resident_bytes()
    how = ", ".join(
        f"{modes.count(mode):,} {name}"
        for mode, name in (("core", "on a basis"), ("truncated", "truncated"), ("raw", "raw"))
    )
    values = [("Adapters served", f"{len(modes):,}", f"{how}; {len(manifest.refused):,} refused")]
    if before:
        ratio, direction = (before / after, "fewer") if before >= after else (after / before, "more")
        sizes = f"{size_text(before)} before, {size_text(after)} after"
        values.append((f"Bytes, {direction} by a factor of", f"{ratio:.2f}", sizes))
    else:
        values.append(("Bytes resident", size_text(after), f"{after:,} bytes"))
    for label, error in (("Mean error", served), ("Mean error, SVD at equal bytes", svd)):
        if error:
            values.append((label, error_text(error.mean), f"worst {error_text(error.worst)}: {error.worst_adapter}"))
    groups = (
        f"{count(len(manifest.clusters), 'cluster')} of rank {method.rank}"
        if manifest.clusters
        else f"rank {method.rank}"
    )
    verdict = verdict_on_svd(served, svd)
    return (
        "<h1>Compression report</h1>\n"
        + paragraph(
            f"{manifest.bundle}, revision {manifest.revision}: {method.name}, {groups}, for {manifest.base.name}",
            "where",
        )
        + cards(values)
        + (paragraph(verdict) if verdict else "")
        + paragraph(
            "Every error here is squared and weighted by energy: Σ‖M − M̂‖² / Σ‖M‖² over an adapter's modules, M being "
            "the adapter's change of a module and M̂ what is served instead. 0 is lossless, 1 is as if there were no "
            "adapter. It is not a loss on a task: compress_jobs evaluate measures that."
        )
    )


def _identity(manifest: Manifest, report: Notes) -> Section:
    method = manifest.method
    rows = [
        ("Bundle", f"{manifest.bundle} revision {manifest.revision}"),
        ("Parent", "–" if manifest.parent is None else f"revision {manifest.parent}"),
        ("Base model", f"{manifest.base.name} ({manifest.base.fingerprint[:19]}…)"),
        ("Method", f"{method.name}, rank {method.rank}" + (f", {method.clusters} clusters" if method.clusters else "")),
        ("Chosen by the job", ", ".join(method.auto) or "nothing: all as given"),
        ("Target error", "–" if method.target_error is None else f"{method.target_error:g}"),
        ("Gate", gate_text(method)),
        ("Raw by wish", ", ".join(method.raw) or "–"),
        ("Tenants", "never share a cluster" if method.isolation == "tenant" else "may share clusters"),
        ("Stored as", f"{method.dtype}, seed {method.seed}"),
        ("Modules", f"{len(manifest.modules):,}"),
    ]
    return Section("identity", "What this is", table("Bundle and options", ("", ""), rows))
