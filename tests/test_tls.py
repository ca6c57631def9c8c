"""TLS of all listeners: real clients, client certificates, exchange of certificates under load."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from codeq import CodeqError, Producer, Task, Tls, Worker
from codeq.config import ConfigError, load
from codeq.server import http_server
from codeq.server.tls import Certificates, Identity

from .authority import NAME, Authority, Pair
from .conftest import PREFIX, STOP_SECONDS, Server, dev_arguments, launch, read_line, refusal
from .test_app import assert_one_line, run

LISTENERS = ("http", "producer", "worker")
#: Requests of each client before and after the exchange
LOAD_REQUESTS = 100


def settings(pair: Pair, client_ca: Path | None = None) -> dict[str, str]:
    """TLS of all three listeners, from the environment."""
    files = {"CERT_FILE": pair.cert, "KEY_FILE": pair.key}
    if client_ca is not None:
        files["CLIENT_CA_FILE"] = client_ca
    return {
        f"TLS_{name.upper()}_{file}": str(path)
        for name in LISTENERS
        for file, path in files.items()
    }


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority", "root")


def context(authority: Authority, pair: Pair | None = None) -> ssl.SSLContext:
    """What a client trusts and shows."""
    made = ssl.create_default_context(cafile=str(authority.ca))
    if pair is not None:
        made.load_cert_chain(pair.cert, pair.key)
    return made


@contextlib.contextmanager
def rest(server: Server, trust: ssl.SSLContext, **options: Any) -> Iterator[httpx.Client]:
    headers = {"authorization": "Bearer dev-producer"}
    base = f"https://{server.http}{PREFIX}"
    with httpx.Client(base_url=base, verify=trust, headers=headers, **options) as client:
        yield client


def shown(address: str, trust: ssl.SSLContext) -> str:
    """The subject of the certificate that a listener shows to a new connection."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=STOP_SECONDS) as plain,
        trust.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        certificate: Any = connection.getpeercert()
        return str(dict(pair[0] for pair in certificate["subject"])["commonName"])


async def life(server: Server, tls: Tls) -> bytes:
    """One task through both streams; returns its payload as the worker saw it."""
    seen: list[bytes] = []
    async with Producer(server.producer, token="dev-producer", credentials=tls) as producer:
        await producer.produce("job", {"a": 1})
    worker = Worker(
        server.worker,
        token="dev-worker",
        commands=["job"],
        credentials=tls,
        connect_timeout_seconds=STOP_SECONDS,
    )

    def handle(task: Task) -> None:
        seen.append(task.payload)
        worker.stop()

    await worker.run(handle)
    return seen[0]


def wait_for_log(server: Server, text: str, count: int = 1) -> list[str]:
    """Until the log has so many lines with this text; returns their messages."""
    found: list[str] = []
    command = ["tail", "-n", "+1", "-f", str(server.stderr_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        try:
            for line in follower.stdout:
                message = json.loads(line)["message"]
                found += [message] if text in message else []
                if len(found) == count:
                    break
        finally:
            follower.kill()
    return found


# --- clients


def test_T42_tls_on_every_listener(
    start_server: Callable[..., Server], authority: Authority
) -> None:
    server = start_server(**settings(authority.issue("server")))
    trust = context(authority)
    with rest(server, trust) as client:
        answer = client.post("/tasks", json={"command": "a", "payload": 1})
        assert (answer.status_code, answer.http_version) == (201, "HTTP/1.1")
    with rest(server, trust, http2=True) as client:
        answer = client.get(f"/tasks/{answer.json()['id']}")
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
        assert answer.json()["payload"] == "1"
    assert asyncio.run(life(server, Tls(ca_file=authority.ca))) == b'{"a":1}'
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{server.http}/healthz")
    assert server.terminate() == 0


def test_T42_a_server_that_nobody_vouches_for_is_refused(
    start_server: Callable[..., Server], authority: Authority, tmp_path: Path
) -> None:
    server = start_server(**settings(authority.issue("server")))
    other = Authority(tmp_path / "other", "other")
    with pytest.raises(httpx.ConnectError), rest(server, context(other)) as client:
        client.get("/raft/status")

    async def connect(tls: Tls | None, seconds: float = 0.2) -> None:
        async with Producer(
            server.producer, token="dev-producer", credentials=tls, connect_timeout_seconds=seconds
        ):
            pass

    for tls in (Tls(ca_file=other.ca), Tls(ca_file=authority.ca, server_name="else.test"), None):
        with pytest.raises(CodeqError) as refused:
            asyncio.run(connect(tls))
        assert refused.value.slug == "unavailable"
    asyncio.run(connect(Tls(ca_file=authority.ca, server_name=NAME), STOP_SECONDS))
    with pytest.raises(CodeqError, match="no-such"):
        asyncio.run(connect(Tls(ca_file="no-such.pem")))


def test_T42_client_certificates_only_admit(
    start_server: Callable[..., Server], authority: Authority, tmp_path: Path
) -> None:
    clients = Authority(tmp_path / "clients", "clients")
    server = start_server(**settings(authority.issue("server"), clients.ca))
    client, stranger = clients.issue("client"), authority.issue("stranger")
    for nobody in (context(authority), context(authority, stranger)):
        with pytest.raises(httpx.HTTPError), rest(server, nobody) as http:
            http.get("/raft/status")
    with rest(server, context(authority, client)) as http:
        assert http.get("/raft/status").status_code == 200
        answer = http.get("/raft/status", headers={"authorization": ""})
        assert refusal(answer) == (401, "unauthenticated", "invalid token")
    known = Tls(authority.ca, client.cert, client.key)
    assert asyncio.run(life(server, known)) == b'{"a":1}'

    async def refused(tls: Tls, token: str, seconds: float = 0.2) -> str:
        with pytest.raises(CodeqError) as caught:
            await Producer(
                server.producer, token=token, credentials=tls, connect_timeout_seconds=seconds
            ).start()
        return caught.value.slug

    for tls in (Tls(authority.ca), Tls(authority.ca, stranger.cert, stranger.key)):
        assert asyncio.run(refused(tls, "dev-producer")) == "unavailable"
    assert asyncio.run(refused(known, "nonsense", STOP_SECONDS)) == "unauthenticated"


# --- exchange


class Load:
    """Threads that send requests one after the other until told to stop: each over a connection
    that stays, or over a new one per request."""

    def __init__(self, server: Server, trust: ssl.SSLContext) -> None:
        self._address, self._trust = server.http, trust
        self._stop = threading.Event()
        self._many = threading.Semaphore(0)
        self.outcomes: Counter[str] = Counter()
        self.moved = 0  # connections that were asked to come again
        kinds = (True, True, False, False)
        self._threads = [threading.Thread(target=self._send, args=(kept,)) for kept in kinds]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def more(self) -> None:
        """Until so many requests were answered."""
        for _ in range(LOAD_REQUESTS):
            assert self._many.acquire(timeout=STOP_SECONDS), self.outcomes

    def _send(self, kept: bool) -> None:
        connection = None
        while not self._stop.is_set():
            try:
                if connection is None:
                    connection = http.client.HTTPSConnection(
                        self._address, context=self._trust, timeout=STOP_SECONDS
                    )
                connection.request("GET", "/healthz")
                answer = connection.getresponse()
                outcome = f"{answer.status} {answer.read().decode()}"
                closed = not kept or answer.will_close
                self.moved += answer.will_close
            except (OSError, http.client.HTTPException) as error:
                outcome, closed = repr(error), True
            if closed and connection is not None:
                connection.close()
                connection = None
            self.outcomes[outcome] += 1
            self._many.release()
        if connection is not None:
            connection.close()


def test_T42_certificates_are_exchanged_under_load(
    start_server: Callable[..., Server], authority: Authority
) -> None:
    pair = authority.issue("first")
    server = start_server(**settings(pair), LOG_FORMAT="json")
    trust = context(authority)
    addresses = (server.http, server.producer, server.worker)
    with Load(server, trust) as load:
        load.more()
        for number, subject in enumerate(("second", "third"), 1):
            pair.replace(authority.issue(subject))
            server.process.send_signal(signal.SIGHUP)
            wait_for_log(server, "get the new certificate", number)
            # At once, while the connections to the old one are still being moved
            assert {shown(server.http, trust) for _ in range(20)} == {subject}
            wait_for_log(server, "certificates were read", number)
            load.more()
            assert {shown(address, trust) for address in addresses} == {subject}
    assert load.outcomes.keys() == {'200 {"status":"ok"}'}
    assert load.moved >= 4  # both that stay, at each exchange
    assert asyncio.run(life(server, Tls(authority.ca))) == b'{"a":1}'
    assert server.terminate() == 0


def test_T42_what_runs_during_an_exchange_goes_on(
    start_server: Callable[..., Server], authority: Authority
) -> None:
    """A claim that waits over REST, and a stream that is open."""
    pair = authority.issue("first")
    server = start_server(**settings(pair), LOG_FORMAT="json")

    async def check() -> None:
        trust = context(authority)
        tls = Tls(authority.ca)
        headers = {"authorization": "Bearer dev-worker"}
        base = f"https://{server.http}{PREFIX}"
        async with (
            Producer(server.producer, token="dev-producer", credentials=tls) as producer,
            httpx.AsyncClient(base_url=base, verify=trust, headers=headers, timeout=60) as client,
        ):
            body = {"commands": ["late"], "waitSeconds": 30}
            waiting = asyncio.create_task(client.post("/tasks/claim", json=body))
            while (
                b"codeq_waiting_claims 1"
                not in (await client.get(f"https://{server.http}/metrics")).content
            ):
                pass
            pair.replace(authority.issue("second"))
            server.process.send_signal(signal.SIGHUP)
            await asyncio.to_thread(wait_for_log, server, "certificates were read")
            task_id = await producer.produce("late", {})
            answer = await waiting
            assert answer.json()["id"] == task_id

    asyncio.run(check())
    assert server.terminate() == 0


def test_T42_a_stop_during_an_exchange_is_in_order(
    start_server: Callable[..., Server], authority: Authority
) -> None:
    pair = authority.issue("first")
    server = start_server(**settings(pair), LOG_FORMAT="json")
    kept = httpx.Limits(keepalive_expiry=STOP_SECONDS)
    with rest(server, context(authority), limits=kept) as client:
        assert client.get("/raft/status").status_code == 200
        pair.replace(authority.issue("second"))
        server.process.send_signal(signal.SIGHUP)
        wait_for_log(server, "get the new certificate")
        assert client.get("/raft/status").headers["connection"] == "close"
        assert server.terminate() == 0
    assert "cut off" not in server.stderr_path.read_text()


def test_T42_a_bad_file_keeps_the_certificate_in_use(
    start_server: Callable[..., Server], authority: Authority
) -> None:
    pair = authority.issue("first")
    server = start_server(**settings(pair), LOG_FORMAT="json")
    trust = context(authority)
    good = pair.cert.read_bytes(), pair.key.read_bytes()
    # The last one is good for a part of the libraries only
    odd = authority.issue("odd", ec.generate_private_key(ec.SECP256K1()))
    bad = (b"nonsense", good[1]), (good[0], b""), (odd.cert.read_bytes(), odd.key.read_bytes())
    for number, (certificate, key) in enumerate(bad, 1):
        pair.cert.write_bytes(certificate)
        pair.key.write_bytes(key)
        server.process.send_signal(signal.SIGHUP)
        wait_for_log(server, "certificates were read", number)
        lines = wait_for_log(server, "the certificate in use stays", 3 * number)
        named = {line.partition(":")[0].rpartition(".")[0] for line in lines[-3:]}
        assert named == {f"tls.{name}" for name in LISTENERS}, lines
        for address in (server.http, server.producer, server.worker):
            assert shown(address, trust) == "first"
    pair.replace(authority.issue("second"))
    server.process.send_signal(signal.SIGHUP)
    wait_for_log(server, "certificates were read", len(bad) + 1)
    assert shown(server.http, trust) == shown(server.worker, trust) == "second"


def test_a_hangup_without_tls_is_a_line_in_the_log(start_server: Callable[..., Server]) -> None:
    server = start_server(LOG_FORMAT="json")
    for number in (1, 2):
        server.process.send_signal(signal.SIGHUP)
        (*_, said) = wait_for_log(server, "SIGHUP", number)
        assert "nothing to read" in said
        assert httpx.get(f"http://{server.http}/readyz").status_code == 200
    assert server.terminate() == 0


def test_a_server_without_tls_stops_when_its_terminal_is_closed(tmp_path: Path) -> None:
    ours, its = os.openpty()
    try:
        process = launch(dev_arguments(tmp_path), {}, tmp_path / "log", stdin=its)
        assert read_line(process).startswith("ready ")
        process.send_signal(signal.SIGHUP)
        assert process.wait(STOP_SECONDS) == 0
    finally:
        os.close(ours)
        os.close(its)
        process.kill()
        process.communicate()


# --- start


@pytest.mark.parametrize("name", LISTENERS)
def test_T42_files_that_cannot_be_used_are_named(
    tmp_path: Path, authority: Authority, name: str
) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    locked = authority.issue("locked", password=b"secret")
    empty = tmp_path / "empty"
    empty.touch()
    cases: list[tuple[dict[str, Path], str, str]] = [
        ({"certFile": good.cert}, "keyFile", "missing"),
        ({"keyFile": good.key}, "certFile", "missing"),
        ({"clientCaFile": authority.ca}, "certFile", "missing"),
        ({"certFile": tmp_path / "none", "keyFile": good.key}, "certFile", "No such file"),
        ({"certFile": good.cert, "keyFile": tmp_path}, "keyFile", "cannot be read"),
        ({"certFile": good.key, "keyFile": good.key}, "certFile", "no certificate"),
        ({"certFile": good.cert, "keyFile": other.key}, "keyFile", "not the key"),
        ({"certFile": locked.cert, "keyFile": locked.key}, "keyFile", "not encrypted"),
        (
            {"certFile": good.cert, "keyFile": good.key, "clientCaFile": empty},
            "clientCaFile",
            "no certificate",
        ),
    ]
    for files, key, words in cases:
        flags = {f"tls.{name}.{file}": str(path) for file, path in files.items()}
        with pytest.raises(ConfigError) as refused:
            Certificates(load(flags=flags).tls).read()
        assert refused.value.key == f"tls.{name}.{key}"
        assert words in str(refused.value)


@pytest.mark.parametrize("name", LISTENERS)
def test_T42_files_that_cannot_be_used_stop_the_start(
    tmp_path: Path, authority: Authority, name: str
) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    environ = _environ(name, good.cert, other.key)
    outcome = run(tmp_path, dev_arguments(tmp_path), **environ)
    assert_one_line(outcome, f"tls.{name}.keyFile: ", "not the key")
    assert not (tmp_path / "data").exists()


def _environ(name: str, cert: Path, key: Path) -> dict[str, str]:
    prefix = f"TLS_{name.upper()}"
    return {f"{prefix}_CERT_FILE": str(cert), f"{prefix}_KEY_FILE": str(key)}


@pytest.mark.parametrize("name", LISTENERS)
def test_T42_a_key_that_the_library_cannot_use_stops_the_start(
    tmp_path: Path, authority: Authority, name: str
) -> None:
    odd = authority.issue("odd", ec.generate_private_key(ec.SECP256K1()))
    outcome = run(tmp_path, dev_arguments(tmp_path), **_environ(name, odd.cert, odd.key))
    assert_one_line(outcome, f"tls.{name}.certFile: ", "cannot use it")
    assert not (tmp_path / "data").exists()


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["http_version"].encode()})


@pytest.mark.parametrize("protocols", [[], ["http/1.1"], ["h2"]])
def test_T48_a_connection_that_says_nothing_is_ended(
    authority: Authority, protocols: list[str]
) -> None:
    pair = authority.issue("server")
    identity = Identity(pair.cert.read_bytes(), pair.key.read_bytes(), b"")
    trust = context(authority)
    if protocols:
        trust.set_alpn_protocols(protocols)

    async def check() -> None:
        reserved = http_server.reserve("127.0.0.1", 0, "REST")
        port = reserved.getsockname()[1]
        serving = http_server.Serving(_answer, 128, reserved, identity)
        await serving.started()
        reader, writer = await asyncio.open_connection("localhost", port, ssl=trust)
        assert await asyncio.to_thread(http_server.end_silent, port, 60) == 0
        ended = asyncio.create_task(reader.read())
        async with asyncio.timeout(STOP_SECONDS):
            while not ended.done():  # what is ended first may be another connection
                await asyncio.to_thread(http_server.end_silent, port, 0.001)
        with contextlib.suppress(ConnectionError):
            await ended
        writer.close()
        async with httpx.AsyncClient(verify=context(authority)) as client:
            assert (await client.get(f"https://localhost:{port}/")).text == "1.1"
        assert await serving.end(STOP_SECONDS)

    asyncio.run(check())


def test_a_port_is_found_in_use_though_sockets_may_share_it() -> None:
    with http_server.reserve("127.0.0.1", 0, "REST") as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            http_server.reserve(*first.getsockname(), "REST")
