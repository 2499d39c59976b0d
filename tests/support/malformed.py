"""Bodies and requests that no client should send: what is wrong with them is theirs, whatever engine is behind."""

from __future__ import annotations

import gzip
import json
from typing import Any

_FINE = {"model": "add", "prompt": "x", "max_tokens": 1}
_CHAT = {"model": "add", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
_IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


RAW: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"x"',
    "cut": b'{"model": "add", "prompt": "x',
    "two": b'{"model": "add", "prompt": "x"}{}',
    "no utf-8": b'{"model": "add", "prompt": "\xff\xfe"}',
    "utf-16": json.dumps(_FINE).encode("utf-16"),
    "with a mark": b"\xef\xbb\xbf{",
    "zipped": gzip.compress(json.dumps(_FINE).encode()),
    "NaN": b'{"model": "add", "prompt": "x", "temperature": NaN}',
    "Infinity": b'{"model": "add", "prompt": "x", "top_p": -Infinity}',
    "1e999": b'{"model": "add", "prompt": "x", "temperature": 1e999}',
    "a number of 5000 digits": b'{"model": "add", "prompt": "x", "seed": ' + b"1" * 5000 + b"}",
    "deep": b'{"model": "add", "prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "deep within a schema": b'{"model": "add", "prompt": "x", "structured_outputs": {"json": '
    + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}}",
    "half a surrogate pair in the prompt": b'{"model": "add", "prompt": "\\ud800"}',
    "half a surrogate pair in a stop": b'{"model": "add", "prompt": "x", "stop": ["\\udc00"]}',
    "half a surrogate pair in the model": b'{"model": "\\ud83d", "prompt": "x"}',
    "half a surrogate pair as a key": b'{"model": "add", "prompt": "x", "\\ud83d": 1}',
    "half a surrogate pair in a message": b'{"model": "add", "messages": [{"role": "user", "content": "\\ud800"}]}',
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    **{f"prompt {value!r:.40}": {"prompt": value} for value in (
        [], [[]], [""], [-1], [2**31], [2**63], [1.5], [True], [[1], []], ["a", 1], [[1], "a"], [49152], [None], {}, 5,
        {"prompt": "x"}, [[[1]]], [["99999999"]], [99999999.0],
    )},
    **{f"max_tokens {value!r}": {"max_tokens": value} for value in (-1, 2**62, "5", 1.5, True, [1], 10**18)},
    **{f"temperature {value!r}": {"temperature": value} for value in (-1, "1", [], 1e300)},
    **{f"n {value!r}": {"n": value} for value in (0, -1, 10**9, 1.5, "2", [2])},
    **{f"logit_bias {value!r:.40}": {"logit_bias": value} for value in (
        {"-1": 1}, {"99999999": 1}, {"a": 1}, {"5": "x"}, {"5": 10**9}, [5], "5", {str(i): 1 for i in range(3000)},
    )},
    **{f"stop {value!r:.40}": {"stop": value} for value in (
        "", [""], [5], {}, [["x"]], 5, [str(i) for i in range(100_000)], "x" * 10_000)},
    **{f"stop_token_ids {value!r:.40}": {"stop_token_ids": value} for value in (
        [-1], [49152], [2**62], ["x"], list(range(100)), 5)},
    **{f"logprobs {value!r}": {"logprobs": value} for value in (-2, 10**9, "x", [1], 1.5)},
    **{f"{name} {value!r}": {name: value} for name, value in (
        ("seed", 2**64), ("seed", "x"), ("top_p", 0), ("top_p", 2), ("top_k", -2), ("top_k", "x"), ("min_p", 2),
        ("presence_penalty", 9), ("repetition_penalty", 0), ("repetition_penalty", -1), ("stream", "true"),
        ("stream", 1), ("stream_options", {"include_usage": True}), ("stream_options", "x"), ("min_tokens", 10**9),
        ("model", 5), ("model", ""), ("model", None), ("model", "add\r\nX-Evil: 1"), ("model", "../add"),
        ("model", ["add"]), ("echo", "x"), ("best_of", 0), ("user", 5), ("truncate_prompt_tokens", -5),
        ("allowed_token_ids", []), ("allowed_token_ids", [10**9]), ("bad_words", [""]), ("bad_words", 5),
        ("prompt_logprobs", -5), ("priority", "x"), ("suffix", 5), ("thinking_token_budget", -9),
        ("repetition_detection", {"max_pattern_size": -1}), ("logprob_token_ids", [10**9]), ("x" * 100_000, 1),
    )},
    **{f"structured_outputs {value!r:.60}": {"structured_outputs": value} for value in (
        {}, {"regex": "("}, {"regex": "a{99999999}"}, {"choice": []}, {"choice": [5]}, {"grammar": "root ::="},
        {"json": {"type": 5}}, {"json": "x"}, {"json": {"$ref": "http://127.0.0.1:1/x"}},
        {"regex": "a", "choice": ["b"]}, {"nothing": 1}, "x",
        {"json": '{"type": "array", "minItems": 1099511627776}'}, {"json": '{"a":' * 5000 + "1" + "}" * 5000},
    )},
}  # fmt: skip
CHAT_FIELDS: dict[str, dict[str, Any]] = {
    **{f"messages {value!r:.60}": {"messages": value} for value in (
        [], [{}], {}, "x", [None], [[]], [{"role": "user"}], [{"role": "nobody", "content": "x"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": [_IMAGE]}], [{"role": "user", "content": [{}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": {"type": "text", "text": "x"}}],
        [{"role": "tool", "content": "x"}], [{"role": "assistant", "tool_calls": [{}]}],
        [{"role": "assistant", "content": None, "tool_calls": "x"}],
        [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "user", "content": "word " * 50_000}],
    )},
    **{f"response_format {value!r:.60}": {"response_format": value} for value in (
        {"type": "json_schema"}, _schema({"type": 5}), _schema("x"), {"type": "nothing"}, "x", {}, _schema(None),
        _schema({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}),
        _schema({"type": "string", "pattern": "("}), _schema({"type": "array", "minItems": 1 << 40}),
        _schema({"type": "array", "items": {"type": "array", "maxItems": 10**7}}),
        _schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}),
    )},
    **{f"tools {value!r:.60}": {"tools": value} for value in (
        "x", [{}], [{"type": "function"}], [_TOOL, 5], [{"type": "function", "function": {"name": 5}}],
    )},
    **{f"tool_choice {value!r:.60}": {"tool_choice": value, "tools": [_TOOL]} for value in (
        "x", 5, {}, {"type": "function", "function": {"name": "nobody"}},
    )},
    "tool_choice without tools": {"tool_choice": "required"},
    "a template": {"chat_template": "{% for a in range(10**9) %}x{% endfor %}"},
    "variables of a template": {"chat_template_kwargs": "x"},
    "both prefill and turn": {"continue_final_message": True, "add_generation_prompt": True},
    "top_logprobs alone": {"top_logprobs": 3},
    "reasoning": {"reasoning_effort": 5},
}  # fmt: skip
BODIES: dict[str, tuple[str, bytes]] = {
    **{name: ("completions", body) for name, body in RAW.items()},
    **{name: ("completions", json.dumps(_FINE | own).encode()) for name, own in FIELDS.items()},
    **{f"chat: {name}": ("chat/completions", json.dumps(_CHAT | own).encode()) for name, own in CHAT_FIELDS.items()},
}
_BODY = json.dumps(_FINE).encode()
_POST = b"POST %s/v1/completions HTTP/1.1\r\nHost: x\r\n"
REQUESTS: dict[str, bytes] = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no such version": b"GET %s/health HTTP/9.9\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"POST %s/v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    "a header of a megabyte": b"GET %s/health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
    "a header with a line feed": b"GET %s/health HTTP/1.1\r\nHost: x\r\nX: a\nb\r\n\r\n",
    "a negative length": _POST + b"Content-Length: -5\r\n\r\n{}",
    "a length of letters": _POST + b"Content-Length: ten\r\n\r\n{}",
    "a length that is too long": _POST + b"Content-Length: 1000\r\n\r\n{}",
    "a length that is too short": _POST + b"Content-Length: 5\r\n\r\n" + _BODY,
    "two lengths": _POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and chunks": _POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks of no size": _POST + b"Transfer-Encoding: chunked\r\n\r\nxx\r\n{}\r\n0\r\n\r\n",
    "chunks that are cut": _POST + b"Transfer-Encoding: chunked\r\n\r\n40\r\n{",
    "chunks of another length": _POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}}}\r\n0\r\n\r\n",
    "another encoding": _POST + b"Transfer-Encoding: gzip\r\n\r\n{}",
    "a path that climbs": b"GET %s/v1/models/../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path with a zero": b"GET %s/v1/models/a%%00b HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path that is no utf-8": b"GET %s/v1/models/%%ff%%fe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path of a megabyte": b"GET %s/v1/models/" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a query of signs": b"GET %s/v1/models?limit=%%ff&after=%%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "another method": b"BREW %s/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    "delete": b"DELETE %s/v1/models/add HTTP/1.1\r\nHost: x\r\n\r\n",
    "trace": b"TRACE %s/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "half a request": _POST,
    "an upgrade": b"GET %s/v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
}
