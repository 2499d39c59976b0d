"""The sections of a report: what each says of a revision, computed from its manifest and its report.json."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.manifest import Adapter, Manifest
from compress_jobs.report_page import Section, count, error_text, figure, paragraph, size_text, table
from compress_jobs.summary import ErrorFigure

_WORST = 20
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Notes = Mapping[str, Any]


def adapters(manifest: Manifest, report: Notes) -> Section | None:
    from compress_jobs import report_plots

    found = manifest.adapters
    served, svd = served_error(manifest, report), error_figure(report, "svd_equal_bytes")
    if not found or not served:
        return None
    gate = manifest.method.gate
    above = [adapter_id for adapter_id, adapter in found.items() if adapter.mode == "core" and adapter.error > gate]
    num_core = sum(adapter.mode == "core" for adapter in found.values())
    means = {"mean as served": served.mean} | ({"mean of SVD at equal bytes": svd.mean} if svd else {})
    svg = report_plots.error_by_adapter(
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
        here += f"{error_text(_mean(added))}, of those on a basis from the start {error_text(_mean(fitted))}."
    body = figure(svg, "A mark, or a step of the curve, is an adapter; the less the better.", here)
    kinds = (
        ("as served", served),
        ("all on their basis, before the gate", error_figure(report, "on_basis")),
        ("random balanced split", error_figure(report, "random_split")),
        ("SVD at equal bytes", svd),
    )
    rows = [(name, error_text(f.mean), error_text(f.worst), f.worst_adapter) for name, f in kinds if f]
    body += table("Error over the adapters that were compressed", ("", ">mean", ">worst", "worst adapter"), rows)
    worst = sorted(found.items(), key=lambda item: (-item[1].error, item[0]))[:_WORST]
    caption = (
        f"The worst {_WORST} of {len(found):,} adapters" if len(found) > _WORST else "All adapters, the worst first"
    )
    header = ("adapter", "served", "cluster", ">error", ">unweighted", ">worst module", "came")
    rows = [(name, *_served_as(a), *map(error_text, _three(a)), _came(a)) for name, a in worst]
    if not added:
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Section("adapters", "Error by adapter", body + table(caption, header, rows))


def modules(manifest: Manifest, report: Notes) -> Section | None:
    from compress_jobs import report_plots

    errors = {name: float(error) for name, error in (report.get("module_errors") or {}).items() if error is not None}
    if not errors:
        return None
    cells: dict[tuple[str, str], list[float]] = {}
    for name, error in errors.items():
        cells.setdefault(_place(name), []).append(error)
    layers = sorted({layer for layer, _ in cells}, key=_by_number)
    kinds = sorted({kind for _, kind in cells}, key=_by_kind)
    values = np.array([[_mean(cells.get((layer, kind), [])) for layer in layers] for kind in kinds])
    svg = report_plots.heat_map(
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
        f"the largest is {error_text(errors[worst])} at {worst}, the smallest {error_text(min(errors.values()))}; mean by "
        f"kind: {by_kind}. {_svd_beside(report)}"
    )
    how = (
        "A cell is the mean error over the adapters that touch the module, each counted alike; darker is more, a ring "
        "marks the largest. A module of little energy may stand out here and hardly count in an adapter's error."
    )
    if values.shape[1] <= 12:
        how = how.replace(", a ring marks the largest", "")
    rows = [(layer, *(error_text(value) for value in column)) for layer, column in zip(layers, values.T, strict=True)]
    header = ("layer", *(f">{kind}" for kind in kinds))
    return Section(
        "modules", "Error by layer and module kind", figure(svg, how, here) + table("Error by layer", header, rows)
    )


def clusters(manifest: Manifest, report: Notes) -> Section | None:
    from compress_jobs import report_plots

    if not manifest.clusters:
        return None
    members: dict[str, list[Adapter]] = {name: [] for name in sorted(manifest.clusters, key=_by_number)}
    for adapter in manifest.adapters.values():
        if adapter.cluster is not None:
            members[adapter.cluster].append(adapter)
    counts = {name: len(own) for name, own in members.items()}
    svg = report_plots.cluster_sizes(counts, "Adapters in each cluster; the table below has the numbers")
    here = (
        f"{count(len(counts), 'cluster')} of {min(counts.values())} to {max(counts.values())} adapters. "
        f"{_verdict_on_split(report)} {_svd_beside(report)}"
    )
    body = figure(svg, "A bar is a cluster: adapters that share one basis.", here)
    rows = []
    for name, own in members.items():
        cluster = manifest.clusters[name]
        errors = [adapter.error for adapter in own]
        basis_bytes, cores_bytes = manifest.objects[cluster.basis], manifest.objects[cluster.cores]
        worst = error_text(max(errors, default=math.nan))
        rows.append((name, len(own), f"{basis_bytes:,}", f"{cores_bytes:,}", error_text(_mean(errors)), worst))
    header = ("cluster", ">adapters", ">basis, bytes", ">cores, bytes", ">error, mean", ">worst")
    body += table("Clusters", header, rows)
    if report.get("similarity"):
        body += _similarity(list(members), report["similarity"])
    return Section("clusters", "Clusters", body)


def _similarity(names: Sequence[str], rows: Sequence[Sequence[float | None]]) -> str:
    """``rows`` in ascending order of the clusters' numbers: a JSON object's own order would put 10 before 2."""
    from compress_jobs import report_plots

    values = np.array([[math.nan if value is None else float(value) for value in row] for row in rows])
    if values.shape != (len(names), len(names)):
        raise ValueError(f"similarity is {values.shape}, expected a row and a column for each of {len(names)} clusters")
    svg = report_plots.heat_map(
        "similarity",
        values,
        names,
        names,
        ("cluster", "cluster"),
        "mean cosine",
        "Similarity within and across clusters",
    )
    within = float(np.nanmean(np.diag(values)))
    here = f"within clusters the mean cosine is {within:.3f}"
    across = values[~np.eye(len(names), dtype=bool)]
    if np.isfinite(across).any():
        between = float(np.nanmean(across))
        here += f", across {between:.3f}: " + (
            f"adapters are more like those of their own cluster, by {within - between:.3f}."
            if within > between
            else "adapters are no more like those of their own cluster than like others."
        )
    how = "A cell is the mean cosine between the adapters of two clusters, on the diagonal within one; darker is more alike."
    table_rows = [
        (name, *(f"{v:.3f}" if np.isfinite(v) else "–" for v in row)) for name, row in zip(names, values, strict=True)
    ]
    return figure(svg, how, here) + table("Mean cosine", ("cluster", *(f">{name}" for name in names)), table_rows)


def trade_off(manifest: Manifest, report: Notes) -> Section | None:
    from compress_jobs import report_plots

    options = [option for option in report.get("tradeoff") or [] if _is_positive(option["error"])]
    if not options:
        return None
    weighed: dict[str, list[tuple[int, float]]] = {}
    for option in sorted(options, key=lambda option: (option["method"], option["bytes"], option["error"])):
        weighed.setdefault(option["method"], []).append((option["bytes"], option["error"]))
    served, svd = served_error(manifest, report), error_figure(report, "svd_equal_bytes")
    marked = {"this bundle": served, "SVD at equal bytes": svd}
    num_bytes = manifest.resident_bytes()
    target = report.get("target_error") or manifest.method.target_error
    svg = report_plots.trade_off(
        weighed,
        {name: (num_bytes, f.mean) for name, f in marked.items() if f and _is_positive(f.mean)},
        target,
        "Bytes against error of every option weighed; a table follows",
    )
    here = (
        f"{count(len(options), 'option')} weighed. " + _joint_against_svd(weighed) + " " + verdict_on_svd(served, svd)
    )
    how = (
        "Lower and further left is better. A mark is an option; a line joins those that no option of the same method "
        "beats. The star is what was published, the cross SVD in as many bytes."
    )
    rows = [
        (
            option["method"],
            option.get("clusters") or "–",
            option.get("rank", "–"),
            f"{option['bytes']:,}",
            error_text(option["error"]),
        )
        for option in sorted(options, key=lambda option: (option["bytes"], option["method"]))
    ]
    header = ("method", ">clusters", ">rank", ">bytes", ">error, mean")
    return Section(
        "trade-off",
        "Trade-off of bytes against error",
        figure(svg, how, here) + table("Options, by bytes", header, rows),
    )


def _joint_against_svd(weighed: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    svd = weighed.get("svd", [])
    joint = [point for method, points in weighed.items() if method != "svd" for point in points]
    comparable = [(error, [e for b, e in svd if b <= num_bytes]) for num_bytes, error in joint]
    pairs = [(error, min(others)) for error, others in comparable if others]
    if not pairs:
        return "None of the joint options has an SVD option of no more bytes beside it."
    better = sum(error < other for error, other in pairs)
    return f"{better} of {len(pairs)} joint options have a lower error than the best SVD option of no more bytes."


def choices(manifest: Manifest, report: Notes) -> Section | None:
    options = report.get("choices")
    if not options:
        return None
    target = report.get("target_error") or manifest.method.target_error
    chosen = [option for option in options if option.get("chosen")]
    text = f"The job weighed {count(len(options), 'option')}"
    text += f" for the fewest bytes with a mean error of at most {target:g}. " if target is not None else ". "
    for option in chosen:
        text += f"It chose {_option_name(option)}: {size_text(option['bytes'])}, predicted error "
        text += error_text(option.get("predicted_error"))
        confirmed = option.get("confirmed_error")
        text += f", confirmed on all modules {error_text(confirmed)}" if confirmed is not None else ", not confirmed"
        if target is not None and confirmed is not None:
            text += ", within the target" if confirmed <= target else ", which misses the target"
        text += ". "
    meeting = [
        o for o in options if target is not None and (_best_known(o) or math.inf) <= target and o["method"] == "svd"
    ]
    if meeting and chosen and chosen[0]["method"] != "svd":
        svd = min(meeting, key=lambda option: option["bytes"])
        more = svd["bytes"] / chosen[0]["bytes"] - 1
        text += f"The smallest SVD option that meets the target takes {size_text(svd['bytes'])}, {more:+.0%}."
    rows = [
        (
            _option_name(option),
            f"{option['bytes']:,}",
            error_text(option.get("predicted_error")),
            error_text(option.get("confirmed_error")),
            "–" if target is None or _best_known(option) is None else "yes" if _best_known(option) <= target else "no",
            "◀ chosen" if option.get("chosen") else "",
        )
        for option in sorted(options, key=lambda option: (option["bytes"], _option_name(option)))
    ]
    header = ("option", ">bytes", ">predicted error", ">confirmed error", "meets target", "")
    return Section("choices", "Choices weighed", paragraph(text) + table("Options, by bytes", header, rows))


def sizes(manifest: Manifest, report: Notes) -> Section | None:
    from compress_jobs import report_plots

    parts, before = _bytes_by_part(manifest), report.get("bytes_before")
    after = sum(parts.values())
    if not after:
        return None
    svg = report_plots.bytes_before_and_after(before, parts, "Bytes before and after, by part; a table follows")
    here = f"{size_text(before)} became {size_text(after)}, {ratio_text(before, after)}. " if before else ""
    slots = sum(cluster.num_slots for cluster in manifest.clusters.values())
    if slots:
        here += (
            f"The bases are {parts['bases'] / after:.0%} of it, and do not grow with the number of adapters: a further "
        )
        here += f"adapter on a basis takes a core of {size_text(parts['cores'] / slots)}."
    else:
        here += "No basis is shared: bytes grow with every adapter."
    rows = [(name, f"{size:,}", f"{size / after:.1%}") for name, size in parts.items() if size]
    rows.append(("after, all together", f"{after:,}", "100%"))
    if before:
        rows.insert(0, ("before", f"{before:,}", f"{before / after:.1%}"))
    how = "Bars are the adapters' files as they were, and all that is resident now, by what it is for."
    body = figure(svg, how, here) + table("Bytes", ("part", ">bytes", ">of the bytes after"), rows)
    return Section("bytes", "Bytes before and after", body)


def grades(manifest: Manifest, report: Notes) -> Section | None:
    parts = _bytes_by_part(manifest)
    cost = {"core": parts["bases"] + parts["cores"], "truncated": parts["truncated"], "raw": parts["raw"]}
    by_mode: dict[str, dict[str, Adapter]] = {mode: {} for mode in cost}
    for adapter_id, adapter in sorted(manifest.adapters.items()):
        by_mode[adapter.mode][adapter_id] = adapter
    total = sum(cost.values()) or 1
    rows = [
        (
            "on a basis" if mode == "core" else mode,
            f"{len(own):,}",
            f"{cost[mode]:,}",
            f"{cost[mode] / total:.1%}",
            error_text(_mean([adapter.error for adapter in own.values()])),
        )
        for mode, own in by_mode.items()
    ]
    body = table("Grades and what they cost", ("served", ">adapters", ">bytes", ">of all bytes", ">error, mean"), rows)
    for mode in ("truncated", "raw"):
        own = by_mode[mode]
        if mode == "truncated" and manifest.method.name == "svd":
            body += paragraph(
                f"The method is svd: every adapter is cut to rank {manifest.method.rank}, or less if the gate asks."
            )
        elif own:
            rows = [
                (
                    name,
                    a.rank,
                    error_text(a.error),
                    f"{manifest.objects[str(a.factors)]:,}",
                    _why_alone(manifest, name, a),
                )
                for name, a in own.items()
            ]
            body += table(f"{mode.capitalize()}: {len(own):,}", ("adapter", ">rank", ">error", ">bytes", "why"), rows)
    refused = [(name, refusal.reason, refusal.message) for name, refusal in sorted(manifest.refused.items())]
    if refused:
        body += table(f"Refused, not served: {len(refused):,}", ("adapter", "reason", "message"), refused)
    else:
        body += paragraph("No adapter was refused.")
    return Section("grades", "Truncated, raw and refused adapters", body)


def seconds(manifest: Manifest, report: Notes) -> Section | None:
    from compress_jobs import report_plots

    phases = {name: float(value) for name, value in (report.get("seconds") or {}).items() if value is not None}
    if not phases:
        return None
    # By length: JSON does not keep the order in which they ran.
    ranked = dict(sorted(phases.items(), key=lambda item: (-item[1], item[0])))
    total = sum(ranked.values())
    longest = next(iter(ranked))
    here = f"{total:,.1f} seconds in all, {ranked[longest] / (total or 1):.0%} of them in {longest}."
    before, read, peak = (report.get(key) for key in ("bytes_before", "bytes_read", "peak_task_memory_bytes"))
    if read:
        here += f" {size_text(read)} were read" + (
            f", {read / before:.2f} times the adapters' files." if before else "."
        )
    if peak:
        here += f" The largest task held {peak / 2**20:,.0f} MiB."
    svg = report_plots.seconds_by_phase(ranked, "Seconds by phase; a table follows")
    rows = [(name, f"{value:,.1f}", f"{value / (total or 1):.0%}") for name, value in ranked.items()]
    body = figure(svg, "Wall-clock seconds of the run's phases, the longest first.", here)
    return Section("time", "Seconds by phase", body + table("Phases", ("phase", ">seconds", ">share"), rows))


def error_figure(report: Notes, key: str) -> ErrorFigure | None:
    value = report.get(key)
    return ErrorFigure(float(value["mean"]), float(value["worst"]), value["worst_adapter"]) if value else None


def served_error(manifest: Manifest, report: Notes) -> ErrorFigure | None:
    """As the run reports it, else over all that were not opted out."""
    compressed = {name: a.error for name, a in sorted(manifest.adapters.items()) if not _raw_pattern(manifest, name)}
    return error_figure(report, "served") or ErrorFigure.of(compressed)


def verdict_on_svd(served: ErrorFigure | None, svd: ErrorFigure | None) -> str:
    """Joint against plain truncation at equal bytes; "" where one of them is not known."""
    if served is None or svd is None:
        return ""
    figures = f"{error_text(served.mean)} against {error_text(svd.mean)}"
    if svd.mean < 0.99 * served.mean:
        return (
            f"On this collection plain truncation by SVD wins at equal bytes: mean error of this bundle {figures}. Joint "
            "compression wins where the number of adapters is large against clusters × rank; what it gives here besides "
            "is less traffic per token (a core instead of an adapter's own factors)."
        )
    if served.mean < 0.99 * svd.mean:
        return f"At equal bytes this bundle loses {1 - served.mean / svd.mean:.1%} less than plain SVD: mean error {figures}."
    return f"At equal bytes this bundle and plain truncation by SVD are within 1% of each other: mean error {figures}."


def ratio_text(before: int, after: int) -> str:
    return f"{before / after:.2f} times fewer" if before >= after else f"{after / before:.2f} times more"


def _verdict_on_split(report: Notes) -> str:
    ours, at_random = error_figure(report, "on_basis"), error_figure(report, "random_split")
    if ours is None or at_random is None:
        return ""
    figures = f"(mean {error_text(ours.mean)} against {error_text(at_random.mean)})"
    if ours.mean < 0.99 * at_random.mean:
        return (
            f"Clustering lowers the error of a random balanced split by {1 - ours.mean / at_random.mean:.1%} {figures}."
        )
    return (
        f"Clustering is no better than a random balanced split {figures}: these adapters show no groups worth the name."
    )


def _svd_beside(report: Notes) -> str:
    svd = error_figure(report, "svd_equal_bytes")
    return f"SVD at equal bytes has a mean error of {error_text(svd.mean)} over the adapters." if svd else ""


def _bytes_by_part(manifest: Manifest) -> dict[str, int]:
    """Each object once, though several may name it."""
    parts = {"bases": {}, "cores": {}, "truncated": {}, "raw": {}}
    for cluster in manifest.clusters.values():
        parts["bases"][cluster.basis] = parts["cores"][cluster.cores] = 1
    for adapter in manifest.adapters.values():
        if adapter.factors:
            parts[adapter.mode][adapter.factors] = 1
    return {part: sum(manifest.objects[sha] for sha in shas) for part, shas in parts.items()}


def _why_alone(manifest: Manifest, adapter_id: str, adapter: Adapter) -> str:
    method = manifest.method
    if adapter.mode == "truncated":
        return f"beyond the gate of {method.gate:g} on a basis; rank {adapter.rank} is the smallest that meets it"
    if pattern := _raw_pattern(manifest, adapter_id):
        return f"by wish: --raw {pattern}"
    if method.name == "svd":
        return f"its own rank of {adapter.rank} is no larger than what the method keeps"
    return f"beyond the gate of {method.gate:g} on a basis, and no rank below its own meets it"


def _raw_pattern(manifest: Manifest, adapter_id: str) -> str | None:
    return next((pattern for pattern in manifest.method.raw if fnmatch.fnmatchcase(adapter_id, pattern)), None)


def _served_as(adapter: Adapter) -> tuple[str, str]:
    return ("on a basis" if adapter.mode == "core" else adapter.mode), adapter.cluster or "–"


def _three(adapter: Adapter) -> tuple[float, float, float]:
    return adapter.error, adapter.error_unweighted, adapter.error_worst_module


def _came(adapter: Adapter) -> str:
    return "with the fit" if adapter.added is None else f"with revision {adapter.added}"


def _option_name(option: Mapping[str, Any]) -> str:
    groups = f"{option['clusters']} × " if option.get("clusters") else ""
    return f"{option['method']} {groups}rank {option['rank']}"


def _best_known(option: Mapping[str, Any]) -> float | None:
    confirmed = option.get("confirmed_error")
    return option.get("predicted_error") if confirmed is None else confirmed


def _place(module: str) -> tuple[str, str]:
    """(layer, kind) of a module's name; experts of one layer count as one kind."""
    found = _LAYER.fullmatch(module)
    layer, kind = (found[1], found[2]) if found else ("–", module)
    return layer, re.sub(r"\.\d+\.", ".*.", kind).rpartition("self_attn.")[2]


def _by_kind(kind: str) -> tuple[int, str]:
    last = kind.rpartition(".")[2]
    return (_KINDS.index(last) if last in _KINDS else len(_KINDS)), kind


def _by_number(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() and name.isascii() else -1), name


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _is_positive(error: float) -> bool:
    return math.isfinite(error) and error > 0
