"""Clients that ask all the time, and note what each served revision answered."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing

NUM_TOKENS = 8
PATIENCE_S = 120.0
PROMPTS = ("Q: 48 as a Roman numeral?\nA:", "Q: 450 in English words?\nA:", "Q: the capital of France?\nA:")

Failure = tuple[float, str]
Answered = dict[tuple[str, str, str], Counter[str]]
"""(served revision, adapter, prompt) -> how often each text."""


def ask(port: int, model: str, prompt: str, stream: bool) -> tuple[str, str]:
    """The served revision, and the text, greedy. Raises RuntimeError for anything but a whole answer, OSError and
    HTTPException."""
    fields = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(fields | {"stream": stream}))
        response = connection.getresponse()
        said = response.read().decode()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {said[:300]}")
    served = response.getheader("X-Served-Revision") or ""
    if not stream:
        return served, json.loads(said)["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in said.split("\n\n") if line.startswith("data: ")]
    if events[-1:] != ["[DONE]"]:
        raise RuntimeError(f"a stream without an end: {said[-300:]}")
    return served, "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


class Clients:
    """``num_clients`` threads. ``failed``: when, in seconds of ``time.monotonic``, and what."""

    def __init__(self, port: int, models: Sequence[str], num_clients: int, seed: int) -> None:
        self.answered: Answered = defaultdict(Counter)
        self.failed: list[Failure] = []
        self.num_answers = 0
        self._port, self._models = port, models
        # The k-th most popular model is asked for 1/k times as often as the first.
        self._weights = [1 / rank for rank in range(1, len(models) + 1)]
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed + index,)) for index in range(num_clients)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._stop.is_set():
            [model] = draw.choices(self._models, self._weights)
            prompt, stream = draw.choice(PROMPTS), draw.random() < 0.5
            try:
                served, text = ask(self._port, model, prompt, stream)
            except Exception as error:  # whatever a client sees
                with self._lock:
                    self.failed.append((time.monotonic(), f"{model}: {type(error).__name__}: {error}"))
                time.sleep(0.5)
                continue
            with self._lock:
                self.num_answers += 1
                self.answered[served, model, prompt][text] += 1
