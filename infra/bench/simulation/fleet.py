"""Replicas and groups in simulated time, scaled by the application's own function."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infra.bench.simulation.costs import Costs
from serve_app.autoscaling import GroupLoad, share_devices

TICK_S, LOOK_BACK, UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 10.0, 3, 10.0, 60.0
BATCH, TARGET = 32, 16.0


class Replica:
    """All that run share the engine evenly: ``_done`` is how many requests one that was always there would have had."""

    def __init__(self, costs: Costs, slots: int | None) -> None:
        self._costs, self._slots = costs, slots
        self._loaded: OrderedDict[int, None] = OrderedDict()
        self._waiting: deque[tuple[float, int]] = deque()
        self._running: list[tuple[float, float]] = []  # when _done is so much, it is ready; when it came
        self._done, self._at, self._stopped_s = 0.0, 0.0, 0.0
        self.swaps = 0
        self.is_leaving = False

    @property
    def ongoing(self) -> int:
        return len(self._running) + len(self._waiting)

    def add(self, now: float, came_at: float, adapter: int) -> None:
        self._advance(now)
        self._waiting.append((came_at, adapter))
        self._admit()

    def take_ready(self, now: float) -> list[float]:
        """When those came that are ready."""
        self._advance(now)
        ready = []
        while self._running and self._running[0][0] <= self._done + 1e-9:
            ready.append(heapq.heappop(self._running)[1])
        self._admit()
        return ready

    def next_ready(self) -> float:
        if not self._running:
            return math.inf
        left = max(self._running[0][0] - self._done, 0.0)
        return self._at + self._stopped_s + left * self._costs.request_s(len(self._running))

    def _advance(self, now: float) -> None:
        stopped = min(self._stopped_s, now - self._at)
        if self._running:
            self._done += (now - self._at - stopped) / self._costs.request_s(len(self._running))
        self._stopped_s -= stopped
        self._at = now

    def _admit(self) -> None:
        while self._waiting and len(self._running) < BATCH:
            came_at, adapter = self._waiting.popleft()
            if self._slots is not None:
                if adapter not in self._loaded:
                    self.swaps += 1
                    self._stopped_s += self._costs.swap_s
                    if len(self._loaded) >= self._slots:
                        self._loaded.popitem(last=False)
                self._loaded[adapter] = None
                self._loaded.move_to_end(adapter)
            heapq.heappush(self._running, (self._done + 1.0, came_at))


@dataclass
class Group:
    """``starting``: when each will be there. ``loads``: at the last ticks. ``since``: from when another number than
    ``target`` was decided, and whether more."""

    least: int
    most: int
    target: int
    replicas: list[Replica] = field(default_factory=list)
    starting: list[float] = field(default_factory=list)
    queue: list[tuple[float, int]] = field(default_factory=list)
    loads: deque[float] = field(default_factory=lambda: deque(maxlen=LOOK_BACK))
    since: tuple[bool, float] | None = None

    def load(self) -> GroupLoad:
        mean = sum(self.loads) / len(self.loads)
        return GroupLoad(mean, self.target, self.least, self.most, TARGET)

    def decide(self, now: float, wanted: int) -> None:
        """With Serve's delays; one that has none and is waited for gets its first at once, as Serve does it."""
        if wanted == self.target:
            self.since = None
            return
        up = wanted > self.target
        if self.since is None or self.since[0] != up:
            self.since = (up, now)
        delay_s = UPSCALE_DELAY_S if up else DOWNSCALE_DELAY_S
        if (up and self.target == 0) or now - self.since[1] >= delay_s:
            self.target, self.since = wanted if self.target else 1, None


@dataclass(frozen=True)
class Outcome:
    """``latencies_s`` of the requests that ``came_at`` so; ``devices`` at each tick until the last one came."""

    came_at: np.ndarray
    latencies_s: np.ndarray
    devices: np.ndarray
    swaps: int

    def figures(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.latencies_s, [50, 99])
        asked_s, device_s = len(self.devices) * TICK_S, float(self.devices.sum() * TICK_S)
        return {
            "devices_mean": round(float(self.devices.mean()), 2),
            "devices_most": int(self.devices.max()),
            "latency_p50_s": round(float(p50), 2),
            "latency_p99_s": round(float(p99), 2),
            "swaps_per_s": round(self.swaps / asked_s, 2),
            "device_s_per_1000_requests": round(1000 * device_s / len(self.latencies_s), 1),
        }


def simulate(
    requests: list[tuple[float, int]],
    group_of: Callable[[int], int],
    groups: list[Group],
    devices: int,
    costs: Costs,
    slots: int | None,
    seed: int,
) -> Outcome:
    """``requests``: when each comes, in order, and for which adapter. To the end of the last one."""
    draw, order = random.Random(seed), itertools.count()
    events: list[tuple[float, int, str, Any]] = [(requests[0][0], next(order), "request", 0)]
    heapq.heappush(events, (TICK_S, next(order), "tick", None))
    expected: dict[int, float] = {}  # the event that counts, of a replica's
    finished: list[tuple[float, float]] = []
    held, swaps, last_came_at = [], 0, requests[-1][0]

    def push(at: float, kind: str, what: Any) -> None:
        heapq.heappush(events, (at, next(order), kind, what))

    def expect(replica: Replica) -> None:
        at = replica.next_ready()
        if at < math.inf and expected.get(id(replica)) != at:
            expected[id(replica)] = at
            push(at, "ready", replica)

    def send(now: float, group: Group, request: tuple[float, int]) -> None:
        there = [own for own in group.replicas if not own.is_leaving]
        if not there:
            group.queue.append(request)
            return
        two = draw.sample(there, 2) if len(there) > 1 else there
        chosen = min(two, key=lambda own: own.ongoing)
        chosen.add(now, *request)
        expect(chosen)

    while len(finished) < len(requests):
        now, _, kind, what = heapq.heappop(events)
        if kind == "request":
            came_at, adapter = requests[what]
            send(now, groups[group_of(adapter)], (came_at, adapter))
            if what + 1 < len(requests):
                push(requests[what + 1][0], "request", what + 1)
        elif kind == "ready":
            if expected.get(id(what)) != now:
                continue
            finished += [(came_at, now - came_at) for came_at in what.take_ready(now)]
            expected.pop(id(what))
            expect(what)
        elif kind == "start":
            if now in what.starting:  # else it was given up before it was there
                what.starting.remove(now)
                what.replicas.append(Replica(costs, slots))
                waiting, what.queue = what.queue, []
                for request in waiting:
                    send(now, what, request)
        else:
            for group in groups:
                gone = [own for own in group.replicas if own.is_leaving and not own.ongoing]
                swaps += sum(own.swaps for own in gone)
                group.replicas = [own for own in group.replicas if own not in gone]
                group.loads.append(sum(own.ongoing for own in group.replicas) + len(group.queue))
            shared = share_devices({str(i): group.load() for i, group in enumerate(groups)}, devices)
            for index, group in enumerate(groups):
                group.decide(now, shared[str(index)])
                own = [replica for replica in group.replicas if not replica.is_leaving]
                for _ in range(group.target - len(own) - len(group.starting)):
                    group.starting.append(now + costs.start_s)
                    push(now + costs.start_s, "start", group)
                    now = math.nextafter(now, math.inf)  # so that no two are there at the same moment
                for _ in range(len(own) + len(group.starting) - group.target):
                    if group.starting:
                        group.starting.pop()
                    else:
                        min((r for r in own if not r.is_leaving), key=lambda r: r.ongoing).is_leaving = True
            if now <= last_came_at:
                held.append(sum(len(group.replicas) + len(group.starting) for group in groups))
            push(now + TICK_S, "tick", None)
    swaps += sum(own.swaps for group in groups for own in group.replicas)
    came, took = np.array(sorted(finished)).T
    return Outcome(came, took, np.array(held), swaps)
