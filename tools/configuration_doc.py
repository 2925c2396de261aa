"""Writes `docs/configuration.md` from the settings types: `python tools/configuration_doc.py`. A test holds the two
together."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pydantic import BaseModel

from infsvc import settings
from infsvc.settings import NodeSettings, WorkerSettings

TARGET = Path(__file__).resolve().parent.parent / "docs/configuration.md"

_DERIVED = {
    "model_path": "data/models/\\<m>/model.gguf",
    "db_path": "data/logs/\\<m>.sqlite",
    "subject": "inference.request.\\<m>, embedding.request.\\<m>",
    "stream_name": "from the name",
    "queue_durable": "from the name",
    "queue_group": "from the name",
    "node": "the host's name",
    "model_name": "the file's name",
}

_UNITS = (("h", 3600), ("m", 60), ("s", 1))

_HEAD = """# Configuration

Every key, its range and its default. This page is made from the settings types: `python tools/configuration_doc.py`.

A model is one worker file, `envs/worker.<name>.env`, looked up in the home and then in what ships. A value in the file
beats a bare name in the environment; `INFSVC__<MODEL>__<KEY>` (dots and dashes as `_`) beats the file. An unknown key
or a value of the wrong type or range is an error with file, line and key, before anything starts. A running node reads
a worker file that is new or has changed when its model is loaded the next time.
"""


def described(model: type[BaseModel]) -> dict[str, str]:
    """The sentence under each field of a settings class."""
    tree = ast.parse(inspect.getsource(settings))
    body = next(each.body for each in tree.body if isinstance(each, ast.ClassDef) and each.name == model.__name__)
    found: dict[str, str] = {}
    for field, after in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def _range(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(part for each in schema["anyOf"] if (part := _range(each)))
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{low} to {high}"
    if low is not None:
        return f"from {low}"
    if schema.get("type") == "number":
        return "a duration: seconds, or with ms, s, m, h, d"
    if "gt" in schema:
        return "a size: bytes, or with K, M, G, T"
    return {"boolean": "true, false", "string": "text"}.get(str(schema.get("type")), "")


def _table(model: type[BaseModel], prefix: str) -> list[str]:
    sentences = described(model)
    properties = model.model_json_schema()["properties"]
    lines = ["| key | default | values | what |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = _DERIVED.get(name)
        if default is None:
            value = field.default
            if isinstance(value, float):
                value = next(f"{value / n:g}{unit}" for unit, n in _UNITS if value >= n)
            text = str(value).lower() if isinstance(value, bool) else str(value)
            default = "–" if value in ("", None) else text
        lines.append(f"| {prefix}{name.upper()} | {default} | {_range(properties[name])} | {sentences[name]} |")
    return lines


def page() -> str:
    """The whole page."""
    parts = [
        _HEAD,
        "## A model's worker file\n",
        *_table(WorkerSettings, ""),
        "\n## The node, from the environment\n",
        "`INFSVC_HOME` names the home folder; else it is the checkout, else the user's data folder.\n"
        "`INFSVC_URL` is for commands: the node that `infsvc chat`, `embed`, `status`, `queue` and `dashboard` ask\n"
        "when it is not the one that runs on this home; `--url` goes before it.\n",
        *_table(NodeSettings, "INFSVC_"),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page())
