"""What a person reads when something is wrong: one line, its exit code, no traceback, no secret.

The table below is the list of situations; those that need a Ray cluster of their own are in
tests/faults/test_ray_places.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from compress_jobs.__main__ import main
from compress_jobs.job import ray_cluster
from infra.seaweed import S3Server
from tests.support.jobs import rewrite
from tests.support.place import Place
from tests.support.s3_proxy import Action, S3Proxy, always
from tests.support.upload import upload

pytestmark = pytest.mark.usefixtures("ray_for_jobs")

CONNECT = ray_cluster.connect
SECRETS = ("test-secret-key", "hunter2-secret", "s3cr3t-token")


@dataclass
class Scene:
    place: Place
    root: Path
    environment: pytest.MonkeyPatch
    opened: contextlib.ExitStack

    def run(self, *more: str, adapters: str = "", base: str = "", out: str = "") -> list[str]:
        source = ("--adapters", adapters or str(self.place.adapters), "--base", base or str(self.place.base))
        return ["run", *source, "--out", out or str(self.place.out), "--rank", "2", "--gate", "1", *more]

    def write(self, name: str, data: bytes | str) -> str:
        path = self.root / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    def publish(self) -> None:
        assert self.place.call("run") == 0

    def at(self, address: str) -> list[str]:
        """With RAY_ADDRESS, and really connecting."""
        self.environment.setattr(ray_cluster, "connect", CONNECT)
        self.environment.setenv("RAY_ADDRESS", address)
        return self.run()


Situation = Callable[[Scene], list[str]]


def _config(data: bytes | str) -> Situation:
    return lambda scene: scene.run("--config", scene.write("run.toml", data))


def _tasks(data: bytes | str) -> Situation:
    def sweep(scene: Scene) -> list[str]:
        source = ["--adapters", str(scene.place.adapters), "--base", str(scene.place.base)]
        return ["sweep", *source, "--tasks", scene.write("tasks.jsonl", data)]

    return sweep


def _out(address: str) -> Situation:
    return lambda scene: scene.run(out=address)


def _refused(changes: dict[str, object], number: int, *more: str) -> Situation:
    def run(scene: Scene) -> list[str]:
        for name in range(number):
            rewrite(scene.place.adapters / f"a{name}", **changes)
        return scene.run(*more)

    return run


def _published(then: Callable[[Scene], list[str]]) -> Situation:
    def run(scene: Scene) -> list[str]:
        scene.publish()
        return then(scene)

    return run


def _submitted(then: Callable[[Scene], list[str]]) -> Situation:
    """As Ray's job supervisor starts a driver; one that was really submitted is in tests/faults/test_ray_places.py."""

    def run(scene: Scene) -> list[str]:
        scene.environment.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        return then(scene)

    return run


def _broken_manifest(scene: Scene) -> list[str]:
    (manifest,) = scene.place.out.glob("bundles/*/revisions/0/manifest.json")
    manifest.write_text("{")
    return ["show", str(scene.place.out)]


def _index_lacks_a_shard(scene: Scene) -> list[str]:
    base = scene.root / "sharded"
    base.mkdir()
    (base / "config.json").write_bytes((scene.place.base / "config.json").read_bytes())
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x.weight": "model-1.safetensors"}}))
    return scene.run(base=str(base))


def _unlink_folder(scene: Scene) -> list[str]:
    scene.publish()
    for path in sorted((scene.place.adapters / "a0").iterdir()):
        path.unlink()
    return scene.run()


def _listening_that_never_answers(scene: Scene) -> list[str]:
    server = scene.opened.enter_context(socket.create_server(("127.0.0.1", 0)))
    scene.environment.setattr(ray_cluster, "_PATIENCE_S", 3)
    return scene.at(f"127.0.0.1:{server.getsockname()[1]}")


TABLE: dict[str, tuple[Situation, int, str]] = {
    # --- Where things are -----------------------------------------------------------------------------------
    "out: one slash": (_out("s3:/lora/x"), 2, r"'s3:/lora/x' begins like a URI and is none; expected s3://bucket"),
    "out: no slash": (_out("s3:lora/x"), 2, r"begins like a URI and is none"),
    "out: no colon": (_out("s3//lora/x"), 2, r"begins like a URI and is none"),
    "out: three slashes": (_out("s3:///lora/x"), 2, r"whose bucket is not a bucket name; expected s3://bucket/prefix"),
    "out: file with one slash": (_out("file:/lora/x"), 2, r"begins like a URI and is none"),
    "out: another scheme": (_out("gs://lora/x"), 2, r"a store of scheme 'gs'; expected s3://"),
    "out: a secret in it": (_out("s3://key:hunter2-secret@lora/x"), 2, r"with credentials and endpoint in the environ"),
    "out: in quotes": (_out('"s3://lora/b"'), 2, r"spaces or quotes around it"),
    "out: a space behind": (_out("s3://lora/b "), 2, r"ends in a space or a line break"),
    "out: a line break behind": (_out("s3://lora/b\n"), 2, r"ends in a space or a line break"),
    "out: no scheme": (_out("://lora/b"), 2, r"begins like a URI and is none"),
    "out: a digit before": (_out("3s://lora/b"), 2, r"begins like a URI and is none"),
    "out: nobody's home": (_out("~nobody-of-that-name/b"), 2, r"no such user"),
    "export: to a URI": (
        _published(lambda s: ["export", str(s.place.out), "--adapter", "a0", "--to", "s3://lora/x"]),
        2,
        r"--to s3://lora/x: it writes on this machine; give a local path",
    ),
    "export: to a long name": (
        _published(lambda s: ["export", str(s.place.out), "--adapter", "a0", "--to", f"{s.root}/{'x' * 300}"]),
        2,
        r"--to \S+: File name too long",
    ),
    "report: to a URI": (
        _published(lambda s: ["report", str(s.place.out), "--to", "s3://lora/r.html"]),
        2,
        r"--to s3://lora/r.html: it writes on this machine",
    ),
    "out: empty": (lambda s: ["run", "--adapters", "a", "--base", "b"], 2, r"--out is missing; give --out or put it"),
    "out: relative, submitted": (_submitted(_out("bundle")), 2, r"--out bundle: a relative path, but a job that was"),
    "out: elsewhere, submitted": (_submitted(_out("/of/a/laptop")), 2, r"neither it nor the folder above it is on the"),
    "report: relative, submitted": (
        _submitted(_published(lambda s: ["report", str(s.place.out)])),
        2,
        r"--to report.html: a relative path",
    ),
    "adapters: missing": (lambda s: s.run(adapters="/nowhere"), 2, r"--adapters: /nowhere: No such file or directory"),
    "adapters: misspelt": (lambda s: s.run(adapters="s3:/x"), 2, r"'s3:/x' begins like a URI and is none"),
    "adapters: one's own folder": (
        lambda s: s.run(adapters=str(s.place.adapters / "a0")),
        2,
        r"it is an adapter's own folder; give the folder above it",
    ),
    "base: missing": (lambda s: s.run(base="/nowhere"), 1, r"base model /nowhere: no config.json there"),
    "base: a shard is missing": (_index_lacks_a_shard, 1, r"1 of the 1 files that .* names are not there, such as"),
    # --- Options and files ----------------------------------------------------------------------------------
    "config: missing": (
        lambda s: s.run("--config", "/nowhere"),
        2,
        r"--config /nowhere: No such file .*; give",
    ),
    "config: an unknown key": (_config('output = "x"'), 2, r"unknown key 'output'; known keys are accept-base"),
    "config: no TOML": (_config("rank ="), 2, r"not TOML"),
    "config: UTF-16 without a mark": (_config("rank = 2".encode("utf-16-le")), 2, r"it is UTF-16 without a byte order"),
    "config: an endless number": (_config("rank = " + "9" * 5000), 2, r"not TOML"),
    "config: nested without end": (_config("rank = " + "[" * 20000), 2, r"not TOML"),
    "config: an archive": (_config(b"\x1f\x8b\x08\0"), 2, r"it is a gzip archive"),
    "config: a folder": (lambda s: s.run("--config", str(s.root)), 2, r"no regular file; give the path of a TOML file"),
    "config: a page": (_config(b"<html>\xff"), 2, r"it is an HTML page"),
    "tasks: no text": (_tasks(b"\xff\xfe\xff"), 2, r"--tasks .*tasks.jsonl: it is no UTF-8 text"),
    "tasks: none": (_tasks("\n"), 2, r"no task in it"),
    "tasks: nested without end": (_tasks("[" * 100000), 2, r"expected JSON lines with name, question and test"),
    "tasks: a list": (_tasks("[]"), 2, r"expected JSON lines with name, question and test"),
    "tasks: a key is missing": (_tasks('{"name": "x"}'), 2, r"key 'question' is missing; expected JSON lines"),
    "tasks: no JSON": (_tasks("name"), 2, r"expected JSON lines with name, question and test"),
    "id-pattern": (
        lambda s: s.run("--id-pattern", "{id}"),
        2,
        r"expected a folder's path below --adapters",
    ),
    "restore: nobody": (
        lambda s: s.run("--restore", "a0"),
        2,
        r"--restore a0: it is not among those",
    ),
    # --- Who is served --------------------------------------------------------------------------------------
    "refused: all": (_refused({"use_dora": True}, 6), 2, r"none of the 6 adapters can be accepted; see above"),
    "refused: too many": (
        _refused({"use_dora": True}, 2),
        1,
        r"2 of 6 adapters are refused \(2 dora\).*--max-ref",
    ),
    "dropped: refused by now": (_published(_refused({"use_dora": True}, 1)), 1, r"a0 \(dora: .*--allow-drop 1$"),
    "dropped: no folder": (_unlink_folder, 1, r"a0 \(it has no folder\).*--allow-missing"),
    "remove: nobody": (
        _published(lambda s: ["remove", str(s.place.out), "--adapter", "x"]),
        2,
        r"--adapter x: .*not in",
    ),
    "alias: nobody": (
        _published(lambda s: ["alias", str(s.place.out), "support", "--to", "x"]),
        2,
        r"--to x: .*not in the current revision of",
    ),
    "show: nothing published": (lambda s: ["show", str(s.place.out)], 1, r"no CURRENT there; run the compression job"),
    "show: a damaged manifest": (
        _published(_broken_manifest),
        1,
        r"manifest.json: not JSON .*publish the bundle",
    ),
    # --- Ray ------------------------------------------------------------------------------------------------
    "ray: nothing listens": (
        lambda s: s.at("127.0.0.1:9"),
        2,
        r"cannot be joined: nothing answers there: Conn",
    ),
    "ray: no such host": (lambda s: s.at("no-host.invalid:6379"), 2, r"cannot be joined: nothing answers there: "),
    "ray: a name that cannot be": (lambda s: s.at("head..svc:6379"), 2, r"cannot be joined: nothing answers there"),
    "ray: half an IPv6 address": (lambda s: s.at("[::1"), 2, r"it is no host:port \(\[::1\]:6379 for IPv6\)"),
    "ray: client without a port": (lambda s: s.at("ray://127.0.0.1"), 2, r"it is no ray://host:port"),
    "ray: a password": (lambda s: s.at("http://u:hunter2-secret@h:1"), 2, r"RAY_ADDRESS holds more than host:port"),
    "ray: the jobs' address in capitals": (lambda s: s.at("HTTP://h:8265"), 2, r"where jobs are submitted"),
    "ray: no address": (lambda s: s.at("bogus"), 2, r"cannot be joined: Invalid address format: bogus"),
    "ray: the jobs' address": (
        lambda s: s.at("http://127.0.0.1:8265"),
        2,
        r"where jobs are submitted: `ray job",
    ),
    "ray: something else listens": (_listening_that_never_answers, 2, r"cannot be joined: no answer within 3 s"),
}


@pytest.mark.parametrize("situation", TABLE)
def test_each_situation_has_its_line_and_its_exit_code(
    situation: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, code, expected = TABLE[situation]
    with contextlib.ExitStack() as opened:
        line = make(Scene(place, tmp_path, monkeypatch, opened))
        capsys.readouterr()
        before = place.current() if (place.out / "CURRENT").exists() else None
        assert main(line) == code
    assert_one_line(capsys.readouterr(), expected)
    assert (place.current() if (place.out / "CURRENT").exists() else None) == before


def assert_one_line(printed: pytest.CaptureResult[str], expected: str) -> None:
    last = printed.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("python -m compress_jobs: ")
    assert re.search(expected, last), last
    assert printed.err.count("python -m compress_jobs: ") == 1
    for text in (*SECRETS, "Traceback"):
        assert text not in printed.out + printed.err


# --- S3 -----------------------------------------------------------------------------------------------------

S3_TABLE: dict[str, tuple[dict[str, str], Action, int, str]] = {
    "no credentials": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, Action.FORWARD, 1,
        r"get s3://\S+/base/config.json at http://\S+: Unable to locate credentials; set AWS_ACCESS_KEY_ID and "
        rf"AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, where this runs, on {re.escape(socket.gethostname())}$"),
    "a wrong secret": ({"AWS_SECRET_ACCESS_KEY": "hunter2-secret"}, Action.FORWARD, 1,
        r"get .*: answered 403 SignatureDoesNotMatch.*; check AWS_SECRET_ACCESS_KEY$"),
    "a wrong key": ({"AWS_ACCESS_KEY_ID": "nobody"}, Action.FORWARD, 1,
        r"InvalidAccessKeyId.*; check AWS_ACCESS_KEY_ID"),
    "not allowed": ({}, Action.FORBIDDEN, 1,
        r"get .*: answered 403 AccessDenied: .*these credentials may do this here; a bucket whose requester pays wants "
        r"AWS_REQUEST_PAYER=requester$"),
    "a token that has expired": ({"AWS_SESSION_TOKEN": "s3cr3t-token"}, Action.EXPIRED, 1,
        r"get .*: answered 400 ExpiredToken: .*; renew the credentials and their AWS_SESSION_TOKEN$"),
    "a token file that is not there": (
        {"AWS_ACCESS_KEY_ID": "", "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x"},
        Action.FORWARD, 1, r"get .*: credentials cannot be read \(.*/nowhere.*\); set AWS_ACCESS_KEY_ID"),
    "an authority that is not there": ({"AWS_CA_BUNDLE": "/nowhere"}, Action.FORWARD, 2,
        r"AWS_CA_BUNDLE is '/nowhere', which cannot be read"),
    "a secret in the address": ({"AWS_ENDPOINT_URL": "http://hunter2-secret@127.0.0.1:9"}, Action.FORWARD, 2,
        r"AWS_ENDPOINT_URL holds more than a host and a path"),
    "a secret after the address": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9/?x=hunter2-secret"}, Action.FORWARD, 2,
        r"AWS_ENDPOINT_URL holds more than a host and a path"),
    "nothing listens": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, Action.FORWARD, 1,
        r"get .*Could not connect.*; check AWS_ENDPOINT_URL, the network, and that the store is up$"),
    "no TLS there": ({"AWS_ENDPOINT_URL": "TLS"}, Action.FORWARD, 1, r"get .*; .*AWS_(CA_BUNDLE|ENDPOINT_URL)"),
    "throttled": ({}, Action.SLOW_DOWN, 1, r"get .*: answered 503 SlowDown.*\(tried several times\); wait, use fewer"),
    "who pays": ({"AWS_REQUEST_PAYER": "me"}, Action.FORWARD, 2, r"AWS_REQUEST_PAYER is 'me'; expected requester"),
}  # fmt: skip


@pytest.fixture
def uploaded(s3_bucket: str, place: Place) -> str:
    upload(place.base, f"{s3_bucket}/base")
    upload(place.adapters, f"{s3_bucket}/adapters")
    return s3_bucket


@pytest.mark.parametrize("situation", S3_TABLE)
def test_the_stores_messages_name_operation_and_variable(
    situation: str,
    uploaded: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment, action, code, expected = S3_TABLE[situation]
    monkeypatch.setattr("cluster.store.s3.NUM_ROUNDS", 1)  # nobody waits for a store that stays away in a test
    with S3Proxy(s3_server, always(action)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for name, value in environment.items():
            monkeypatch.setenv(name, proxy.endpoint.replace("http:", "https:") if value == "TLS" else value)
            if not value:
                monkeypatch.delenv(name)
        source = ["--adapters", f"{uploaded}/adapters", "--base", f"{uploaded}/base"]
        assert main(["run", *source, "--out", f"{uploaded}/out", "--rank", "2"]) == code
    assert_one_line(capsys.readouterr(), expected)


def test_requester_pays_is_asked_for_where_the_environment_says_so(
    uploaded: str, place: Place, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def note(method: str, path: str, headers: dict[str, str]) -> Action:
        seen.append(headers.get("x-amz-request-payer"))
        return Action.FORWARD

    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    with S3Proxy(s3_server, note) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert (
            main(
                ["plan", "--adapters", f"{uploaded}/adapters", "--base", f"{uploaded}/base", "--device-memory", "1GiB"]
            )
            == 0
        )
    assert seen
    assert set(seen) == {"requester"}


# --- Text as editors save it --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_config_file_is_read_whatever_the_editor(place: Place, tmp_path: Path, encoding: str, end: str) -> None:
    config = tmp_path / "run.toml"
    config.write_bytes(end.join(['without = ["a1"]  # größer', "rank = 2", ""]).encode(encoding))
    assert place.call("run", "--config", str(config)) == 0
    assert place.served() == {"a0", "a2", "a3", "a4", "a5"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tasks_are_read_whatever_the_editor(tmp_path: Path, encoding: str, end: str) -> None:
    from compress_jobs.quality.task import Task, read_tasks

    rows = [{"name": f"n{i}", "question": "wie groß\u2028{x}?", "test": [["a", "b"]]} for i in range(2)]
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(end.join([*(json.dumps(row, ensure_ascii=False) for row in rows), ""]).encode(encoding))
    assert read_tasks(path, 1) == {f"n{i}": Task(f"n{i}", "wie groß\u2028{x}?", (("a", "b"),)) for i in range(2)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": ["a"]}, r"task \['a'\] has \['a'\] where a text is expected"),
        ({"question": 5}, "has 5 where a text is expected"),
        ({"question": "{y}?"}, r"has question '{y}\?' \(KeyError"),
        ({"question": "What does { do in {x}?"}, "other braces doubled"),
        ({"test": [["a", None]]}, "has None where a text is expected"),
        ({"test": ["ab"]}, "row 'ab' is no pair"),
        ({"test": []}, "has no test rows"),
        ({}, "is there twice"),
    ],
)
def test_a_task_of_another_form_is_named(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    from compress_jobs.quality.task import read_tasks

    task = {"name": "n", "question": "{x}?", "test": [["a", "b"]]}
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (task, task | change)))
    with pytest.raises(ConfigError, match=expected):
        read_tasks(path, 1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"},
            "Ray cannot be started on this machine: .*to",
        ),
        ({"RAY_TMPDIR": "/proc/nowhere"}, "Ray cannot be started on this machine: .*RAY_TMPDIR"),
    ],
)
def test_a_ray_that_cannot_be_started_here_is_one_line(
    place: Place, environment: dict[str, str], expected: str
) -> None:
    line = Scene(place, place.out, pytest.MonkeyPatch(), contextlib.ExitStack()).run("--num-cpus", "1")
    done = subprocess.run(
        [sys.executable, "-m", "compress_jobs", *line], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(expected, done.stderr.splitlines()[-1])


def test_a_home_folder_is_where_it_is_written_to(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.call("run") == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", str(place.out), "--adapter", "a0", "--to", "~/exported"]) == 0
    assert main(["report", str(place.out), "--to", f"file://{tmp_path}/r.html"]) == 0
    assert (tmp_path / "exported" / "adapter_config.json").exists()
    assert (tmp_path / "r.html").exists()
