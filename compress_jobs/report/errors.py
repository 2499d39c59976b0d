"""The sections of a report on what was lost: by adapter, by layer and module kind, by cluster."""

from __future__ import annotations

import math
import re

import numpy as np

from cluster.bundle.manifest import Adapter, Manifest
from compress_jobs.report import plots
from compress_jobs.report.facts import Notes, by_number, error_figure, mean, served_error, svd_beside
from compress_jobs.report.page import Section, count, error_text, figure, table
from compress_jobs.report.summary import without_placed

_WORST = 20
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapters(manifest: Manifest, report: Notes) -> Section | None:
    found = manifest.adapters
    served, svd = served_error(manifest, report), error_figure(report, "svd_equal_bytes")
    if not found or not served:
        return None
    gate = manifest.method.gate
    above = [adapter_id for adapter_id, adapter in found.items() if adapter.mode == "core" and adapter.error > gate]
    num_core = sum(adapter.mode == "core" for adapter in found.values())
    means = {"mean as served": served.mean} | ({"mean of SVD at equal bytes": svd.mean} if svd else {})
    svg = plots.error_by_adapter(
        {adapter_id: (adapter.mode, adapter.error) for adapter_id, adapter in found.items()},
        gate,
        means,
        "Error of each adapter, sorted, with the gate; the table below has the worst",
    )
    here = (
        f"the mean is {error_text(served.mean)}, the worst {error_text(served.worst)} ({served.worst_adapter}). "
        + (f"{len(above)} of {num_core} on a basis are above the gate of {gate:g}. " if above else "")
        + (f"All {num_core} on a basis are within the gate of {gate:g}. " if num_core and not above else "")
        + (f"SVD at equal bytes has a mean of {error_text(svd.mean)}." if svd else "")
    )
    added = [adapter.error for adapter in found.values() if adapter.added is not None]
    if added:
        fitted = [adapter.error for adapter in found.values() if adapter.mode == "core" and adapter.added is None]
        here += f" {count(len(added), 'adapter')} came after the fit, onto bases fitted without them: mean error "
        here += f"{error_text(mean(added))}, of those on a basis from the start {error_text(mean(fitted))}."
    how = (
        "A mark is an adapter, its shape is how it is served; further left is better."
        if len(found) <= plots.MAX_NAMED
        else "The curve is all adapters, from the largest error to the smallest; marks are those served unlike most."
    )
    body = figure(svg, how, here)
    on_basis = error_figure(report, "on_basis")
    compared = (
        ("as served", served),
        ("all on their basis (no gate)", on_basis if on_basis != served else None),
        ("on the sampled modules", error_figure(report, "clustering")),
        ("random balanced split, sampled", error_figure(report, "random_split")),
        ("SVD at equal bytes", svd),
    )
    figures = [(name, error_text(f.mean), error_text(f.worst), f.worst_adapter) for name, f in compared if f]
    header = ["squared, energy-weighted", ">mean", ">worst", "worst adapter"]
    body += table("Error over the adapters that were compressed", header, figures)
    worst = sorted(found.items(), key=lambda item: (-item[1].error, item[0]))[:_WORST]
    caption = (
        f"The worst {_WORST} of {len(found):,} adapters" if len(found) > _WORST else "All adapters, the worst first"
    )
    header = ["adapter", "served", "cluster", ">error", ">unweighted", ">worst module"]
    rows = [_adapter_row(adapter_id, adapter) for adapter_id, adapter in worst]
    if added:
        header.append("came")
        rows = [(*row, _came(adapter)) for row, (_, adapter) in zip(rows, worst, strict=True)]
    return Section("adapters", "Error by adapter", body + table(caption, header, rows))


def modules(manifest: Manifest, report: Notes) -> Section | None:
    known = report.get("module_errors") or {}
    errors = {name: float(error) for name, error in known.items() if error is not None and math.isfinite(error)}
    if not errors:
        return None
    cells: dict[tuple[str, str], list[float]] = {}
    for name, error in errors.items():
        cells.setdefault(_place(name), []).append(error)
    layers = sorted({layer for layer, _ in cells}, key=by_number)
    kinds = sorted({kind for _, kind in cells}, key=_by_kind)
    values = np.array([[mean(cells.get((layer, kind), [])) for layer in layers] for kind in kinds])
    svg = plots.heat_map(
        "modules",
        values,
        kinds,
        layers,
        ("layer", ""),
        "squared error",
        "Mean error by layer and module kind; a table follows",
    )
    worst = max(sorted(errors), key=lambda name: errors[name])
    by_kind = ", ".join(f"{kind} {error_text(float(np.nanmean(row)))}" for kind, row in zip(kinds, values, strict=True))
    here = (
        f"the largest is {error_text(errors[worst])} at {worst}, the smallest {error_text(min(errors.values()))}; "
        f"mean by kind: {by_kind}. {svd_beside(report)}"
    )
    how = (
        f"A cell is the mean error over the adapters that touch the module, each counted alike; {_darker(values)}. "
        "A module of little energy may stand out here and hardly count in an adapter's error."
    )
    rows = [(layer, *(error_text(value) for value in column)) for layer, column in zip(layers, values.T, strict=True)]
    header = ("layer", *(f">{kind}" for kind in kinds))
    return Section(
        "modules", "Error by layer and module kind", figure(svg, how, here) + table("Error by layer", header, rows)
    )


def clusters(manifest: Manifest, report: Notes) -> Section | None:
    if not manifest.clusters:
        return None
    members: dict[str, list[Adapter]] = {name: [] for name in sorted(manifest.clusters, key=by_number)}
    for adapter in manifest.adapters.values():
        if adapter.cluster is not None:
            members[adapter.cluster].append(adapter)
    counts = {name: len(own) for name, own in members.items()}
    svg = plots.bars(
        "cluster-sizes", counts, ("cluster", "adapters"), "Adapters in each cluster; the table below has the numbers"
    )
    smallest, largest = min(counts.values()), max(counts.values())
    sizes = f"{smallest} to {largest}" if smallest < largest else f"{largest}"
    here = f"{count(len(counts), 'cluster')} of {sizes} adapters. {_verdict_on_split(report)} {svd_beside(report)}"
    body = figure(svg, "A bar is a cluster: adapters that share one basis.", here)
    rows = []
    for name, own in members.items():
        cluster = manifest.clusters[name]
        errors = [adapter.error for adapter in own]
        basis_bytes, cores_bytes = manifest.objects[cluster.basis], manifest.objects[cluster.cores]
        worst = error_text(max(errors, default=math.nan))
        rows.append((name, len(own), f"{basis_bytes:,}", f"{cores_bytes:,}", error_text(mean(errors)), worst))
    header = ("cluster", ">adapters", ">basis, bytes", ">cores, bytes", ">error, mean", ">worst")
    body += table("Clusters", header, rows)
    return Section("clusters", "Clusters", body)


def similarity(manifest: Manifest, report: Notes) -> Section | None:
    """Rows in ascending order of the clusters' numbers: the order of a JSON object's keys would put 10 before 2."""
    names = sorted(report.get("cluster_sizes") or manifest.clusters, key=by_number)
    rows = report.get("similarity") or []
    values = np.array([[math.nan if value is None else float(value) for value in row] for row in rows])
    if len(names) < 2 or not np.isfinite(values).any():
        return None
    if values.shape != (len(names), len(names)):
        raise ValueError(f"similarity is {values.shape}, expected a row and a column for each of {len(names)} clusters")
    svg = plots.heat_map(
        "similarity",
        values,
        names,
        names,
        ("cluster", "cluster"),
        "mean cosine",
        "Similarity within and across clusters",
    )
    across = np.where(np.eye(len(names), dtype=bool), np.nan, values)
    within, between = _mean_of(np.diag(values)), _mean_of(across)
    here = f"within clusters the mean cosine is {within:.3f}, across {between:.3f}: " + (
        f"adapters are more like those of their own cluster, by {within - between:.3f}."
        if within > between
        else "adapters are no more like those of their own cluster than like others."
    )
    by_cluster = []
    for i, name in enumerate(names):
        others = np.nan_to_num(across[i], nan=-np.inf)
        nearest = int(others.argmax())
        by_cluster.append(
            (name, *map(_cosine, (values[i, i], _mean_of(across[i]))), names[nearest], _cosine(others[nearest]))
        )
    how = f"A cell is the mean cosine between adapters of two clusters, on the diagonal of one; {_darker(values)}."
    header = ("cluster", ">within", ">across", "most like", ">by")
    body = figure(svg, how, here) + table("Mean cosine", header, by_cluster)
    return Section("similarity", "Similarity within and across clusters", body)


def _mean_of(values: np.ndarray) -> float:
    return mean([float(value) for value in values.flat if np.isfinite(value)])


def _cosine(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _darker(values: np.ndarray) -> str:
    return "darker is more" + (", a ring marks the largest" if plots.has_ring(values) else "")


def _verdict_on_split(report: Notes) -> str:
    # Both are estimates on the sample: what was fitted is measured otherwise.
    ours, at_random = error_figure(report, "clustering"), error_figure(report, "random_split")
    if ours is None or at_random is None:
        return ""
    figures = f"(mean {error_text(ours.mean)} against {error_text(at_random.mean)})"
    num_estimated = report.get("num_estimated")
    if num_estimated is not None and num_estimated < report["num_fitted"]:
        figures = f"{figures[:-1]}, which {without_placed(num_estimated)})"
    if ours.is_clearly_below(at_random):
        return (
            f"Clustering lowers the error of a random balanced split by {1 - ours.mean / at_random.mean:.1%} {figures}."
        )
    return (
        f"Clustering is no better than a random balanced split {figures}: these adapters show no groups worth the name."
    )


def _adapter_row(adapter_id: str, adapter: Adapter) -> tuple[str, ...]:
    served = "on a basis" if adapter.mode == "core" else adapter.mode
    errors = (adapter.error, adapter.error_unweighted, adapter.error_worst_module)
    return adapter_id, served, adapter.cluster or "–", *map(error_text, errors)


def _came(adapter: Adapter) -> str:
    return "with the fit" if adapter.added is None else f"with revision {adapter.added}"


def _place(module: str) -> tuple[str, str]:
    """(layer, kind) of a module's name; experts of one layer count as one kind."""
    found = _LAYER.fullmatch(module)
    layer, kind = (found[1], found[2]) if found else ("–", module)
    return layer, re.sub(r"\.\d+\.", ".*.", kind).rpartition("self_attn.")[2]


def _by_kind(kind: str) -> tuple[int, str]:
    last = kind.rpartition(".")[2]
    return (_KINDS.index(last) if last in _KINDS else len(_KINDS)), kind
