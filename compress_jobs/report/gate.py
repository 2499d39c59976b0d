"""The section on the gate: what it was chosen by, and what each gate would have kept."""

from __future__ import annotations

from cluster.bundle.manifest import Manifest
from compress_jobs.report import plots
from compress_jobs.report.facts import Notes
from compress_jobs.report.page import Section, figure, paragraph, table

_BY = {
    "loss": "held-out rows: the share kept of the loss that an adapter gains over the base on its own",
    "probe": "a probe, which needs no data: on text that the uncompressed adapter writes, the share kept of its "
    "divergence from the base",
}


def gate(manifest: Manifest, report: Notes) -> Section | None:
    method, known = manifest.method, report.get("gate")
    if method.evidence is None or not known:
        return None
    if not known["levels"]:
        reason = f"The paper's gate of {method.gate:g} was taken, for there is no evidence of this collection: "
        return Section("gate", "The gate", paragraph(reason + known["reason"]))
    levels = [(level["gate"], level["kept"], level["worst"]) for level in known["levels"]]
    ways = [(way["error"], way["kept"]) for one in known["judged"] for way in one["ways"] if way["how"] != "whole"]
    at = next(level for level in known["levels"] if level["gate"] == method.gate)
    svg = plots.kept_by_gate(levels, ways, method.gate, known["keep"], "What is kept by gate; a table follows")
    here = (
        f"{len(known['judged'])} sampled adapters were judged by {_BY[method.evidence]}. At the gate of "
        f"{method.gate:g}, {at['kept']:.3f} is kept in the mean, and {at['worst']:.3f} of the worst, "
        f"{at['worst_adapter']}; {known['keep']:g} was asked for."
    )
    how = "A point is an adapter as some gate would have it served; the lines are all of them at that gate."
    rows = [
        (
            f"{one['gate']:g}",
            one["on_basis"],
            *(f"{one[key]:.4f}" for key in ("kept", "at_least", "worst")),
            one["worst_adapter"],
        )
        for one in known["levels"]
    ]
    header = ("gate", ">of them on a basis", ">kept, mean", ">of all, at least", ">worst", "who")
    return Section("gate", "The gate", figure(svg, how, here) + table("Gates that were tried", header, rows))
