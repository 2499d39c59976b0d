"""What is measured: vLLM with its own LoRA support, our two engines, all in this process's event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from cluster.bundle.reading import Bundle
from infra.bench.serving.load import Question
from infra.bench.slot_rank import slot_rank
from serve_app.engine.protocol import GenerationRequest
from serve_app.engine.revisions import READY, Revision
from serve_app.engine.vllm.engine import VllmEngine
from serve_app.engine.vllm.options import VllmSettings, base_options
from serve_app.placement import home_sizes


class StockRow:
    """vLLM as it is. ``folders`` are the adapters, all in its CPU cache; ``slots`` of them in its LoRA layers at a
    time. No folders: LoRA is off."""

    def __init__(self, name: str, llm: Any, requests: Sequence[Any], start_s: float, resident_bytes: int) -> None:
        self.name, self.start_s, self.resident_bytes = name, start_s, resident_bytes
        self._llm, self._requests, self._numbers = llm, requests, itertools.count()

    @classmethod
    async def start(
        cls,
        name: str,
        base: Path,
        settings: VllmSettings,
        folders: Sequence[Path] = (),
        slots: int = 0,
        rank: int = 0,
        modules: Sequence[str] = (),
    ) -> StockRow:
        began = time.perf_counter()
        options = base_options(base, settings)
        if folders:
            options |= {
                "enable_lora": True,
                "max_loras": slots,
                "max_cpu_loras": len(folders),
                "max_lora_rank": slot_rank(rank),
                # Unset, vLLM adapts embeddings and lm_head too, and collapses: not a fair baseline.
                "lora_target_modules": list(modules),
                "worker_extension_cls": "infra.bench.serving.stock_worker.StockWorker",
            }
        llm = await asyncio.to_thread(_make_llm, options)
        from vllm.lora.request import LoRARequest

        requests = [LoRARequest(folder.name, number, str(folder)) for number, folder in enumerate(folders, start=1)]
        for request in requests:
            await llm.add_lora(request)
        resident = sum(await llm.collective_rpc("resident_bytes")) if folders else 0
        return cls(name, llm, requests, time.perf_counter() - began, resident)

    async def ask(self, question: Question, answer_tokens: int) -> AsyncIterator[int]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0, max_tokens=answer_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        adapter = self._requests[question.adapter % len(self._requests)] if self._requests else None
        outputs = self._llm.generate(
            {"prompt_token_ids": list(question.prompt_ids)},
            sampling,
            f"{self.name}-{next(self._numbers)}",
            lora_request=adapter,
        )
        async for output in outputs:
            yield len(output.outputs[0].token_ids)

    async def close(self) -> None:
        await asyncio.to_thread(self._llm.shutdown)


class EngineRow:
    """One of our engines, with all homes of a bundle."""

    def __init__(self, name: str, engine: Any, adapters: Sequence[str], start_s: float, resident_bytes: int) -> None:
        self.name, self.start_s, self.resident_bytes = name, start_s, resident_bytes
        self._engine, self._adapters = engine, adapters

    @classmethod
    async def start(
        cls, name: str, base: Path, settings: VllmSettings, bundle: Bundle, adapters: Sequence[str], engine: str
    ) -> EngineRow:
        """``adapters`` in the order of popularity, as all rows have them."""
        began = time.perf_counter()
        served = bundle.serving_map
        homes = sorted({served.find(adapter).home for adapter in adapters})
        made = _make_engine(engine, base, Revision(0, served, tuple(homes), bundle.load_home), settings)
        await made.start()
        if broken := {home: state for home, state in made.health().revisions[0].homes.items() if state != READY}:
            raise RuntimeError(f"{name}: not every home is served: {broken}")
        sizes = home_sizes(bundle.manifest, settings.dtype)
        resident = await made.resident_bytes() if engine == "vllm" and homes else sum(sizes[home] for home in homes)
        return cls(name, made, adapters, time.perf_counter() - began, resident)

    async def ask(self, question: Question, answer_tokens: int) -> AsyncIterator[int]:
        request = GenerationRequest(
            request_id=self.name,
            adapter=self._adapters[question.adapter % len(self._adapters)],
            prompt_token_ids=question.prompt_ids,
            max_tokens=answer_tokens,
            ignore_eos=True,
            temperature=0,
        )
        async for chunk in self._engine.generate(request):
            yield len(chunk.token_ids)

    async def close(self) -> None:
        await self._engine.stop()


def _make_llm(options: dict[str, Any]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))


def _make_engine(engine: str, base: Path, revision: Revision, settings: VllmSettings) -> Any:
    if engine == "vllm":
        return VllmEngine(base, revision, settings)
    from serve_app.engine.transformers.engine import TransformersEngine
    from serve_app.engine.transformers.settings import EngineSettings

    own = EngineSettings(
        device=settings.device,
        dtype=settings.dtype,
        max_batch=settings.max_batch,
        max_model_len=settings.max_model_len,
        num_threads=settings.num_threads,
    )
    return TransformersEngine(base, revision, own)
