"""A real S3 server, SeaweedFS, on 127.0.0.1, for as long as a context lasts.

with run_seaweed(data_dir) as server:
    os.environ.update(server.environment())
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.process_group import end_group

BUCKET = "tests"
AMBIENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
)
"""Variables of a developer's own that would lead a test elsewhere."""
_START_TIMEOUT_S = 60
_GRPC_OFFSET = 10000  # each port + 10000 is taken too


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def environment(self) -> dict[str, str]:
        """What leads boto3, and it alone, to this server. Unset what stands in AMBIENT besides."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> Any:
        """A plain boto3 client, for what a test does behind the store's back."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(s3={"addressing_style": "path"}),
        )


@contextmanager
def run_seaweed(data_dir: Path) -> Iterator[S3Server]:
    """Starts ``weed mini`` with its data in ``data_dir``, waits until it takes a write into BUCKET, and ends
    its whole process group afterwards. Raises RuntimeError with its log when it does not come up."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log_path = data_dir / "weed.log"
    master, volume, filer, s3, admin = _free_ports(5)
    server = S3Server(f"http://127.0.0.1:{s3}", "test-access-key", "test-secret-key")
    command = [
        *(_weed(), "mini", f"-dir={data_dir}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"),
        *(f"-admin.port={admin}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        # As S3 does: a write into a bucket that does not exist fails.
        *("-s3.autoCreateBucket=false", "-master.telemetry=false", f"-bucket={BUCKET}"),
    ]
    with ExitStack() as stack:
        log = stack.enter_context(log_path.open("wb"))
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=data_dir,
            env={**os.environ, **server.environment()},
            start_new_session=True,
        )
        stack.callback(end_group, process, 10)
        _wait_until_writable(server, process, log_path)
        yield server


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError(f"no SeaweedFS: neither {beside} nor `weed` on PATH; run `make setup`")
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and free ``_GRPC_OFFSET`` above; both below the range of outgoing connections."""
    ports: list[int] = []
    candidates = random.SystemRandom().sample(range(12000, 22000), 10000)
    with ExitStack() as stack:
        for port in candidates:
            try:
                for bound in (port, port + _GRPC_OFFSET):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", bound))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise RuntimeError(f"no {count} free ports on 127.0.0.1")


def _wait_until_writable(server: S3Server, process: subprocess.Popen[bytes], log_path: Path) -> None:
    client = server.client()
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            client.put_object(Bucket=BUCKET, Key="started", Body=b"")
            return
        except (ClientError, BotoCoreError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                log = log_path.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"weed mini did not start (exit status {process.poll()}): {error}\n{log}") from error
        time.sleep(0.1)
