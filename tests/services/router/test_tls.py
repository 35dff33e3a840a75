"""TLS and clients' certificates on a real port, streams included; files that are wrong are named before anything is served."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from duomo.config_gateway import GatewaySection
from duomo.errors import ConfigError
from services.router import edge
from services.router.tls import tls_context
from services.router.tls_accept import TlsAcceptor, TlsTerms
from tests.services.router.stub_system import PATIENCE_S, stub_system

STREAM = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "stream": True}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> dict[str, str]:
    """The gateway's own certificate and key, as its options."""
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(tmp_path / "cert.pem", append=number > 0)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return {"ssl_certfile": str(tmp_path / "cert.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_streams_go_over_tls_and_plain_http_does_not(authority: trustme.CA, files: dict[str, str], tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": files}) as system:
            url = system.base_url.replace("http:", "https:")
            async with httpx.AsyncClient(base_url=url, verify=trusting(authority), timeout=PATIENCE_S) as client:
                async with client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
                    lines = [line async for line in answer.aiter_lines() if line.startswith("data:")]
                assert answer.status_code == 200 and len(lines) == 42 and lines[-1] == "data: [DONE]"
            with pytest.raises(httpx.TransportError):
                await system.client.get("/health/live")
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as stranger:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await stranger.get("/health/live")

    asyncio.run(scenario())


def test_who_does_not_shake_hands_is_counted(
    authority: trustme.CA, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "SPARE_CONNECTIONS", 2)

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": files | {"max_connections": 2}}) as system:
            port = system.gateway.config.gateway.port
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(12)]
            ends = [asyncio.create_task(reader.read()) for reader, _ in silent]
            await system.until(lambda: sum(end.done() for end in ends) == 8, PATIENCE_S)
            assert system.gateway.metrics.requests.labels("refused", "too_many_connections")._value.get() == 8
            for end, (_, writer) in zip(ends, silent, strict=True):
                if not end.done():
                    writer.close()
            url = system.base_url.replace("http:", "https:")
            async with httpx.AsyncClient(base_url=url, verify=trusting(authority), timeout=PATIENCE_S) as client:

                async def is_served() -> bool:
                    try:
                        return (await client.get("/health/live")).status_code == 200
                    except httpx.TransportError:  # those that left have not been noticed yet
                        return False

                async with asyncio.timeout(PATIENCE_S):
                    while not await is_served():
                        await asyncio.sleep(0.02)
            held = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(held[0].read(), PATIENCE_S) == b"", "whoever shakes hands is cut at the end"

    asyncio.run(scenario())


def test_a_client_needs_a_certificate_where_authorities_are_named(authority: trustme.CA, files: dict[str, str], tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": files | {"ssl_ca_certs": str(tmp_path / "ca.pem")}}) as system:
            url = system.base_url.replace("http:", "https:") + "/v1/models"
            for issuer, is_welcome in ((authority, True), (trustme.CA(), False), (None, False)):
                context = trusting(authority)
                if issuer is not None:
                    issuer.issue_cert("client@example.org").configure_cert(context)
                async with httpx.AsyncClient(verify=context, timeout=PATIENCE_S) as client:
                    if is_welcome:
                        assert (await client.get(url)).status_code == 200
                    else:
                        with pytest.raises(httpx.TransportError):
                            await client.get(url)

    asyncio.run(scenario())


def test_files_that_cannot_be_used_are_named(authority: trustme.CA, files: dict[str, str], tmp_path: Path) -> None:
    good = GatewaySection.model_validate(files)
    assert tls_context(good) is not None and tls_context(GatewaySection()) is None
    other = tmp_path / "other.pem"
    authority.issue_cert("other").private_key_pem.write_to_path(other)
    noise = tmp_path / "noise.pem"
    noise.write_text("no certificate\n")
    shutil.copy(files["ssl_keyfile"], tmp_path / "encrypted.pem")
    for changed, named in (
        ({"ssl_certfile": tmp_path / "none.pem"}, "gateway.ssl_certfile .*none.pem cannot be read"),
        ({"ssl_keyfile": tmp_path / "none.pem"}, "gateway.ssl_keyfile .*none.pem cannot be read"),
        ({"ssl_keyfile": other}, "ssl_keyfile .*other.pem cannot be used: they do not belong together"),
        ({"ssl_certfile": noise}, "ssl_certfile .*noise.pem .*must be PEM"),
        ({"ssl_ca_certs": noise}, "gateway.ssl_ca_certs .*noise.pem must hold PEM certificates"),
    ):
        with pytest.raises(ConfigError, match=named):
            tls_context(good.model_copy(update=changed))


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"ssl_certfile": "c"}, "gateway.ssl_keyfile"),
        ({"ssl_keyfile": "k"}, "gateway.ssl_certfile"),
        ({"ssl_ca_certs": "a"}, "gateway.ssl_ca_certs"),
        ({"admin_port": 8000}, "gateway.admin_port"),
        ({"admin_port": 8001, "admin_host": "0.0.0.0"}, "gateway.admin_host"),
        ({"metrics_need_key": True}, "gateway.metrics_need_key"),
    ],
)
def test_options_that_contradict_each_other_are_refused(section: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GatewaySection.model_validate(section)


def test_a_handshake_that_is_cut_before_it_began_leaves_no_socket(files: dict[str, str]) -> None:
    context = tls_context(GatewaySection.model_validate(files))
    assert context is not None
    terms = TlsTerms(context=context, handshake_s=60.0, has_room=lambda num_shaking: True, refused=lambda: None)

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as bound:
            bound.setblocking(False)
            door = TlsAcceptor(asyncio.Protocol, bound, terms)
            client = socket.create_connection(bound.getsockname())
            door.start()
            while not door._shaking:  # until the loop has seen it, and not until the task has run
                door._accept()
            door.close()
            await door.wait_closed()
            client.settimeout(PATIENCE_S)
            assert await asyncio.to_thread(client.recv, 1) == b"", "closed from the other side"
            client.close()

    asyncio.run(scenario())
