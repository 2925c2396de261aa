"""Where a NATS broker is, and how one says who one is: its servers, user and password, a token, a `.creds` file, an
nkey, and TLS.

It stands apart because the node, the client and every command log in alike, and because of what must never be seen: no
sentence, `repr` or log line from here holds a secret, and a `tls://` server that turns out to speak in the clear gets
none. Files are read at each connection, so that a renewed one is taken as it is then.
"""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from infsvc.errors import ConfigError

if TYPE_CHECKING:
    from nats.aio.client import Client

PORT = 4222
"""NATS's own, where a URL names none."""

SETTINGS = {
    "url": "INFSVC_NATS_URL",
    "user": "INFSVC_NATS_USER",
    "password": "INFSVC_NATS_PASSWORD",
    "token": "INFSVC_NATS_TOKEN",
    "creds": "INFSVC_NATS_CREDS",
    "nkey": "INFSVC_NATS_NKEY",
    "ca": "INFSVC_NATS_CA",
    "cert": "INFSVC_NATS_CERT",
    "key": "INFSVC_NATS_KEY",
}
"""What a field of a login is called where a person sets it; the client's parameters are `PARAMETERS`."""

PARAMETERS = {
    "url": "url",
    "user": "user",
    "password": "password",
    "token": "token",
    "creds": "credentials",
    "nkey": "nkey_file",
    "ca": "ca_file",
    "cert": "cert_file",
    "key": "key_file",
}

_BLOCK = r"-+BEGIN {0}-+\s+(\S+)\s+-+END {0}-+"
_JWT = re.compile(_BLOCK.format("NATS USER JWT"))
_SEED_BLOCK = re.compile(_BLOCK.format("USER NKEY SEED"))
_SEED = re.compile(r"SU[A-Z2-7]{56}")
_REFUSED = ("authorization violation", "authentication timeout", "authentication expired", "authentication revoked")


def shown(server: str) -> str:
    """A server's URL without user and password; `ValueError` for what has no host or a wrong port."""
    parts = urlsplit(server)
    if not parts.hostname:
        raise ValueError("no host")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or PORT}"


@dataclass(frozen=True, kw_only=True)
class NatsLogin:
    """A broker and a login. Build it with `of`, which checks it.

    Attributes:
        servers: URLs; a user or token that only some of them, or each another, carry stays in them.
        creds, nkey: paths of a `.creds` file, and of a file with a user's nkey seed.
        ca, cert, key: paths of PEM files: who signed the broker's certificate, and what this side shows.
        names: what the fields are called in sentences.
    """

    servers: tuple[str, ...] = field(repr=False)
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    creds: str = ""
    nkey: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    names: dict[str, str] = field(default_factory=lambda: SETTINGS, repr=False, compare=False)

    @classmethod
    def of(cls, url: str, *, names: dict[str, str] = SETTINGS, **fields: str) -> NatsLogin:
        """A checked login.

        Args:
            url: `nats://host:port` or `tls://…`, several separated by commas; user and password, or a token, may stand
                before the host, percent-encoded.
            fields: as the attributes; empty ones are none.

        Raises:
            ConfigError: the URL is none, or the fields exclude each other. Never with a value, which may be secret.
        """
        servers = [one if "//" in one else f"nats://{one}" for one in map(str.strip, url.split(",")) if one]
        try:
            fine = all(urlsplit(one).scheme in ("nats", "tls") and shown(one) for one in servers)
        except ValueError:
            fine = False
        if not servers or not fine:
            raise ConfigError("not nats://host:port or tls://host:port, several separated by commas", key=names["url"])
        return cls(servers=tuple(servers), names=names, **fields)._out_of_the_url()._checked()

    def _out_of_the_url(self) -> NatsLogin:
        """Takes user and password out of URLs that all say the same.

        nats-py does not decode them there, and servers that it hears of from the cluster would get none.
        """
        parts = [urlsplit(one) for one in self.servers]
        if not any(one.username for one in parts):
            return self
        for name in ("user", "token", "creds", "nkey"):
            if getattr(self, name):
                raise ConfigError(
                    f"{self.names['url']} says who one is, and so does this: leave one of them out",
                    key=self.names[name],
                )
        who = {(one.username, one.password) for one in parts}
        if len(who) > 1:
            return self
        user, password = unquote(parts[0].username or ""), unquote(parts[0].password or "")
        bare = tuple(urlunsplit(one._replace(netloc=one.netloc.rpartition("@")[2])) for one in parts)
        if password:
            return replace(self, servers=bare, user=user, password=password)
        return replace(self, servers=bare, token=user)

    def _checked(self) -> NatsLogin:
        names = self.names
        for one, other in (("user", "password"), ("password", "user"), ("cert", "key"), ("key", "cert")):
            if getattr(self, one) and not getattr(self, other):
                raise ConfigError(f"{names[one]} and {names[other]} go together", key=names[one])
        given = [name for name in ("user", "token", "creds", "nkey") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"it excludes {names[given[0]]}: a login has one of them", key=names[given[1]])
        return self

    def at(self, url: str) -> NatsLogin:
        """The same login at another URL; who one is there comes from the URL where that says so."""
        bare = dict.fromkeys(("user", "password", "token", "creds", "nkey"), "") if "@" in url else {}
        return NatsLogin.of(
            url,
            names=self.names,
            **{name: getattr(self, name) for name in PARAMETERS if name != "url"} | bare,
        )

    @property
    def shown(self) -> str:
        """The servers, hosts and ports only."""
        return ",".join(shown(one) for one in self.servers)

    @property
    def wants_tls(self) -> bool:
        """Whether nothing may be said in the clear."""
        return bool(self.ca or self.cert) or any(one.startswith("tls://") for one in self.servers)

    @property
    def embedded_url(self) -> str | None:
        """The URL of a broker that this node may start for itself, with user or token; None when a plain nats-server of
        one's own could not be what is meant: several servers, TLS, keys."""
        if len(self.servers) > 1 or self.wants_tls or self.creds or self.nkey:
            return None
        parts = urlsplit(self.servers[0])
        who = (
            f"{quote(self.user, safe='')}:{quote(self.password, safe='')}" if self.user else quote(self.token, safe="")
        )
        return urlunsplit(parts._replace(netloc=f"{who}@{parts.netloc}")) if who else self.servers[0]

    def client(self) -> Client:
        """A nats-py client, not connected; a server in the clear is told nothing where TLS was asked for."""
        return _client_class()(self.wants_tls, bool(self.cert))

    def options(self) -> dict[str, Any]:
        """What that client's `connect` takes beside its servers. Reads the files.

        Raises:
            ConfigError: a file cannot be read, holds something else, or needs a package that is not installed.
        """
        options: dict[str, Any] = {}
        if self.user:
            options |= {"user": self.user, "password": self.password}
        elif self.token:
            options["token"] = self.token
        elif self.creds:
            jwt, seed = self._read_creds()
            sign = self._signer(seed, "creds")
            options |= {"user_jwt_cb": lambda: bytearray(jwt.encode()), "signature_cb": sign}
        elif self.nkey:
            found = _SEED.search(self._read("nkey"))
            if found is None:
                raise self._wrong("nkey", "holds no seed of a user's nkey, which begins with SU")
            self._signer(found[0], "nkey")
            options["nkeys_seed_str"] = found[0]
        if self.wants_tls:
            options["tls"] = self._context()
        return options

    def _read(self, name: str) -> str:
        path = Path(getattr(self, name)).expanduser()
        try:
            return path.read_text(encoding="ascii")
        except OSError as error:
            raise self._wrong(name, f"cannot be read: {error.strerror or error}") from None
        except ValueError:
            raise self._wrong(name, "is no text file") from None

    def _read_creds(self) -> tuple[str, str]:
        text = self._read("creds")
        jwt, seed = _JWT.search(text), _SEED_BLOCK.search(text)
        if jwt is None or seed is None:
            lacks = "BEGIN NATS USER JWT" if jwt is None else "BEGIN USER NKEY SEED"
            raise self._wrong("creds", f"is no .creds file: it has no block {lacks}")
        return jwt[1], seed[1]

    def _signer(self, seed: str, name: str) -> Callable[[str], bytes]:
        """Signs the broker's question with a seed, which is tried here."""
        try:
            import nkeys
        except ImportError:
            raise ConfigError(
                "signing with a key needs the package nkeys: pip install 'infsvc[nkeys]'", key=self.names[name]
            ) from None
        try:
            pair = nkeys.from_seed(bytearray(seed.encode()))  # type: ignore[no-untyped-call]
        except Exception:
            # Without what it says, and without its chain: both may hold the seed.
            raise self._wrong(name, "holds a seed that is none: is a letter missing?") from None

        def sign(nonce: str) -> bytes:
            return base64.b64encode(pair.sign(nonce.encode()))

        return sign

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=str(Path(self.ca).expanduser()) if self.ca else None)
        except (OSError, ValueError) as error:
            raise self._wrong("ca", f"is no file of certificates in PEM: {_told(error)}") from None
        if self.cert:
            try:
                # A password for a key that has none is not looked at; without one, OpenSSL would ask the terminal.
                context.load_cert_chain(
                    str(Path(self.cert).expanduser()), str(Path(self.key).expanduser()), password=""
                )
            except (OSError, ValueError) as error:
                raise self._wrong("cert", f"with {self.key} is no certificate with its key: {_told(error)}") from None
        return context

    def _wrong(self, name: str, words: str) -> ConfigError:
        return ConfigError(f"{getattr(self, name)} {words}", key=self.names[name])

    def sentence(self, error: BaseException) -> str:
        """What went wrong with a connection, for a person: the broker's or OpenSSL's words, and what mends it."""
        told = str(error) or type(error).__name__
        names = self.names
        if any(word in told.lower() for word in _REFUSED):
            sent = "user and password" if self.user else "a token" if self.token else self.creds or self.nkey
            words = told.removeprefix("nats: ").strip("'").lower()
            if not sent and not any("@" in one for one in self.servers):
                keys = ", ".join(names[name] for name in ("user", "token", "creds", "nkey"))
                return f"it asks who this is ({words}): set one of {keys}"
            return f"it refuses the login ({words}): check {sent or names['url']}"
        if isinstance(error, ssl.SSLCertVerificationError):
            if "not valid for" in error.verify_message or "mismatch" in error.verify_message:
                return f"its certificate is another host's: {error.verify_message}"
            mend = f"check {self.ca}" if self.ca else f"name the CA that signed it with {names['ca']}"
            return f"its certificate is not trusted ({error.verify_message}): {mend}"
        if "asks for a client certificate" in told:
            return f"{told}: set {names['cert']} and {names['key']}"
        if isinstance(error, ssl.SSLError) and "certificate" in told.lower().replace("_", " "):
            return f"it refuses this side's certificate ({_told(error)}): check {self.cert or names['cert']}"
        return told


def _told(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__


@lru_cache(maxsize=1)
def _client_class() -> Callable[[bool, bool], Client]:
    # Imported here: whoever only names a broker loads no network library.
    from nats.aio.client import Client
    from nats.errors import Error

    class GuardedClient(Client):
        """nats-py logs in over a plain connection where a `tls://` server offers nothing else; this one does not. And
        it says in words that a certificate is asked for, which else is a lost connection."""

        def __init__(self, wants_tls: bool, has_cert: bool) -> None:
            super().__init__()
            self._wants_tls, self._has_cert = wants_tls, has_cert

        async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
            if initial_connection and self._wants_tls and not info.get("tls_required"):
                raise Error("it does not speak TLS: nothing was said to it")
            if initial_connection and info.get("tls_verify") and not self._has_cert:
                raise Error("it asks for a client certificate")
            await super()._process_info(info, initial_connection)

    return GuardedClient
