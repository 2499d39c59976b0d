"""Which adapters a collection has: a spread over the grid task x subset x seed x steps.

Ranks, scales and modules are mixed as public collections mix them; a third of the adapters share one init seed.
"""

from __future__ import annotations

import fnmatch
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import ConfigError
from infra.train_zoo.task import SUBSETS

STEPS = (40, 160, 640)
SEEDS = (0, 1, 2)
_SHARED_SEED = 42

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class LoraShape:
    rank: int
    alpha: int
    modules: tuple[str, ...]
    rslora: bool = False


_SHAPES = {
    LoraShape(8, 16, _QKV): 6,
    LoraShape(16, 32, _QKV): 2,
    LoraShape(4, 8, ("q_proj", "v_proj")): 1,
    LoraShape(8, 16, _QKV, rslora=True): 1,
}  # by share


@dataclass(frozen=True)
class AdapterPlan:
    """One adapter to be trained. Its shape and its seed do not depend on ``steps``: adapters that differ in
    nothing else can be compared."""

    task: str
    subset: str
    seed_index: int
    steps: int

    @property
    def adapter_id(self) -> str:
        return f"{self.task}.{self.subset}.{self.seed_index}.{self.steps}"

    @property
    def shape(self) -> LoraShape:
        return self._random("shape").choices(tuple(_SHAPES), tuple(_SHAPES.values()))[0]

    @property
    def seed(self) -> int:
        """Of the init and of the order of the rows."""
        return _SHARED_SEED if self.seed_index == 0 else self._random("seed").randrange(1 << 31)

    def _random(self, what: str) -> random.Random:
        return random.Random(f"{self.task}.{self.subset}.{self.seed_index}/{what}")


def plan_adapters(
    tasks: Iterable[str], count: int, *, steps: Sequence[int] = STEPS, only: Sequence[str] = ()
) -> list[AdapterPlan]:
    """The first ``count`` adapters of the grid, in an order that spreads them.

    Round by round, one of every task; within a round the step counts take turns, and a task's subsets and
    seeds come in an order of its own. A larger count only adds to a smaller one. ``only``: patterns with *
    that an adapter's id must match one of. Raises ConfigError when the grid has fewer than ``count``.
    """
    names = sorted(tasks)
    random.Random("tasks").shuffle(names)
    cells = list(itertools.product(SUBSETS, SEEDS))
    grid = []
    for round_index in range(len(cells) * len(steps)):
        for task_index, task in enumerate(names):
            step_index = (task_index + round_index) % len(steps)
            order = random.Random(f"{task}/{step_index}").sample(cells, len(cells))
            subset, seed_index = order[round_index // len(steps)]
            grid.append(AdapterPlan(task, subset, seed_index, steps[step_index]))
    if only:
        grid = [plan for plan in grid if any(fnmatch.fnmatchcase(plan.adapter_id, pattern) for pattern in only)]
    if count > len(grid):
        matching = f" that match {' '.join(only)}" if only else ""
        raise ConfigError(f"--adapters {count}: the grid has {len(grid)} adapters{matching}; ask for at most that many")
    return grid[:count]
