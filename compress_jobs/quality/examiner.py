"""Asking variants of adapters their held-out rows."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.adapters.factors import Factors
from cluster.errors import ConfigError
from compress_jobs.progress import track
from compress_jobs.quality.collection import Adapters
from compress_jobs.quality.metrics import Relative, Score, score
from compress_jobs.quality.scorer import Answers, Scorer
from compress_jobs.quality.task import Task


class Examiner:
    """Asks variants of a collection's adapters their held-out rows, and compares with what it asked first: the
    base and the uncompressed adapters, once."""

    def __init__(self, scorer: Scorer, originals: Adapters, tasks: Mapping[str, Task]) -> None:
        self._scorer = scorer
        self._tasks = {adapter_id: tasks[adapter_id] for adapter_id in originals if adapter_id in tasks}
        if not self._tasks:
            raise ConfigError("none of the adapters has a task of its name in --tasks; nothing to evaluate")
        self._uncompressed: dict[str, Answers] = {}
        self.base: dict[str, Score] = {}
        self.uncompressed: dict[str, Score] = {}
        for adapter_id, task in track(self._tasks.items(), len(self._tasks), "base and uncompressed"):
            own = scorer.answer(task, originals[adapter_id])
            self._uncompressed[adapter_id] = own
            self.uncompressed[adapter_id] = score(task, own, own)
            self.base[adapter_id] = score(task, scorer.answer(task, {}), own)

    def examine(self, adapters: Adapters) -> dict[str, Score]:
        """Adapter id -> its score, of those that have a task. ``adapters``: the factors of any variant."""
        return {
            adapter_id: self._score(task, adapters[adapter_id], self._uncompressed[adapter_id])
            for adapter_id, task in self._tasks.items()
        }

    def _score(self, task: Task, factors: Mapping[str, Factors], uncompressed: Answers) -> Score:
        return score(task, self._scorer.answer(task, factors, drafts=uncompressed.texts), uncompressed)

    def relative(self, scores: Mapping[str, Score]) -> dict[str, Relative]:
        return {
            adapter_id: Relative.of(row, self.uncompressed[adapter_id], self.base[adapter_id])
            for adapter_id, row in scores.items()
        }
