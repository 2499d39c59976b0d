"""Clients that ask all the time, and know what each answer must be by the served revision that it names."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.support.application import App

PROMPT, NUM_TOKENS = "Q: 48 as a Roman numeral?\nA:", 6
PAUSE_S = 0.2
CUT = "a stream that had begun was cut: "


def ask(app: App, model: str, stream: bool = False) -> tuple[int, str, str]:
    """Status, served revision and text. A stream that has begun and ends by an error event, as it must where it cannot
    go on, has the text CUT and the event."""
    fields = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body = json.dumps(fields | {"stream": stream}).encode()
    with app.open("POST", "/v1/completions", body=body) as answer:
        served, said = answer.getheader("X-Served-Revision") or "", answer.read().decode()
        if answer.status != 200:
            return answer.status, served, said
        if not stream:
            document = json.loads(said)
            assert document["system_fingerprint"] == served
            return 200, served, document["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in said.split("\n\n") if line.startswith("data: ")]
    if "error" in json.loads(events[-1] if events[-1] != "[DONE]" else "{}"):
        return 200, served, CUT + events[-1]
    assert events[-1] == "[DONE]", said
    return 200, served, "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


@dataclass
class Load:
    """``clients`` ask for ``models`` all the time, whole and streamed. ``expected``: (adapter, served revision) -> its
    answer. ``failed``: what was not answered rightly; ``wrong``: those of them that had another text
    than they should. ``cut``: streams that had begun. ``troubled_at``: when anything of this was. ``served``: which
    adapters answered, each by which revision."""

    app: App
    expected: Mapping[tuple[str, str], str]
    models: tuple[str, ...]
    clients: int
    num_answers: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    troubled_at: list[float] = field(default_factory=list)
    served: set[tuple[str, str]] = field(default_factory=set)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def has_answered(self, number: int) -> bool:
        return self.num_answers >= number

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._stop.is_set():
            model, stream = draw.choice(self.models), draw.random() < 0.5
            try:
                status, served, text = ask(self.app, model, stream)
            except Exception as error:
                self.failed.append(f"{model}: {type(error).__name__}: {error}")
                self.troubled_at.append(time.monotonic())
                time.sleep(PAUSE_S)
                continue
            self.num_answers += 1
            self.served.add((model, served))
            if text.startswith(CUT):
                self.cut.append(text)
            elif status != 200 or self.expected.get((model, served)) != text:
                self.failed.append(f"{model}: {status} {served} {text!r}")
                if status == 200:
                    self.wrong.append(self.failed[-1])
            else:
                continue
            self.troubled_at.append(time.monotonic())
