"""langchain-openai as shipped, without tools: two turns, of which the second plays the first back; a stream."""

import json
import sys

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

url, model = sys.argv[1:]
chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=16, max_retries=0, timeout=120)
first = chat.invoke([HumanMessage("Say three words.")])
history = [HumanMessage("Say three words."), first, HumanMessage("And three more.")]
second = chat.invoke(history)
streamed = "".join(str(chunk.content) for chunk in chat.stream(history))
print(json.dumps({"first": first.content, "second": second.content, "streamed": streamed}))
