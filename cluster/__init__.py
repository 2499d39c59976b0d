"""The library that the compression job and the serving application stand on.

Adapters go in, a bundle comes out, and both sides read it here. It knows torch, numpy, safetensors
and boto3; it knows nothing of Ray, HTTP, transformers or vLLM (``tests/test_imports.py`` holds it to that).
"""
