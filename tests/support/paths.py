"""Where the repository and its shipped adapters lie."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
ZOO = REPOSITORY / "infra" / "zoo"
