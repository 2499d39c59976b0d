"""``watch``: a bundle kept in step with its collection."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import datetime
from typing import Any

from cluster.errors import CtsError, InputError
from compress_jobs.commands.compact import DEFAULT_LEVEL
from compress_jobs.commands.drops import drops_allowed
from compress_jobs.commands.gc import duration_s
from compress_jobs.commands.source import add_source_arguments, source_of
from compress_jobs.lifecycle.compact import Drift
from compress_jobs.lifecycle.watch import Round, Watch

_WATCH = f"""\
Look at the collection again and again, and bring the bundle in step with it: adapters that came are added, those whose
files have changed are taken up anew, those whose folders have gone are removed; all of a round is one revision, which
a running application follows by itself. Without a refit and without Ray, as `add`, `update` and `remove` do it.

- An adapter that is refused is named once, and read again when its files change; one that is served stays as it was.
- Folders that have gone are removed a tenth of the served adapters at a time at most (--allow-drop): where more are
  gone, none is removed, and the line says so. What comes back is added again. What `remove` took out stays out. One
  that an alias sends requests to stays until `alias` moves those.
- Of adapters that have not changed nothing is read: by the ETags of their files from the second round on, by that of
  their weights in the first. `update` looks at all.
- Another job that publishes first is no error: the next round starts from what it published. Two watches do each
  other no harm.
- What `rollback` took back stays so while the watch runs, until files change.
- A store that fails, or a collection that cannot be read, is told in the round's line, and tried again in the next.
  What trying again would not help ends the first round, with the exit code that `add` would have had.

With --compact the bases are fitted anew when drift passes a level (default: {DEFAULT_LEVEL:g}), by the job that
`compact` runs, at most once in --compact-every. That makes a new bundle, which a running application does not follow:
deploy anew.

Each round prints a line: time, revision, how many are served, added, updated, removed and refused.
"""


def add_parser(commands: Any) -> None:
    watch = commands.add_parser(
        "watch",
        help="keep a bundle in step with its collection",
        description=_WATCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(watch, None)
    watch.add_argument("--checkpoints", action="store_true", help="folders within an adapter's folder are adapters too")
    watch.add_argument(
        "--every", metavar="AGE", type=duration_s, default="30s", help="from one round to the next (default: 30s)"
    )
    watch.add_argument("--once", action="store_true", help="one round, for a scheduler that calls it")
    watch.add_argument(
        "--allow-drop",
        metavar="N|all",
        type=drops_allowed,
        help="how many adapters a round may remove because their folders have gone (default: a tenth of the served)",
    )
    watch.add_argument(
        "--compact", metavar="LEVEL", type=float, nargs="?", const=DEFAULT_LEVEL, help="fit anew above this drift"
    )
    watch.add_argument(
        "--compact-every", metavar="AGE", type=duration_s, default="1d", help="at most so often (default: 1d)"
    )
    watch.add_argument("--num-cpus", metavar="N", type=int, default=0, help="of --compact, as for `run`")
    watch.set_defaults(execute=_execute)


def _execute(parsed: argparse.Namespace) -> int:
    watch, compacted_at, is_first = Watch(source_of(parsed), parsed.allow_drop), -float("inf"), True
    while True:
        began, drift = time.monotonic(), None
        try:
            done = watch.look()
            _tell(done, time.monotonic() - began)
            drift = Drift.of(done.manifest).figure
        except CtsError as error:
            if parsed.once or (is_first and isinstance(error, InputError)):
                raise
            print(f"{_now()}  nothing was changed: {error}", flush=True)
        is_due = parsed.compact is not None and time.monotonic() - compacted_at > parsed.compact_every
        if is_due and drift is not None and drift > parsed.compact:
            # In a process of its own: it starts a Ray, which is to be gone afterwards.
            status = subprocess.run(_of_compact(parsed)).returncode
            print(f"{_now()}  compact ended with exit code {status}", flush=True)
            if status == 0:
                compacted_at = time.monotonic()
            elif parsed.once:
                return status
        if parsed.once:
            return 0
        is_first = False
        time.sleep(max(0.0, parsed.every - (time.monotonic() - began)))


def _tell(done: Round, seconds: float) -> None:
    for line in done.lines:
        print(line, file=sys.stderr, flush=True)
    print(f"{_now()}  {done.line()}; {seconds:.1f} s", flush=True)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _of_compact(parsed: argparse.Namespace) -> list[str]:
    """What has gone has been removed by now."""
    line = [sys.executable, "-m", "compress_jobs", "compact", parsed.out]
    line += ["--adapters", parsed.adapters, "--base", parsed.base, "--drift", str(parsed.compact)]
    line += [f"--accept-base={name}" for name in parsed.accept_base]
    line += [f"--id-pattern={pattern}" for pattern in parsed.id_pattern]
    line += ["--accept-unnamed-base"] if parsed.accept_unnamed_base else []
    return [*line, "--num-cpus", str(parsed.num_cpus)]
