"""Every field of OpenAI's and vLLM's completions and chats, and what each engine does with it: the data of the table in
serve_app/README.md, which `python -m tests.support.conformance` writes there, and of the tests that send every field.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.openai.requests import NEUTRAL, SAYS_NOTHING
from tests.support.paths import REPOSITORY

Outcome = Literal["honoured", "neutral", "refused"]
BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"
PAGE = REPOSITORY / "serve_app" / "README.md"
NOT_HERE = "vllm does not take it from clients here"


@dataclass(frozen=True)
class Asked:
    """``value`` asks for something; ``beside`` are fields without which it cannot be asked."""

    name: str
    value: Any
    vllm: Outcome
    transformers: Outcome
    endpoints: tuple[str, ...] = ("chat", "completions")
    beside: dict[str, Any] = field(default_factory=dict)

    def body(self, endpoint: str) -> dict[str, Any]:
        prompt: dict[str, Any] = {"messages": MESSAGES} if endpoint == "chat" else {"prompt": "Once"}
        return prompt | {"max_tokens": 1, "temperature": 0} | self.beside | {self.name: self.value}


MESSAGES = [{"role": "user", "content": "Say a word."}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
CHAT, COMPLETIONS = ("chat",), ("completions",)
_BOTH: tuple[Outcome, Outcome] = "honoured", "honoured"
_VLLM: tuple[Outcome, Outcome] = "honoured", "refused"
_NOTHING: tuple[Outcome, Outcome] = "neutral", "neutral"
_NEITHER: tuple[Outcome, Outcome] = "refused", "refused"

FIELDS = (
    Asked("add_generation_prompt", False, *_VLLM, CHAT),
    Asked("add_special_tokens", True, *_VLLM, CHAT),
    Asked("add_special_tokens", False, *_VLLM, COMPLETIONS),
    Asked("allowed_token_ids", [260, 253], *_VLLM),
    Asked("audio", {"voice": "alloy", "format": "wav"}, *_NEITHER),
    Asked("bad_words", ["never"], *_VLLM),
    Asked("best_of", 2, *_NEITHER),
    Asked("cache_salt", "salt", *_NEITHER),
    Asked("chat_template", "{{ messages }}", *_NEITHER, CHAT),
    Asked("chat_template_kwargs", {"some": "thing"}, *_VLLM, CHAT),
    Asked(
        "continue_final_message",
        True,
        *_VLLM,
        CHAT,
        {"messages": [*MESSAGES, {"role": "assistant", "content": "One"}], "add_generation_prompt": False},
    ),
    Asked("detokenize", False, *_NEITHER),
    Asked("documents", [{"title": "t", "text": "x"}], *_VLLM, CHAT),
    Asked("ec_transfer_params", {"some": "thing"}, *_NEITHER),
    Asked("echo", True, *_VLLM, CHAT, {"add_generation_prompt": False}),
    Asked("echo", True, *_BOTH, COMPLETIONS),
    Asked("frequency_penalty", 0.5, *_BOTH),
    Asked("function_call", {"name": "look"}, *_NEITHER),
    Asked("functions", [{"name": "look"}], *_NEITHER),
    Asked("guided_choice", ["yes", "no"], *_NEITHER),
    Asked("guided_grammar", "root ::= 'x'", *_NEITHER),
    Asked("guided_json", {"type": "object"}, *_NEITHER),
    Asked("guided_regex", "x", *_NEITHER),
    Asked("ignore_eos", True, *_BOTH),
    Asked("include_reasoning", False, "honoured", "neutral", CHAT),
    Asked("include_stop_str_in_output", True, *_VLLM),
    Asked("kv_transfer_params", {"some": "thing"}, *_NEITHER),
    Asked("length_penalty", 2.0, *_VLLM, beside={"use_beam_search": True, "n": 2}),
    Asked("logit_bias", {"260": 5}, *_BOTH),
    Asked("logits_processors", ["some.processor"], *_NEITHER),
    Asked("logprob_token_ids", [260, 253], *_VLLM, CHAT, {"logprobs": True}),
    Asked("logprob_token_ids", [260, 253], *_VLLM, COMPLETIONS, {"logprobs": 1}),
    Asked("logprobs", True, *_BOTH, CHAT),
    Asked("logprobs", 2, *_BOTH, COMPLETIONS),
    Asked("max_completion_tokens", 1, *_BOTH),
    Asked("max_tokens", 1, *_BOTH),
    Asked("media_io_kwargs", {"video": {"num_frames": 4}}, *_NEITHER, CHAT),
    Asked("messages", MESSAGES, *_BOTH, CHAT),
    Asked("metadata", {"some": "thing"}, *_NOTHING),
    Asked("min_p", 0.1, *_BOTH),
    Asked("min_tokens", 1, *_BOTH),
    Asked("mm_payload", "none", *_NEITHER),
    Asked("mm_processor_kwargs", {"some": "thing"}, *_NEITHER, CHAT),
    Asked("modalities", ["text", "audio"], *_NEITHER),
    Asked("moderation", {"model": "omni-moderation-latest"}, *_NEITHER),
    Asked("n", 2, *_BOTH, beside={"temperature": 1.0}),
    Asked("parallel_tool_calls", False, "honoured", "neutral"),
    Asked("prediction", {"type": "content", "content": "x"}, *_NEITHER),
    Asked("presence_penalty", 0.5, *_BOTH),
    Asked("priority", 1, *_NEITHER),
    Asked("prompt", [504, 3575], *_BOTH, COMPLETIONS),
    Asked("prompt_cache_key", "key", *_NOTHING),
    Asked("prompt_cache_options", {"mode": "implicit"}, *_NOTHING),
    Asked("prompt_cache_retention", "24h", *_NOTHING),
    Asked("prompt_embeds", "AAAA", *_NEITHER, COMPLETIONS),
    Asked("prompt_logprobs", 1, *_VLLM),
    Asked("reasoning_effort", "low", *_VLLM, CHAT),
    Asked("repetition_detection", {"max_pattern_size": 4, "min_count": 3}, *_VLLM),
    Asked("repetition_penalty", 1.1, *_BOTH),
    Asked("request_id", "mine", *_NEITHER),
    Asked("response_format", SCHEMA, *_BOTH),
    Asked("return_mm_kwargs", False, *_NEITHER),
    Asked("return_prompt_text", True, *_VLLM, CHAT),
    Asked("return_token_ids", True, *_VLLM),
    Asked("return_token_offsets", True, *_NEITHER),
    Asked("return_tokens_as_token_ids", True, *_VLLM, CHAT, {"logprobs": True}),
    Asked("return_tokens_as_token_ids", True, *_VLLM, COMPLETIONS, {"logprobs": 1}),
    Asked("routed_experts_prompt_start", 1, *_NEITHER),
    Asked("safety_identifier", "me", *_NOTHING),
    Asked("seed", 7, *_BOTH, beside={"temperature": 1.0}),
    Asked("service_tier", "flex", *_NOTHING),
    Asked("session_id", "mine", *_NEITHER),
    Asked("skip_special_tokens", False, *_VLLM),
    Asked("spaces_between_special_tokens", False, *_VLLM),
    Asked("stop", ["never"], *_BOTH),
    Asked("stop_token_ids", [38], *_BOTH),
    Asked("store", True, *_NOTHING),
    Asked("stream", True, *_BOTH),
    Asked("stream_interval", 4, *_VLLM, beside={"stream": True}),
    Asked("stream_options", {"include_usage": True}, *_BOTH, beside={"stream": True}),
    Asked("structured_outputs", {"choice": ["yes", "no"]}, *_VLLM),
    Asked("suffix", "the end", *_NEITHER),
    Asked("temperature", 0.5, *_BOTH),
    Asked("thinking_token_budget", 4, *_NEITHER),
    Asked("tool_choice", "required", *_VLLM, CHAT, {"tools": [TOOL], "max_tokens": 40}),
    Asked("tools", [TOOL], *_VLLM, CHAT, {"tool_choice": "none"}),
    Asked("top_k", 5, *_BOTH),
    Asked("top_logprobs", 2, *_BOTH, CHAT, {"logprobs": True}),
    Asked("top_p", 0.9, *_BOTH),
    Asked("truncate_prompt_tokens", 2, *_VLLM),
    Asked("truncation_side", "left", "honoured", "neutral"),
    Asked("use_beam_search", True, *_VLLM, beside={"n": 2}),
    Asked("user", "me", *_NOTHING),
    Asked("verbosity", "low", *_NEITHER),
    Asked("vllm_xargs", {"some": "thing"}, *_NEITHER),
    Asked("watermarking", True, *_NEITHER),
    Asked("web_search_options", {"search_context_size": "low"}, *_NEITHER),
)
CASES = [(asked, endpoint) for asked in FIELDS for endpoint in asked.endpoints]
IDS = [f"{asked.name}-{endpoint}" for asked, endpoint in CASES]


def table() -> str:
    lines = ["| field | of | vLLM | transformers | values that ask for nothing, besides null |", "|" + " --- |" * 5]
    rows: dict[tuple[str, Outcome, Outcome], list[str]] = {}
    for asked in FIELDS:
        rows.setdefault((asked.name, asked.vllm, asked.transformers), []).extend(asked.endpoints)
    for (name, vllm, transformers), endpoints in sorted(rows.items()):
        of = "both" if len(endpoints) == 2 else endpoints[0]
        if name in SAYS_NOTHING:
            values = {str: "any string", dict: "any object", bool: "true, false"}[SAYS_NOTHING[name]]
        else:
            values = ", ".join(f"`{json.dumps(value)}`" for value in NEUTRAL.get(name, ()))
        lines.append(f"| `{name}` | {of} | {vllm} | {transformers} | {values} |")
    return "\n".join(lines) + "\n"


def page_with_table() -> str:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page_with_table())
