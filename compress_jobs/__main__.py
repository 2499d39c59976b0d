"""``python -m compress_jobs``: compress a collection of LoRA adapters, look at a bundle, take adapters out again."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from cluster.bundle import Bundle
from cluster.errors import ConfigError, CtsError
from compress_jobs import options, report

_RUN = """\
Compress a collection of PEFT LoRA adapters into clusters that share a basis, and publish the bundle.

  python -m compress_jobs run --adapters s3://lora/adapters --base s3://lora/base --out s3://lora/bundle \\
      --clusters 25 --rank 16
  ray job submit --working-dir . -- python -m compress_jobs run --config run.toml

Credentials, region and endpoint of s3:// come from the environment as boto3 reads it (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL). A bad adapter is refused by name and the others go on.
Exit status: 0 when the revision is published (or was already), 1 when the job failed, 2 when an option is wrong.
Nothing half-written is ever visible: only CURRENT names what is served, and it moves last.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compress_jobs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser(
        "run",
        help="compress a collection and publish it",
        description=_RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_arguments(run)

    show = commands.add_parser("show", help="print what a bundle holds", description="Print what a bundle holds.")
    show.add_argument("uri", help="the job's --out (its CURRENT revision), or <out>/bundles/<bundle_id>")
    show.add_argument("--adapter", metavar="ID", help="one adapter, with all its figures")

    export = commands.add_parser(
        "export",
        help="write an adapter, as it is served, as a standard PEFT LoRA",
        description="Write what is served for an adapter as a standard PEFT LoRA (B = U S, A = V^T), float32.",
    )
    export.add_argument("uri", help="the job's --out, or <out>/bundles/<bundle_id>")
    export.add_argument("--adapter", metavar="ID", required=True)
    export.add_argument(
        "--to", metavar="DIR", type=Path, required=True, help="folder to write; must not exist, or be empty"
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="held-out loss and exact match: base, uncompressed, served, SVD at equal bytes",
        description="Held-out loss and exact match of the base, the uncompressed adapters, the adapters as served, and "
        "plain SVD in the same bytes. The last line is one JSON object.",
    )
    evaluate.add_argument("uri", help="the job's --out, or <out>/bundles/<bundle_id>")
    evaluate.add_argument("--adapters", metavar="URI", required=True, help="the collection that was compressed")
    evaluate.add_argument("--base", metavar="PATH", required=True, help="the base model's local folder")
    evaluate.add_argument("--tasks", metavar="FILE", type=Path, required=True, help="JSON lines: name, question, test")
    evaluate.add_argument("--rows", metavar="N", type=int, default=32, help="held-out rows an adapter (default: 32)")

    report.add_parser(commands)

    parsed = parser.parse_args(arguments)
    try:
        if "execute" in parsed:
            return int(parsed.execute(parsed))
        return {"run": _run, "show": _show, "export": _export, "evaluate": _evaluate}[parsed.command](parsed)
    except ConfigError as error:
        print(f"compress_jobs: {error}", file=sys.stderr)
        return 2
    except CtsError as error:
        print(f"compress_jobs: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compress_jobs: interrupted; nothing was published", file=sys.stderr)
        return 130


def _run(parsed: argparse.Namespace) -> int:
    chosen = options.from_arguments(parsed)
    # Here, for Ray is slow to import and --help should not be.
    from compress_jobs import job, tasks

    prepared = job.prepare(chosen)
    tasks.connect(chosen)
    outcome = job.run(prepared)
    manifest = outcome.manifest
    if outcome.summary is None:
        print("unchanged: these inputs and options are published already, nothing new was written")
        print(f"bundle     {manifest.bundle} revision {manifest.revision} at {chosen.out}")
        return 0
    for line in outcome.summary.lines(manifest):
        print(line)
    print(f"bundle     {manifest.bundle} revision {manifest.revision}, published at {chosen.out}")
    return 0


def _show(parsed: argparse.Namespace) -> int:
    from compress_jobs.show import show_adapter, show_bundle

    bundle = Bundle.open(parsed.uri)
    lines = show_adapter(bundle, parsed.adapter) if parsed.adapter else show_bundle(bundle)
    print("\n".join(lines))
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from compress_jobs.export import export_adapter

    num_modules = export_adapter(Bundle.open(parsed.uri), parsed.adapter, parsed.to)
    print(f"wrote {parsed.adapter} ({num_modules} modules) to {parsed.to}")
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from compress_jobs.evaluate import VARIANTS, evaluate, mean_scores, read_tasks

    tasks = read_tasks(parsed.tasks, parsed.rows)
    scores = evaluate(Bundle.open(parsed.uri), parsed.base, parsed.adapters, tasks)
    means = mean_scores(scores)
    print(f"{'loss / exact match':<24}" + "".join(f"{variant:>18}" for variant in VARIANTS))
    for name, row in [*scores.items(), ("mean", means)]:
        cells = (f"{row[variant].loss:9.3f} / {row[variant].exact_match:5.3f}" for variant in VARIANTS)
        print(f"{name:<24}" + "".join(f"{cell:>18}" for cell in cells))
    print(json.dumps({"adapters": len(scores), "rows": parsed.rows} | {v: asdict(means[v]) for v in VARIANTS}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
