"""The paper's quality figures: loss, exact match, Rouge-L, agreement; each also relative to the uncompressed adapter.

Relative, with b the base and u the uncompressed adapter (1: nothing lost, whatever the figure):

    exact match, Rouge-L    x / x_u                        left out where x_u = 0
    loss                    (L_b - L) / (L_b - L_u)        the share kept of what the adapter gained; left out where
                                                           it gained nothing
    agreement               already is: the share of rows with u's own greedy output

(L / L_u says little: a task learnt by heart has L_u near 0, and the ratio of two such losses is noise.)
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cluster.errors import ConfigError
from compress_jobs.quality.scorer import Answers
from compress_jobs.quality.task import Task


@dataclass(frozen=True)
class Score:
    """Of one variant of an adapter: ``loss`` in nats a token, the others in 0..1."""

    loss: float
    exact_match: float
    rouge_l: float
    agreement: float


@dataclass(frozen=True)
class Relative:
    """To the uncompressed adapter; None where that has nothing to be relative to."""

    loss: float | None
    exact_match: float | None
    rouge_l: float | None
    agreement: float | None

    @staticmethod
    def of(score: Score, uncompressed: Score, base: Score) -> Relative:
        gained = base.loss - uncompressed.loss
        return Relative(
            (base.loss - score.loss) / gained if gained > 0 else None,
            score.exact_match / uncompressed.exact_match if uncompressed.exact_match > 0 else None,
            score.rouge_l / uncompressed.rouge_l if uncompressed.rouge_l > 0 else None,
            score.agreement,
        )


METRICS = tuple(field.name for field in fields(Score))


@dataclass(frozen=True)
class Figure:
    """Over adapters. ``worst``: the least (of a plain loss: the largest); ``spread``: the standard deviation."""

    mean: float
    worst: float
    spread: float
    num_adapters: int

    @staticmethod
    def of(values: Sequence[float | None], *, worst_is_largest: bool = False) -> Figure | None:
        """None where no adapter has a value."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        worst = max(known) if worst_is_largest else min(known)
        return Figure(math.fsum(known) / len(known), worst, statistics.pstdev(known), len(known))


def figures(rows: Sequence[Score] | Sequence[Relative]) -> dict[str, Figure | None]:
    """Metric -> its figure over the adapters' rows."""
    return {
        metric: Figure.of(
            [getattr(row, metric) for row in rows], worst_is_largest=metric == "loss" and isinstance(rows[0], Score)
        )
        for metric in METRICS
    }


def score(task: Task, answers: Answers, uncompressed: Answers) -> Score:
    expected = [y for _, y in task.rows]
    n = len(expected)
    return Score(
        answers.loss,
        sum(answers.exact) / n,
        math.fsum(rouge_l(expected, answers.texts)) / n,
        sum(ours == theirs for ours, theirs in zip(answers.texts, uncompressed.texts, strict=True)) / n,
    )


def rouge_l(expected: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Rouge-L's F-measure a row, 0..1. Words are runs of letters and digits of any script, lower-cased (the
    package's own tokenizer knows a-z only and drops or splits everything else)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError("Rouge-L needs the package rouge_score: pip install 'compress-then-serve[demo]'") from None
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [float(scorer.score(y, text)["rougeL"].fmeasure) for y, text in zip(expected, texts, strict=True)]


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def as_json(row: Score | Relative | Figure | None) -> dict[str, Any] | None:
    """Five digits: more would say nothing, and the result files stay small."""
    if row is None:
        return None
    values: Mapping[str, Any] = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
