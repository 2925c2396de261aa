"""A model's file over real HTTP: resumed, verified, stopped, and every way its server can fail."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import download
from engine.download import Download, Fetched, Patience, Progress
from engine.model_file import part_of
from engine.model_source import source_of
from infsvc.errors import DiskFull, DownloadError, DownloadStopped, NoSource
from infsvc.settings import WorkerSettings
from tests.fake_hub import FILE, REPO, FakeHub

CONTENT = b"GGUF" + bytes(range(256)) * 4096
QUICK = Patience(connect_s=5, stall_s=0.3, first_wait_s=0.001, max_wait_s=0.002, n_tries=3)


@pytest.fixture
def hub(make_hub: Callable[[bytes], FakeHub]) -> FakeHub:
    return make_hub(CONTENT)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models/tiny/model.gguf"


class Notes:
    """What a download told while it ran."""

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.notes: list[tuple[str, str, str]] = []
        self.moved = threading.Event()

    def on_progress(self, progress: Progress) -> None:
        self.progress.append(progress)
        self.moved.set()

    def on_note(self, *note: str) -> None:
        self.notes.append(note)  # type: ignore[arg-type]


def from_hub(target: Path, notes: Notes | None = None, patience: Patience = QUICK, **keys: Any) -> Download:
    settings = WorkerSettings(**{"model_name": "tiny", "model_repo": REPO, "model_file": FILE} | keys)
    notes = notes or Notes()
    return Download(settings, target, on_progress=notes.on_progress, on_note=notes.on_note, patience=patience)


def from_url(target: Path, hub: FakeHub, **keys: Any) -> Download:
    return from_hub(target, model_repo="", model_file="", model_url=hub.file_url, **keys)


def fetch(each: Download) -> Fetched:
    each.start()
    try:
        return each.done.result(30)
    finally:
        assert each.join(5)


def refused(each: Download) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch(each)
    assert not each.target.exists()
    return str(caught.value)


def kept(target: Path) -> bytes:
    return part_of(target).read_bytes() if part_of(target).exists() else b""


def until_kept(target: Path, n_bytes: int) -> None:
    """Waits until so much lies on the disk; a file has no event for that."""
    deadline = time.monotonic() + 20
    while len(kept(target)) < n_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_file_of_a_repository_arrives_verified_and_leaves_nothing_beside_it(hub: FakeHub, target: Path) -> None:
    notes = Notes()
    fetched = fetch(from_hub(target, notes))
    assert target.read_bytes() == CONTENT
    assert (fetched.total_bytes, fetched.resumed_bytes, fetched.verified) == (len(CONTENT), 0, "sha256")
    assert sorted(path.name for path in target.parent.iterdir() if not path.name.startswith(".")) == ["model.gguf"]
    assert hub.n_body_bytes == len(CONTENT)
    assert notes.progress[-1].verifying
    assert [each.done_bytes for each in notes.progress if not each.verifying][-1] == len(CONTENT)
    assert all(each.total_bytes == len(CONTENT) for each in notes.progress)
    assert notes.notes == []


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(
    hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(from_hub(target))
    shown = {(each.host.partition(":")[0], each.authorization) for each in hub.asked}
    assert shown == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_a_renamed_repository_is_followed(hub: FakeHub, target: Path) -> None:
    fetch(from_hub(target, model_repo="owner/old-name"))
    assert target.read_bytes() == CONTENT


def test_truncated_bodies_are_resumed_where_they_ended(hub: FakeHub, target: Path) -> None:
    hub.truncate_at = [100_000, 200_000, 300_000, 1]
    notes = Notes()
    fetch(from_hub(target, notes))
    assert target.read_bytes() == CONTENT
    assert [each.range for each in hub.bodies] == [
        None, "bytes=100000-", "bytes=300000-", "bytes=600000-", "bytes=600001-",
    ]  # fmt: skip
    assert hub.n_body_bytes == len(CONTENT)
    assert [code for _, code, _ in notes.notes] == ["model.download_retry"] * 4


def test_a_body_without_a_length_that_ends_early_is_resumed(hub: FakeHub, target: Path) -> None:
    hub.lengths, hub.truncate_at = False, [70_000]
    fetch(from_hub(target))
    assert target.read_bytes() == CONTENT


def test_a_stalled_body_is_given_up_and_resumed(hub: FakeHub, target: Path) -> None:
    hub.stall_at = 100_000
    fetch(from_hub(target))
    assert target.read_bytes() == CONTENT
    assert hub.bodies[1].range == "bytes=100000-"


def test_a_restart_goes_on_where_the_stop_was(hub: FakeHub, target: Path) -> None:
    hub.stall_at = 300_000
    first = from_hub(target, patience=Patience())
    first.start()
    assert hub.stalled.wait(10)
    until_kept(target, 200_000)
    first.stop()
    with pytest.raises(DownloadStopped):
        first.done.result(5)
    assert first.join(5)
    first.stop()
    had = kept(target)
    assert CONTENT.startswith(had)
    hub.n_body_bytes = 0
    fetched = fetch(from_hub(target))
    assert (fetched.resumed_bytes, hub.n_body_bytes) == (len(had), len(CONTENT) - len(had))
    assert target.read_bytes() == CONTENT


CHILD = """
import sys
from pathlib import Path
from engine.download import Download
from infsvc.settings import WorkerSettings
Download(WorkerSettings(model_name="tiny", model_repo=sys.argv[1], model_file=sys.argv[2]), Path(sys.argv[3]))._run()
"""


def test_kill_9_in_mid_file_costs_only_what_had_not_come(hub: FakeHub, target: Path) -> None:
    hub.stall_at = 500_000
    child = subprocess.Popen([sys.executable, "-c", CHILD, REPO, FILE, str(target)], env=os.environ | {"HF_TOKEN": ""})
    assert hub.stalled.wait(30)
    until_kept(target, 400_000)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = len(kept(target))
    hub.n_body_bytes = 0
    assert fetch(from_hub(target)).resumed_bytes == had
    assert hub.n_body_bytes == len(CONTENT) - had
    assert target.read_bytes() == CONTENT


def test_a_server_that_ignores_ranges_begins_anew(hub: FakeHub, target: Path) -> None:
    hub.ignore_range, hub.truncate_at = True, [600_000]
    fetch(from_hub(target))
    assert target.read_bytes() == CONTENT
    assert hub.n_body_bytes == len(CONTENT) + 600_000


def test_a_server_that_ignores_ranges_and_never_ends_is_given_up(hub: FakeHub, target: Path) -> None:
    hub.ignore_range, hub.truncate_at = True, [600_000] * 50
    assert "585.9 KiB have come and are kept" in refused(from_hub(target))
    assert len(hub.bodies) == QUICK.n_tries


def test_a_file_that_changed_meanwhile_begins_anew(hub: FakeHub, target: Path) -> None:
    hub.truncate_at = [100_000] * 2
    refused(from_hub(target, patience=Patience(first_wait_s=0, n_tries=1)))
    hub.content, hub.truncate_at = b"GGUF" + os.urandom(len(CONTENT) - 4), []
    assert fetch(from_hub(target)).resumed_bytes == 0
    assert target.read_bytes() == hub.content


def test_a_corrupted_file_of_the_right_size_is_removed(hub: FakeHub, target: Path) -> None:
    hub.etag = "0" * 64
    told = refused(from_hub(target))
    assert hub.sha256 in told
    assert "0" * 64 in told
    assert "pull again" in told
    assert kept(target) == b""
    hub.etag = None
    fetch(from_hub(target))


def test_a_part_that_was_damaged_on_disk_is_found_out(hub: FakeHub, target: Path) -> None:
    hub.truncate_at = [500_000]
    refused(from_hub(target, patience=Patience(first_wait_s=0, n_tries=1)))
    with part_of(target).open("r+b") as part:
        part.seek(1000)
        part.write(b"damage")
    assert "arrived damaged" in refused(from_hub(target))
    assert fetch(from_hub(target)).resumed_bytes == 0


def test_model_sha256_is_held_against_the_hub_before_a_byte_is_fetched(hub: FakeHub, target: Path) -> None:
    assert "MODEL_SHA256 says" in refused(from_hub(target, model_sha256="a" * 64))
    assert hub.bodies == []
    fetch(from_hub(target, model_sha256=hub.sha256.upper()))


@pytest.mark.parametrize(
    ("answer", "token", "told"),
    [
        ((404, "EntryNotFound"), "", "has no such file"),
        ((404, "RepoNotFound"), "", "there is no"),
        ((401, "RepoNotFound"), "", "needs HF_TOKEN"),
        ((401, "RepoNotFound"), "hf_secret", "the token cannot see it"),
        ((401, "GatedRepo"), "", "accept its terms at"),
        ((403, "GatedRepo"), "hf_secret", "the account of HF_TOKEN has not done so"),
        ((401, ""), "", "set HF_TOKEN"),
        ((401, ""), "hf_secret", "HF_TOKEN is not accepted"),
        ((418, ""), "", "answered 418"),
    ],
)
def test_a_hubs_refusal_says_what_to_do_and_keeps_the_token(
    hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str], token: str, told: str
) -> None:
    hub.hub_status = answer
    monkeypatch.setenv("HF_TOKEN", token)
    reason = refused(from_hub(target))
    assert told in reason
    assert "hf_secret" not in reason
    assert len(hub.asked) == 1


@pytest.mark.parametrize(("status", "told"), [(404, "check MODEL_URL"), (401, "asks for a login"), (403, "run out")])
def test_a_plain_addresss_refusal_is_final_and_keeps_its_query(
    hub: FakeHub, target: Path, status: int, told: str
) -> None:
    hub.statuses = [status]
    reason = refused(from_url(target, hub))
    assert told in reason
    assert "secret" not in reason
    assert len(hub.asked) == 1


def test_what_may_pass_is_tried_again(hub: FakeHub, target: Path) -> None:
    hub.statuses = [503, 429]
    fetch(from_hub(target))
    target.unlink()
    hub.statuses = [403]
    fetch(from_hub(target))
    target.unlink()
    hub.asked.clear()
    hub.statuses = [500] * 10
    assert "answered 500" in refused(from_hub(target))
    assert len(hub.bodies) == QUICK.n_tries


def test_a_web_page_is_no_model(hub: FakeHub, target: Path) -> None:
    hub.content_type = "text/html; charset=utf-8"
    assert "is a web page" in refused(from_url(target, hub))
    hub.content_type, hub.content = "application/octet-stream", b"<!doctype html>" + b" " * 100_000
    assert "is a web page" in refused(from_url(target, hub))
    hub.content = b"PK\x03\x04" + b" " * 100_000
    assert "is something else and no GGUF" in refused(from_url(target, hub))
    hub.content = b"GG"
    assert "no GGUF model file" in refused(from_url(target, hub))
    assert kept(target) == b""


def test_a_plain_address_is_resumed_and_verified_by_the_worker_files_hash(hub: FakeHub, target: Path) -> None:
    hub.truncate_at = [100_000]
    fetched = fetch(from_url(target, hub, model_sha256=hub.sha256))
    assert fetched.verified == "sha256"
    assert hub.n_body_bytes == len(CONTENT)
    target.unlink()
    assert fetch(from_url(target, hub)).verified == "size"
    target.unlink()
    hub.lengths = False
    assert fetch(from_url(target, hub)).verified == "nothing"
    target.unlink()
    assert "arrived damaged" in refused(from_url(target, hub, model_sha256="b" * 64))


def test_a_plain_address_whose_file_changed_begins_anew(hub: FakeHub, target: Path) -> None:
    hub.truncate_at = [100_000]
    refused(from_url(target, hub, patience=Patience(first_wait_s=0, n_tries=1)))
    hub.content = b"GGUF" + os.urandom(len(CONTENT) - 4)
    assert fetch(from_url(target, hub)).resumed_bytes == 0
    assert target.read_bytes() == hub.content


def test_a_whole_part_of_a_plain_address_is_not_fetched_again(hub: FakeHub, target: Path) -> None:
    hub.stall_at = 100_000
    first = from_url(target, hub, patience=Patience())
    first.start()
    until_kept(target, 80_000)
    first.stop()
    assert first.join(5)
    part_of(target).write_bytes(CONTENT)
    hub.n_body_bytes = 0
    assert fetch(from_url(target, hub, model_sha256=hub.sha256)).path.read_bytes() == CONTENT
    assert hub.n_body_bytes == 0


def test_a_redirect_to_plain_http_elsewhere_is_refused(hub: FakeHub, target: Path) -> None:
    hub.redirect_to = "http://192.0.2.1/model"
    source = source_of(WorkerSettings(model_name="x", model_url="https://a.example/f?token=secret"))
    assert source is not None
    assert "secret" not in f"{source} {source.shown}"
    settings = WorkerSettings(model_name="x", model_url=f"{hub.endpoint}/{REPO}/resolve/main/{FILE}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "source_of", lambda _: source_of(settings).__class__(settings.model_url, "x"))
        assert "not https" in refused(Download(settings, target, patience=QUICK))


def test_too_little_room_is_told_with_figures_before_a_byte_comes(
    hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_SPARE_BYTES", 2**60)
    each = from_hub(target)
    each.start()
    with pytest.raises(DiskFull) as caught:
        each.done.result(10)
    assert caught.value.needed_bytes == len(CONTENT)
    assert caught.value.free_bytes > 0
    assert "MODEL_PATH" in str(caught.value)
    assert hub.bodies == []


def test_a_disk_that_fills_up_keeps_what_has_come(hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        """A file that takes no more than so many bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if self.file.tell() + len(data) > 300_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    receive = Download._receive

    async def full(self: Download, source: Any, response: Any, part: Any, start: int) -> None:
        await receive(self, source, response, FullDisk(part), start)

    monkeypatch.setattr(Download, "_receive", full)
    each = from_hub(target)
    each.start()
    with pytest.raises(DiskFull):
        each.done.result(10)
    assert 0 < len(kept(target)) <= 300_000
    monkeypatch.setattr(Download, "_receive", receive)
    assert fetch(from_hub(target)).resumed_bytes > 0


def test_a_folder_that_cannot_be_made_says_so(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(from_hub(tmp_path / "file/model.gguf"))


def test_offline_and_no_source_and_split_files_say_so(
    hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "split model" in refused(from_hub(target, model_file="a-00001-of-00003.gguf"))
    assert "owner/name" in refused(from_hub(target, model_repo="a/b/c"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refused(from_hub(target))
    none = from_hub(target, model_repo="", model_file="")
    none.start()
    with pytest.raises(NoSource):
        none.done.result(10)
    assert hub.asked == []


def test_no_server_is_tried_again_and_told(hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    notes = Notes()
    assert "cannot be reached" in refused(from_hub(target, notes))
    assert len(notes.notes) == QUICK.n_tries - 1


def test_two_processes_fetch_one_file_once(hub: FakeHub, target: Path) -> None:
    hub.stall_at = 100_000
    first, notes = from_hub(target, patience=Patience()), Notes()
    first.start()
    assert hub.stalled.wait(10)
    second = from_hub(target, notes)
    waits = threading.Event()
    second._on_note = lambda *note: (notes.on_note(*note), waits.set())[0]  # type: ignore[func-returns-value]
    second.start()
    assert waits.wait(10)
    hub.release.set()
    assert first.done.result(10).total_bytes == second.done.result(10).total_bytes == len(CONTENT)
    assert first.join(5)
    assert second.join(5)
    assert hub.n_body_bytes == len(CONTENT)
    assert [code for _, code, _ in notes.notes] == ["model.download_waits"]


def test_one_that_waits_for_another_can_be_stopped(hub: FakeHub, target: Path) -> None:
    hub.stall_at = 100_000
    first, second = from_hub(target, patience=Patience()), from_hub(target)
    first.start()
    assert hub.stalled.wait(10)
    second.start()
    second.stop()
    with pytest.raises(DownloadStopped):
        second.done.result(5)
    first.stop()
    assert first.join(5)
    assert second.join(5)


def test_nothing_of_the_address_is_left_on_disk(hub: FakeHub, target: Path) -> None:
    hub.truncate_at = [100_000]
    refused(from_url(target, hub, patience=Patience(first_wait_s=0, n_tries=1)))
    facts = target.with_name("model.gguf.part.json").read_text()
    assert "secret" not in facts
    assert json.loads(facts)["total_bytes"] == len(CONTENT)
