"""The Ray side of the job: a thin remote shell around any step, and a bounded number of them in flight."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch

from cluster.errors import ConfigError, CtsError, NotEnoughMemory, StoreUnreachable
from cluster.units import parse_size

# A lost worker is tried again, and so is a store that stayed away; wrong input never is.
_RETRIES = {"max_retries": 3, "retry_exceptions": [StoreUnreachable]}

_STOP_PERIOD_S, _STOP_ATTEMPTS = 3, 3
# How Ray tells that a worker could not load a function: with the worker's traceback, whose last line is the error.
_IMPORT = re.compile(
    r"ip=(?P<node>[^),]+).*failed to import on the worker.*^(?P<error>(?:\w*\.)*(?:\w+Error): [^\n]*)",
    re.DOTALL | re.MULTILINE,
)


@functools.cache
def remote(step: Callable[..., Any]) -> Any:
    """The step as a Ray task on one CPU. One thread: the same bytes on every machine of a kind, and tasks
    that share a node do not fight for its cores."""

    def run(*arguments: Any) -> Any:
        torch.set_num_threads(1)
        return step(*arguments)

    run.__name__ = run.__qualname__ = step.__name__
    return ray.remote(num_cpus=1, **_RETRIES)(run)


@functools.cache
def keeping(step: Callable[..., Any]) -> Any:
    """``remote``, for what other tasks shall read: it stays in Ray's object store, where those of a node share it, is
    spilled to disk where there is no room, and made again where it was lost. For ``run_bounded``."""

    def run(*arguments: Any) -> tuple[None, Any]:
        return None, step(*arguments)

    run.__name__ = step.__name__
    return remote(run).options(num_returns=2)


def memory_of_a_task(asked: str, needed: int) -> int:
    """Bytes that a fit task may hold: ``asked`` (--task-memory), or by default what a node has for each of its CPUs, to
    the power of two below, so that it is the same from start to start; ``needed`` (of the largest cluster alone) where
    that is more.

    Raises NotEnoughMemory when ``needed`` is more than was asked for, or than any node has: Ray would wait for one for
    ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = largest_node_memory()
    if asked and needed > parse_size(asked):
        raise NotEnoughMemory(
            f"--task-memory {asked}: the largest cluster takes {_mib(needed)} to fit; give that, or more clusters"
        )
    if needed > largest:
        raise NotEnoughMemory(
            f"the largest cluster takes {_mib(needed)} to fit, and the largest node of this Ray cluster offers "
            f"{largest >> 20} MiB: add a larger node, or give more clusters"
        )
    if asked:
        return min(parse_size(asked), largest)
    by_cpu = [int(node.get("memory", 0) / node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    return max(needed, 1 << max(min(by_cpu, default=0).bit_length() - 1, 0))


def _mib(size_bytes: int) -> str:
    return f"{-(-size_bytes // (1 << 20))}MiB"


def with_memory(task: Any, memory_bytes: int) -> Any:
    """The task, asking Ray for the memory it may take, and for a GPU where there is one."""
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    return task.options(memory=memory_bytes, num_gpus=num_gpus)


def largest_node_memory() -> int:
    """Bytes that the largest node of the Ray cluster offers to tasks."""
    return max((int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]), default=0)


def run_bounded(task: Any, calls: Sequence[tuple[Any, ...]], in_flight: int) -> Iterator[tuple[int, Any]]:
    """Run ``task`` once for each tuple of arguments, at most ``in_flight`` at a time; yields (index, result)
    as they end. Of a task that ``keeping`` made the result stays where it is, and its reference is yielded.

    Raises the step's own error, or CtsError when Ray lost the task for good; then, and when the caller
    stops early, the tasks still running have been stopped: none writes a part after the job has tidied up."""
    waiting = iter(enumerate(calls))
    running: dict[Any, tuple[int, list[Any]]] = {}
    try:
        while True:
            while len(running) < in_flight and (call := next(waiting, None)) is not None:
                sent = task.remote(*call[1])
                ended, *kept = sent if isinstance(sent, list) else [sent]
                running[ended] = call[0], kept
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            index, kept = running.pop(done[0])
            result = _result(done[0])
            yield index, kept[0] if kept else result
    finally:
        if running and ray.is_initialized():
            _stop(list(running))


def _stop(running: list[Any]) -> None:
    """Ends tasks, and returns when they have ended. Cancelling raises KeyboardInterrupt in the worker, but not
    surely: where a shell started the job in the background all its processes ignore interrupts, Python swallows one
    that is raised in a callback, and a long call into C ends first. So they are asked again, and at last killed."""
    for attempt in range(_STOP_ATTEMPTS + 1):
        for reference in running:
            ray.cancel(reference, force=attempt == _STOP_ATTEMPTS)
        _, running = ray.wait(running, num_returns=len(running), timeout=_STOP_PERIOD_S)
        if not running:
            return


def run_one(task: Any, *arguments: Any) -> Any:
    return _result(task.remote(*arguments))


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CtsError):
            raise error.cause from None
        if lacking := _IMPORT.search(str(error)):
            raise ConfigError(
                f"Ray's node {lacking['node']} cannot run the job's tasks: {lacking['error']}; install this project "
                "and its requirements there, in the versions that this node has"
            ) from None
        raise
    except ray.exceptions.RayError as error:
        raise CtsError(
            f"Ray lost a task and its retries ({type(error).__name__}): {error}; "
            "look at the node's memory (`ray status`, `ray memory`) and run the job again"
        ) from None


def num_cpus() -> int:
    """Of the Ray cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def default_in_flight() -> int:
    return 2 * num_cpus()
