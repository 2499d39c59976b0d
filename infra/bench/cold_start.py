"""At zero replicas, and from there: what wakes a group, and when its first token comes.

    python -m infra.bench.cold_start --bundle build/served/bundle

The application on this machine, with groups that go to zero. First nothing is asked of an adapter for ``--minutes``,
while /ready and /v1/models are asked every second: every look at Serve must find no replica. Then, ``--starts`` times:
a streamed request that wakes the group, the same at once again, and how long it takes until the group is at zero again.
Seconds are from when the request is sent to the first event with text. Last line: JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import time
import urllib.request
from typing import Any

from infra.demo.application import BASE, ENGINE, free_port, set_up_serve
from infra.ready import wait_until_ready

NAME, DOWNSCALE_DELAY_S, PATIENCE_S = "cold-start", 20, 600.0


def first_token_s(port: int, model: str) -> float:
    body = {"model": model, "prompt": "Q: 48?\nA:", "max_tokens": 4, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    while not (line := answer.readline()).startswith(b"data: "):
        if not line:
            raise SystemExit(f"cold_start: {answer.status}, and no token")
    took = time.perf_counter() - began
    answer.read()
    connection.close()
    if b'"error"' in line:
        raise SystemExit(f"cold_start: {line.decode()}")
    return took


def get(port: int, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        document: dict[str, Any] = json.loads(answer.read())
    return document


def num_replicas() -> int:
    """Of all groups, in whatever state."""
    from ray import serve

    deployments = serve.status().applications[NAME].deployments
    return sum(sum(own.replica_states.values()) for name, own in deployments.items() if name != "router")


def stay_at_zero(port: int, for_s: float) -> dict[str, int]:
    looks = found = 0
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        get(port, "/ready?all=1")  # raises where that is a 503
        get(port, "/v1/models")
        looks, found = looks + 1, found + (num_replicas() > 0)
        time.sleep(1)
    return {"looks": looks, "looks_that_found_a_replica": found}


def measure(parsed: argparse.Namespace) -> dict[str, Any]:
    set_up_serve()
    import ray
    from ray import serve

    from serve_app.app import build

    arguments = {
        "bundle": parsed.bundle,
        "base": parsed.base,
        "engine": ENGINE,
        "device": "cpu",
        "autoscaling": {"min": 0, "max": 1, "downscale_delay_s": DOWNSCALE_DELAY_S},
    }
    port = free_port()
    os.environ.pop("RAY_ADDRESS", None)
    # Ray's CPUs are tickets.
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(arguments), name=NAME)
        wait_until_ready(f"http://127.0.0.1:{port}/ready?all=1", PATIENCE_S)
        at_zero = stay_at_zero(port, 60 * parsed.minutes)
        print(f"{parsed.minutes:g} minutes at zero: {at_zero}", flush=True)
        model = next(card["id"] for card in get(port, "/v1/models")["data"] if card["mode"] != "base")
        print(f"\n{'first token, s':>14} {'replica there, s':>16} {'warm, s':>8} {'to zero again, s':>16}")
        starts = []
        for _ in range(parsed.starts):
            cold, warm, began = first_token_s(port, model), first_token_s(port, model), time.monotonic()
            there = next(iter(get(port, "/ready")["groups"].values()))["cold_start_s"]
            while num_replicas():
                time.sleep(1)
            starts.append({"cold": cold, "there": there, "warm": warm, "to_zero": time.monotonic() - began})
            print("{cold:14.2f} {there:16.2f} {warm:8.2f} {to_zero:16.0f}".format(**starts[-1]), flush=True)
    finally:
        ray.shutdown()
    rounded = [{name: round(value, 3) for name, value in start.items()} for start in starts]
    return {"minutes": parsed.minutes, **at_zero, "starts": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.cold_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="PATH", required=True, help="such as build/served/bundle, of make serve")
    parser.add_argument("--base", metavar="PATH", default=str(BASE))
    parser.add_argument("--minutes", metavar="N", type=float, default=10.0, help="at zero (default: 10)")
    parser.add_argument("--starts", metavar="N", type=int, default=3, help="from zero (default: 3)")
    parsed = parser.parse_args()
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}"
    print(f"{machine}, engine {ENGINE}, downscale_delay_s {DOWNSCALE_DELAY_S}\n", flush=True)
    print(json.dumps({"machine": machine, "engine": ENGINE, **measure(parsed)}))


if __name__ == "__main__":
    main()
