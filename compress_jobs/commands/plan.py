"""``plan``: what a collection would cost in several sizes, before anything is spent on it.

On this machine and without Ray; nothing is written.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from cluster.bundle.manifest import METHODS
from cluster.errors import ConfigError
from cluster.units import parse_size
from compress_jobs.commands.collection import add_collection_arguments, base_and_layout
from compress_jobs.commands.run_options import number_or_auto
from compress_jobs.host.cpus import available_cpus
from compress_jobs.job.options import AUTO, DTYPES, RunOptions
from compress_jobs.quality.gate_choice import PAPER
from compress_jobs.quality.plan import plan

_HELP = """\
What a collection of adapters would cost, compressed in several sizes, before anything is spent on it: adapters
and refusals, resident bytes, bytes of its own that an adapter's token reads, predicted error, how many adapters
a device holds, devices needed, seconds the job would take. Estimated from a sample of adapters, with the
estimate's own error beside it. Needs no Ray, writes nothing. The last line is one JSON object.

  python -m compress_jobs plan --adapters s3://lora/adapters --base s3://lora/base --device-memory 80GiB \\
      --clusters 25 --rank 16                                        # and exactly that run
"""


_OF_A_RUN = ("clusters", "rank", "method", "gate", "dtype")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what it would cost, before spending anything: bytes, error, devices, seconds",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_collection_arguments(parser)
    parser.add_argument("--device-memory", metavar="SIZE", required=True, help="of one serving device, such as 80GiB")
    parser.add_argument(
        "--num-cpus",
        metavar="N",
        type=int,
        default=available_cpus(),
        help="CPUs the job would have (default: as many as this process may use)",
    )
    parser.add_argument("--sample", metavar="N", type=int, default=64, help="adapters to read (default: 64)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="which of them (default: 0)")
    run = parser.add_argument_group(
        "exactly one run", "grades, bytes and devices of it; what is not given is run's default"
    )
    run.add_argument("--clusters", metavar="K", type=int, help="as for run")
    run.add_argument("--rank", metavar="R", type=int, help="as for run")
    run.add_argument("--method", choices=METHODS, help="as for run")
    run.add_argument(
        "--gate", metavar="E", type=number_or_auto, help=f"as for run; where it judges, {PAPER:g} is taken here"
    )
    run.add_argument("--dtype", choices=DTYPES, help="as for run")
    parser.set_defaults(execute=_plan)


def _plan(parsed: argparse.Namespace) -> int:
    try:
        device_memory = parse_size(parsed.device_memory)
    except ValueError as error:
        raise ConfigError(f"--device-memory is {parsed.device_memory!r}; expected {error}") from None
    for name in ("sample", "num_cpus"):
        if getattr(parsed, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(parsed, name)}; expected 1 or more")
    given = {name: value for name in _OF_A_RUN if (value := getattr(parsed, name)) is not None}
    method = None
    if given:
        run = RunOptions(adapters=parsed.adapters, base=parsed.base, out="-", seed=parsed.seed, **given)
        gate = PAPER if run.gate == AUTO else float(run.gate)
        method = run.recorded_method(run.method, int(run.clusters), int(run.rank), gate)
    base, layout = base_and_layout(parsed)
    planned = plan(parsed.adapters, base, device_memory, parsed.num_cpus, parsed.sample, parsed.seed, layout, method)
    print("\n".join(planned.lines()))
    if method and parsed.gate in (None, AUTO):
        print(f"gate       the run judges its own; this plan takes the paper's {PAPER:g}, give --gate E for another")
    print(json.dumps(planned.figures()))
    return 0
