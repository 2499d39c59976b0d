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
LEARNING_RATE = 3e-3
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
    """One adapter to be trained. Its shape and its seed do not depend on ``steps`` and ``learning_rate``: adapters that
    differ in nothing else can be compared."""

    task: str
    subset: str
    seed_index: int
    steps: int
    learning_rate: float = LEARNING_RATE

    @property
    def adapter_id(self) -> str:
        """It names the learning rate where that is not the usual one."""
        rate = "" if self.learning_rate == LEARNING_RATE else f".{self.learning_rate:g}"
        return f"{self.task}.{self.subset}.{self.seed_index}.{self.steps}{rate}"

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
    tasks: Iterable[str],
    count: int,
    *,
    steps: Sequence[int] = STEPS,
    learning_rate: float = LEARNING_RATE,
    only: Sequence[str] = (),
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
            grid.append(AdapterPlan(task, subset, seed_index, steps[step_index], learning_rate))
    if only:
        grid = [plan for plan in grid if any(fnmatch.fnmatchcase(plan.adapter_id, pattern) for pattern in only)]
    if count > len(grid):
        matching = f" that match {' '.join(only)}" if only else ""
        raise ConfigError(f"--adapters {count}: the grid has {len(grid)} adapters{matching}; ask for at most that many")
    return grid[:count]


def side_by_side(plans: Sequence[AdapterPlan], together: int) -> list[list[AdapterPlan]]:
    """Groups of at most ``together`` that can be trained in one batch: of one number of steps and one learning rate,
    and of one task or of a few, whose rows are about as long. In the order of each one's first plan."""
    by_kind = sorted(plans, key=lambda plan: (plan.steps, plan.learning_rate, plan.adapter_id))
    groups = []
    for _, kind in itertools.groupby(by_kind, key=lambda plan: (plan.steps, plan.learning_rate)):
        rest = list(kind)
        groups += [rest[start : start + together] for start in range(0, len(rest), together)]
    order = {plan: index for index, plan in enumerate(plans)}
    return sorted(groups, key=lambda group: min(order[plan] for plan in group))
