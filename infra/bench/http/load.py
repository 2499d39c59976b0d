"""Clients that cost little: raw bytes by aiohttp, each asking its next question as soon as its last is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Run:
    """Seconds from a request to its first event, and to its end, one each a request; ``events`` of all streams."""

    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    events: int = 0


async def drive(
    url: str, models: Sequence[str], clients: int, requests: int, tokens: int, stream: bool, choices: int = 1
) -> Run:
    """``requests`` completions of ``choices`` times ``tokens`` tokens, the models in turn. Raises RuntimeError for an
    answer that is not whole: nothing is counted then."""
    run, waiting = Run(), iter(range(requests))
    timeout = aiohttp.ClientTimeout(total=300)

    async def client(session: aiohttp.ClientSession) -> None:
        for number in waiting:
            body = {
                "model": models[number % len(models)],
                "prompt": "Say a few words, please.",
                "max_tokens": tokens,
                "n": choices,
                "ignore_eos": True,
                "stream": stream,
            }
            began, first, tail = time.perf_counter(), 0.0, b""
            async with session.post(url, json=body) as response:
                async for piece in response.content.iter_any():
                    first = first or time.perf_counter()
                    run.events += piece.count(b"data: ")
                    tail = (tail + piece)[-4096:]
                whole = b"[DONE]" in tail if stream else f'"completion_tokens":{tokens}'.encode() in tail
                if response.status != 200 or not whole:
                    raise RuntimeError(f"{url}: {response.status} {tail[-300:]!r}")
            run.first_s.append(first - began)
            run.whole_s.append(time.perf_counter() - began)

    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        run.seconds = time.perf_counter() - began
    return run
