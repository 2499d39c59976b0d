"""The vLLM plugin: a fleet of compressed adapters in one engine, with no fork of vLLM.

vLLM calls ``register`` (entry point group ``vllm.general_plugins``) in each of its processes, before any worker is
built. It rebinds one name, the class that the model runner makes its LoRA manager of; an engine that was not given
our section of ``additional_config`` gets vLLM's own class, as if we were not installed.

A request's life here: ``serve_app.engine.vllm.engine`` names the adapter's place (home and slot) in the request's
``lora_path`` -> vLLM schedules it like any LoRA request -> ``worker_manager`` looks whose adapters are in the batch,
``model_manager`` turns their LoRA ids into an index for each token (``token_index``) -> each adapted layer adds
U S V^T x from its stack (``basis_stack``).
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM, possibly more than once in a process. Changes nothing for engines that are not ours, and
    never raises: what is missing is refused when an engine of ours starts (``compatibility.check``)."""
    from serve_app.engine.vllm.plugin import compatibility, parent

    parent.end_with_parent()
    if compatibility.missing_symbols():
        return
    from vllm.v1.worker import lora_model_runner_mixin

    from serve_app.engine.vllm.plugin.worker_manager import make_manager

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = make_manager
