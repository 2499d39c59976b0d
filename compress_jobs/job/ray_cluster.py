"""Joining the Ray cluster that RAY_ADDRESS names, or starting one here; and whether its nodes see the job's folders."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import ray

from cluster.adapters.record import AdapterFiles
from cluster.errors import ConfigError, CtsError, StoreError
from cluster.store.address import local_path, open_store
from cluster.store.protocol import Store
from compress_jobs.host.cpus import available_cpus
from compress_jobs.host.submission import SUBMITTED
from compress_jobs.job.options import RunOptions
from compress_jobs.progress import say

_PATIENCE_S = 22
_SEEN_S = 60
_MAX_MESSAGE_SIZE = 300
_PROBE = "import ray; ray.init(log_to_driver=False); ray.shutdown()"
_TOKEN = (
    "it wants its token, and {seen}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token "
    "that the Ray cluster was started with"
)


def connect(options: RunOptions) -> None:
    """Join the Ray cluster that RAY_ADDRESS names (``ray job submit`` sets it), or start one here. Raises ConfigError
    within half a minute where it cannot be joined."""
    # Ray warns about this default on every start otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "local"):
        _check_reachable(address)
        try:
            ray.init(log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise _cannot_join(address, _one_line(str(error))) from None
        nodes = [node for node in ray.nodes() if node["Alive"]]
        say(f"Ray cluster at {address}: {len(nodes)} nodes, {ray.cluster_resources().get('CPU', 0):g} CPUs")
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address="local",
            num_cpus=options.num_cpus or available_cpus(),
            include_dashboard=False,
            object_store_memory=512 << 20,
            log_to_driver=False,
            logging_level="warning",
        )
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"Ray cannot be started on this machine: {_one_line(str(error))}; look at RAY_AUTH_TOKEN_PATH, "
            "RAY_TMPDIR and HOME, which must be a folder that can be written"
        ) from None


def check_shared(options: RunOptions, store: Store, files: AdapterFiles, relative: Sequence[str]) -> None:
    """Raises ConfigError where a task could run on a node that does not see what this one sees in a local folder.

    ``relative``: options that were given as relative paths, which mean another folder on each node.
    """
    local = [uri for uri in (options.adapters, options.out) if local_path(uri) is not None]
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    own = _own_node()
    strange = [node for node in nodes if node["NodeID"] != own]
    if not local or not strange:
        return
    if relative:
        raise ConfigError(
            f"{relative[0]}: a relative path, and Ray has {len(strange)} other nodes; give s3://bucket/prefix, or the "
            "absolute path of a folder that all of them share"
        )
    key, token = f"work/shared-{uuid4().hex}", uuid4().hex.encode()
    store.write(key, token)
    try:
        # All at once: a node may have to start a worker first.
        asked = [(node, _ask(node, options.adapters, options.out, key, token, files)) for node in strange]
        for node, answer in asked:
            where = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            if problem := _answer(answer, where):
                raise ConfigError(
                    f"{problem} on Ray's node {where}; give s3://bucket/prefix, or a folder that all nodes share at "
                    "one path"
                )
    finally:
        store.delete(key)


def _ask(node: dict[str, str], *question: object) -> Any:
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=pinned)(_unseen).remote(*question)


def _answer(reference: Any, where: str) -> str | None:
    try:
        problem: str | None = ray.get(reference, timeout=_SEEN_S)
        return problem
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise CtsError(
            f"Ray's node {where} cannot run the job's tasks: {_one_line(str(error))}; see that this package and its "
            "requirements are installed there"
        ) from None


def _unseen(adapters: str, out: str, key: str, token: bytes, files: AdapterFiles) -> str | None:
    """Which of the two is not, on the node that this runs on, what it is on the driver's."""
    own = f"{key}-{uuid4().hex}"
    try:
        if open_store(out).read(key).data != token:
            return f"--out {out}: it is another folder"
    except StoreError:
        return f"--out {out}: what this node writes there is not seen"
    try:
        open_store(out).write(own, token)
        open_store(out).delete(own)
    except StoreError as error:
        return f"--out {out}: cannot be written ({error})"
    for entry in filter(None, (files.config, files.weights)):
        try:
            if open_store(adapters).head(entry.key).etag != entry.etag:
                return f"--adapters {adapters}: {entry.key} is another file"
        except StoreError:
            return f"--adapters {adapters}: {entry.key} is not seen"
    return None


def _own_node() -> str | None:
    """None where this process only speaks to the Ray cluster, from elsewhere (ray://)."""
    return None if ray.util.client.ray.is_connected() else str(ray.get_runtime_context().get_node_id())


def _check_reachable(address: str) -> None:
    """In a process of its own: a connection that cannot be made keeps Ray busy for many minutes, and cannot be given
    up from within."""
    if "@" in address:
        raise ConfigError("RAY_ADDRESS holds more than host:port; the token of a Ray cluster stands in RAY_AUTH_TOKEN")
    if address.lower().startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, where jobs are submitted: `ray job submit` reads it; to join the Ray cluster "
            "from one of its nodes, set it to host:port of the head (6379 by default)"
        )
    _check_listening(address)
    with tempfile.TemporaryFile() as log:
        # Not as the submitted job that this may be: Ray would set that up once more.
        environment = {name: value for name, value in os.environ.items() if name != SUBMITTED}
        command = [sys.executable, "-c", _PROBE]
        probe = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + _PATIENCE_S
        text = ""
        try:
            while probe.poll() is None and time.monotonic() < deadline and "InvalidAuthToken" not in text:
                time.sleep(0.1)
                text = _written(log.fileno())
        finally:
            ended = probe.poll() is not None
            probe.kill()  # which does nothing to one that has ended
            probe.wait()
        text = _written(log.fileno())
    if not _one_line(text) and "InvalidAuthToken" not in text and ended and probe.returncode < 0:
        text = "Ray's process ended at once; look for line breaks and signs in the token that no HTTP header may have"
    if probe.returncode != 0:
        raise _cannot_join(address, text)


def _written(descriptor: int) -> str:
    # Not by seeking: the probe writes at the same offset.
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace")


def _check_listening(address: str) -> None:
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _cannot_join(address, "it is no host:port ([::1]:6379 for IPv6)") from None
    if port is None and "://" not in address:
        return  # "auto"; Ray says what it makes of others
    if host is None or port is None:
        raise _cannot_join(address, "it is no ray://host:port (10001 by default)")
    try:
        socket.create_connection((host, port), timeout=5).close()
    except (OSError, ValueError) as error:  # a name that no name server takes is a ValueError
        raise _cannot_join(address, f"nothing answers there: {getattr(error, 'strerror', None) or error}") from None


def _cannot_join(address: str, text: str) -> ConfigError:
    """``text``: what Ray has said."""
    told = (
        "unset it to start Ray on this machine, or submit the job to the Ray cluster (`ray job submit --address "
        "http://<head>:8265`)"
    )
    if "InvalidAuthToken" in text:
        text, told = _TOKEN.format(seen="none or another one was given"), ""
    elif "AuthenticationError" in text or "no authentication token" in text or "RAY_AUTH_TOKEN" in text:
        text, told = _TOKEN.format(seen="none was found here"), ""
    elif "ersion mismatch" in text:
        text = f"it runs other versions: {_one_line(text[text.index('ersion mismatch') + 15 :])}"
        told = "run the job with the versions that the Ray cluster has"
    elif not (text := _one_line(text)):
        text = f"no answer within {_PATIENCE_S} s"
    return ConfigError(
        f"RAY_ADDRESS is {address!r}, and that Ray cluster cannot be joined: {'; '.join(filter(None, (text, told)))}"
    )


def _one_line(text: str) -> str:
    """Of a log its last error; of a message of many lines one."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    if found := list(re.finditer(r"^[\w.]*(?:Error|Exception): ", text, re.MULTILINE)):
        text = text[found[-1].end() :]
    elif re.match(r"\[?\d{4}-\d\d-\d\d ", text):  # Ray's log alone
        text = ""
    line = " ".join(text.split()).lstrip(":; ")
    return line if len(line) <= _MAX_MESSAGE_SIZE else line[:_MAX_MESSAGE_SIZE] + "..."
