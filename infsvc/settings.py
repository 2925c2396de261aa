"""Settings: one worker file a model (`envs/worker.<name>.env`), and the node's own `INFSVC_…` variables.

For a worker: `INFSVC__<MODEL>__<KEY>` beats the file, the file beats a bare `KEY` in the environment, that beats the
default. An unknown key, a wrong type or a value out of range is a `ConfigError` that names file, line and key, before
anything starts.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from dotenv.parser import parse_stream
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, SettingsConfigDict

from infsvc import subjects
from infsvc.errors import ConfigError, shown
from infsvc.home import Home
from infsvc.nats_login import SETTINGS, NatsLogin

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?$")
_SECONDS = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


def seconds_of(value: Any) -> Any:
    """A duration's text as seconds; what is no text is left as it is. Raises `ValueError`."""
    if isinstance(value, str):
        match = _DURATION.match(value.strip())
        if not match:
            raise ValueError("a duration such as 10s, 10m or 24h")
        return float(match[1]) * _SECONDS[match[2]]  # "9" * 400 is infinity, which the type refuses
    return value


def _size(value: Any) -> Any:
    if isinstance(value, str):
        match = _SIZE.match(value.strip())
        if not match:
            raise ValueError("a size such as 800M or 16G")
        n_bytes = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")
        if n_bytes > 2**63:
            raise ValueError("a size such as 800M or 16G")
        return int(n_bytes)
    return value


Seconds = Annotated[float, BeforeValidator(seconds_of), Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, BeforeValidator(_size), Field(gt=0)]


class Address:
    """A host and a port to listen on; an empty host stands for INFSVC_BIND."""

    __slots__ = ("host", "port")

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    @classmethod
    def parse(cls, text: str) -> Address:
        host, colon, port = text.strip().rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise ValueError("host:port or :port")
        return cls(host.strip("[]"), int(port))

    def bound(self, bind: str) -> Address:
        """The address with the empty host filled."""
        return Address(self.host or bind, self.port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address_text(value: str) -> str:
    if value:
        Address.parse(value)
    return value


class WorkerSettings(BaseSettings):
    """One model's worker file. Field names are the file's keys in lower case."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_name: str
    """The model's name on every door; the worker file's middle when not given."""
    model_url: str = ""
    """An https address of the model's file, where it is in no repository."""
    model_repo: str = ""
    """The repository on the hub that holds the file, as owner/name."""
    model_file: str = ""
    """The file's name in MODEL_REPO."""
    model_sha256: Annotated[str, Field(pattern=r"^([0-9a-fA-F]{64})?$")] = ""
    """What the file must hash to, 64 hexadecimal digits; empty trusts the hub's own checksum."""
    model_path: str = ""
    """Where the file lies, relative to the home."""
    model_format: Literal["auto", "template", "harmony", "embedding"] = "auto"
    """How prompts are made and answers read: `auto` reads it from the file."""
    http_addr: Annotated[str, BeforeValidator(_address_text)] = ""
    """The model's own port, host:port; an empty host is INFSVC_BIND, empty altogether is no port of its own."""
    subject: str = ""
    """The NATS subject that takes requests."""
    stream_name: str = ""
    """The JetStream stream of the model's durable queue."""
    queue_durable: str = ""
    """The durable consumer that all nodes with this model share."""
    queue_group: str = ""
    """The queue group of the nodes that listen on SUBJECT."""
    response_prefix: str = "inference.reply"
    """Answers without a reply subject go to `<RESPONSE_PREFIX>.<req_id>`."""
    monitoring_topic: str = "monitoring.inference"
    """Backpressure reports go to `<MONITORING_TOPIC>.<model>`."""
    backpressure_threshold: Annotated[int, Field(ge=1)] = 5
    """Waiting requests from which the level is `warning`; from twice as many it is `critical`."""
    harmony_reasoning_level: Literal["low", "medium", "high"] = "medium"
    """How long a Harmony model thinks when a request does not say."""
    harmony_extract_final: bool = True
    """Whether a Harmony answer is told apart by its channels: final, and what is said before a call, is the text,
    analysis the reasoning. With false the text is the whole answer with its marks; calls are told all the same."""
    harmony_model_identity: str = "ChatGPT, a large language model trained by OpenAI"
    """Who the model is, as the Harmony system message says after "You are"; a whole sentence is taken as it is."""
    harmony_knowledge_cutoff: str = "2024-06"
    """The knowledge cut-off that the Harmony system message names; empty names none."""
    worker_concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Sequences decoded in one batch; each has a context of CTX_SIZE."""
    ctx_size: Annotated[int, Field(ge=0, le=2**24)] = 4096
    """Tokens of one sequence, prompt and answer together; 0 is what the model was trained on."""
    model_threads: Annotated[int, Field(ge=0, le=512)] = 0
    """Threads of llama.cpp; 0 is one a core."""
    engine_isolation: Literal["thread", "process"] = "thread"
    """Where the engine runs: in a `thread` of the node, or in a `process` of its own, whose crash ends this model
    alone; it is then started again."""
    gpu_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Layers on the GPU; `auto` is all that fit, 0 is none."""
    pooling: Literal["auto", "mean", "cls", "last", "rank"] = "auto"
    """How an embedding is made of a text's tokens; `auto` is what the file says. `rank` is a reranker's: a score for a
    query and a document (`POST /v1/rerank`) in place of embeddings."""
    prefix_cache_mb: Annotated[int, Field(ge=0, le=2**20)] = 256
    """RAM for what prompts had in common and no slot holds any more, in MiB; never more than a quarter of what the load
    leaves free. 0 reads every prompt from its first token."""
    prefix_cache_disk_mb: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Disk for what leaves that RAM and for all of it at an unload or an end, in MiB, so that a restarted node goes on
    where it was; in `prefixes` below DATA_DIR. It holds the tokens of prompts, readable by the node's user only. 0 is
    none."""
    draft_max: Annotated[int, Field(ge=0, le=15)] = 0
    """Tokens that are guessed ahead from what the text repeats and checked in one step, at most and only where it is
    faster; 15 suits extracts, rewrites and JSON. 0 never guesses. A request's `draft_max` goes before it."""
    queue_max_msgs: Annotated[int, Field(ge=1)] = 2000
    """Requests that may wait, over HTTP and NATS together; one more is refused with `queue_full`."""
    queue_max_age: Seconds = 86400.0
    """How long a durable request may wait; then it is answered with a 504 and kept as a dead letter."""
    ack_wait: Seconds = 10.0
    """After how long without a sign of life a durable request goes to another node."""
    max_deliver: Annotated[int, Field(ge=1)] = 5
    """How often a durable request is tried before it is a dead letter."""
    max_ack_pending: Annotated[int, Field(ge=1)] = 64
    """Durable requests that may be at work at once, over all nodes."""
    dedupe_window: Seconds = 600.0
    """How long a repeated `req_id` gets the same answer again."""
    stream_replicas: Annotated[int, Field(ge=1, le=5)] = 1
    """On how many servers of a NATS cluster the durable queue is kept; 3 outlive the loss of one. What a stream has
    already is never made less."""
    data_dir: str = "data"
    """Where MODEL_PATH and DB_PATH begin when they are not given."""
    db_path: str = ""
    """The model's audit file."""
    nats_url: str = ""
    """May repeat INFSVC_NATS_URL; another value is an error."""

    _file: str | None = PrivateAttr(None)
    _lines: dict[str, int] = PrivateAttr(default_factory=dict)

    @property
    def file(self) -> str | None:
        """The worker file that this was read from."""
        return self._file

    def wrong(self, key: str, message: str) -> ConfigError:
        """The error that says where `key` stands."""
        return ConfigError(message, file=self._file, line=self._lines.get(key.lower()), key=key)

    @field_validator("model_name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _NAME.match(value):
            raise ValueError("letters, digits, dots, dashes and underscores, at most 64")
        return value

    @field_validator("model_url")
    @classmethod
    def _safe_url(cls, value: str) -> str:
        parts = urlsplit(value)
        local = parts.scheme == "http" and is_loopback(parts.hostname or "")
        if value and not (parts.hostname and (parts.scheme == "https" or local)):
            raise ValueError("an address that begins with https:// (http:// on this machine only)")
        return value

    @model_validator(mode="before")
    @classmethod
    def _from_the_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("model_name"), str):
            return values
        name = values["model_name"]
        embedding = values.get("model_format") == "embedding"
        flat = re.sub(r"[^A-Za-z0-9]", "_", name)
        derived = {
            "model_path": f"{values.get('data_dir') or 'data'}/models/{name}/model.gguf",
            "db_path": f"{values.get('data_dir') or 'data'}/logs/{name}.sqlite",
            "subject": f"{'embedding' if embedding else 'inference'}.request.{name}",
            "stream_name": f"{'EMBEDDING' if embedding else 'INFERENCE'}_{flat.upper()}",
            "queue_durable": f"{flat}_workers",
            "queue_group": f"{flat}_workers",
        }
        return values | {key: value for key, value in derived.items() if not values.get(key)}

    @property
    def address(self) -> Address | None:
        return Address.parse(self.http_addr) if self.http_addr else None

    @property
    def embedding_subject(self) -> str:
        """The NATS subject that takes texts to embed: SUBJECT of an embedding model, one beside it of any other."""
        return subjects.request(self.model_name, embedding=True)

    @property
    def queue_subject(self) -> str:
        """Where JetStream publishers put this model's durable requests."""
        return subjects.queue(self.model_name, embedding=self.model_format == "embedding")


class NodeSettings(BaseSettings):
    """The node's own settings, from `INFSVC_…` in the environment."""

    model_config = SettingsConfigDict(env_prefix="INFSVC_", extra="ignore", frozen=True)

    names: ClassVar[frozenset[str]]

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: InitSettingsSource, **_: Any
    ) -> tuple[Any, ...]:
        return (init_settings,)  # what `load_node_settings` read, and no other environment

    bind: str = "127.0.0.1"
    """The host for every empty host in an address."""
    gateway: Annotated[str, BeforeValidator(_address_text)] = ":5780"
    """The address that serves every model."""
    nats_url: str = "nats://127.0.0.1:5700"
    """The broker, `nats://` or `tls://`; the servers of a cluster are separated by commas."""
    nats_user: str = ""
    """The user to log in as, with INFSVC_NATS_PASSWORD."""
    nats_password: str = Field(default="", repr=False)
    """The user's password."""
    nats_token: str = Field(default="", repr=False)
    """A token to log in with."""
    nats_creds: str = ""
    """A `.creds` file to log in with."""
    nats_nkey: str = ""
    """A file with the nkey seed of a user to log in as."""
    nats_ca: str = ""
    """A file of certificates that the broker's is checked against; the system's when not given."""
    nats_cert: str = ""
    """A certificate file to show the broker, with INFSVC_NATS_KEY."""
    nats_key: str = ""
    """That certificate's key file."""
    embedded_nats: Literal["auto", "off"] = "auto"
    """`auto` starts a broker when nothing listens at a single address of this machine; `off` never does."""
    api_keys: str = ""
    """Keys that HTTP clients must send, separated by commas; empty asks for none."""
    tls_cert: str = ""
    """A certificate file for https, with INFSVC_TLS_KEY."""
    tls_key: str = ""
    """The certificate's key file."""
    allow_open: bool = False
    """Whether a port may be open to other machines without keys."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least level that is logged."""
    memory_limit: Bytes | None = None
    """Memory for all models together, as 800M or 16G."""
    node: str = Field(default_factory=lambda: socket.gethostname().split(".")[0] or "node")
    """The node's name in logs, audit rows and on the bus; the host's when not given."""

    @property
    def gateway_address(self) -> Address:
        return Address.parse(self.gateway).bound(self.bind)

    @property
    def nats_login(self) -> NatsLogin:
        """The broker and who the node is there; `ConfigError` when the settings make no login."""
        fields = {name: getattr(self, f"nats_{name}") for name in SETTINGS if name != "url"}
        return NatsLogin.of(self.nats_url, **fields)

    @property
    def keys(self) -> tuple[str, ...]:
        """The API keys; none means that no key is asked for."""
        return tuple(key.strip() for key in self.api_keys.split(",") if key.strip())


NodeSettings.names = frozenset(f"INFSVC_{name.upper()}" for name in NodeSettings.model_fields) | {
    "INFSVC_HOME",
    "INFSVC_URL",  # the commands': which node they ask
}


def load_node_settings(environ: Mapping[str, str] = os.environ) -> NodeSettings:
    """Reads the node's settings; raises `ConfigError` for a bad value, an unknown name or an open door without keys."""
    for name in environ:
        if name.startswith("INFSVC_") and not name.startswith("INFSVC__") and name not in NodeSettings.names:
            raise ConfigError(f"unknown setting; there are: {', '.join(sorted(NodeSettings.names))}", key=name)
    values = {
        key: environ[f"INFSVC_{key.upper()}"]
        for key in NodeSettings.model_fields
        if environ.get(f"INFSVC_{key.upper()}")
    }
    try:
        settings = NodeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(_sentence(first), key=f"INFSVC_{str(first['loc'][0]).upper()}") from None
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("INFSVC_TLS_CERT and INFSVC_TLS_KEY go together", key="INFSVC_TLS_CERT")
    _ = settings.nats_login  # makes sense, or raises
    return settings


def check_open(settings: NodeSettings, host: str, *, key: str) -> None:
    """Refuses to listen beyond this machine without API keys, unless INFSVC_ALLOW_OPEN says so."""
    if not is_loopback(host) and not settings.keys and not settings.allow_open:
        raise ConfigError(
            f"{host} is reachable from other machines and INFSVC_API_KEYS is empty: "
            "set keys, or INFSVC_ALLOW_OPEN=true if that is meant",
            key=key,
        )


def _sentence(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return "unknown key"
    given = error["input"]
    return f"{message} (got {repr(shown(given)) if isinstance(given, str) else shown(repr(given))})"


def load_worker(name: str, path: Path, node: NodeSettings, environ: Mapping[str, str] = os.environ) -> WorkerSettings:
    """Reads one worker file.

    Args:
        name: the worker's name, the file name's middle.
        path: the file.
        node: for NATS_URL, which may only repeat the node's own.
        environ: where `INFSVC__<MODEL>__<KEY>` and bare keys are looked up.

    Raises:
        ConfigError: with file, line and key.
    """
    file = str(path)
    lines: dict[str, int] = {}
    values: dict[str, Any] = {}
    try:
        with path.open(encoding="utf-8") as stream:
            for binding in parse_stream(stream):
                # A binding begins with the blank lines before it.
                text = binding.original.string
                line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
                if binding.error:
                    raise ConfigError("not KEY=value", file=file, line=line)
                if binding.key is None:
                    continue
                key = binding.key.lower()
                if key not in WorkerSettings.model_fields:
                    raise ConfigError("unknown key", file=file, line=line, key=binding.key)
                if binding.value is None:
                    raise ConfigError("not KEY=value", file=file, line=line, key=binding.key)
                lines[key] = line
                if binding.value:
                    values[key] = binding.value
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=file) from None

    values.setdefault("model_name", name)
    prefix = _prefix(values["model_name"])
    for variable in environ:
        if variable.startswith(prefix) and variable.removeprefix(prefix).lower() not in WorkerSettings.model_fields:
            raise ConfigError("unknown key", key=variable)

    class Scoped(WorkerSettings):
        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], **_: Any
        ) -> tuple[Any, ...]:
            return (
                _Environment(settings_cls, prefix, environ),
                InitSettingsSource(settings_cls, values),
                _Environment(settings_cls, "", environ, leave_out=frozenset({"model_name"})),
            )

    try:
        settings: WorkerSettings = Scoped()
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        scoped = f"{prefix}{key.upper()}"
        if scoped in environ:
            raise ConfigError(_sentence(first), key=scoped) from None
        if key not in lines and key.upper() in environ:
            raise ConfigError(f"{_sentence(first)}, in the environment", key=key.upper()) from None
        raise ConfigError(_sentence(first), file=file, line=lines.get(key), key=key.upper()) from None
    settings._file, settings._lines = file, lines
    if bool(settings.model_repo) != bool(settings.model_file):
        raise settings.wrong(
            "MODEL_REPO" if settings.model_repo else "MODEL_FILE", "MODEL_REPO and MODEL_FILE go together"
        )
    if settings.prefix_cache_disk_mb and not settings.prefix_cache_mb:
        raise settings.wrong("PREFIX_CACHE_DISK_MB", "needs RAM to pass through: set PREFIX_CACHE_MB too")
    if settings.nats_url and settings.nats_url != node.nats_url:
        raise settings.wrong(
            "NATS_URL",
            # Without this one's own value: it may hold a password.
            f"the node talks to one broker, {node.nats_login.shown} (INFSVC_NATS_URL), and this names another",
        )
    return settings


def _prefix(model: str) -> str:
    """What the names of the environment's values for one model begin with."""
    return f"INFSVC__{re.sub(r'[.-]', '_', model).upper()}__"


class _Environment(EnvSettingsSource):
    """The environment's values under a prefix, from a given mapping."""

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        prefix: str,
        environ: Mapping[str, str],
        leave_out: frozenset[str] = frozenset(),
    ) -> None:
        self._given = {
            key.lower(): value
            for key, value in environ.items()
            if value and key.removeprefix(prefix).lower() not in leave_out
        }
        super().__init__(settings_cls, env_prefix=prefix, case_sensitive=False)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._given


def load_workers(home: Home, node: NodeSettings, environ: Mapping[str, str] = os.environ) -> dict[str, WorkerSettings]:
    """All worker files by model name, as `load_worker` reads them. Two files with one MODEL_NAME are an error, and so
    is a variable for a model that no file names."""
    found: dict[str, WorkerSettings] = {}
    for name, path in home.worker_files().items():
        settings = load_worker(name, path, node, environ)
        if settings.model_name in found:
            raise settings.wrong("MODEL_NAME", f"{settings.model_name} is named by another worker file too")
        found[settings.model_name] = settings
    prefixes = tuple(_prefix(name) for name in found)
    for variable in environ:
        if variable.startswith("INFSVC__") and not variable.startswith(prefixes):
            raise ConfigError(f"no worker file names this model; there are: {', '.join(found)}", key=variable)
    return found


def check_ports(chosen: list[WorkerSettings], node: NodeSettings) -> None:
    """Raises `ConfigError` when two of the chosen models, or one and the gateway, want one port."""
    taken = {node.gateway_address.port: "the gateway"}
    for worker in chosen:
        if worker.address is None or worker.address.port == 0:
            continue
        if worker.address.port in taken:
            raise worker.wrong(
                "HTTP_ADDR",
                f"{worker.model_name} and {taken[worker.address.port]} both want port {worker.address.port}",
            )
        taken[worker.address.port] = worker.model_name
