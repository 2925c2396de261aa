"""Each rule of the configuration: who beats whom, and that a wrong word names its file, line and key before anything
starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infsvc.errors import ConfigError, shown
from infsvc.home import Home
from infsvc.settings import (
    Address,
    NodeSettings,
    WorkerSettings,
    check_open,
    check_ports,
    is_loopback,
    load_node_settings,
    load_worker,
    load_workers,
)

NODE = load_node_settings({})
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a worker file and gives its path."""

    def write(text: str, name: str = "m") -> Path:
        path = tmp_path / "envs" / f"worker.{name}.env"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def load(path: Path, environ: dict[str, str] | None = None) -> WorkerSettings:
    return load_worker(path.name.removeprefix("worker.").removesuffix(".env"), path, NODE, environ or {})


# -- precedence ----------------------------------------------------------------------------------------------------


def test_an_empty_file_has_the_documented_defaults(write: Write) -> None:
    worker = load(write("", "my-model.v1"))
    assert worker.model_dump() == {
        "model_name": "my-model.v1",
        "model_url": "",
        "model_repo": "",
        "model_file": "",
        "model_sha256": "",
        "model_path": "data/models/my-model.v1/model.gguf",
        "model_format": "auto",
        "http_addr": "",
        "subject": "inference.request.my-model.v1",
        "stream_name": "INFERENCE_MY_MODEL_V1",
        "queue_durable": "my_model_v1_workers",
        "queue_group": "my_model_v1_workers",
        "response_prefix": "inference.reply",
        "monitoring_topic": "monitoring.inference",
        "backpressure_threshold": 5,
        "harmony_reasoning_level": "medium",
        "harmony_extract_final": True,
        "harmony_model_identity": "ChatGPT, a large language model trained by OpenAI",
        "harmony_knowledge_cutoff": "2024-06",
        "worker_concurrency": 4,
        "ctx_size": 4096,
        "model_threads": 0,
        "engine_isolation": "thread",
        "gpu_layers": "auto",
        "pooling": "auto",
        "prefix_cache_mb": 256,
        "prefix_cache_disk_mb": 0,
        "draft_max": 0,
        "queue_max_msgs": 2000,
        "queue_max_age": 86400.0,
        "ack_wait": 10.0,
        "max_deliver": 5,
        "max_ack_pending": 64,
        "dedupe_window": 600.0,
        "stream_replicas": 1,
        "data_dir": "data",
        "db_path": "data/logs/my-model.v1.sqlite",
        "nats_url": "",
    }


def test_the_file_beats_a_bare_name_and_a_scoped_name_beats_the_file(write: Write) -> None:
    path = write("MODEL_NAME=a.b-c\nCTX_SIZE=100\n")
    assert load(path, {}).ctx_size == 100
    assert load(path, {"CTX_SIZE": "200", "MODEL_THREADS": "3"}).model_dump(include={"ctx_size", "model_threads"}) == {
        "ctx_size": 100,
        "model_threads": 3,
    }
    assert load(path, {"CTX_SIZE": "200", "INFSVC__A_B_C__CTX_SIZE": "300"}).ctx_size == 300
    assert load(path, {"INFSVC__OTHER__CTX_SIZE": "300"}).ctx_size == 100


def test_a_bare_model_name_never_renames_a_file(write: Write) -> None:
    assert load(write(""), {"MODEL_NAME": "other"}).model_name == "m"


def test_an_empty_value_counts_as_none(write: Write) -> None:
    worker = load(write("CTX_SIZE=\nSUBJECT=\n"), {"MODEL_THREADS": "", "INFSVC__M__ACK_WAIT": ""})
    assert (worker.ctx_size, worker.subject, worker.model_threads, worker.ack_wait) == (
        4096,
        "inference.request.m",
        0,
        10.0,
    )


def test_the_process_environment_is_not_read_behind_the_back(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTX_SIZE", "77")
    monkeypatch.setenv("INFSVC_NODE", "elsewhere")
    monkeypatch.setenv("INFSVC_GATEWAY", ":1")
    assert load(write("")).ctx_size == 4096
    assert load_node_settings({"INFSVC_NODE": "x"}).gateway == ":5780"


def test_names_follow_the_format_and_the_data_folder(write: Write) -> None:
    worker = load(write("MODEL_FORMAT=embedding\nDATA_DIR=/srv/d\nMODEL_NAME=e-1.5\n"))
    assert worker.subject == "embedding.request.e-1.5"
    assert worker.stream_name == "EMBEDDING_E_1_5"
    assert worker.model_path == "/srv/d/models/e-1.5/model.gguf"
    assert worker.db_path == "/srv/d/logs/e-1.5.sqlite"
    worker = load(write("SUBJECT=s.t\nDB_PATH=x.sqlite\nMODEL_PATH=y.gguf\nQUEUE_GROUP=g\n"))
    assert (worker.subject, worker.db_path, worker.model_path, worker.queue_group) == ("s.t", "x.sqlite", "y.gguf", "g")


def test_the_forms_a_line_may_have(write: Write) -> None:
    text = "\ufeff# a comment\n\nexport CTX_SIZE=1 # and why\nSUBJECT='a b'\nDATA_DIR=\"d\"\nmodel_threads = 2\n"
    worker = load(write(text))
    assert (worker.ctx_size, worker.subject, worker.data_dir, worker.model_threads) == (1, "a b", "d", 2)


# -- wrong words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "says"),
    [
        ("CTX_SIZE=1\nCTX_SIZ=2\n", 2, "CTX_SIZ", "unknown key"),
        ("# one\n\n\nCTX_SIZ=2\n", 4, "CTX_SIZ", "unknown key"),
        ("\n\nCTX_SIZE=many\n", 3, "CTX_SIZE", "Input should be a valid integer, unable to parse string as an integer"),
        ("CTX_SIZE=-1\n", 1, "CTX_SIZE", "Input should be greater than or equal to 0"),
        ("CTX_SIZE=99999999\n", 1, "CTX_SIZE", "Input should be less than or equal to 16777216"),
        ("WORKER_CONCURRENCY=0\n", 1, "WORKER_CONCURRENCY", "Input should be greater than or equal to 1"),
        ("PREFIX_CACHE_MB=-1\n", 1, "PREFIX_CACHE_MB", "Input should be greater than or equal to 0"),
        ("PREFIX_CACHE_DISK_MB=-1\n", 1, "PREFIX_CACHE_DISK_MB", "Input should be greater than or equal to 0"),
        (
            "PREFIX_CACHE_DISK_MB=64\nPREFIX_CACHE_MB=0\n",
            1,
            "PREFIX_CACHE_DISK_MB",
            "needs RAM to pass through: set PREFIX_CACHE_MB too",
        ),
        ("DRAFT_MAX=16\n", 1, "DRAFT_MAX", "Input should be less than or equal to 15"),
        ("WORKER_CONCURRENCY=65\n", 1, "WORKER_CONCURRENCY", "Input should be less than or equal to 64"),
        (
            "WORKER_CONCURRENCY=1.5\n",
            1,
            "WORKER_CONCURRENCY",
            "Input should be a valid integer, unable to parse string as an integer",
        ),
        (
            f"CTX_SIZE={'9' * 5000}\n",
            1,
            "CTX_SIZE",
            f"Unable to parse input string as an integer, exceeded maximum size (got '{'9' * 119}…')",
        ),
        ("MODEL_FORMAT=chatml\n", 1, "MODEL_FORMAT", "Input should be 'auto', 'template', 'harmony' or 'embedding'"),
        ("POOLING=max\n", 1, "POOLING", "Input should be 'auto', 'mean', 'cls', 'last' or 'rank'"),
        ("GPU_LAYERS=some\n", 1, "GPU_LAYERS", "Input should be a valid integer, unable to parse string as an integer"),
        ("GPU_LAYERS=-1\n", 1, "GPU_LAYERS", "Input should be greater than or equal to 0"),
        ("MODEL_SHA256=abc\n", 1, "MODEL_SHA256", "String should match pattern '^([0-9a-fA-F]{64})?$'"),
        (
            "MODEL_URL=example.com/model.gguf\n",
            1,
            "MODEL_URL",
            "an address that begins with https:// (http:// on this machine only)",
        ),
        (
            "MODEL_URL=http://example.com/model.gguf\n",
            1,
            "MODEL_URL",
            "an address that begins with https:// (http:// on this machine only)",
        ),
        (
            "MODEL_URL=file:///etc/passwd\n",
            1,
            "MODEL_URL",
            "an address that begins with https:// (http:// on this machine only)",
        ),
        ("\nMODEL_REPO=owner/name\n", 2, "MODEL_REPO", "MODEL_REPO and MODEL_FILE go together"),
        ("MODEL_FILE=model.gguf\n", 1, "MODEL_FILE", "MODEL_REPO and MODEL_FILE go together"),
        ("MODEL_NAME=a b\n", 1, "MODEL_NAME", "letters, digits, dots, dashes and underscores, at most 64"),
        ("MODEL_NAME=../evil\n", 1, "MODEL_NAME", "letters, digits, dots, dashes and underscores, at most 64"),
        ("MODEL_NAME=" + "x" * 65 + "\n", 1, "MODEL_NAME", "letters, digits, dots, dashes and underscores, at most 64"),
        ("HTTP_ADDR=5770\n", 1, "HTTP_ADDR", "host:port or :port"),
        ("HTTP_ADDR=:port\n", 1, "HTTP_ADDR", "host:port or :port"),
        ("HTTP_ADDR=:70000\n", 1, "HTTP_ADDR", "host:port or :port"),
        ("ACK_WAIT=soon\n", 1, "ACK_WAIT", "a duration such as 10s, 10m or 24h"),
        ("ACK_WAIT=0s\n", 1, "ACK_WAIT", "Input should be greater than 0"),
        ("ACK_WAIT=" + "9" * 400 + "\n", 1, "ACK_WAIT", "Input should be a finite number"),
        ("QUEUE_MAX_MSGS=0\n", 1, "QUEUE_MAX_MSGS", "Input should be greater than or equal to 1"),
        ("BACKPRESSURE_THRESHOLD=0\n", 1, "BACKPRESSURE_THRESHOLD", "Input should be greater than or equal to 1"),
        (
            "HARMONY_EXTRACT_FINAL=perhaps\n",
            1,
            "HARMONY_EXTRACT_FINAL",
            "Input should be a valid boolean, unable to interpret input",
        ),
        ("HARMONY_REASONING_LEVEL=most\n", 1, "HARMONY_REASONING_LEVEL", "Input should be 'low', 'medium' or 'high'"),
        (
            "NATS_URL=nats://elsewhere:4222\n",
            1,
            "NATS_URL",
            "the node talks to one broker, nats://127.0.0.1:5700 (INFSVC_NATS_URL), and this names another",
        ),
        ("CTX_SIZE\n", 1, "CTX_SIZE", "not KEY=value"),
    ],
)
def test_a_wrong_word_names_file_line_and_key(write: Write, text: str, line: int, key: str, says: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    error = caught.value
    assert (error.file, error.line, error.key) == (str(path), line, key)
    value = text.strip().splitlines()[-1].partition("=")[2]
    told = str(error).removeprefix(f"{path}:{line}: {key}: ")
    assert told in (says, f"{says} (got {shown(value)!r})")


def test_a_line_that_is_none_names_file_and_line(write: Write) -> None:
    path = write("CTX_SIZE=5\n\n= what\n")
    with pytest.raises(ConfigError, match=r"worker\.m\.env:3: not KEY=value"):
        load(path)


def test_a_wrong_word_in_the_environment_names_the_variable(write: Write) -> None:
    path = write("")
    with pytest.raises(ConfigError, match=r"^INFSVC__M__CTX_SIZE: ") as caught:
        load(path, {"INFSVC__M__CTX_SIZE": "many"})
    assert caught.value.file is None
    with pytest.raises(ConfigError, match=r"^INFSVC__M__CTX_SIZ: unknown key"):
        load(path, {"INFSVC__M__CTX_SIZ": "5"})
    with pytest.raises(ConfigError, match=r"^MODEL_THREADS: .*in the environment") as caught:
        load(path, {"MODEL_THREADS": "many"})
    assert caught.value.file is None


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "worker.m.env").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "worker.m.env")
    (tmp_path / "worker.n.env").write_bytes(b"CTX_SIZE=\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "worker.n.env")


def test_the_nodes_own_broker_may_be_named(write: Write) -> None:
    assert load(write(f"NATS_URL={NODE.nats_url}\n")).nats_url == NODE.nats_url


# -- durations, sizes, addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 10),
        ("10s", 10),
        ("250ms", 0.25),
        ("10m", 600),
        ("24h", 86400),
        ("1.5h", 5400),
        ("2d", 172800),
        (" 5 s ", 5),
    ],
)
def test_durations(write: Write, text: str, seconds: float) -> None:
    assert load(write(f'ACK_WAIT="{text}"\n')).ack_wait == seconds


@pytest.mark.parametrize("text", ["", "s", "10 apples", "-5s", "1h30m", "nan", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|ack_wait"):
        WorkerSettings(model_name="m", ack_wait=text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("800M", 800 * 2**20),
        ("16G", 2**34),
        ("16GiB", 2**34),
        ("16gb", 2**34),
        ("1.5K", 1536),
        ("1T", 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert load_node_settings({"INFSVC_MEMORY_LIMIT": text}).memory_limit == size


@pytest.mark.parametrize("text", ["many", "-1G", "0", "9" * 400, "9" * 30 + "G", "5X", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="INFSVC_MEMORY_LIMIT"):
        load_node_settings({"INFSVC_MEMORY_LIMIT": text})


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        (":5770", "", 5770, ":5770"),
        ("127.0.0.1:80", "127.0.0.1", 80, "127.0.0.1:80"),
        ("[::1]:80", "::1", 80, "[::1]:80"),
        ("name:0", "name", 0, "name:0"),
    ],
)
def test_addresses(text: str, host: str, port: int, shown: str) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, shown)
    assert address.bound("0.0.0.0").host == (host or "0.0.0.0")


# -- the node's own ------------------------------------------------------------------------------------------------


def test_the_nodes_defaults() -> None:
    assert NODE.model_dump(exclude={"node"}) == {
        "bind": "127.0.0.1",
        "gateway": ":5780",
        "nats_url": "nats://127.0.0.1:5700",
        "nats_user": "",
        "nats_password": "",
        "nats_token": "",
        "nats_creds": "",
        "nats_nkey": "",
        "nats_ca": "",
        "nats_cert": "",
        "nats_key": "",
        "embedded_nats": "auto",
        "api_keys": "",
        "tls_cert": "",
        "tls_key": "",
        "allow_open": False,
        "log_level": "info",
        "memory_limit": None,
    }
    assert NODE.node
    assert str(NODE.gateway_address) == "127.0.0.1:5780"


def test_the_node_from_the_environment() -> None:
    node = load_node_settings(
        {
            "INFSVC_BIND": "0.0.0.0",
            "INFSVC_GATEWAY": "[::1]:9",
            "INFSVC_API_KEYS": " one, two ,,",
            "INFSVC_ALLOW_OPEN": "true",
            "INFSVC_NODE": "rack-1",
            "INFSVC_LOG_LEVEL": "",
            "INFSVC_HOME": "/x",
            "INFSVC__M__CTX_SIZE": "5",
            "PATH": "/bin",
        }
    )
    assert (node.keys, node.allow_open, node.node, node.log_level) == (("one", "two"), True, "rack-1", "info")
    assert str(node.gateway_address) == "[::1]:9"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INFSVC_GATWAY", ":5"),
        ("INFSVC_GATEWAY", "5"),
        ("INFSVC_LOG_LEVEL", "loud"),
        ("INFSVC_ALLOW_OPEN", "perhaps"),
        ("INFSVC_EMBEDDED_NATS", "on"),
        ("INFSVC_TLS_CERT", "cert.pem"),
    ],
)
def test_a_wrong_node_setting_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        load_node_settings({name: value})
    assert caught.value.key == name


def test_an_open_door_needs_keys() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is reachable from other machines") as caught:
        check_open(NODE, "0.0.0.0", key="INFSVC_BIND")
    assert caught.value.key == "INFSVC_BIND"
    check_open(NODE, "127.0.0.1", key="INFSVC_BIND")
    for settings in ({"INFSVC_API_KEYS": "k"}, {"INFSVC_ALLOW_OPEN": "1"}):
        check_open(load_node_settings(settings), "::", key="INFSVC_BIND")
    with pytest.raises(ConfigError):
        check_open(load_node_settings({"INFSVC_API_KEYS": " , "}), "::", key="INFSVC_BIND")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# -- several files -------------------------------------------------------------------------------------------------


def home(tmp_path: Path) -> Home:
    return Home(tmp_path, tmp_path)


def test_two_models_on_one_port_are_an_error_that_names_the_line(write: Write, tmp_path: Path) -> None:
    write("HTTP_ADDR=:5001\n", "a")
    path = write("\nHTTP_ADDR=127.0.0.1:5001\n", "b")
    workers = load_workers(home(tmp_path), NODE, {})
    check_ports([workers["a"]], NODE)
    check_ports([workers["b"]], NODE)
    with pytest.raises(ConfigError, match="b and a both want port 5001") as caught:
        check_ports(list(workers.values()), NODE)
    assert (caught.value.file, caught.value.line, caught.value.key) == (str(path), 2, "HTTP_ADDR")


def test_a_model_on_the_gateways_port_is_an_error(write: Write, tmp_path: Path) -> None:
    write("HTTP_ADDR=:5780\n", "a")
    with pytest.raises(ConfigError, match="a and the gateway both want port 5780"):
        check_ports(list(load_workers(home(tmp_path), NODE, {}).values()), NODE)


def test_any_free_port_is_never_taken(write: Write, tmp_path: Path) -> None:
    write("HTTP_ADDR=:0\n", "a")
    write("HTTP_ADDR=:0\n", "b")
    write("", "c")
    check_ports(list(load_workers(home(tmp_path), NODE, {}).values()), load_node_settings({"INFSVC_GATEWAY": ":0"}))


def test_one_name_in_two_files_is_an_error(write: Write, tmp_path: Path) -> None:
    write("", "a")
    path = write("MODEL_NAME=a\n", "b")
    with pytest.raises(ConfigError, match="a is named by another worker file too") as caught:
        load_workers(home(tmp_path), NODE, {})
    assert (caught.value.file, caught.value.line) == (str(path), 1)


def test_a_variable_for_a_model_that_is_not_there_is_an_error(write: Write, tmp_path: Path) -> None:
    write("", "a.b")
    load_workers(home(tmp_path), NODE, {"INFSVC__A_B__CTX_SIZE": "5"})
    with pytest.raises(ConfigError, match=r"^INFSVC__AB__CTX_SIZE: .*there are: a\.b"):
        load_workers(home(tmp_path), NODE, {"INFSVC__AB__CTX_SIZE": "5"})


SHIPPED = {
    "demo": (5769, "", "", "template", 1024, 5),
    "gemma3-270m": (
        5770,
        "bartowski/google_gemma-3-270m-it-GGUF",
        "google_gemma-3-270m-it-Q4_K_M.gguf",
        "template",
        8192,
        5,
    ),
    "qwen3-4b": (5771, "bartowski/Qwen_Qwen3-4B-GGUF", "Qwen_Qwen3-4B-Q4_K_M.gguf", "template", 4096, 3),
    "gpt-oss-20b": (5772, "bartowski/openai_gpt-oss-20b-GGUF", "openai_gpt-oss-20b-MXFP4.gguf", "harmony", 8192, 2),
    "nomic-embed-v1.5": (
        5778,
        "nomic-ai/nomic-embed-text-v1.5-GGUF",
        "nomic-embed-text-v1.5.f16.gguf",
        "embedding",
        2048,
        5,
    ),
    "nomic-embed-v2-moe": (
        5779,
        "nomic-ai/nomic-embed-text-v2-moe-GGUF",
        "nomic-embed-text-v2-moe.f16.gguf",
        "embedding",
        512,
        3,
    ),
}


def test_the_files_that_ship_are_the_contracts_table() -> None:
    root = Path(__file__).parents[2]
    workers = load_workers(Home(root / "nowhere", root), NODE, {})
    assert {
        name: (
            worker.address.port if worker.address else 0,
            worker.model_repo,
            worker.model_file,
            worker.model_format,
            worker.ctx_size,
            worker.backpressure_threshold,
        )
        for name, worker in workers.items()
    } == SHIPPED
    check_ports(list(workers.values()), NODE)
    assert workers["demo"].worker_concurrency == 8
    for name, worker in workers.items():
        kind = "embedding" if worker.model_format == "embedding" else "inference"
        assert worker.subject == f"{kind}.request.{name}"
        assert worker.response_prefix == f"{kind}.reply"
        assert worker.monitoring_topic == f"monitoring.{kind}"
        assert worker.stream_name.startswith(kind.upper())


def test_the_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        WorkerSettings(model_name="m").ctx_size = 5
    with pytest.raises(ValueError, match="frozen"):
        NodeSettings().bind = "x"
