"""Where a model's file comes from: MODEL_REPO and MODEL_FILE on a hub, or any MODEL_URL; and what its server's refusals
mean for the user.

Apart from `engine.download` because this knows hubs, and that knows bytes. The environment (HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE) is read when a download begins. A token goes to the hub alone, never into a sentence or a log, and no
more does the query of an address, where others keep theirs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from infsvc.errors import DownloadError
from infsvc.settings import WorkerSettings, is_loopback

_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_TRUE = ("1", "on", "yes", "true")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """A file on a server.

    Attributes:
        url: where it is asked for; on a hub this answers with a redirect to where it lies.
        shown: the same for people: `repo · file`, or the address without user and query.
        sha256: what the worker file says the content is, or "".
        repo: the hub's repository, or "" for a plain address.
        page: where a person reads of that repository.
        token: sent to the hub, or "".
        anyhow: whether plain http is allowed on the way, as it is in `url` itself.
    """

    url: str
    shown: str
    sha256: str = ""
    repo: str = ""
    page: str = ""
    token: str = ""
    anyhow: bool = False

    def __repr__(self) -> str:
        return f"Source({self.shown})"

    @property
    def on_hub(self) -> bool:
        return bool(self.repo)


@dataclass(frozen=True)
class RemoteFile:
    """What a hub says of a file before it is fetched; None where it does not say."""

    total_bytes: int | None
    etag: str | None

    @property
    def sha256(self) -> str | None:
        """The content's hash: large files carry it as their etag."""
        return self.etag if self.etag and _SHA256.fullmatch(self.etag) else None


def describe(settings: WorkerSettings) -> str:
    """The source as people read it, or "" when the worker file names none. MODEL_URL beats MODEL_REPO."""
    if settings.model_url:
        return shown_url(settings.model_url)
    return f"{settings.model_repo} · {settings.model_file}" if settings.model_repo and settings.model_file else ""


def shown_url(url: str) -> str:
    """An address without user, password and query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"


def source_of(settings: WorkerSettings, environ: Mapping[str, str] = os.environ) -> Source | None:
    """The worker file's source, or None. Imports huggingface_hub (a quarter of a second): not on the loop.

    Raises:
        DownloadError: it cannot be used as it stands.
    """
    sha256 = settings.model_sha256.lower()
    shown = describe(settings)
    if not shown:
        return None
    named = settings.model_url or settings.model_file
    if _SPLIT.search(urlsplit(named).path):
        raise DownloadError(f"{shown} is one part of a split model, and those are not served by this version")
    if settings.model_url:
        return Source(settings.model_url, shown, sha256, anyhow=settings.model_url.startswith("http:"))
    if environ.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE:
        raise DownloadError(
            f"{shown} is not on this disk and HF_HUB_OFFLINE is set: unset it, or put the file at "
            f"{settings.model_path} yourself"
        )
    from huggingface_hub import get_token, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    endpoint = environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"
    if not endpoint.startswith(("https://", "http://")):
        raise DownloadError("HF_ENDPOINT is no address that begins with https://: mend or unset it")
    try:
        url = hf_hub_url(settings.model_repo, settings.model_file, endpoint=endpoint)
    except HFValidationError:
        raise DownloadError(f"{settings.model_repo} is no name of a repository: MODEL_REPO is owner/name") from None
    return Source(
        url,
        shown,
        sha256,
        repo=settings.model_repo,
        page=f"{endpoint}/{settings.model_repo}",
        token=get_token() or "",
        anyhow=endpoint.startswith("http:"),
    )


def may_ask(url: str, *, anyhow: bool) -> bool:
    """Whether a request may go to `url`: https, or plain http to this machine or where plain http was asked for."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and (anyhow or is_loopback(parts.hostname or "")))


def refusal(source: Source, status: int, headers: Mapping[str, str]) -> DownloadError:
    """A final answer other than the file, in words that say what to do."""
    shown = source.shown
    if not source.on_hub:
        told = {
            401: "it asks for a login: fetch the file yourself, or use an address that needs none",
            403: "access is refused: the address may have run out, or need a login",
            404: "there is no such file: check MODEL_URL",
            410: "the file is gone: check MODEL_URL",
        }.get(status, "check MODEL_URL")
        return DownloadError(f"{shown} answered {status}: {told}")
    word = headers.get("x-error-code", "")
    if word == "GatedRepo":
        then = "the account of HF_TOKEN has not done so" if source.token else "and set HF_TOKEN"
        return DownloadError(f"{source.repo} is gated ({status}): accept its terms at {source.page}, {then}")
    if word == "RepoNotFound" or (status == 404 and not word):
        login = "the token cannot see it" if source.token else "it is private and needs HF_TOKEN"
        return DownloadError(f"there is no {shown} ({status}), or {login}: check MODEL_REPO and MODEL_FILE")
    if status == 404:
        return DownloadError(f"{source.repo} has no such file ({shown}): {source.page}/tree/main lists what it has")
    if status in (401, 403):
        told = "HF_TOKEN is not accepted" if source.token else "set HF_TOKEN"
        return DownloadError(f"{shown} asks for a login ({status}): {told}; its page is {source.page}")
    return DownloadError(f"{shown} answered {status}: see {source.page}")
