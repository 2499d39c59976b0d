"""The main job in one go, on the adapters that this repository ships.

make demo     compress them, serve them, ask each its held-out questions, compare with PEFT
make demo ENGINE=vllm    the same, served by vLLM's CPU build
make serve    leave the application running;  make stop  ends it
"""

from __future__ import annotations

import argparse
import sys

from infra.demo.background import serve_here, serve_in_background, stop
from infra.demo.comparison import demo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="demo", choices=("demo", "serve", "serve-here", "stop"))
    parser.add_argument("--port", type=int, default=8000, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.command == "serve-here":
        return serve_here(parsed.port)
    return {"demo": demo, "serve": serve_in_background, "stop": stop}[parsed.command]()


if __name__ == "__main__":
    sys.exit(main())
