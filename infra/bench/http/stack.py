"""One stack in a process of its own, for Serve reads its settings once: python -m infra.bench.http.stack --help

Ends when its standard input does.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any
from unittest import mock

from infra.demo.application import SERVE_SETTINGS

HAPROXY_SETTINGS = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", choices=["python", "haproxy"], required=True)
    parser.add_argument("--engine", choices=["free", "vllm"], required=True)
    parser.add_argument("--routers", type=int, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True, help="that run together")
    args = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= SERVE_SETTINGS if args.proxy == "python" else HAPROXY_SETTINGS
    serve_all(args)


def serve_all(args: argparse.Namespace) -> None:
    import ray
    from ray import serve

    from infra.bench.http.free_engine import FreeReplica
    from serve_app import app
    from serve_app.replica.replica import GroupReplica

    arguments: dict[str, Any] = {
        "bundle": args.bundle,
        "base": args.base,
        "engine": "vllm" if args.engine == "vllm" else "transformers",
        "device": "cpu",
        "routers": args.routers,
        "placement": {"num_cpus": 1},
        "limits": {"max_batch": args.streams, "max_inflight": 4 * args.streams, "max_prompts": 64},
    }
    # Ray's CPUs are tickets: one for each router and replica, the rest for Serve's own actors.
    ray.init(address="local", num_cpus=args.routers + 4, include_dashboard=False, object_store_memory=200 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        own = GroupReplica if args.engine == "vllm" else FreeReplica
        with mock.patch("serve_app.app.GroupReplica", own):
            application = app.build(arguments)
        serve.run(application, name="bench")
        sys.stdin.read()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
