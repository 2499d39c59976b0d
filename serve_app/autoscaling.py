"""How many replicas each group gets, by its load: pure functions, and the two policies of Serve's that stand on them.

    by_sequences    a group alone; ``serve_app.app`` gives it to every group that scales
    ShareDevices    all groups together, within a number of devices; only a Serve config can name it, as its
                    application's ``autoscaling_policy``

Load is counted in sequences, as the replicas say it (``serve_app.replica.load``), not in calls as Serve counts them:
the routers' questions for the state are calls too, and one that is caught by a sample keeps a replica for nobody.

Serve's controller gets this file by value, so it imports nothing of ours: the controller need not have our code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

SEQUENCES = "sequences"  # what a replica calls its load
# A replica is given up only when the load would fit if it were a quarter larger.
KEEP = 0.8
# What a step costs without a sequence, in the cost of ``target`` ones: with that many an engine gives 3/4 of its most.
FIXED = 1 / 3
Z99 = 2.326


@dataclass(frozen=True)
class GroupLoad:
    """``load``: sequences that run or wait, a mean. ``replicas``: how many it has been given, running or not. It is to
    have ``least`` to ``most`` of them, and each of these ``target`` sequences."""

    load: float
    replicas: int
    least: int
    most: int
    target: float


def wanted_replicas(group: GroupLoad) -> int:
    """Semantics: clamp(replicas, fewest, enough), and that between ``least`` and ``most``, with

        fewest = ceil(load / target)
        enough = max(ceil(load / (KEEP target)), ceil(share(load / replicas) replicas / share(KEEP target)))

    where share(n) = n / (FIXED target + n) is what an engine gives with n sequences, of the most it can. The same
    requests are more sequences on fewer replicas, for each of them takes longer there: going by the load alone gives up
    what the rest cannot do without. Never less for more load; without load ``least``.

    While load stays within [a, b], b <= a / KEEP, it moves in one direction only: nothing below ceil(a / (KEEP target))
    is given up, nothing above ceil(b / target) is asked for, and the second is not the larger.
    """
    fewest = math.ceil(group.load / group.target)
    asked = group.load / (FIXED * group.target + group.load / group.replicas) if group.replicas else 0.0
    enough = math.ceil(max(group.load / (KEEP * group.target), asked * (FIXED + KEEP) / KEEP))
    return min(max(min(max(group.replicas, fewest), enough), group.least), group.most)


def crowd_p99(load: float, replicas: int) -> float:
    """Semantics: x + 2.326 sqrt(x), x = load / replicas: the 99th percentile of how many sequences a replica has, if
    they come independently (Poisson, by its normal approximation). A step of an engine takes a + b n seconds with n
    sequences in it, and who waits, waits for those before him: a group's P99 latency is affine in this."""
    mean = load / replicas
    return mean + Z99 * math.sqrt(mean)


def share_devices(groups: Mapping[str, GroupLoad], devices: int) -> dict[str, int]:
    """Replicas of each group, within ``devices`` in all.

    Semantics: every group gets ``least``. What each wants besides (``wanted_replicas``) is ranked, and the first
    devices - sum(least) of that are given: the groups' first replicas, the largest load before others; then by how much
    a replica lowers the P99, summed over the group's sequences,

        gain(load, n) = load (crowd_p99(load, n - 1) - crowd_p99(load, n)),

    which falls with n and rises with load: taking the largest is the optimum of the sum (Fox 1966, Discrete
    Optimization via Marginal Analysis). A replica that is there is ranked as if the load were load / KEEP, so that
    noise of that size moves no device to and fro.

    What one group is to give up may still be its own for a while (Serve's ``downscale_delay_s``), so others get only
    what is free now: sum(max(result, replicas)) <= max(devices, sum(max(replicas, least))). A group never gets less for
    more load of its own. ``least`` of all together must fit in ``devices``: that is for the plan to see to.
    """
    places = []
    for name, group in groups.items():
        for number in range(group.least + 1, wanted_replicas(group) + 1):
            load = group.load / KEEP if number <= group.replicas else group.load
            first = number == 1
            gain = load if first else load * (crowd_p99(load, number - 1) - crowd_p99(load, number))
            places.append((not first, -gain, name, number))
    open_places = max(devices - sum(group.least for group in groups.values()), 0)
    shared = {name: group.least for name, group in groups.items()}
    have = {name: max(group.replicas, group.least) for name, group in groups.items()}
    free = devices - sum(have.values())
    for *_, name, number in sorted(places)[:open_places]:
        if number > have[name]:
            if free <= 0:
                continue
            free -= 1
        shared[name] = number
    return shared


def load_of(context: AutoscalingContext) -> GroupLoad:
    """As the controller knows it. Replicas report every 10 seconds; one that has not yet is taken for idle."""
    running = (context.aggregated_metrics or {}).get(SEQUENCES, {})
    return GroupLoad(
        load=sum(running.values()) + context.total_queued_requests,
        replicas=context.target_num_replicas,
        least=context.capacity_adjusted_min_replicas,
        most=context.capacity_adjusted_max_replicas,
        target=context.config.get_target_ongoing_requests(),
    )


def by_sequences(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """A deployment's policy. Serve adds the delays, and wakes what is at zero and is waited for."""
    return wanted_replicas(load_of(context)), {}


class ShareDevices:
    """An application's policy: ``devices`` replicas in all, of the groups that scale."""

    def __init__(self, devices: int) -> None:
        if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
            raise ValueError(f"policy_kwargs.devices is {devices!r}, expected a whole number of at least 1")
        self._devices = devices

    def __call__(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """By Serve's deployment id."""
        loads = {deployment.name: load_of(context) for deployment, context in contexts.items()}
        shared = share_devices(loads, self._devices)
        # Serve itself wakes what is at zero and is waited for, whatever the decision is, but for what has none.
        decided = {own: shared[own.name] for own in contexts if loads[own.name].replicas or shared[own.name]}
        return decided, {}
