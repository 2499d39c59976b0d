"""Background tasks that end are begun again, and say why."""

from __future__ import annotations

import asyncio

import pytest

from serve_app import supervision
from serve_app.supervision import Supervised


@pytest.mark.parametrize("ends_by", [RuntimeError("it broke"), MemoryError(), asyncio.CancelledError(), None])
def test_a_task_that_ends_in_whatever_way_is_told_and_begun_again(
    ends_by: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "RESTART_S", 0.01)
    starts = 0

    async def work() -> None:
        nonlocal starts
        starts += 1
        if starts > 2:
            await asyncio.sleep(60)
        if ends_by is not None:
            raise ends_by

    async def other() -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        supervised = Supervised({"it": work, "other": other})
        await asyncio.sleep(0.3)
        assert starts == 3
        assert supervised.failures == {"it": "it ended" if ends_by is None else f"{type(ends_by).__name__}: {ends_by}"}
        # Well for a while: there is nothing to tell any more.
        await asyncio.sleep(0.5)
        assert supervised.failures == {}
        supervised.stop()
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
