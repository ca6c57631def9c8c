"""No private network is reached: by literal, name, redirect, or an address that changed."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from codeq.engine import targets
from codeq.engine.clock import FakeClock

from .receiver import Sender, names, receiver, sender

PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::a00:1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::808:808",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:a9fe:a9fe::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]
PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_T38_private_addresses(address: str) -> None:
    assert not targets.is_public(address)
    host = f"[{address}]" if ":" in address else address
    assert targets.is_private_literal(host)
    assert not targets.is_valid(f"http://{host}/", private=False)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert targets.is_public(address)
    host = f"[{address}]" if ":" in address else address
    assert targets.is_valid(f"https://{host}:8443/x?y#z", private=False)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "127.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "127.0.0.1.",
        "10.0.0.1\uff0e",
        "\uff11\uff12\uff17.0.0.1",
        "127\u30020\u30020\uff611",
        "\u2460\u2461\u2466.0.0.1\u3002",
        "127.\u00ad0.0.1",
        "127.0.0.1\ufe0f",
        "\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3",
        "0\uff587f.1",
    ],
)
def test_T38_other_ways_to_write_them(host: str) -> None:
    assert not targets.is_valid(f"http://{host}/", private=False)
    assert targets.is_valid(f"http://{host}/", private=True)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://h/",
        "http://",
        "http:///x",
        "//h/",
        "http://h:99999/",
        "http://a b/",
        "http://[x/",
        "http://[x]/",
        "http://[v1.x]/",
        "http://./",
        "http://../",
        "http://\u3002/",
        "http://a..b/",
        "http://.a/",
        "http://a../",
        "http://a\uff0e\u3002b/",
        "http://%31%32%37.0.0.1/",
        "http://a%2eb/",
        "http://a\\b/",
        "http://a\u00a0b/",
        "http://a\u3000/",
        "http://a\x9fb/",
        "http://a<b/",
        f"http://{'a' * 254}/",
        f"http://{chr(0xFC) * 254}/",  # normalising it would take long
    ],
)
def test_what_is_no_target(url: str) -> None:
    assert not targets.is_valid(url, private=True)


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "example.com.",
        "my_service",
        "bücher.example",
        "BÜCHER.example.",
        "例え.テスト",
        "例え。テスト",
        "xn--bcher-kva.example",
        "نامه\u200c\u0627ی.example",
        "\U0001e900.example",
        "3com.example",
    ],
)
def test_names_of_any_script_are_targets(host: str) -> None:
    assert targets.is_valid(f"https://{host}:8443/hook", private=False)


async def outcome(node: Sender, url: str) -> str:
    """Why the only try to tell a webhook failed; empty when it did not."""
    before = node.webhooks.exhausted_count
    await node.end(url)
    await node.until(lambda: node.shard.deliveries.pending == 0)
    return node.webhooks.exhausted[-1].error if node.webhooks.exhausted_count > before else ""


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["::1"], ["93.184.216.34", "127.0.0.1"]])
def test_T38_a_name_with_a_private_address_is_not_connected_to(
    tmp_path: Path, addresses: list[str]
) -> None:
    flags: dict[str, Any] = {"webhooks__allowPrivateNetworks": False, "resultWebhookMaxAttempts": 1}

    async def run() -> None:
        lookup = names(inner_test=addresses)
        async with receiver() as hook, sender(tmp_path, lookup=lookup, **flags) as node:
            failure = await outcome(node, hook.url(host="inner.test"))
            assert "is not a public address" in failure
            assert hook.all == []

    asyncio.run(run())


@pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:127.0.0.1]"])
def test_T38_a_literal_is_checked_at_the_connection_too(tmp_path: Path, host: str) -> None:
    """It was let in while the setting allowed it."""
    clock = FakeClock()

    async def run() -> None:
        async with receiver() as hook:
            hook.status = None
            async with sender(tmp_path, clock, resultWebhookMaxAttempts=1) as node:
                await node.end(hook.url(host=host))
            hook.all.clear()
            flags = {"webhooks__allowPrivateNetworks": False, "resultWebhookMaxAttempts": 1}
            async with sender(tmp_path, clock, **flags) as node:
                await node.until(lambda: node.webhooks.exhausted_count == 1)
                assert "is not a public address" in node.webhooks.exhausted[0].error
            assert hook.all == []

    asyncio.run(run())


def test_T38_the_connection_goes_to_the_address_that_was_checked(tmp_path: Path) -> None:
    """A name is asked once for a connection; what it says later leads nowhere."""
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[tuple[Any, ...]]:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async def run() -> None:
        async with receiver() as hook, sender(tmp_path, lookup=lookup) as node:
            assert await outcome(node, hook.url(host="turning.test")) == ""
            assert asked == ["turning.test"]
            assert (await hook.next()).headers["host"] == f"turning.test:{hook.port}"

    asyncio.run(run())


def test_T38_a_name_that_turns_private_is_refused_at_the_next_connection(tmp_path: Path) -> None:
    """Checked by its first answer alone it would be let through later."""
    answers = iter(["93.184.216.34", "127.0.0.1"])

    def lookup(host: str, port: int) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    async def run() -> None:
        flags = {"webhooks__allowPrivateNetworks": False}
        async with receiver() as hook, sender(tmp_path, lookup=lookup, **flags) as node:
            guard = node.callbacks._session.connector._resolver  # type: ignore[union-attr]
            (first,) = await guard.resolve("turning.test", hook.port)
            assert first["host"] == "93.184.216.34"
            with pytest.raises(OSError, match=r"127\.0\.0\.1 is not a public address"):
                await guard.resolve("turning.test", hook.port)

    asyncio.run(run())


def test_T38_a_redirect_is_not_followed(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            receiver() as inner,
            receiver() as hook,
            sender(tmp_path, resultWebhookMaxAttempts=1) as node,
        ):
            hook.status, hook.headers = 307, {"location": inner.url()}
            assert await outcome(node, hook.url()) == "status 307"
            assert inner.all == [] and len(hook.all) == 1

    asyncio.run(run())


def test_https_names_the_host_of_the_url(tmp_path: Path) -> None:
    """The connection goes to the address that was checked, and asks there for the name."""
    hello: asyncio.Queue[bytes] = asyncio.Queue()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello.put_nowait(await reader.read(4096))
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        lookup = names(secure_test=["127.0.0.1"])
        async with sender(tmp_path, lookup=lookup, resultWebhookMaxAttempts=1) as node:
            assert await outcome(node, f"https://secure.test:{port}/") != ""
            assert b"secure.test" in await hello.get()
        server.close()

    asyncio.run(run())
