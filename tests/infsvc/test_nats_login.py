"""What makes a login and what makes none; what of it is shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infsvc import Client
from infsvc.errors import ConfigError
from infsvc.nats_login import NatsLogin
from infsvc.settings import load_node_settings


@pytest.mark.parametrize(
    ("url", "servers", "who"),
    [
        ("nats://h", ("nats://h",), ("", "", "")),
        ("h1:1, tls://h2", ("nats://h1:1", "tls://h2"), ("", "", "")),
        ("nats://me:p%40ss@h1:1,nats://me:p%40ss@h2:2", ("nats://h1:1", "nats://h2:2"), ("me", "p@ss", "")),
        ("nats://t%40ken@h:1", ("nats://h:1",), ("", "", "t@ken")),
        ("nats://a:b@h1,nats://c:d@h2", ("nats://a:b@h1", "nats://c:d@h2"), ("", "", "")),
    ],
)
def test_of_a_url(url: str, servers: tuple[str, ...], who: tuple[str, str, str]) -> None:
    login = NatsLogin.of(url)
    assert login.servers == servers
    assert (login.user, login.password, login.token) == who
    assert not any(secret in repr(login) + login.shown for secret in ("p@ss", "p%40ss", "t@ken", "t%40ken", "b@", "d@"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"USER": "me"}, "INFSVC_NATS_USER: INFSVC_NATS_USER and INFSVC_NATS_PASSWORD go together"),
        ({"PASSWORD": "s3cret"}, "INFSVC_NATS_PASSWORD: INFSVC_NATS_PASSWORD and INFSVC_NATS_USER go together"),
        ({"CERT": "c.pem"}, "INFSVC_NATS_CERT: INFSVC_NATS_CERT and INFSVC_NATS_KEY go together"),
        ({"TOKEN": "s3cret", "CREDS": "c"}, "INFSVC_NATS_CREDS: it excludes INFSVC_NATS_TOKEN"),
        ({"URL": "nats://me:s3cret@h", "NKEY": "n"}, "INFSVC_NATS_NKEY: INFSVC_NATS_URL says who one is"),
        ({"URL": "nats://me:s3cret@h:x"}, "INFSVC_NATS_URL: not nats://"),
    ],
)
def test_what_makes_no_login(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_node_settings({f"INFSVC_NATS_{name}": value for name, value in settings.items()})
    assert str(caught.value).startswith(words)
    assert "s3cret" not in str(caught.value)


def test_another_broker_gets_the_same_login_unless_it_brings_its_own() -> None:
    login = NatsLogin.of("nats://h", token="t", ca="ca.pem")
    assert (login.at("nats://other").token, login.at("nats://other").servers) == ("t", ("nats://other",))
    own = login.at("tls://me:pw@other")
    assert (own.token, own.user, own.ca) == ("", "me", "ca.pem")


@pytest.mark.parametrize(
    ("url", "fields", "own"),
    [
        ("nats://127.0.0.1:5700", {}, "nats://127.0.0.1:5700"),
        ("nats://127.0.0.1", {"user": "a:b", "password": "p@"}, "nats://a%3Ab:p%40@127.0.0.1"),
        ("nats://127.0.0.1", {"token": "t/"}, "nats://t%2F@127.0.0.1"),
        ("nats://127.0.0.1:1,nats://127.0.0.1:2", {}, None),
        ("tls://127.0.0.1", {}, None),
        ("nats://127.0.0.1", {"creds": "c"}, None),
        ("nats://127.0.0.1", {"ca": "c"}, None),
    ],
)
def test_which_broker_a_node_may_start_itself(url: str, fields: dict[str, str], own: str | None) -> None:
    assert NatsLogin.of(url, **fields).embedded_url == own


def test_a_login_of_nats_is_none_for_http() -> None:
    with pytest.raises(ConfigError, match="credentials: is for a NATS broker"):
        Client("http://h", credentials="c")
    with pytest.raises(ConfigError, match="nkey_file: it excludes credentials"):
        Client("nats://h", credentials="c", nkey_file="n")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user.nk").write_text(f"SU{'A' * 56}")
    monkeypatch.setitem(sys.modules, "nkeys", None)
    with pytest.raises(ConfigError, match=r"needs the package nkeys: pip install 'infsvc\[nkeys\]'"):
        NatsLogin.of("nats://h", nkey=str(tmp_path / "user.nk")).options()


def test_a_login_loads_no_network_library() -> None:
    code = "import sys; from infsvc.nats_login import NatsLogin; NatsLogin.of('nats://h'); print('nats' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "False"
