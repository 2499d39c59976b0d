"""What a sampled adapter keeps, served in each of the ways that some gate would have it served in."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cluster.adapters.factors import Factors
from cluster.adapters.reading import read_modules
from cluster.adapters.record import AdapterRecord
from cluster.compression.svd import adapter_spectra, smallest_rank, truncate
from cluster.errors import AdapterChanged, CtsError
from cluster.store.address import open_store
from cluster.store.download import default_cache, download
from compress_jobs.job.context import JobContext
from compress_jobs.job.parts import once, read_tensors
from compress_jobs.quality.gate_choice import BASIS, LEVELS, NOTHING, Judged, Served
from compress_jobs.quality.task import Task

if TYPE_CHECKING:
    from compress_jobs.quality.scorer import Scorer

Adapter = Mapping[str, Factors]
Judge = Callable[[Adapter], tuple[float, float | None]]
"""From an adapter's compressed factors to ``kept`` and ``agreement`` of ``Served``."""


@dataclass(frozen=True)
class Subject:
    """A sampled adapter. ``part``: (cluster, position among its members) where it was fitted, ``error``: its error
    there, 1 where it was not; ``task``: its held-out rows."""

    record: AdapterRecord
    part: tuple[int, int] | None
    error: float
    task: Task | None


@dataclass(frozen=True)
class Examined:
    """``judged`` None: nothing can be told by the adapter. It changed, answers as the base does, or ``failed``;
    ``is_loaded``: whether there was a base to ask."""

    judged: Judged | None = None
    failed: str = ""
    is_loaded: bool = True
    cpu_seconds: float = 0.0


def examine(context: JobContext, num_layers: int, subjects: Sequence[Subject]) -> list[Examined]:
    """Each adapter in turn, by its task's rows or, where it has none, on text of its own."""
    scorer = functools.cache(partial(_load_base, context))  # loaded once, and only where something is left to do
    found = []
    for subject in subjects:
        name = hashlib.sha256(subject.record.adapter_id.encode()).hexdigest()[:32]
        step = partial(_examine, context, num_layers, subject, scorer)
        found.append(once(context, f"{context.fits}gate/{name}", Examined, step, lambda done: not done.failed))
    return found


def _load_base(context: JobContext) -> Scorer:
    # Here, for transformers is slow to import and most tasks need none of it.
    from compress_jobs.quality.scorer import Scorer

    base = context.options.base
    return Scorer(str(download(open_store(base), default_cache()) if base.startswith("s3://") else base))


def _examine(context: JobContext, num_layers: int, subject: Subject, load: Callable[[], Scorer]) -> Examined:
    began = time.process_time()
    scorer = None
    try:
        scorer = load()
        judged = _judge(context, num_layers, subject, scorer)
    except AdapterChanged:
        judged = None
    except CtsError:
        raise
    except Exception as error:  # a model library raises whatever it likes for what it does not know
        told = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if scorer is None:
            return Examined(failed=f"the base cannot be loaded ({told})", is_loaded=False)
        return Examined(failed=f"adapter {subject.record.adapter_id} cannot be asked ({told})")
    return Examined(judged, cpu_seconds=time.process_time() - began)


def _judge(context: JobContext, num_layers: int, subject: Subject, scorer: Scorer) -> Judged | None:
    record = subject.record
    touched = [module for module, places in record.modules.items() if places.energy > 0]
    factors = read_modules(context.adapters(), record, touched)
    judge = _by_rows(scorer, subject.task, factors) if subject.task else _by_text(context, scorer, record, factors)
    if judge is None:
        return None
    spectra = [np.asarray(values) for values in adapter_spectra(factors).values()]
    ways: dict[int, Served] = {}  # by rank, 0 standing for the basis
    by_level = []
    for level in LEVELS:
        rank, error = smallest_rank(spectra, level)
        if context.options.method == "svd" and rank < int(context.options.rank):
            rank = int(context.options.rank)
            error = sum(float(values[rank:].sum()) for values in spectra) / sum(float(v.sum()) for v in spectra)
        if subject.part is not None and subject.error <= level:
            rank, error = 0, subject.error
        if rank >= max(map(len, spectra)):
            ways[rank] = Served("whole", 0.0, 1.0)
        elif rank not in ways:
            served = _truncated(context, factors, rank) if rank else _on_basis(context, num_layers, subject)
            ways[rank] = Served(f"rank {rank}" if rank else BASIS, error, *judge(served))
        by_level.append(list(ways).index(rank))
    return Judged(record.adapter_id, tuple(ways.values()), tuple(by_level))


def _by_rows(scorer: Scorer, task: Task, factors: Adapter) -> Judge | None:
    """The share kept of the loss that the adapter gains on its rows; None where it gains nothing."""
    base = scorer.score(task, {}).loss
    gained = base - scorer.score(task, factors).loss
    if gained < NOTHING:
        return None
    return lambda served: ((base - scorer.score(task, served).loss) / gained, None)


def _by_text(context: JobContext, scorer: Scorer, record: AdapterRecord, factors: Adapter) -> Judge | None:
    from compress_jobs.quality.probe import Probe

    probe = Probe(scorer, factors, context.seed("probe", record.adapter_id))
    return None if probe.says_nothing else probe.judge


def _truncated(context: JobContext, factors: Adapter, rank: int) -> Adapter:
    cut = {module: truncate(*pair, rank) for module, pair in factors.items()}
    return {module: (A.to(context.dtype).float(), B.to(context.dtype).float()) for module, (A, B) in cut.items()}


def _on_basis(context: JobContext, num_layers: int, subject: Subject) -> Adapter:
    """As the fit has left it, by layers."""
    assert subject.part is not None
    cluster, position = subject.part
    served = {}
    for layer in range(num_layers):
        tensors = read_tensors(context, context.fit_key(layer, cluster))
        for module in subject.record.modules.keys() & tensors.keys():
            U, V = tensors[f"{module}.U"].float(), tensors[f"{module}.V"].float()
            core = tensors[module][position].float()
            served[module] = (V.T, U * core if core.dim() == 1 else U @ core)
    return served
