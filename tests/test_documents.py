"""Every command, option, path and link of the READMEs exists; what can run without a network is run."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluster.bundle.parsing import parse_manifest
from compress_jobs.__main__ import make_parser
from compress_jobs.commands.run_options import from_arguments
from infra.ready import wait_until_ready
from infra.seaweed import AMBIENT, S3Server
from serve_app.arguments import known_keys, parse_arguments
from serve_app.openai.requests import ChatRequest, CompletionRequest, parse_request
from tests.support.documents import CODE, Document, all_documents
from tests.support.paths import REPOSITORY, ZOO
from tests.support.processes import running
from tests.support.upload import upload

DOCUMENTS = all_documents()
LANGUAGES = {"sh", "text", "toml", "json", "python", "yaml"}
ROUTES = r"http://127\.0\.0\.1:8000(/v1/(completions|chat/completions|models(\?.*|/.+)?)|/health|/ready(\?all=1)?)"
# Whose commands are not the project's own, with the options that the documents may use.
FOREIGN = {
    "pip": {"-c", "-e", "--no-deps", "--target"},
    "curl": {"-s", "-H", "-d", "-i", "-N"},
    "git": {"--follow"},
    "ray": {"--working-dir", "--address", "--runtime-env"},
    "kubectl": {"-o"},
    "weed": {"-dir", "-ip.bind", "-s3.port", "-bucket", "-metricsPort"},
}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=str)


def test_the_first_page_is_short_and_every_room_has_its_own() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 160
    rooms = {path.parent for name in CODE for path in (REPOSITORY / name).rglob("__init__.py")}
    rooms |= {REPOSITORY / "infra" / "zoo", REPOSITORY / "tests"}
    assert [str(room) for room in sorted(rooms) if not (room / "README.md").exists()] == []


@each_document
def test_blocks_say_what_they_are(document: Document) -> None:
    assert document.languages <= LANGUAGES
    assert document.text.count("\n```") == 2 * len(document.blocks())
    for block in document.blocks("toml"):
        tomllib.loads(block)
    for block in document.blocks("json"):
        json.loads(block)
    for block in document.blocks("python"):
        compile(block, str(document), "exec")


@pytest.mark.parametrize(
    "document",
    # Those whose programs take seconds to say their --help.
    [
        pytest.param(d, marks=pytest.mark.slow) if str(d).startswith(("infra/bench", "infra/train_zoo")) else d
        for d in DOCUMENTS
    ],
    ids=str,
)
def test_every_command_exists_with_its_options(document: Document) -> None:
    for words in document.commands():
        check_command(words)


def check_command(words: list[str]) -> None:
    line = " ".join(words)
    match words:
        case ["export", *settings]:
            assert all(re.fullmatch(r"[A-Z0-9_]+=\S*", setting) for setting in settings), line
        case [".", file]:
            assert file in (".venv/bin/activate", ".venv-vllm/bin/activate"), line
        case ["make", *targets]:
            known = re.findall(r"^([a-z][a-z-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
            assert all(target in known or re.match(r"[A-Z_]+=", target) for target in targets), line
        case ["compress-jobs", *arguments]:
            check_command(["python", "-m", "compress_jobs", *arguments])
        case [python, "-m", "compress_jobs", *arguments] if python.endswith("python"):
            if arguments not in (["--version"], ["--help"]) and arguments[-1] != "--help":
                make_parser().parse_args(arguments)
        case [python, "-m", module, *arguments] if python.endswith("python"):
            options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            assert options <= options_of(module), line
        case ["serve", "run", "serve_app.app:build", *arguments]:
            parse_arguments(dict(argument.split("=", 1) for argument in arguments))
        case ["serve", "deploy" | "run", file]:
            assert (REPOSITORY / file).is_file(), line
        case ["ray", "start", "--head"] | ["serve", "status", "--name", "compress-then-serve"]:
            pass
        case ["ray", "job", "submit", *options]:
            split = options.index("--")
            assert {word for word in options[:split] if word.startswith("-")} <= FOREIGN["ray"], line
            check_command(options[split + 1 :])
        case ["curl", *arguments]:
            check_curl(arguments)
        case [setting, *command] if re.fullmatch(r"[A-Z_]+=\S+", setting):
            check_command(command)
        case [".venv/bin/weed", "mini", *options, "&"]:
            assert {option.partition("=")[0] for option in options} <= FOREIGN["weed"], line
        case [("pip" | "git" | "kubectl") as tool, *arguments]:
            assert {word for word in arguments if word.startswith("-")} <= FOREIGN[tool], line
        case _:
            pytest.fail(f"{line}: a command that this test does not know")


@functools.cache
def options_of(module: str) -> frozenset[str]:
    """As the module's own help lists them."""
    said = subprocess.run([sys.executable, "-m", module, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert said.returncode == 0, f"{module}: {said.stderr}"
    return frozenset(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", said.stdout.replace(",", " ").replace("[", " ")))


def check_curl(arguments: list[str]) -> None:
    assert {word for word in arguments if word.startswith("-")} <= FOREIGN["curl"]
    url = next(word for word in arguments if word.startswith("http"))
    assert re.fullmatch(ROUTES, url), url
    if "-d" in arguments:
        kind = ChatRequest if "chat" in url else CompletionRequest
        parse_request(kind, arguments[arguments.index("-d") + 1].encode())


@each_document
def test_every_path_and_option_named_exists(document: Document) -> None:
    source = "".join(path.read_text() for name in CODE for path in (REPOSITORY / name).rglob("*.py"))
    options = set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source)) | set().union(*FOREIGN.values())
    options |= {option for command in _subparsers() for option in command._option_string_actions}
    for span in document.spans():
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span):
            assert option in options, f"{span}: no command has {option}"
        if _is_path(span):
            path = span.partition("#")[0]
            assert (document.path.parent / path).exists() or (REPOSITORY / path).exists(), f"{span} is not there"


def _subparsers() -> list[object]:
    action = next(action for action in make_parser()._actions if hasattr(action, "choices") and action.choices)
    return list(action.choices.values())  # type: ignore[union-attr]


def _is_path(span: str) -> bool:
    """Of this repository: by its ending, or by its first folder."""
    if not re.fullmatch(r"\.?[\w.-]+(/[\w.-]+)*/?", span) or span.startswith("build/"):
        return False
    first = span.split("/")[0]
    is_below = "/" in span and first in (*CODE, "tests", "docker", "store", "adapters", "compression", "bundle")
    return span.endswith((".py", ".md", ".yaml", ".sh")) or (is_below and (REPOSITORY / first).is_dir())


@each_document
def test_every_link_leads_somewhere(document: Document) -> None:
    for link in document.links():
        if re.match(r"https://[\w.-]+/?", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.path.parent / path).resolve() if path else document.path
        assert target.exists(), link
        if anchor:
            assert anchor in Document(target).anchors(), link


def test_every_argument_of_the_application_is_in_its_table() -> None:
    text = (REPOSITORY / "serve_app" / "README.md").read_text()
    assert [key for key in known_keys() if f"`{key}`" not in text] == []


def test_every_command_and_every_option_of_run_is_in_a_table() -> None:
    text = (REPOSITORY / "compress_jobs" / "README.md").read_text()
    action = next(action for action in make_parser()._actions if hasattr(action, "choices") and action.choices)
    assert action.choices is not None
    assert [name for name in action.choices if f"`{name}`" not in text] == []
    options = [max(a.option_strings, key=len) for a in action.choices["run"]._actions]  # type: ignore[call-overload]
    assert [option for option in options if option != "--help" and f"`{option}`" not in text] == []


def test_the_manifest_that_is_shown_is_one(tmp_path: Path) -> None:
    (shown,) = Document(REPOSITORY / "cluster" / "bundle" / "README.md").blocks("json")
    assert parse_manifest(shown.encode(), "README").adapters


def test_the_config_file_that_is_shown_is_accepted(tmp_path: Path) -> None:
    (shown,) = Document(REPOSITORY / "compress_jobs" / "README.md").blocks("toml")
    (tmp_path / "run.toml").write_text(shown)
    options = from_arguments(make_parser().parse_args(["run", "--config", str(tmp_path / "run.toml")]))
    assert options.out == "s3://lora/bundle"


# Running them, as they stand.


@pytest.fixture
def shell(base_path: Path, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the checkout, and an environment in which s3://lora is a bucket of a real server: the shipped
    adapters and the base are in it."""
    for name in AMBIENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    client = s3_server.client()
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
        client.create_bucket(Bucket="lora")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="lora"):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket="lora", Key=item["Key"])
    upload(ZOO / "adapters", "s3://lora/adapters")
    upload(base_path, "s3://lora/base")
    for name in (*CODE, "pyproject.toml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "base").symlink_to(base_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", pytest.param("compress_jobs/README.md", marks=pytest.mark.by_hand)])
def test_the_commands_of_the_job_work_one_after_the_other(name: str, shell: Path) -> None:
    commands = Document(REPOSITORY / name).commands()
    own = [words for words in commands if words[:3] == ["python", "-m", "compress_jobs"]]
    assert own
    for words in own:
        done = subprocess.run(words, cwd=shell, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.by_hand
@pytest.mark.slow
def test_the_application_is_started_and_asked_as_the_documents_say(shell: Path) -> None:
    first, application = Document(REPOSITORY / "README.md"), Document(REPOSITORY / "serve_app" / "README.md")
    (publish,) = [words for words in first.commands() if words[2:4] == ["compress_jobs", "run"]]
    subprocess.run(publish, cwd=shell, check=True, capture_output=True, timeout=900)
    starts = {tuple(words) for d in (first, application) for words in d.commands() if words[:2] == ["serve", "run"]}
    asked = [words for d in (first, application) for words in d.commands() if words[0] == "curl"]
    (start,) = starts
    # A Ray of its own, whatever else runs on this machine.
    with running(*start, cwd=shell, RAY_ADDRESS="local") as process:
        wait_until_ready("http://127.0.0.1:8000/ready?all=1", 300, lambda: process.poll() is None)
        for words in asked:
            answered = subprocess.run(
                [*words, "-s", "--fail-with-body"], cwd=shell, capture_output=True, text=True, timeout=120
            )
            assert answered.returncode == 0, f"{' '.join(words)}\n{answered.stdout}"
        for block in (*first.blocks("python"), *application.blocks("python")):
            done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.by_hand
@pytest.mark.slow
def test_make_serve_answers_and_make_stop_ends_it(base_path: Path) -> None:
    """The targets' own commands; what they set up is there."""
    call = [sys.executable, "-m", "infra.demo"]
    served = subprocess.run([*call, "serve"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    try:
        assert served.returncode == 0, served.stdout + served.stderr
        assert shutil.which("curl") is not None
        line = next(line for line in served.stdout.splitlines() if line.startswith("curl "))
        answer = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120)
        assert json.loads(answer.stdout)["choices"][0]["text"].strip() == "four hundred and fifty"
    finally:
        stopped = subprocess.run([*call, "stop"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert stopped.stdout == "stopped\n"
