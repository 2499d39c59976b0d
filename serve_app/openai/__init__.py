"""The OpenAI API's shapes: requests, answers, errors."""
