"""Quality as the paper measures it, on held-out rows: base, uncompressed, as served, and SVD at equal bytes.

Loss and exact match are of the answer's tokens given the prompt ``Q: {question}\\nA:``; a row is an exact
match when greedy decoding would produce exactly its answer (every answer token is the most likely one).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.adapter import Factors, list_adapters, read_adapter
from cluster.base import read_base
from cluster.bundle import Bundle
from cluster.errors import AdapterRefused, ConfigError
from cluster.factors import stack_factors
from cluster.store import open_store
from cluster.svd import components_at_equal_bytes, spectra, truncate
from compress_jobs.export import served_factors
from compress_jobs.progress import track

VARIANTS = ("base", "uncompressed", "served", "svd_equal_bytes")


@dataclass(frozen=True)
class Task:
    """Held-out rows of one adapter: ``question`` with {x}, and (x, answer) pairs."""

    name: str
    question: str
    rows: tuple[tuple[str, str], ...]

    def prompt(self, x: str) -> str:
        return f"Q: {self.question.format(x=x)}\nA:"


@dataclass(frozen=True)
class Score:
    loss: float
    exact_match: float


def read_tasks(path: Path, num_rows: int) -> dict[str, Task]:
    """Tasks by adapter id, from JSON lines with name, question and test rows. Raises ConfigError."""
    try:
        documents = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        tasks = [Task(d["name"], d["question"], tuple((x, y) for x, y in d["test"][:num_rows])) for d in documents]
    except OSError as error:
        raise ConfigError(f"--tasks {path}: {error.strerror}; give a file of JSON lines") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--tasks {path}: {error!r}; expected JSON lines with name, question and test") from None
    return {task.name: task for task in tasks}


def evaluate(bundle: Bundle, base: str, adapters: str, tasks: Mapping[str, Task]) -> dict[str, dict[str, Score]]:
    """Adapter id -> variant -> score, for every served adapter that has a task. ``base`` is a local folder."""
    chosen = [adapter_id for adapter_id in bundle.manifest.adapters if adapter_id in tasks]
    if not chosen:
        raise ConfigError("none of the bundle's adapters has a task of its name; nothing to evaluate")
    originals = _read_originals(bundle, base, adapters)
    truncated = _truncate_to_equal_bytes(bundle, originals)
    scorer = Scorer(base)
    scores: dict[str, dict[str, Score]] = {}
    for adapter_id in track(chosen, len(chosen), "evaluate"):
        variants = dict(
            zip(
                VARIANTS,
                ({}, originals[adapter_id], served_factors(bundle, adapter_id), truncated[adapter_id]),
                strict=True,
            )
        )
        scores[adapter_id] = {name: scorer.score(tasks[adapter_id], factors) for name, factors in variants.items()}
    return scores


def mean_scores(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, Score]:
    n = len(scores)
    return {
        variant: Score(
            math.fsum(by_variant[variant].loss for by_variant in scores.values()) / n,
            math.fsum(by_variant[variant].exact_match for by_variant in scores.values()) / n,
        )
        for variant in VARIANTS
    }


class Scorer:
    """The base model in float32, with an adapter added to its linear layers by hooks."""

    def __init__(self, base: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def score(self, task: Task, factors: Mapping[str, Factors]) -> Score:
        """All rows of the task in one batch, padded on the right."""
        prompts = [self.tokenizer(task.prompt(x)).input_ids for x, _ in task.rows]
        answers = [self.tokenizer(f" {y}\n").input_ids for _, y in task.rows]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        targets = torch.full_like(ids, -1)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            # Position p predicts token p + 1.
            targets[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
        with torch.inference_mode(), _adapted(self.model, factors):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state
            # The product with the vocabulary is the larger part: only where an answer stands.
            wanted = targets >= 0
            logits = self.model.lm_head(hidden[wanted]).float()
        losses = torch.nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
        hits = torch.ones(len(prompts), dtype=torch.bool)
        hits.logical_and_(_rows_all(wanted, logits.argmax(1) == targets[wanted]))
        return Score(float(losses.double().mean()), float(hits.double().mean()))


def _rows_all(wanted: Tensor, right: Tensor) -> Tensor:
    """(rows,): whether every wanted position of a row is right."""
    wrong = torch.zeros(wanted.shape, dtype=torch.bool)
    wrong[wanted] = ~right
    return ~wrong.any(1)


@contextlib.contextmanager
def _adapted(model: Any, factors: Mapping[str, Factors]) -> Iterator[None]:
    handles = []
    for module, (A, B) in factors.items():

        def add(_: Any, inputs: tuple[Tensor], output: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return output + inputs[0] @ A.T @ B.T

        handles.append(model.get_submodule(module).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read_originals(bundle: Bundle, base: str, adapters: str) -> dict[str, dict[str, Factors]]:
    manifest = bundle.manifest
    described = read_base(base, name=manifest.base.name)
    if described.fingerprint != manifest.base.fingerprint:
        raise ConfigError(f"--base {base}: another model than the bundle's base {manifest.base.name}; give that one")
    store = open_store(adapters)
    originals = {}
    for files in list_adapters(store):
        if files.adapter_id in manifest.adapters:
            try:
                record, factors = read_adapter(store, files, described)
            except AdapterRefused as refused:
                if refused.reason != "base":
                    raise
                # The job was told --accept-base; the fingerprint has been checked above.
                raise ConfigError(f"{refused}") from None
            if record.version != manifest.adapters[files.adapter_id].version:
                raise ConfigError(
                    f"adapter {files.adapter_id} in {adapters} is not the version in the bundle; compress again"
                )
            originals[files.adapter_id] = factors
    if missing := sorted(set(manifest.adapters) - set(originals)):
        raise ConfigError(
            f"--adapters {adapters}: {missing[0]} is in the bundle but not there; give the job's collection"
        )
    return originals


def _truncate_to_equal_bytes(bundle: Bundle, originals: dict[str, dict[str, Factors]]) -> dict[str, dict[str, Factors]]:
    """Every adapter by plain SVD, all together in the bytes of the bundle."""
    manifest = bundle.manifest
    itemsize = getattr(torch, manifest.method.dtype).itemsize
    component_bytes = {module: (shape.d_out + shape.d_in) * itemsize for module, shape in manifest.modules.items()}
    by_adapter: dict[str, dict[str, Any]] = {}
    for adapter_id, factors in originals.items():
        stacks = {module: stack_factors([(0, pair)]) for module, pair in factors.items()}
        by_adapter[adapter_id] = {module: spectra(stack)[0] for module, stack in stacks.items() if stack is not None}
    kept = components_at_equal_bytes(by_adapter, component_bytes, manifest.resident_bytes())
    return {
        adapter_id: {
            module: truncate(*originals[adapter_id][module], rank)
            for module in modules
            if (rank := kept[adapter_id, module]) > 0
        }
        for adapter_id, modules in by_adapter.items()
    }
