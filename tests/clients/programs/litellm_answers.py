"""litellm as shipped: a chat, a text completion, a stream, and an unknown model."""

import json
import sys

import litellm

url, model = sys.argv[1:]
own = {"api_base": url, "api_key": "none", "temperature": 0, "max_tokens": 12, "num_retries": 0, "timeout": 120}
messages = [{"role": "user", "content": "Say three words."}]
chat = litellm.completion(model=f"openai/{model}", messages=messages, **own)
pieces = litellm.completion(model=f"openai/{model}", messages=messages, stream=True, **own)
text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="One, two,", **own)
try:
    litellm.completion(model="openai/nobody", messages=messages, **own)
    unknown = "answered"
except litellm.NotFoundError:
    unknown = "NotFoundError"
print(
    json.dumps(
        {
            "chat": chat.choices[0].message.content,
            "streamed": "".join(piece.choices[0].delta.content or "" for piece in pieces),
            "text": text.choices[0].text,
            "tokens": chat.usage.completion_tokens,
            "unknown": unknown,
        }
    )
)
