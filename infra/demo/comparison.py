"""``make demo``: held-out questions to the base, to PEFT with the adapters, and to the application; side by side."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.demo.application import BASE, NUM_CLUSTERS, RANK, ZOO, free_port, running_application, wait_for_application

QUESTIONS_EACH = 16
MAX_TOKENS = 24
# Well below what it is (0.96), far above what a wrong adapter or the base would reach (0.1).
LEAST_AGREEMENT = 0.8


@dataclass(frozen=True)
class Question:
    adapter: str
    prompt: str
    expected: str


def read_questions() -> list[Question]:
    questions = []
    for line in (ZOO / "tasks.jsonl").read_text().splitlines():
        task = json.loads(line)
        for x, y in task["test"][:QUESTIONS_EACH]:
            questions.append(Question(task["name"], f"Q: {task['question'].format(x=x)}\nA:", y))
    return questions


def first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


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
            wait_for_application(port)
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
