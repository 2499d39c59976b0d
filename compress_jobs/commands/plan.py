"""``plan``: what a collection would cost in several sizes, before anything is spent on it.

On this machine and without Ray; nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

import torch

from cluster.adapters.base import read_base
from cluster.adapters.listing import list_adapters
from cluster.errors import ConfigError
from cluster.store.address import open_store
from cluster.units import gib, parse_size
from compress_jobs.quality.estimate import estimate, read_sample, standard_error

USABLE_SHARE = 0.9  # of a device's memory, as the application's placement counts it

_HELP = """\
What a collection of adapters would cost, compressed in several sizes, before anything is spent on it: adapters
and refusals, resident bytes, bytes of its own that an adapter's token reads, predicted error, how many adapters
a device holds, devices needed, seconds the job would take. Estimated from a sample of adapters, with the
estimate's own error beside it. Needs no Ray, writes nothing. The last line is one JSON object.

  python -m compress_jobs plan --adapters s3://lora/adapters --base s3://lora/base --device-memory 80GiB
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what it would cost, before spending anything: bytes, error, devices, seconds",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", metavar="URI", required=True, help="the collection, as for run")
    parser.add_argument("--base", metavar="URI", required=True, help="base model's folder, as for run")
    parser.add_argument("--base-name", metavar="NAME", help="the base's own name, where its config does not say")
    parser.add_argument(
        "--accept-base", metavar="NAME", action="append", default=[], help="further name of the base (repeatable)"
    )
    parser.add_argument("--device-memory", metavar="SIZE", required=True, help="of one serving device, such as 80GiB")
    parser.add_argument("--num-cpus", metavar="N", type=int, default=os.cpu_count(), help="CPUs the job would have")
    parser.add_argument("--sample", metavar="N", type=int, default=64, help="adapters to read (default: 64)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="which of them (default: 0)")
    parser.set_defaults(execute=_plan)


def _plan(parsed: argparse.Namespace) -> int:
    try:
        device_memory = parse_size(parsed.device_memory)
    except ValueError as error:
        raise ConfigError(f"--device-memory is {parsed.device_memory!r}; expected {error}") from None
    for name in ("sample", "num_cpus"):
        if getattr(parsed, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(parsed, name)}; expected 1 or more")
    base = read_base(parsed.base, name=parsed.base_name, accept=parsed.accept_base)
    usable = int(USABLE_SHARE * device_memory) - base.size_bytes
    if usable <= 0:
        raise ConfigError(
            f"--device-memory {gib(device_memory)}: {USABLE_SHARE:.0%} of it does not hold the base's "
            f"{gib(base.size_bytes)}; give a larger device"
        )
    store = open_store(parsed.adapters)
    folders = list_adapters(store)
    if not folders:
        raise ConfigError(f"--adapters {parsed.adapters}: no adapter there; expected folders with adapter_config.json")
    torch.set_num_threads(1)  # as the job's tasks do, so that the seconds are a core's
    sampled = read_sample(store, folders, base, parsed.sample, parsed.seed)
    num_read = len(sampled.records) + len(sampled.refused)
    share = len(sampled.records) / num_read
    num_adapters = max(1, round(len(folders) * share))
    rows = estimate(sampled, base, num_adapters, usable, parsed.num_cpus, parsed.seed)

    bytes_now = sum(files.weights.size_bytes for files in folders if files.weights)
    everybody = num_read == len(folders)
    doubt = 0.0 if everybody else standard_error(share, num_read, len(folders)) * len(folders)
    print(f"adapters   {len(folders)} in {parsed.adapters}, {bytes_now:,} bytes")
    print(f"sample     {num_read} read whole; {len(sampled.refused)} of them refused")
    for adapter_id, message in sorted(sampled.refused.items()):
        print(f"refused    {adapter_id} {message}")
    about = "" if everybody else f" ± {doubt:.0f} (one standard error, from the sample)"
    print(f"to serve   {num_adapters}{about}")
    print(f"device     {gib(device_memory)}, {gib(usable)} of it for adapters beside the base's {gib(base.size_bytes)}")
    inspect_seconds = sampled.seconds / num_read * len(folders) / parsed.num_cpus
    print(f"seconds    about {inspect_seconds:.0f} to read and inspect on {parsed.num_cpus} CPUs, then the last column")
    print("error      mean squared, energy-weighted, ± one standard error; joint methods by a random balanced split\n")
    print(
        f"{'method':<8} {'clusters':>8} {'rank':>4} {'resident bytes':>16} {'own bytes/token':>16} {'error':>17} "
        f"{'adapters/device':>16} {'devices':>8} {'fit seconds':>12}"
    )
    for row in rows:
        size = f"{row.method:<8} {row.clusters or '-':>8} {row.rank:>4} {row.size_bytes:>16,}"
        figures_of_row = f"{row.own_bytes_per_token:>16,} {row.error:8.4f} ± {row.plus_minus:6.4f}"
        print(f"{size} {figures_of_row} {row.adapters_per_device:>16,} {row.devices:>8} {row.fit_seconds:>12.0f}")
    figures = {
        "adapters": len(folders),
        "sampled": num_read,
        "refused_in_sample": len(sampled.refused),
        "to_serve": num_adapters,
        "to_serve_plus_minus": round(doubt, 1),
        "bytes_now": bytes_now,
        "inspect_seconds": round(inspect_seconds, 1),
        "choices": [asdict(row) for row in rows],
    }
    print(json.dumps(figures))
    return 0
