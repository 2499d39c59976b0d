"""One contract, two stores: a folder, and a real S3 server with a fault-injecting proxy before it."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.errors import (
    ConfigError,
    CtsError,
    StoreConflict,
    StoreForbidden,
    StoreMissing,
    StoreUnreachable,
    StoreUnsafe,
)
from cluster.store.address import open_store
from cluster.store.protocol import Blob, Entry, Store
from infra.seaweed import S3Server
from tests.support.paths import REPOSITORY
from tests.support.s3_proxy import Action, OnRequest, S3Proxy, always, first


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_bucket"))
    root = tmp_path / "root"
    root.mkdir()
    return open_store(str(root))


@pytest.fixture
def proxy(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """In front of the server of ``s3_bucket``; stores opened from here on go through it."""
    with S3Proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


# --- The contract -------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_whole_and_in_ranges(store: Store) -> None:
    data = os.urandom(5 << 20)  # more than SeaweedFS keeps in one chunk
    store.write("a/b.bin", data)
    assert store.read("a/b.bin").data == data
    assert store.read_range("a/b.bin", (4 << 20) - 7, 20) == data[(4 << 20) - 7 :][:20]
    assert store.read_range("a/b.bin", len(data) - 1, 1) == data[-1:]
    assert store.read_range("a/b.bin", 3, 0) == b""
    store.write("empty", b"")
    assert store.read("empty").data == b""


def test_a_range_beyond_the_end_is_refused_and_allocates_nothing(store: Store) -> None:
    store.write("short", b"0123456789")
    for start, length in [(8, 3), (8, 10**12), (10, 1), (10**12, 5)]:
        with pytest.raises(StoreConflict, match="short"):
            store.read_range("short", start, length)


def test_write_list_head_and_read_agree_on_the_etag(store: Store) -> None:
    for key, data in {"small": b"x", "big": bytes(9 << 20)}.items():
        written = store.write(key, data)
        (listed,) = store.list(key)
        assert listed == store.head(key) == Entry(key, len(data), written, listed.modified_s)
        assert store.read(key) == Blob(data, written)
    assert store.create("created", b"y") == store.head("created").etag
    assert store.replace("small", b"z", if_match=store.head("small").etag) == store.head("small").etag


def test_times_are_the_stores_own_and_a_rewrite_makes_an_object_young_again(store: Store) -> None:
    """The same bytes, too. Against the store's clock, and that against this machine's, which is the server's here."""
    store.write("key", b"same")
    first = store.head("key").modified_s
    assert abs(first - store.clock_s()) <= 5
    assert abs(store.clock_s() - time.time()) <= 5
    time.sleep(1.1)  # S3 tells whole seconds
    store.write("key", b"same")
    assert store.head("key").modified_s > first
    assert [entry.key for entry in store.list()] == ["key"]  # the clock left nothing behind


def test_list_yields_keys_by_string_prefix_in_code_point_order(store: Store) -> None:
    keys = ["a-b", "a.b", "a/b", "a/c/d", "a0", "b/\uffee", "b/\U0001f600", "b/ü", "b/with space+%41&<x>"]
    for key in reversed(keys):
        store.write(key, key.encode())
    assert [entry.key for entry in store.list()] == sorted(keys)
    for prefix in ("a", "a/", "a/c", "a/c/d", "b/w", "b/\U0001f600", "../", "c", "a/b/"):
        assert [entry.key for entry in store.list(prefix)] == sorted(k for k in keys if k.startswith(prefix)), prefix


def test_list_crosses_pages(s3_bucket: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.store.s3.PAGE_SIZE", 7)
    store = open_store(s3_bucket)
    keys = sorted(f"{index % 3}/{index:02}" for index in range(30))
    for key in keys:
        store.write(key, b"")
    assert [entry.key for entry in store.list()] == keys
    assert sum(method == "GET" for method, _, _ in proxy.seen) == 5  # ceil(30 / 7)


def test_what_is_not_there_is_missing_by_name(store: Store) -> None:
    store.write("folder/file", b"x")
    for key in ("nothing", "folder", "folder/nothing"):
        for call in (store.head, store.read, lambda key: store.read_range(key, 0, 1)):
            with pytest.raises(StoreMissing, match=re.escape(f"{store.uri}/{key}")):
                call(key)


def test_reads_with_an_outdated_etag_conflict(store: Store) -> None:
    old = store.write("key", b"one")
    new = store.write("key", b"two")
    assert store.read("key", if_match=new).data == b"two"
    assert store.read_range("key", 1, 2, if_match=new) == b"wo"
    with pytest.raises(StoreConflict, match="key"):
        store.read("key", if_match=old)
    with pytest.raises(StoreConflict, match="key"):
        store.read_range("key", 1, 2, if_match=old)


def test_create_never_overwrites(store: Store) -> None:
    store.create("a/key", b"first")
    with pytest.raises(StoreConflict, match="a/key"):
        store.create("a/key", b"second")
    assert store.read("a/key").data == b"first"


def test_replace_needs_the_object_unchanged(store: Store) -> None:
    first_etag = store.write("key", b"one")
    second_etag = store.replace("key", b"two", if_match=first_etag)
    with pytest.raises(StoreConflict, match="key"):
        store.replace("key", b"lost update", if_match=first_etag)
    assert store.read("key") == Blob(b"two", second_etag)
    store.delete("key")
    for gone in ("key", "no/such/folder"):
        with pytest.raises(StoreConflict, match=gone):
            store.replace(gone, b"three", if_match=second_etag)
    assert list(store.list()) == []


def test_delete_may_be_repeated(store: Store) -> None:
    store.write("a/b", b"x")
    for _ in range(2):
        store.delete("a/b")
        store.delete("never/there")
    assert list(store.list()) == []


def test_of_eight_racing_creators_one_wins(store: Store) -> None:
    def create(index: int) -> int | None:
        try:
            store.create("race", b"%d" % index)
        except StoreConflict:
            return None
        return index

    with ThreadPoolExecutor(8) as pool:
        winners = [index for index in pool.map(create, range(8)) if index is not None]
    assert len(winners) == 1
    assert store.read("race").data == b"%d" % winners[0]


def test_racing_replacers_lose_no_update(store: Store) -> None:
    """A counter incremented by read, then replace-if-unchanged, counts every success."""
    store.write("counter", b"0")

    def increment(_: int) -> int:
        successes = 0
        for _ in range(5):
            blob = store.read("counter")
            try:
                store.replace("counter", b"%d" % (int(blob.data) + 1), if_match=blob.etag)
            except StoreConflict:
                continue
            successes += 1
        return successes

    with ThreadPoolExecutor(4) as pool:
        successes = sum(pool.map(increment, range(4)))
    assert 0 < successes == int(store.read("counter").data)


def test_a_reader_sees_old_or_new_and_nothing_between(store: Store) -> None:
    versions = [bytes([digit]) * (1 << 20) for digit in b"ab"]
    store.write("key", versions[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [store.write("key", versions[i % 2]) for i in range(20)])
        seen = [store.read("key").data for _ in range(10)]
        while not writing.done():
            seen.append(store.read("key").data)
        writing.result()
    assert set(seen) <= set(versions)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\\b", "a\0b", ".cts-lock", "a\ud800"]
)
def test_no_key_leaves_the_store(store: Store, key: str) -> None:
    for call in (
        store.head,
        store.read,
        store.delete,
        lambda key: store.read_range(key, 0, 1),
        lambda key: store.write(key, b""),
        lambda key: store.create(key, b""),
        lambda key: store.replace(key, b"", if_match="x"),
    ):
        with pytest.raises(ConfigError, match="plain segments"):
            call(key)


def test_a_store_with_conditional_writes_passes_and_keeps_no_probe(store: Store) -> None:
    store.write("mine", b"x")
    store.check_conditional_writes()
    assert [entry.key for entry in store.list()] == ["mine"]


@pytest.mark.parametrize("uri", ["", " ", "http://host/x", "gs://bucket/x", "s3://", "s3:///x", "s3://b/x", "a\0b"])
def test_an_address_that_is_no_store_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected s3://bucket/prefix"):
        open_store(uri)


def test_uris_are_normalised(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("x/").uri == open_store(f"file://{tmp_path}/y%20/../x").uri == str(tmp_path / "x")
    assert open_store(s3_bucket + "/").uri == s3_bucket
    assert open_store("s3://bucket/").uri == "s3://bucket"
    with pytest.raises(ConfigError, match="plain segments"):
        open_store("s3://bucket/a/../b")
    with pytest.raises(ConfigError, match="names no host"):
        open_store("file://host/x")


# --- Folders ------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_missing_until_the_first_write(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "new" / "root"))
    with pytest.raises(StoreMissing, match="new/root"):
        list(store.list())
    store.delete("nothing")
    assert not (tmp_path / "new").exists()
    store.create("a/b", b"x")
    assert [entry.key for entry in store.list()] == ["a/b"]


def test_symlinks_are_followed_and_loops_end(tmp_path: Path) -> None:
    """The layout of a Hugging Face cache, plus a folder that links to its parent."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"weights")
    adapter = tmp_path / "root" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "weights").symlink_to("../../blobs/abc")
    (adapter / "broken").symlink_to("nowhere")
    (adapter / "itself").symlink_to("itself")
    (adapter / "up").symlink_to("..")
    (tmp_path / "root" / "again").symlink_to("adapter")
    store = open_store(str(tmp_path / "root"))
    assert [entry.key for entry in store.list()] == ["adapter/weights", "again/weights"]
    assert store.read("again/weights", if_match=store.head("adapter/weights").etag).data == b"weights"


def test_only_regular_files_are_objects(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    store = open_store(str(tmp_path))
    assert list(store.list()) == []
    with pytest.raises(StoreMissing, match="pipe"):
        store.read("pipe")


def test_a_file_rewritten_in_place_changes_its_etag(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    before = store.write("key", b"one")
    with (tmp_path / "key").open("r+b") as file:
        file.write(b"two")
    with pytest.raises(StoreConflict, match="expected"):
        store.read("key", if_match=before)


def test_versions_written_in_a_row_all_have_their_own_etag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inodes are used again and the kernel's clock ticks slowly; neither may bring an old ETag back."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # a disk so fast that many versions fall into one tick
    store = open_store(str(tmp_path))
    etags = [store.write("key", b"same size") for _ in range(200)]
    assert len(set(etags)) == len(etags)


def test_files_follow_the_umask_and_own_files_are_hidden(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("key", b"x")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o666 & ~umask
    (tmp_path / ".cts-left-by-a-killed-writer").write_bytes(b"half")
    assert [entry.key for entry in store.list()] == ["key"]


def test_a_writer_killed_midway_leaves_the_old_content(tmp_path: Path) -> None:
    """SIGKILL between the temporary file and the rename."""
    store = open_store(str(tmp_path))
    before = store.write("key", b"old")
    script = (
        "import os, signal, sys; from cluster.store.address import open_store\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "open_store(sys.argv[1]).replace('key', b'new', if_match=sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), before], cwd=REPOSITORY)
    assert done.returncode == -9
    assert [entry.key for entry in store.list()] == ["key"]
    assert store.read("key", if_match=before).data == b"old"
    store.replace("key", b"new", if_match=before)  # the lock went with its holder


def test_no_permission_is_forbidden(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "locked"))
    store.write("key", b"x")
    (tmp_path / "locked").chmod(0)
    am_root = os.geteuid() == 0
    try:
        if am_root:
            os.seteuid(65534)
        for call in (lambda: store.read("key"), lambda: list(store.list()), lambda: store.write("new", b"")):
            with pytest.raises(StoreForbidden, match="user id"):
                call()
    finally:
        if am_root:
            os.seteuid(0)
        (tmp_path / "locked").chmod(0o700)


# --- S3: three different failures ---------------------------------------------------------------------------


def _message(error: type[CtsError], uri: str) -> str:
    """What the first look into a store ends with, whole; every call of the interface fails the same way."""
    store = open_store(uri)
    with pytest.raises(error) as caught:
        list(store.list())
    for call in (lambda: store.read("key"), lambda: store.head("key"), lambda: store.write("key", b"x")):
        with pytest.raises(error):
            call()
    assert type(pickle.loads(pickle.dumps(caught.value))) is error
    return str(caught.value)


def test_a_wrong_secret_is_forbidden(s3_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    message = _message(StoreForbidden, s3_bucket)
    assert s3_bucket in message
    assert s3_server.endpoint in message
    assert "SignatureDoesNotMatch" in message
    assert "check AWS_SECRET_ACCESS_KEY" in message
    assert "a-wrong-secret" not in message


def test_an_unknown_access_key_is_forbidden(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "check AWS_ACCESS_KEY_ID" in _message(StoreForbidden, s3_bucket)


def test_missing_credentials_are_forbidden(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreForbidden, match="missing: AWS_SECRET_ACCESS_KEY"):
        open_store(s3_bucket)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in _message(StoreForbidden, s3_bucket)


def test_a_missing_bucket_is_missing(s3_server: S3Server, s3_bucket: str) -> None:
    message = _message(StoreMissing, "s3://no-such-bucket/prefix")
    assert "s3://no-such-bucket/prefix" in message
    assert s3_server.endpoint in message
    assert "create the bucket" in message
    with pytest.raises(StoreMissing):
        open_store("s3://no-such-bucket").create("key", b"x")


def test_a_port_nobody_listens_on_is_unreachable(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # bound, not listening: refuses
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store(s3_bucket)
        started = time.monotonic()
        with pytest.raises(StoreUnreachable) as caught:
            list(store.list())
    assert time.monotonic() - started < 30
    message = str(caught.value)
    assert s3_bucket in message
    assert endpoint in message
    assert "check AWS_ENDPOINT_URL" in message


def test_an_endpoint_that_never_answers_is_unreachable(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.store.s3.READ_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreUnreachable, match=r"[Tt]imed? ?out"):
            open_store(s3_bucket).read("key")


def test_a_server_that_is_not_s3_is_told_apart(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("<html>Welcome</p>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.05)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        try:
            with pytest.raises(StoreUnreachable, match="AWS_ENDPOINT_URL"):
                open_store("s3://page").list()
            with pytest.raises(StoreMissing, match="AWS_ENDPOINT_URL"):
                open_store("s3://bucket").list()
        finally:
            server.shutdown()


def test_no_message_holds_a_credential(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break at the end of a token (a secret made from a file) breaks the header it is sent in."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-nobody-may-see\n")
    with pytest.raises(StoreUnreachable, match="line breaks in AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN") as caught:
        open_store(s3_bucket).read("key")
    assert "nobody-may-see" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:nobody-may-see@127.0.0.1:1")
    for uri in (s3_bucket, "s3://me:nobody-may-see@bucket"):
        with pytest.raises(ConfigError) as refused:
            open_store(uri)
        assert "nobody-may-see" not in str(refused.value)


# --- S3: faults on the wire ---------------------------------------------------------------------------------


def test_short_throttling_is_waited_out(s3_bucket: str, proxy: S3Proxy) -> None:
    store = open_store(s3_bucket)
    proxy.on_request = first(2, Action.SLOW_DOWN)
    store.write("key", b"data")
    assert store.read("key").data == b"data"
    assert [action for _, _, action in proxy.seen].count(Action.SLOW_DOWN) == 2


def test_endless_throttling_ends_as_unreachable(
    s3_bucket: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.store.s3.NUM_ATTEMPTS", 1)
    store = open_store(s3_bucket)
    proxy.on_request = always(Action.SLOW_DOWN)
    with pytest.raises(StoreUnreachable, match=r"SlowDown.*fewer tasks"):
        store.read("key")
    assert len(proxy.seen) == 4  # rounds


@pytest.mark.parametrize("action", [Action.DROP, Action.FORWARD_THEN_DROP])
def test_a_lost_connection_is_tried_again(s3_bucket: str, proxy: S3Proxy, action: Action) -> None:
    store = open_store(s3_bucket)
    etag = store.write("key", b"data")
    proxy.on_request = first(1, action)
    assert store.read("key", if_match=etag).data == b"data"
    proxy.on_request = first(1, action)
    assert [entry.key for entry in store.list()] == ["key"]


def test_a_body_cut_short_is_read_again(s3_bucket: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_bucket)
    data = os.urandom(1 << 20)
    store.write("key", data)
    for read in (lambda: store.read("key").data, lambda: store.read_range("key", 0, 1 << 20)):
        proxy.on_request = first(1, Action.TRUNCATE)
        assert read() == data
    proxy.on_request = always(Action.TRUNCATE)
    monkeypatch.setattr("cluster.store.s3.NUM_ROUNDS_OF_ONE", 3)
    with pytest.raises(StoreUnreachable, match="cut short"):
        store.read("key")


def test_a_lost_answer_of_a_conditional_write_ends_in_conflict_with_our_content(s3_bucket: str, proxy: S3Proxy) -> None:
    store = open_store(s3_bucket)
    proxy.on_request = first(1, Action.FORWARD_THEN_DROP, "PUT")
    with pytest.raises(StoreConflict):
        store.create("CURRENT", b"token-1")
    created = store.read("CURRENT")
    assert created.data == b"token-1"
    proxy.on_request = first(1, Action.FORWARD_THEN_DROP, "PUT")
    with pytest.raises(StoreConflict):
        store.replace("CURRENT", b"token-2", if_match=created.etag)
    assert store.read("CURRENT").data == b"token-2"


def test_a_conditional_request_conflict_is_repeated(
    s3_bucket: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_bucket)
    proxy.on_request = first(2, Action.CONFLICT, "PUT")
    store.create("key", b"data")
    assert store.read("key").data == b"data"
    proxy.on_request = always(Action.CONFLICT)
    monkeypatch.setattr("cluster.store.s3.NUM_ROUNDS_OF_ONE", 3)
    with pytest.raises(StoreConflict, match="ConditionalRequestConflict"):
        store.create("other", b"data")


def _strip(header: str) -> OnRequest:
    return lambda method, path, headers: Action.STRIP_CONDITIONS if header in headers else Action.FORWARD


@pytest.mark.parametrize(("header", "named"), [("if-none-match", "If-None-Match"), ("if-match", "If-Match")])
def test_a_store_that_ignores_conditional_writes_is_found_out(
    s3_bucket: str, proxy: S3Proxy, header: str, named: str
) -> None:
    proxy.on_request = _strip(header)
    store = open_store(s3_bucket)
    with pytest.raises(StoreUnsafe, match=f"{s3_bucket}.*ignores.*{named}"):
        store.check_conditional_writes()
    assert Action.STRIP_CONDITIONS in [action for _, _, action in proxy.seen]
    assert list(store.list()) == []


def test_a_store_that_creates_where_it_should_replace_is_found_out(s3_bucket: str, proxy: S3Proxy) -> None:
    proxy.on_request = lambda method, path, headers: (
        Action.STRIP_CONDITIONS if method == "PUT" and path.endswith("-absent") else Action.FORWARD
    )
    store = open_store(s3_bucket)
    with pytest.raises(StoreUnsafe, match=r"creates an object by a write that is only to replace one \(If-Match\)"):
        store.check_conditional_writes()
    assert list(store.list()) == []


def test_a_store_that_does_not_answer_is_waited_for_once(s3_bucket: str, proxy: S3Proxy) -> None:
    """Not a second time, to remove the probe: a silent endpoint would take a job close to a minute to name."""
    store = open_store(s3_bucket)
    proxy.on_request = always(Action.DROP)
    with pytest.raises(StoreUnreachable):
        store.check_conditional_writes()
    assert {method for method, _, _ in proxy.seen} == {"PUT"}


def test_lost_answers_do_not_make_a_store_unsafe(s3_bucket: str, proxy: S3Proxy) -> None:
    """Every conditional write is done once and answered on the second try only."""
    store = open_store(s3_bucket)
    writes = 0

    def on_request(method: str, path: str, headers: dict[str, str]) -> Action:
        nonlocal writes
        writes += method == "PUT"
        return Action.FORWARD_THEN_DROP if method == "PUT" and writes % 2 == 1 else Action.FORWARD

    proxy.on_request = on_request
    store.check_conditional_writes()
    assert writes == 10
    assert list(store.list()) == []
