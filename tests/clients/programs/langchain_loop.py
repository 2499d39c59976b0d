"""langchain-openai as shipped: an agent's loop of three turns with tool calls, a stream, and a structured answer."""

import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, model = sys.argv[1:]


@tool
def look(name: Literal["Ann", "Bob"]) -> str:
    """Look a person up."""
    return f"{name} is at home."


class Person(BaseModel):
    """A person."""

    name: Literal["Ann", "Bob"]
    is_here: bool


chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=96, max_retries=0, timeout=120)
history = [HumanMessage("Where are Ann and Bob?")]
calls = []
for _ in range(2):
    answer = chat.bind_tools([look], tool_choice="required", strict=True).invoke(history)
    history.append(answer)
    calls.append([call["args"] for call in answer.tool_calls])
    history += [look.invoke(call) for call in answer.tool_calls]
last = chat.bind_tools([look], tool_choice="none").invoke(history)
streamed = "".join(str(chunk.content) for chunk in chat.bind_tools([look], tool_choice="none").stream(history))
person = chat.with_structured_output(Person, method="json_schema").invoke('Repeat: {"name": "Ann", "is_here": true}')
print(
    json.dumps(
        {
            "calls": calls,
            "turns": [message.type for message in history],
            "last": last.content,
            "streamed": streamed,
            "person": person.model_dump(),
            "tokens": last.usage_metadata["output_tokens"],
        }
    )
)
