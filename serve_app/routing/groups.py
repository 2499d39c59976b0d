"""A group as the router sees it: is it there, what does it hold, how much is it asked at once.

Serve queues a call to a deployment without a running replica until there is one, which may be never. So the
router asks each group for its state all the time, answers for a silent one by itself, and gives up waiting
as soon as a group is known to be gone. One that may go to zero is not gone when it is there: ``Zero`` wakes it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.bundle.serving_map import ServedAdapter
from cluster.errors import HomeUnavailable
from serve_app.engine.revisions import READY, RevisionHealth
from serve_app.openai.call import Call, Carried, Reply
from serve_app.openai.errors import ApiError, overloaded, timed_out
from serve_app.routing.carrying import Carrying, carried
from serve_app.routing.following import ReplicaStatus, RouterState
from serve_app.routing.interruption import Interruption
from serve_app.routing.own_replicas import STAY_S
from serve_app.routing.pace import Pace
from serve_app.routing.retries import RetryBudget
from serve_app.routing.zero import Zero

# A busy replica on few cores may be slow to say how it is; its chunks count as signs of life too.
SILENCE_S, PATIENCE_S = 10.0, 5.0
UNAVAILABLE = 503  # of one replica: another may do better

logger = logging.getLogger("ray.serve")


class ReplicaLost(HomeUnavailable):
    """The one that was asked; another may be there."""


class GroupClient:
    """``num_inflight`` sequences of this router run or wait in the group; never more than ``max_inflight``.
    ``replicas``: what each said last.
    ``at_zero``: what a request does that finds no replica, see ``Zero``; None: the group never goes to zero.
    """

    def __init__(
        self, name: str, handle: DeploymentHandle[Any], max_inflight: int, router: str, at_zero: str | None = None
    ) -> None:
        self.name, self.max_inflight = name, max_inflight
        self._stayed_at = -STAY_S
        self._staying: set[asyncio.Task[Any]] = set()
        self.num_inflight = 0
        self.replicas: list[ReplicaStatus] = []
        self.has_been_asked, self.is_suspect = asyncio.Event(), asyncio.Event()
        self._handle = handle
        self._stream = handle.options(stream=True)
        self._reason = "starting"
        self._seen_at = time.monotonic()
        self._state = RouterState(router, "", None, None)
        self._calls: set[Interruption] = set()
        self._carried: dict[str, set[Interruption]] = {}  # by the replica whose carrier they are on
        self._retries, self._pace = RetryBudget(), Pace()
        self._router = router
        self.carrying = Carrying(name, self._open_carrier, self._saw, self._lose_carrier)
        self.zero = Zero(name, at_zero, lambda: handle.status.remote(self._state))

    @property
    def alive(self) -> bool:
        return any(replica.health.alive for replica in self.replicas)

    @property
    def can_answer(self) -> bool:
        """A request wakes it where it is at zero."""
        return self.alive or self.zero.is_now

    @property
    def num_running(self) -> int:
        return sum(replica.health.num_running for replica in self.replicas)

    @property
    def num_waiting(self) -> int:
        return sum(replica.health.num_waiting for replica in self.replicas)

    def home_state(self, home: str, revision: int) -> str:
        """READY where a replica can be asked for it, or why none can."""
        if not self.alive:
            return f"{self.name}: {self._reason}"
        states = [health.homes.get(home, f"{self.name} does not hold it") for health in self._healths(revision)]
        return min(states, key=lambda state: state != READY, default=f"revision {revision} is being prepared")

    def failed_adapters(self, revision: int) -> dict[str, str]:
        """Those that no replica can be asked for, though their home is ready, and why."""
        failed = [health.adapters for health in self._healths(revision)]
        common = set.intersection(*map(set, failed)) if failed else set()
        return {adapter_id: failed[0][adapter_id] for adapter_id in common}

    def adapter_state(self, served: ServedAdapter, revision: int) -> str:
        """READY, or why the adapter cannot be asked: its home's reason, or its own."""
        state = self.home_state(served.home, revision)
        return self.failed_adapters(revision).get(served.adapter_id, READY) if state == READY else state

    def check(self, served: ServedAdapter | None, revision: int) -> None:
        """Raises HomeUnavailable when the adapter (None: the base) cannot be asked."""
        if self.zero.is_now:
            return  # it is woken
        if not self.alive:
            raise HomeUnavailable(f"{self.name}: {self._reason}")
        if served is not None and (state := self.adapter_state(served, revision)) != READY:
            own = served.adapter_id if self.home_state(served.home, revision) == READY else served.home
            raise HomeUnavailable(f"{own} is not being served: {state}")

    def _healths(self, revision: int) -> list[RevisionHealth]:
        """Of the living replicas that hold it."""
        found = [own.health.revisions.get(revision) for own in self.replicas if own.health.alive]
        return [health for health in found if health is not None]

    async def refresh(self, state: RouterState) -> None:
        """Ask every replica how it is, and tell it how this router is. By broadcast, which neither waits for a replica
        nor wakes one where there is none."""
        self.is_suspect.clear()
        self._state = state
        try:
            said = await self._statuses(state)
            self.replicas = [own for own in said if own.plan == state.plan]
            if len(self.replicas) < len(said):
                self._keep_own(state.plan)
        except TimeoutError:
            if time.monotonic() - self._seen_at >= SILENCE_S:
                self._lose("no answer; it is starting, or being replaced")
        except Exception as error:  # whatever it is: a group that cannot be asked cannot be used
            is_away = isinstance(error, DeploymentUnavailableError)
            if is_away and self.zero.is_possible:
                # Nothing that waits is given up: what was sent just before waits for a replica as well.
                self.replicas, self._reason = [], self.zero.be()
                self._saw()  # the silence of one that comes begins here
            else:
                if not is_away:
                    logger.warning("%s: %s", self.name, error)
                self._lose("no replica is running; one is starting, or being replaced")
        else:
            self.zero.leave(self.alive)
            if self.alive:
                self._saw()
            elif self.replicas:
                self._end_calls(self.replicas[0].reason or "no engine is running")
            elif said:
                self._lose("the replicas that are there belong to another deploy; its own are starting")
            else:
                self._lose("its replica is lost, another is being started")
        self.has_been_asked.set()

    def _keep_own(self, plan: str) -> None:
        """Another deploy takes the place of this router's: no replica of ``plan`` goes before its routers have."""
        if time.monotonic() - self._stayed_at < STAY_S / 2:
            return
        self._stayed_at = time.monotonic()
        response = self._handle.broadcast("stay", plan)
        task = asyncio.ensure_future(response.results_async(timeout_s=2 * STAY_S, return_exceptions=True))
        self._staying.add(task)
        task.add_done_callback(self._staying.discard)
        # Whatever it ended by, it is asked again.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def _wake(self, deadline: float) -> None:
        """A replica is there when this returns. Raises ApiError (503) where requests do not wait for that, and
        HomeUnavailable when the one that came cannot serve, or none came until ``deadline``."""
        if not self.zero.is_now:
            return
        self.is_suspect.set()
        self.zero.want(deadline)
        try:
            with Interruption(deadline) as interruption, self._ended_by(interruption):
                await interruption.wait(self.zero.end())
        except TimeoutError:
            raise HomeUnavailable(f"{self.name} was at zero, and no replica came in time: is there room?") from None

    async def _statuses(self, state: RouterState) -> list[ReplicaStatus]:
        """Of those that answer. Raises TimeoutError where none does."""
        try:
            response = self._handle.broadcast("status", state)
            said = await response.results_async(timeout_s=PATIENCE_S, return_exceptions=True)
        except TimeoutError:
            self._keep_own(state.plan)  # others may have taken their place, which nobody could say
            # One that hangs hides the others from a broadcast. Serve asks one alone that still takes calls.
            alone = self._handle.status.remote(state)
            try:
                said = [await asyncio.wait_for(_awaited(alone), PATIENCE_S)]
            except (TimeoutError, RayError, RayServeException):  # it may have been the one that hangs
                alone.cancel()
                raise TimeoutError from None
        return [own for own in said if isinstance(own, ReplicaStatus)]

    async def answer(self, call: Call, deadline: float) -> Reply:
        """The whole answer, in one message. Raises ApiError (429) beyond ``max_inflight``, HomeUnavailable when the
        group is lost, and ApiError (504) at ``deadline`` (the event loop's time)."""
        with self._admitted(call.num_sequences):
            await self._wake(deadline)
            for is_last in (False, True):
                response = self._handle.answer.remote(call)
                try:
                    with self._ending(response, deadline) as interruption:
                        reply: Reply = await interruption.wait(_awaited(response))
                    if is_last or not (reply.status == UNAVAILABLE and self._may_retry(call, 2)):
                        return reply
                except ReplicaLost:
                    if is_last or not self._may_retry(call):
                        raise
                except TimeoutError:
                    raise self._too_late() from None
            raise AssertionError("the last try ends by itself")

    async def stream(self, call: Call, deadline: float) -> AsyncGenerator[Reply | bytes, None]:
        """What the replica says, message by message. Closing it stops the replica. Raises as ``answer`` does."""
        with self._admitted(call.num_sequences):
            await self._wake(deadline)
            # What a client has begun to read is not begun again.
            may_retry, has_begun = True, False
            while True:
                try:
                    async with aclosing(self._stream_once(call, deadline)) as pieces:
                        async for piece in pieces:
                            is_refused = isinstance(piece, Reply) and piece.status == UNAVAILABLE
                            if is_refused and may_retry and self._may_retry(call, 2):
                                break
                            may_retry, has_begun = False, True
                            yield piece
                        else:
                            return
                except ReplicaLost:
                    if not may_retry or not self._may_retry(call):
                        raise
                except TimeoutError:
                    raise self._too_late(has_begun) from None
                may_retry = False

    async def _stream_once(self, call: Call, deadline: float) -> AsyncGenerator[Reply | bytes, None]:
        response = self._stream.stream.remote(call)
        with (
            self._ending(response, deadline) as interruption,
            self.carrying.expecting(call.answer_id) as queue,
        ):
            piece = await interruption.wait(_next(response))
            if isinstance(piece, Carried):
                self._saw()
                on_it = self._carried.setdefault(piece.replica, set())
                on_it.add(interruption)
                try:
                    yield piece.piece
                    async with aclosing(carried(queue, response, interruption)) as pieces:
                        async for own in pieces:
                            yield own
                finally:
                    on_it.discard(interruption)
                    if not on_it:
                        self._carried.pop(piece.replica, None)
                return
            if isinstance(piece, bytes):
                self.carrying.want()
            while piece is not None:
                self._saw()
                yield piece
                piece = await interruption.wait(_next(response))

    def _may_retry(self, call: Call, num_living: int = 1) -> bool:
        """Where at least so many replicas live, so that another may answer, and within the budget."""
        if sum(replica.health.alive for replica in self.replicas) < num_living or not self._retries.take():
            return False
        logger.info("%s: %s is asked again", self.name, call.answer_id)
        return True

    def _too_late(self, has_begun: bool | None = None) -> ApiError:
        """``has_begun``: None where nobody knows, as of an answer that is one message."""
        waiting = (
            f": {self.num_waiting} sequences are waiting for their turn in {self.name}" if self.num_waiting else ""
        )
        if has_begun is False:
            return timed_out(f"The request had not begun after limits.request_timeout_s; try again later{waiting}")
        told = f", or try again later{waiting}" if waiting and has_begun is None else ""
        return timed_out(f"The request was not finished after limits.request_timeout_s; ask for fewer tokens{told}")

    def _saw(self) -> None:
        self._seen_at = time.monotonic()

    @contextmanager
    def _admitted(self, num_sequences: int) -> Iterator[None]:
        if self.num_inflight + num_sequences > self.max_inflight:
            told = f"{self.name} has {self.num_inflight} sequences in flight of {self.max_inflight}"
            wait_s = self._pace.wait_s(self._num_ahead(num_sequences), self.num_inflight)
            raise overloaded(f"{told}; try again in {wait_s} s", wait_s)
        self.num_inflight += num_sequences
        began = time.monotonic()
        self._retries.count()
        try:
            yield
        finally:
            self.num_inflight -= num_sequences
            self._pace.end(num_sequences, time.monotonic() - began)

    def _num_ahead(self, num_sequences: int) -> int:
        """How many of this router's must end before there is room for so many more: until all that wait have had their
        turn, because who comes sooner would find as little."""
        known = self.num_running + self.num_waiting
        waiting = self.num_inflight * self.num_waiting // known if known else 0
        return max(waiting, self.num_inflight + num_sequences - self.max_inflight)

    @contextmanager
    def _ending(self, response: Any, deadline: float) -> Iterator[Interruption]:
        """How to wait for a part of ``response``, which is cancelled at the end. Raises HomeUnavailable as soon as the
        group is known to be gone."""
        try:
            with Interruption(deadline) as interruption, self._ended_by(interruption):
                yield interruption
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            logger.warning("%s: %s", self.name, error)
            raise self._lose_replica() from None
        finally:
            # Serve cancels a child only when the whole HTTP request is.
            response.cancel()

    @contextmanager
    def _ended_by(self, call: Interruption) -> Iterator[None]:
        """It is ended when the group is lost."""
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    def _open_carrier(self) -> Any:
        if not self.alive:
            raise ReplicaLost(f"{self.name}: no replica is there")  # the call would wait for one, or wake one
        return self._stream.carry.remote(self._router)

    def _lose_replica(self) -> ReplicaLost:
        """A call to one failed; the next look, which is made at once, tells whether any is left. What to raise."""
        self.is_suspect.set()
        return ReplicaLost(f"{self.name}: the replica that was asked is lost")

    def _lose_carrier(self, replica: str) -> None:
        """Nobody knows what was on it."""
        self.is_suspect.set()
        for call in self._carried.pop(replica, ()):
            call.end(ReplicaLost(f"{self.name}: the replica that was answering is lost"))

    def _lose(self, reason: str) -> None:
        self.replicas = []
        self._end_calls(reason)

    def _end_calls(self, reason: str) -> None:
        self._reason = reason
        for call in self._calls:
            call.end(HomeUnavailable(f"{self.name}: {reason}"))


async def _next(response: Any) -> Any:
    """None at the end, and where it was cancelled: nobody waits any more."""
    try:
        return await anext(response)
    except (StopAsyncIteration, RequestCancelledError):
        return None


async def _awaited(response: Any) -> Any:
    try:
        return await response
    except RequestCancelledError:
        raise asyncio.CancelledError from None  # by us: nobody waits any more
