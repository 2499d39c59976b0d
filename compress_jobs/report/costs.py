"""The sections of a report on what it costs: bytes against error, the choices weighed, bytes, grades, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.bundle.manifest import Adapter, Manifest
from compress_jobs.report import plots
from compress_jobs.report.facts import (
    Notes,
    error_figure,
    is_positive,
    mean,
    raw_pattern,
    served_error,
    verdict_on_svd,
)
from compress_jobs.report.page import Section, count, error_text, figure, paragraph, size_text, table
from compress_jobs.report.refusals import counts
from compress_jobs.report.summary import ratio_text


def trade_off(manifest: Manifest, report: Notes) -> Section | None:
    options = [option for option in report.get("tradeoff") or [] if is_positive(option["error"])]
    if not options:
        return None
    weighed: dict[str, list[tuple[int, float]]] = {}
    for option in sorted(options, key=lambda option: (option["method"], option["bytes"], option["error"])):
        weighed.setdefault(option["method"], []).append((option["bytes"], option["error"]))
    served, svd = served_error(manifest, report), error_figure(report, "svd_equal_bytes")
    marked = {"this bundle": served, "SVD at equal bytes": svd}
    num_bytes = manifest.resident_bytes()
    target = report.get("target_error") or manifest.method.target_error
    svg = plots.trade_off(
        weighed,
        {name: (num_bytes, f.mean) for name, f in marked.items() if f and is_positive(f.mean)},
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
    return (
        f"{better or 'None'} of {count(len(pairs), 'joint option')} {'has' if better == 1 else 'have'} a lower error "
        "than the best SVD option of no more bytes."
    )


def choices(manifest: Manifest, report: Notes) -> Section | None:
    options = report.get("choices")
    if not options:
        return None
    target = report.get("target_error") or manifest.method.target_error
    # What was chosen first: a long table scrolls.
    options = sorted(options, key=lambda option: (not option.get("chosen"), option["size_bytes"], _option_name(option)))
    text = f"The job weighed {count(len(options), 'option')}"
    text += f" for the fewest bytes with a mean error of at most {target:g}. " if target is not None else ". "
    if options[0].get("chosen"):
        text += _on_choice(options[0], options, target)
    rows = [
        (
            _option_name(option),
            "chosen" if option.get("chosen") else "",
            f"{option['size_bytes']:,}",
            error_text(option.get("error")),
            error_text(option.get("confirmed_error")),
            {True: "yes", False: "no", None: "–"}[_meets(option, target)],
        )
        for option in options
    ]
    header = ("option", "", ">bytes", ">predicted error", ">confirmed error", "meets target")
    return Section("choices", "Choices weighed", paragraph(text) + table("Options, by bytes", header, rows))


def _on_choice(chosen: Mapping[str, Any], options: Sequence[Mapping[str, Any]], target: float | None) -> str:
    confirmed = chosen.get("confirmed_error")
    text = f"It chose {_option_name(chosen)}: {size_text(chosen['size_bytes'])}, predicted error "
    text += error_text(chosen.get("error"))
    text += f", confirmed on all modules {error_text(confirmed)}" if confirmed is not None else ", not confirmed"
    if confirmed is not None and target is not None:
        text += ", within the target" if confirmed <= target else ", which misses the target"
    svd = [option["size_bytes"] for option in options if option["method"] == "svd" and _meets(option, target)]
    if chosen["method"] == "svd":
        return text + ". Plain SVD is the best of what was weighed for this collection."
    if not svd:
        return text + (". No SVD option that was weighed meets the target." if target is not None else ".")
    ratio = min(svd) / chosen["size_bytes"]
    return (
        text + f". The smallest SVD option that meets the target takes {size_text(min(svd))}, {ratio:.2f} times that."
    )


def _meets(option: Mapping[str, Any], target: float | None) -> bool | None:
    """By the confirmed error, else by the predicted one; None where that cannot be said."""
    confirmed = option.get("confirmed_error")
    error = option.get("error") if confirmed is None else confirmed
    return None if error is None or target is None else bool(error <= target)


def sizes(manifest: Manifest, report: Notes) -> Section | None:
    parts, before = _bytes_by_part(manifest), report.get("bytes_before")
    after = sum(parts.values())
    if not after:
        return None
    svg = plots.bytes_before_and_after(before, parts, "Bytes before and after, by part; a table follows")
    here = f"{size_text(before)} became {size_text(after)}, {ratio_text(before, after)}. " if before else ""
    slots = sum(cluster.num_slots for cluster in manifest.clusters.values())
    if slots:
        here += f"The bases are {parts['bases'] / after:.0%} of it and do not grow with the number of adapters: "
        here += f"a further adapter on a basis takes a core of {size_text(parts['cores'] / slots)}."
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
            error_text(mean([adapter.error for adapter in own.values()])),
        )
        for mode, own in by_mode.items()
    ]
    body = table("Grades and what they cost", ("served", ">adapters", ">bytes", ">of all bytes", ">error, mean"), rows)
    for mode in ("truncated", "raw"):
        own = by_mode[mode]
        if mode == "truncated" and manifest.method.name == "svd":
            rank = manifest.method.rank
            body += paragraph(
                f"The method is svd: adapters are cut to rank {rank}, to more where the gate asks for it."
            )
        elif own:
            header = ("adapter", ">rank", ">error", ">bytes", "why")
            alone = [_row_alone(manifest, adapter_id, adapter) for adapter_id, adapter in own.items()]
            body += table(f"{mode.capitalize()}: {len(own):,}", header, alone)
    by_reason = sorted(manifest.refused.items(), key=lambda item: (item[1].reason, item[0]))
    refused = [(name, refusal.reason, refusal.message) for name, refusal in by_reason]
    if refused:
        title = f"Refused, not served: {len(refused):,} ({counts(manifest.refused)})"
        body += table(title, ("adapter", "reason", "message"), refused)
    else:
        body += paragraph("No adapter was refused.")
    return Section("grades", "Truncated, raw and refused adapters", body)


def seconds(manifest: Manifest, report: Notes) -> Section | None:
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
    svg = plots.bars("seconds", ranked, ("phase", "seconds"), "Seconds by phase; a table follows")
    rows = [(name, f"{value:,.1f}", f"{value / (total or 1):.0%}") for name, value in ranked.items()]
    body = figure(svg, "Wall-clock seconds of the run's phases, the longest first.", here)
    return Section("time", "Seconds by phase", body + table("Phases", ("phase", ">seconds", ">share"), rows))


def _bytes_by_part(manifest: Manifest) -> dict[str, int]:
    """Each object once, though several may name it."""
    parts: dict[str, set[str]] = {"bases": set(), "cores": set(), "truncated": set(), "raw": set()}
    for cluster in manifest.clusters.values():
        parts["bases"].add(cluster.basis)
        parts["cores"].add(cluster.cores)
    for adapter in manifest.adapters.values():
        if adapter.factors:
            parts[adapter.mode].add(adapter.factors)
    return {part: sum(manifest.objects[sha] for sha in shas) for part, shas in parts.items()}


def _row_alone(manifest: Manifest, adapter_id: str, adapter: Adapter) -> tuple[str, ...]:
    num_bytes = manifest.objects[str(adapter.factors)]
    why = _why_alone(manifest, adapter_id, adapter)
    return adapter_id, str(adapter.rank), error_text(adapter.error), f"{num_bytes:,}", why


def _why_alone(manifest: Manifest, adapter_id: str, adapter: Adapter) -> str:
    method = manifest.method
    if adapter.mode == "truncated":
        return f"beyond the gate of {method.gate:g} on a basis; rank {adapter.rank} is the smallest that meets it"
    if pattern := raw_pattern(manifest, adapter_id):
        return f"by wish: --raw {pattern}"
    if method.name == "svd":
        return f"its own rank of {adapter.rank} is no larger than what the method keeps"
    return f"beyond the gate of {method.gate:g} on a basis, and no rank below its own meets it"


def _option_name(option: Mapping[str, Any]) -> str:
    groups = f"{count(option['clusters'], 'cluster')} of " if option.get("clusters") else ""
    return f"{option['method']}, {groups}rank {option['rank']}"
