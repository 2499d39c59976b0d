"""The main job in one go, on the adapters that this repository ships.

make demo     compress them, serve them, ask each its held-out questions, compare with PEFT
make demo ENGINE=vllm    the same, served by vLLM's CPU build
make serve    leave the application running;  make stop  ends it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
ZOO = REPOSITORY / "infra" / "zoo"
BASE = REPOSITORY / "build" / "base"
SERVED = REPOSITORY / "build" / "served"  # what `make serve` publishes, its process id and log
ENGINE = os.environ.get("ENGINE", "transformers")
# Read by every process of Serve, so they must be set where Ray starts: tokens go from deployment to deployment by gRPC
# instead of Ray's object store, and on the event loop that is there. Not with the router listening on a port of its own
# besides the proxy's, which is for Serve's HAProxy and keeps a stopped application for 30 seconds.
SERVE_SETTINGS = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
NUM_CLUSTERS, RANK = 2, 16
QUESTIONS_EACH = 16
MAX_TOKENS = 24
STARTUP_TIMEOUT_S = 180
# Well below what it is (0.97), far above what a wrong adapter or the base would reach (0.1).
LEAST_AGREEMENT = 0.8


@dataclass(frozen=True)
class Question:
    adapter: str
    prompt: str
    expected: str


def set_up_serve() -> None:
    """SERVE_SETTINGS into the environment, but for those that are there; before Serve is imported."""
    for setting, value in SERVE_SETTINGS.items():
        os.environ.setdefault(setting, value)


def read_questions() -> list[Question]:
    questions = []
    for line in (ZOO / "tasks.jsonl").read_text().splitlines():
        task = json.loads(line)
        for x, y in task["test"][:QUESTIONS_EACH]:
            questions.append(Question(task["name"], f"Q: {task['question'].format(x=x)}\nA:", y))
    return questions


def first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


@contextlib.contextmanager
def running_application(out: Path, port: int) -> Iterator[Any]:
    """Ray on this machine, the shipped adapters compressed into ``out``, the application on 127.0.0.1:``port``.
    Yields the job's outcome; all is shut down at the end."""
    set_up_serve()
    import ray
    from ray import serve

    from compress_jobs.job import tasks
    from compress_jobs.job.options import RunOptions
    from compress_jobs.job.prepare import prepare
    from compress_jobs.job.run import run
    from serve_app.app import build

    num_cpus = max(2, os.cpu_count() or 2)
    options = RunOptions(
        adapters=str(ZOO / "adapters"),
        base=str(BASE),
        out=str(out),
        clusters=NUM_CLUSTERS,
        rank=RANK,
        num_cpus=num_cpus,
    )
    # A Ray of its own, whatever the environment points at.
    os.environ.pop("RAY_ADDRESS", None)
    job = prepare(options)
    tasks.connect(options)
    # So that `make stop`, `kill` and a time limit end it as Ctrl-C does, with all that Ray started. Only now, for
    # Ray sets a handler of its own, which aborts and leaves processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        outcome = run(job)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            build(
                {
                    "bundle": str(out),
                    "base": str(BASE),
                    "engine": ENGINE,
                    "device": "cpu",
                    "placement": {"num_cpus": num_cpus - 0.5},
                }
            ),
            name="compress-then-serve",
        )
        yield outcome
    finally:
        ray.shutdown()


def wait_until_ready(port: int) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready?all=1", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"demo: the application is not ready after {STARTUP_TIMEOUT_S} s: {error}")
            time.sleep(0.5)


def ask_application(port: int, questions: Sequence[Question], base_name: str) -> tuple[list[str], list[str]]:
    """The served adapters' answers and the base's, through the openai client, 32 at a time, all adapters mixed."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", timeout=120)

    def ask(model: str, question: Question) -> str:
        answer = client.completions.create(
            model=model, prompt=question.prompt, max_tokens=MAX_TOKENS, temperature=0, stop="\n"
        )
        return first_line(answer.choices[0].text)

    with ThreadPoolExecutor(32) as pool:
        served = list(pool.map(lambda question: ask(question.adapter, question), questions))
        base = list(pool.map(lambda question: ask(base_name, question), questions))
    return served, base


def ask_peft(questions: Sequence[Question]) -> list[str]:
    """The uncompressed adapters' answers, by PEFT on the same base in float32: the oracle."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    answers: dict[Question, str] = {}
    names = sorted({question.adapter for question in questions})
    for name in names:
        folder = ZOO / "adapters" / name
        if name == names[0]:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
        model.set_adapter(name)
        own = [question for question in questions if question.adapter == name]
        batch = tokenizer([question.prompt for question in own], return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(
                **batch, max_new_tokens=MAX_TOKENS, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer
            )
        texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        answers |= dict(zip(own, map(first_line, texts), strict=True))
    return [answers[question] for question in questions]


def share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def print_comparison(questions: Sequence[Question], base: list[str], adapter: list[str], served: list[str]) -> None:
    """One question of each adapter, and its exact matches over all of them."""
    rows = list(zip(questions, base, adapter, served, strict=True))
    print(f"\n{'adapter':<15} {'question':<34} {'base':<20} {'adapter (PEFT)':<22} {'served':<22} exact match b/a/s")
    for name in sorted({question.adapter for question in questions}):
        own = [row for row in rows if row[0].adapter == name]
        question, *answers = own[0]
        hits = [share([row[column] == row[0].expected for row in own]) for column in (1, 2, 3)]
        asked = question.prompt.removeprefix("Q: ").removesuffix("\nA:")
        cells = [text[:19] for text in answers]
        matches = " ".join(f"{hit:.2f}" for hit in hits)
        print(f"{name:<15} {asked[:33]:<34} {cells[0]:<20} {cells[1]:<22} {cells[2]:<22} {matches}")


def demo() -> int:
    began = time.monotonic()
    questions = read_questions()
    port = free_port()
    out = Path(tempfile.mkdtemp(prefix="compress-then-serve-"))
    try:
        print(f"compressing the adapters of {ZOO / 'adapters'} into {NUM_CLUSTERS} clusters of rank {RANK}", flush=True)
        with running_application(out, port) as outcome:
            manifest, summary = outcome.manifest, outcome.summary
            print("\n".join(summary.lines(manifest)), flush=True)
            wait_until_ready(port)
            print(f"\nasking {len(questions)} held-out questions, of all adapters at once", flush=True)
            served, base = ask_application(port, questions, manifest.base.name)
        print("asking PEFT the same, adapter by adapter", flush=True)
        adapter = ask_peft(questions)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    print_comparison(questions, base, adapter, served)
    expected = [question.expected for question in questions]
    result = {
        "adapters": summary.num_adapters,
        "clusters": len(manifest.clusters),
        "rank": manifest.method.rank,
        "bytes_before": summary.bytes_before,
        "bytes_after": summary.bytes_after,
        "error_mean": round(summary.served.mean, 5),
        "error_worst": round(summary.served.worst, 5),
        "error_mean_svd_equal_bytes": round(summary.svd_equal_bytes.mean, 5),
        "agreement": round(share([a == b for a, b in zip(served, adapter, strict=True)]), 4),
        "em_base": round(share([a == b for a, b in zip(base, expected, strict=True)]), 4),
        "em_adapter": round(share([a == b for a, b in zip(adapter, expected, strict=True)]), 4),
        "em_served": round(share([a == b for a, b in zip(served, expected, strict=True)]), 4),
        "seconds": round(time.monotonic() - began, 1),
    }
    wrong = what_is_off(result, num_shipped=len({question.adapter for question in questions}))
    for line in wrong:
        print(f"demo: {line}", file=sys.stderr)
    print(json.dumps(result), flush=True)
    return 1 if wrong else 0


def what_is_off(result: dict[str, Any], num_shipped: int) -> list[str]:
    """Why the demo did not show what it should; nothing when it did."""
    wrong = []
    if result["adapters"] != num_shipped:
        wrong.append(f"{result['adapters']} of {num_shipped} adapters are served")
    if not result["bytes_after"] < result["bytes_before"]:
        wrong.append(f"{result['bytes_after']} bytes after are not fewer than the {result['bytes_before']} before")
    if result["agreement"] < LEAST_AGREEMENT:
        wrong.append(f"only {result['agreement']:.0%} of the served answers are the uncompressed adapters' own")
    if not result["em_served"] > result["em_base"]:
        wrong.append("the served adapters know no more than the base")
    return wrong


def serve_in_background() -> int:
    """Start the application in a process of its own, wait for it, say how to ask it."""
    SERVED.mkdir(parents=True, exist_ok=True)
    pid_file, log = SERVED / "pid", SERVED / "log"
    if (pid := running_pid()) is not None:
        sys.exit(f"serve: already running (process {pid}); `make stop` ends it")
    port = 8000 if is_free(8000) else free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.demo", "serve-here", "--port", str(port)],
            cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    pid_file.write_text(str(process.pid))
    print(f"compressing and starting; log: {log.relative_to(REPOSITORY)}", flush=True)
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while "ready\n" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            stop()
            sys.exit(f"serve: it did not start; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-15:]))
        time.sleep(0.5)
    question = next(question for question in read_questions() if question.adapter == "number-en")
    body = json.dumps(
        {"model": "number-en", "prompt": question.prompt, "max_tokens": 16, "temperature": 0, "stop": "\n"}
    )
    print(f"running on http://127.0.0.1:{port} (`make stop` ends it); try:\n")
    print(f"curl -s http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
    return 0


def serve_here(port: int) -> int:
    """The background process itself."""
    with running_application(SERVED / "bundle", port):
        wait_until_ready(port)
        print("ready", flush=True)
        while True:
            time.sleep(3600)


def stop() -> int:
    pid = running_pid()
    if pid is None:
        print("serve: nothing is running")
        return 0
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while running_pid() is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    if running_pid() is not None:
        # Its own session: this reaches Ray's processes too.
        os.killpg(pid, signal.SIGKILL)
    (SERVED / "pid").unlink(missing_ok=True)
    print("stopped")
    return 0


def running_pid() -> int | None:
    """The background process, if it is alive and really ours (a process id may have been given to another)."""
    try:
        pid = int((SERVED / "pid").read_text())
        ours = "infra.demo" in Path(f"/proc/{pid}/cmdline").read_text()
        alive = " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    return pid if ours and alive else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="demo", choices=("demo", "serve", "serve-here", "stop"))
    parser.add_argument("--port", type=int, default=8000, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.command == "serve-here":
        return serve_here(parsed.port)
    return {"demo": demo, "serve": serve_in_background, "stop": stop}[parsed.command]()


if __name__ == "__main__":
    sys.exit(main())
