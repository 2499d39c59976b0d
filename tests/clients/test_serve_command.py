"""`serve deploy` as the README has it, on a Ray that asks for its token: what it says, and what it does not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from tests.support.paths import REPOSITORY
from tests.support.ray_heads import BIN, TOKEN, free_port, ray_head

pytestmark = pytest.mark.slow

AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def test_it_wants_the_token_and_a_config_that_is_refused_is_seen_in_the_status(tmp_path: Path) -> None:
    document = yaml.safe_load((REPOSITORY / "infra" / "serve.yaml").read_text())
    document["http_options"]["port"] = free_port()
    document["applications"][0]["args"]["bundel"] = "s3://lora/bundle"
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(document))
    with ray_head(tmp_path) as head:
        deploy = (str(BIN / "serve"), "deploy", "--address", head.dashboard, str(config))
        status, printed = head.run(*deploy, RAY_AUTH_TOKEN=TOKEN)
        assert (status != 0, "401" in printed or "token" in printed.lower()) == (True, True), printed
        status, printed = head.run(*deploy, **AUTH)
        assert (status, "Sent deploy request successfully" in printed) == (0, True), printed
        deadline, ask = time.monotonic() + 120, (str(BIN / "serve"), "status", "--address", head.dashboard)
        while "DEPLOY_FAILED" not in printed:
            assert time.monotonic() < deadline, printed
            status, printed = head.run(*ask, "--name", "compress-then-serve", **AUTH)
            assert status == 0, printed
        assert "bundel" in yaml.safe_load(printed)["message"]
