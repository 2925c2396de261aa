"""Every way to log in, at a real server that lets nobody else in; and that no secret is ever shown."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nkeys
import pytest
from click.testing import CliRunner

from infsvc import Client
from infsvc.cli.doctor import doctor
from infsvc.cli.pub import pub
from infsvc.errors import ConfigError, Unreachable
from infsvc.events import EventBus
from infsvc.home import Home
from infsvc.nats_login import NatsLogin
from transports.nats.broker import Listener, find_binary, probe
from transports.nats.bus import Bus

from .conftest import broker_is, free_port


@contextmanager
def serving(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """A nats-server with this configuration; its host and port."""
    port = free_port()
    path = folder / "server.conf"
    path.write_text(json.dumps({"host": "127.0.0.1", "port": port} | config))
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen([str(find_binary()), "-c", str(path)], stdout=log, stderr=log)
    try:
        asyncio.run(_listening(port))
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def _listening(port: int) -> None:
    async with asyncio.timeout(10):
        while await probe("127.0.0.1", port) is not Listener.NATS:
            await asyncio.sleep(0.02)


def seed_of(kind: int) -> tuple[str, str]:
    """A fresh key: its seed and its public half."""
    seed = nkeys.encode_seed(os.urandom(32), prefix=kind)
    return seed.decode(), nkeys.from_seed(bytearray(seed)).public_key.decode()


def jwt(kind: str, issuer_seed: str, issuer: str, subject: str, **nats: Any) -> str:
    """A signed claim, as the `nsc` tool makes them."""
    claims = {
        "jti": "x",
        "iat": int(time.time()),
        "iss": issuer,
        "name": kind,
        "sub": subject,
        "nats": {"type": kind, "version": 2, **nats},
    }
    head, body = (_b64(json.dumps(each).encode()) for each in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims))
    signed = nkeys.from_seed(bytearray(issuer_seed.encode())).sign(f"{head}.{body}".encode())
    return f"{head}.{body}.{_b64(signed)}"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class Case:
    """A server and the fields that open it. `wrong` are fields that do not, and a part of what is said then."""

    config: dict[str, Any]
    fields: dict[str, str]
    wrong: dict[str, str]
    said: str
    secrets: tuple[str, ...]
    scheme: str = "nats"


def password(folder: Path) -> Case:
    return Case(
        {"authorization": {"user": "me", "password": "p@ss/word"}},
        {"user": "me", "password": "p@ss/word"},
        {"user": "me", "password": "wrong-one"},
        "it refuses the login (authorization violation): check user and password",
        ("p@ss/word", "wrong-one"),
    )


def token(folder: Path) -> Case:
    return Case(
        {"authorization": {"token": "t0ken-of-mine"}},
        {"token": "t0ken-of-mine"},
        {},
        "it asks who this is (authorization violation): set one of INFSVC_NATS_USER, INFSVC_NATS_TOKEN",
        ("t0ken-of-mine",),
    )


def nkey(folder: Path) -> Case:
    seed, public = seed_of(nkeys.PREFIX_BYTE_USER)
    other, _ = seed_of(nkeys.PREFIX_BYTE_USER)
    (folder / "user.nk").write_text(f"{seed}\n")
    (folder / "other.nk").write_text(other)
    return Case(
        {"authorization": {"users": [{"nkey": public}]}},
        {"nkey": str(folder / "user.nk")},
        {"nkey": str(folder / "other.nk")},
        f"(authorization violation): check {folder / 'other.nk'}",
        (seed, other),
    )


def creds(folder: Path) -> Case:
    operator_seed, operator = seed_of(nkeys.PREFIX_BYTE_OPERATOR)
    account_seed, account = seed_of(nkeys.PREFIX_BYTE_ACCOUNT)
    everything = {"subs": -1, "data": -1, "payload": -1}
    limits = everything | {"imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    seeds = []
    for name, signed_by in (("user", account_seed), ("stranger", seed_of(nkeys.PREFIX_BYTE_ACCOUNT)[0])):
        seed, user = seed_of(nkeys.PREFIX_BYTE_USER)
        signer = nkeys.from_seed(bytearray(signed_by.encode())).public_key.decode()
        told = jwt("user", signed_by, signer, user, pub={}, sub={}, **everything)
        (folder / f"{name}.creds").write_text(
            f"-----BEGIN NATS USER JWT-----\n{told}\n------END NATS USER JWT------\n\n*** IMPORTANT ***\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
        seeds += [seed, told]
    return Case(
        {
            "operator": jwt("operator", operator_seed, operator, operator),
            "resolver": "MEMORY",
            "resolver_preload": {account: jwt("account", operator_seed, operator, account, limits=limits)},
        },
        {"creds": str(folder / "user.creds")},
        {"creds": str(folder / "stranger.creds")},
        f"check {folder / 'stranger.creds'}",
        tuple(seeds),
    )


def tls(folder: Path) -> Case:
    certificates(folder)
    return Case(
        _tls(folder),
        {"ca": str(folder / "ca.pem")},
        {},
        "its certificate is not trusted (",
        (),
        scheme="tls",
    )


def mutual_tls(folder: Path) -> Case:
    certificates(folder)
    config = _tls(folder)
    config["tls"] |= {"verify": True, "ca_file": str(folder / "ca.pem")}
    fields = {"ca": str(folder / "ca.pem"), "cert": str(folder / "client.pem"), "key": str(folder / "client.key")}
    return Case(config, fields, {"ca": fields["ca"]}, "set INFSVC_NATS_CERT and INFSVC_NATS_KEY", (), scheme="tls")


def _tls(folder: Path) -> dict[str, Any]:
    return {"tls": {"cert_file": str(folder / "server.pem"), "key_file": str(folder / "server.key")}}


def certificates(folder: Path) -> None:
    """A CA of its own, a server's certificate for 127.0.0.1 and a client's."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program to make certificates with")

    def make(name: str, *more: str) -> None:
        kind = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        files = ("-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem"))
        subprocess.run(
            [openssl, "req", *kind.split(), "-subj", f"/CN={name}", *files, *more],
            check=True,
            capture_output=True,
        )

    make("ca", "-addext", "keyUsage=critical,keyCertSign")
    by_ca = ("-CA", str(folder / "ca.pem"), "-CAkey", str(folder / "ca.key"))
    for name in ("server", "client"):
        make(name, *by_ca, "-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1")


@pytest.mark.parametrize("make", [password, token, nkey, creds, tls, mutual_tls])
def test_a_login_opens_the_broker_to_node_client_and_commands(
    make: Callable[[Path], Case],
    tmp_path: Path,
    home: Home,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("DEBUG")
    case = make(tmp_path)
    with serving(tmp_path, case.config) as address:
        url = f"{case.scheme}://{address}"
        asyncio.run(_node_connects(NatsLogin.of(url, **case.fields), home))
        asyncio.run(_client_connects(url, case.fields))
        for name, value in case.fields.items():
            monkeypatch.setenv(f"INFSVC_NATS_{name.upper()}", value)
        monkeypatch.setenv("INFSVC_HOME", str(home.root))
        monkeypatch.setenv("INFSVC_NATS_URL", url)
        told = CliRunner().invoke(pub, ["somewhere", "x"])
        assert told.exit_code == 0, told.output
        looked = CliRunner().invoke(doctor)
        assert f"broker         one answers at {address}" in looked.output
        refused = asyncio.run(_is_refused(NatsLogin.of(url, **case.wrong), home))
        assert case.said in refused
        with pytest.raises(Unreachable) as caught:
            asyncio.run(_client_connects(url, case.wrong))
        shown = "".join((told.output, looked.output, refused, str(caught.value), caplog.text))
        shown += repr(NatsLogin.of(url, **case.fields))
        assert [secret for secret in case.secrets if secret in shown] == []


async def _node_connects(login: NatsLogin, home: Home) -> None:
    events = EventBus("test")
    bus = Bus(login, embedded="off", home=home, events=events, node="test")
    await bus.start()
    await broker_is(events, "connected")
    assert await bus.publish("somewhere", b"x")
    assert await bus.flush()
    await bus.close()


async def _is_refused(login: NatsLogin, home: Home) -> str:
    events = EventBus("test")
    bus = Bus(login, embedded="off", home=home, events=events, node="test")
    await bus.start()
    reason = (await broker_is(events, "down")).reason
    await bus.close()
    return str(reason)


PARAMETER = {"ca": "ca_file", "cert": "cert_file", "key": "key_file", "creds": "credentials", "nkey": "nkey_file"}


async def _client_connects(url: str, fields: dict[str, str]) -> None:
    options: dict[str, Any] = {PARAMETER.get(name, name): value for name, value in fields.items()}
    async with Client(url, **options):
        pass


async def test_nothing_is_said_in_the_clear_where_tls_was_asked_for(home: Home) -> None:
    heard = bytearray()

    async def plain_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id": "x", "version": "2.12.0", "max_payload": 1024, "headers": true}\r\n')
        heard.extend(await reader.read(1024))
        writer.close()

    server = await asyncio.start_server(plain_server, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        refused = await _is_refused(NatsLogin.of(f"tls://me:secret@127.0.0.1:{port}"), home)
    assert "it does not speak TLS" in refused
    assert heard == b""


async def test_a_file_that_is_of_no_use_is_said_before_anything_is_sent(tmp_path: Path, home: Home) -> None:
    url, none = f"nats://127.0.0.1:{free_port()}", tmp_path / "none"
    bad = tmp_path / "bad"
    bad.write_text("-----BEGIN NATS USER JWT-----\nabc\n------END NATS USER JWT------\n")
    cut = tmp_path / "cut"
    seed, _ = seed_of(nkeys.PREFIX_BYTE_USER)
    cut.write_text(bad.read_text() + f"-----BEGIN USER NKEY SEED-----\n{seed[:-9]}\n------END USER NKEY SEED------\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for fields, words in (
        ({"creds": str(none)}, f"INFSVC_NATS_CREDS: {none} cannot be read: No such file or directory"),
        ({"creds": str(bad)}, f"INFSVC_NATS_CREDS: {bad} is no .creds file: it has no block BEGIN USER NKEY SEED"),
        ({"creds": str(cut)}, f"INFSVC_NATS_CREDS: {cut} holds a seed that is none"),
        ({"creds": str(binary)}, f"INFSVC_NATS_CREDS: {binary} is no text file"),
        ({"nkey": str(bad)}, f"INFSVC_NATS_NKEY: {bad} holds no seed of a user's nkey"),
        ({"ca": str(none)}, f"INFSVC_NATS_CA: {none} is no file of certificates in PEM"),
        ({"ca": str(bad)}, f"INFSVC_NATS_CA: {bad} is no file of certificates in PEM"),
        ({"cert": str(bad), "key": str(bad)}, f"INFSVC_NATS_CERT: {bad} with {bad} is no certificate with its key"),
    ):
        with pytest.raises(ConfigError) as caught:
            NatsLogin.of(url, **fields).options()
        assert str(caught.value).startswith(words)
        assert seed[:-9] not in str(caught.value)
        assert words in await _is_refused(NatsLogin.of(url, **fields), home)
