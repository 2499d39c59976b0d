"""What a run tells at its end, and leaves beside the revision as report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.bundle.manifest import Manifest
from compress_jobs.report.brought import brought_lines
from compress_jobs.report.refusals import counts, refusal_lines, remedy_lines


@dataclass(frozen=True)
class ErrorFigure:
    """Mean and worst squared relative error over a set of adapters, and who is worst."""

    mean: float
    worst: float
    worst_adapter: str

    @staticmethod
    def of(errors: Mapping[str, float]) -> ErrorFigure | None:
        if not errors:
            return None
        worst = max(errors, key=lambda adapter_id: errors[adapter_id])
        return ErrorFigure(sum(errors.values()) / len(errors), errors[worst], worst)

    def is_clearly_below(self, other: ErrorFigure) -> bool:
        """By more than a hundredth of the other's mean: less is not worth a claim."""
        return self.mean < 0.99 * other.mean


@dataclass(frozen=True)
class Summary:
    """Figures of one run. Errors: ``served`` as published, over the adapters that were fitted; ``on_basis`` the same
    before the gate; ``clustering`` and ``random_split`` estimates on the sampled modules, for this clustering and for a
    random balanced split of the same size, of the ``num_estimated`` adapters that were clustered together (not with
    those that were placed afterwards in their clusters); ``svd_equal_bytes`` for plain truncation with the bytes that
    those adapters take in the bundle. ``module_errors``: module -> mean relative error on the bases. ``similarity``:
    mean cosine within and across clusters. ``choices``: what the automatic choice weighed. ``tradeoff``: bytes of
    resident tensors against mean error. ``num_fitted``: adapters meant for a basis, of which ``num_fitted_alone`` stand
    alone in ``bytes_alone``, ``num_dissolved`` of these though they met the gate; ``alternatives``: what would change
    that. ``gate``: how it was chosen, None where it was given; see ``job/gate.py``."""

    bundle: str
    num_adapters: int
    num_on_basis: int
    num_truncated: int
    num_raw: int
    num_refused: int
    cluster_sizes: dict[str, int]
    num_modules: int
    bytes_before: int
    bytes_after: int
    num_fitted: int
    num_fitted_alone: int
    num_dissolved: int
    bytes_alone: int
    alternatives: dict[str, Any] | None
    served: ErrorFigure | None
    on_basis: ErrorFigure | None
    clustering: ErrorFigure | None
    random_split: ErrorFigure | None
    num_estimated: int
    svd_equal_bytes: ErrorFigure | None
    clustering_start: str
    similarity: list[list[float]] | None
    module_errors: dict[str, float]
    gate: dict[str, Any] | None
    target_error: float | None
    choices: list[dict[str, Any]]
    tradeoff: list[dict[str, Any]]
    seconds: dict[str, float]
    bytes_read: int
    peak_task_memory_bytes: int

    def _alone_lines(self, manifest: Manifest) -> list[str]:
        """Where more than a tenth of those meant for a basis stand alone: what that costs, and what would change it."""
        if self.alternatives is None:
            return []
        others = [f"{option} {share:.0%}" for option, share in self.alternatives["kept"].items()]
        gate = f"--gate {self.alternatives['gate']:g} keeps nine in ten on bases, at {self.alternatives['error']:.3f}"
        lines = [
            f"warning    {self.num_fitted_alone} of {self.num_fitted} adapters meant for a basis stand alone, beyond "
            f"the gate of {manifest.method.gate:g}: {self.bytes_alone:,} of the {self.bytes_after:,} bytes",
            f"change     {gate} mean error" + (f"; kept at this gate: {', '.join(others)}" if others else ""),
        ]
        if self.num_dissolved:
            lines.append(
                f"dissolved  {self.num_dissolved} of them met the gate, but were so few on their basis that they take "
                "fewer bytes truncated"
            )
        return lines

    def _gate_lines(self, manifest: Manifest) -> list[str]:
        """What the gate was chosen by, and what it keeps."""
        if self.gate is None:
            return []
        gate, keep = manifest.method.gate, self.gate["keep"]
        if not self.gate["levels"]:
            return [f"gate       {gate:g}, the paper's: no evidence of this collection ({self.gate['reason']})"]
        level = next(level for level in self.gate["levels"] if level["gate"] == gate)
        judge = "held-out rows" if manifest.method.evidence == "loss" else "a probe, the own text"
        kept = (
            f"{level['kept']:.3f} of what they gain is kept, the worst {level['worst']:.3f} ({level['worst_adapter']})"
        )
        return [
            f"gate       {gate:g}, by {judge} of {len(self.gate['judged'])} sampled adapters: {kept}; "
            f"--keep {keep:g}; it took {self.gate['cpu_seconds']:.0f} CPU seconds"
        ]

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    def lines(self, manifest: Manifest) -> list[str]:
        out = []
        if self.num_refused:
            total = self.num_adapters + self.num_refused
            why = counts(manifest.refused)
            out.append(f"warning    {self.num_refused} of {total} adapters were refused and are not served: {why}")
            out += remedy_lines(manifest.refused, manifest.adapters)
        out += self._alone_lines(manifest)
        out += [
            f"adapters   {self.num_adapters} served: {self.num_on_basis} on a basis, {self.num_truncated} truncated, "
            f"{self.num_raw} raw; {self.num_refused} refused",
            *brought_lines(manifest),
            f"clusters   {len(self.cluster_sizes)} of rank {manifest.method.rank}, "
            f"sizes {' '.join(map(str, self.cluster_sizes.values())) or '-'} ({manifest.method.name})",
            f"modules    {self.num_modules}",
            f"bytes      {self.bytes_before:,} before, {self.bytes_after:,} after "
            f"({ratio_text(self.bytes_before, self.bytes_after)})",
            *self._gate_lines(manifest),
            "error      squared, energy-weighted             mean    worst",
        ]
        rows = [("as served", self.served)]
        if self.on_basis != self.served:
            rows.append(("all on their basis (no gate)", self.on_basis))
        rows += [
            ("SVD at equal bytes", self.svd_equal_bytes),
            ("on the sampled modules", self.clustering),
            ("random balanced split, sampled", self.random_split),
        ]
        for name, figure in rows:
            if figure is not None:
                out.append(f"           {name:<34} {figure.mean:6.4f}   {figure.worst:6.4f}  {figure.worst_adapter}")
        if self.random_split is not None and self.clustering is not None:
            out.append(f"           {_verdict(self.clustering, self.random_split)}")
            if self.num_estimated < self.num_fitted:
                out.append(f"           both {without_placed(self.num_estimated)}")
        for mode in ("truncated", "raw"):
            for adapter_id, adapter in sorted(manifest.adapters.items()):
                if adapter.mode == mode:
                    out.append(f"{mode:<10} {adapter_id}: rank {adapter.rank}, error {adapter.error:.4f}")
        out += refusal_lines(manifest.refused)
        out.append("seconds    " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items()))
        out.append(f"read       {self.bytes_read:,} bytes; largest task {self.peak_task_memory_bytes >> 20} MiB")
        return out


def ratio_text(before: int, after: int) -> str:
    return f"{before / after:.2f} times fewer" if before >= after else f"{after / before:.2f} times more"


def without_placed(num_estimated: int) -> str:
    return f"are of clusters of {num_estimated:,} adapters, without those that were placed in them afterwards"


def _verdict(ours: ErrorFigure, at_random: ErrorFigure) -> str:
    if ours.is_clearly_below(at_random):
        return f"clustering lowers the error of a random split by {1 - ours.mean / at_random.mean:.1%}"
    return "clustering is no better than a random split here: these adapters show no groups worth the name"
