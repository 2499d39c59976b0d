"""The base model, loaded from a folder and found fit for the engine's loop, or refused."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cluster.errors import BaseModelError, ConfigError

_NEEDED_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}


@dataclass(frozen=True)
class BaseModel:
    """``eos_ids`` end an answer; ``vocab_size`` is the number of token ids the model has embeddings for."""

    model: Any
    tokenizer: Any
    num_layers: int
    vocab_size: int
    eos_ids: frozenset[int]


def load_base(folder: Path, device: torch.device, dtype: torch.dtype, max_model_len: int) -> BaseModel:
    """Only this folder's own files are read, no code of theirs is run, and pickle is never loaded.

    Raises BaseModelError when the folder holds no usable model, ConfigError for a model that the loop
    could not serve rightly or a device that is not there.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device}, but torch sees no CUDA device here; set device to cpu")
    if not folder.is_dir():
        raise BaseModelError(f"base model {folder}: no such folder; expected one that transformers loads")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        _check_config(folder, config, max_model_len)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"base model {folder} cannot be loaded: {type(error).__name__}: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers would fill them with random numbers.
        raise BaseModelError(f"base model {folder}: no tensor {missing[0]!r} and {len(missing) - 1} more in its files")
    lacking = _NEEDED_ARGUMENTS - inspect.signature(model.forward).parameters.keys()
    if lacking:
        raise _unfit(folder, f"{type(model).__name__}.forward takes no {' and no '.join(sorted(lacking))}")
    return BaseModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        num_layers=config.get_text_config().num_hidden_layers,
        vocab_size=model.get_input_embeddings().num_embeddings,
        eos_ids=_eos_ids(model),
    )


def _check_config(folder: Path, config: Any, max_model_len: int) -> None:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise _unfit(folder, "it is an encoder-decoder")
    other_layers = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    if other_layers:
        raise _unfit(folder, f"it has layers of type {', '.join(other_layers)}")
    window = getattr(text, "sliding_window", None)
    if window is not None and window < max_model_len:
        raise _unfit(folder, f"its sliding_window is {window}, with max_model_len {max_model_len}")
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and max_model_len > longest:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but base model {folder} has max_position_embeddings {longest}; "
            f"set max_model_len to {longest} at most"
        )
    # Rotary frequencies that switch with the longest sequence of the batch would let rows change each other.
    rope = getattr(text, "rope_parameters", None) or {}
    switches_at = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and switches_at is not None and max_model_len > switches_at:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but base model {folder} uses other rotary frequencies beyond "
            f"{switches_at} tokens (longrope); set max_model_len to {switches_at} at most"
        )


def _unfit(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"base model {folder} cannot be served by the transformers engine: {reason}; it serves decoders whose "
        "layers all attend to the full context. Use the vLLM engine, or another base"
    )


def _eos_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
