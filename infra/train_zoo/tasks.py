"""Every task that adapters can be trained for."""

from __future__ import annotations

from infra.train_zoo import names, numbers, words
from infra.train_zoo.task import Task


def all_tasks() -> dict[str, Task]:
    """Every task by name, families side by side; nothing is generated yet."""
    tasks = {}
    for task in (*numbers.tasks(), *names.tasks(), *words.tasks()):
        assert task.name not in tasks, task.name
        tasks[task.name] = task
    return tasks
