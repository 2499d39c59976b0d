"""What is asked of vLLM and of us, to be answered alike; and how answers are compared."""

from __future__ import annotations

import json
from typing import Any

CHAT = [{"role": "user", "content": "Say three words."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
# Of the base, greedy where nothing else is said.
BODIES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "The capital of France is"},
    "two prompts": {"prompt": ["One, two,", "Once upon a time"]},
    "tokens": {"prompt": [504, 3575, 282]},
    "lists of tokens": {"prompt": [[504, 3575], [504, 3575, 282]]},
    "echo": {"prompt": "The capital", "echo": True},
    "echo alone": {"prompt": "The capital", "echo": True, "max_tokens": 0},
    "logprobs": {"prompt": "The capital of France is", "logprobs": 3},
    "echo and logprobs": {"prompt": "The capital of", "echo": True, "logprobs": 2},
    "n": {"prompt": "Once", "n": 3, "temperature": 1.0, "seed": 7},
    "seed": {"prompt": "Once", "temperature": 1.0, "seed": 8, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"prompt": "a a a a", "frequency_penalty": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    "bias": {"prompt": "1, 2, 3,", "logit_bias": {"33": -100, "260": 4}},
    "stop": {"prompt": "1, 2, 3, 4,", "stop": ["6", "never", "nor", "this"]},
    "stop in output": {"prompt": "1, 2, 3, 4,", "stop": ["6"], "include_stop_str_in_output": True},
    "stop tokens": {"prompt": "1, 2, 3, 4,", "stop_token_ids": [38]},
    "least and most": {"prompt": "Hello", "min_tokens": 5, "max_tokens": 5, "ignore_eos": True},
    "bad words": {"prompt": "The capital of France is", "bad_words": [" Paris"]},
    "allowed tokens": {"prompt": "The capital of France is", "allowed_token_ids": [260, 253, 33]},
    "token ids": {"prompt": "The capital", "return_token_ids": True},
    "tokens as ids": {"prompt": "The capital", "logprobs": 1, "return_tokens_as_token_ids": True},
    "special tokens": {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "skip_special_tokens": False},
    "truncated": {"prompt": "one two three four five six", "truncate_prompt_tokens": 3},
    "regex": {"prompt": "The year", "structured_outputs": {"regex": " [0-9]{4}"}},
    "choice": {"prompt": "Yes or no?", "structured_outputs": {"choice": ["yes", "no"]}},
    "chat": {"messages": CHAT},
    "chat with system": {"messages": [{"role": "system", "content": "Be short."}, *CHAT]},
    "chat in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Say"}]}]},
    "chat as developer": {"messages": [{"role": "developer", "content": "Be short."}, *CHAT]},
    "chat with logprobs": {"messages": CHAT, "logprobs": True, "top_logprobs": 2},
    "chat n": {"messages": CHAT, "n": 2, "temperature": 0.8, "seed": 3},
    "chat limit": {"messages": CHAT, "max_completion_tokens": 3, "max_tokens": None},
    "chat stop": {"messages": CHAT, "stop": "e"},
    "chat object": {"messages": CHAT, "response_format": {"type": "json_object"}},
    "chat schema": {
        "messages": CHAT,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        "max_tokens": 24,
    },
    "chat prefill": {
        "messages": [*CHAT, {"role": "assistant", "content": "One two"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "chat template's own": {"messages": CHAT, "chat_template_kwargs": {"some": "thing"}},
    "chat with tools unused": {"messages": CHAT, "tools": [TOOL], "tool_choice": "none"},
    "chat played back": {
        "messages": [
            *CHAT,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "a, b, c"},
        ]
    },
    "usage all along": {"messages": CHAT, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


def events(text: str) -> list[Any]:
    lines = text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def same(document: Any) -> Any:
    """But for ids and times, and what names who answered."""
    if isinstance(document, list):
        return [same(item) for item in document]
    if not isinstance(document, dict):
        return document
    return {k: same(v) for k, v in document.items() if k not in ("id", "created", "system_fingerprint")}


def told_by(chunks: list[Any]) -> Any:
    """A stream's choices, each put together again: how much of them is in one chunk depends on who had to wait."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            own = choices.setdefault(choice["index"], {})
            for field, value in (choice | choice.get("delta", {})).items():
                if field == "logprobs" and value is not None:
                    for part, entries in value.items():
                        own.setdefault(f"logprobs.{part}", []).extend(entries or [])
                elif field in ("text", "content", "token_ids") and value is not None:
                    own[field] = (own.get(field) or type(value)()) + value
                elif field != "delta":
                    own[field] = value if value is not None else own.get(field)
    usage = [chunk.get("usage") for chunk in chunks if chunk.get("usage")]
    return choices, usage[-1:], {field: same(chunks[0][field]) for field in ("object", "model")}
