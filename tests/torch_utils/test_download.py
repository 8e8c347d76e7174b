# SPDX-License-Identifier: MIT
"""Downloads from a server on this machine: whole, resumed, checked, refused; nothing leaves the machine."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from torch_utils import download
from torch_utils.download import DownloadError, cached_path, fetch

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    knows_ranges: bool = True
    announced: int | None = None  # Content-Length instead of the true one
    sends: int | None = None  # bytes after which it breaks off
    wrong_range: bool = False
    status: int = 200
    redirect: str | None = None
    port: int = 0
    requests: list[dict[str, str]] = field(default_factory=list)

    def url(self, name: str = "net.pkl") -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


def handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(dict(self.headers))
            if server.status != 200:
                self.send_error(server.status)
                return
            if server.redirect and self.path == "/net.pkl":
                self.send_response(302)
                self.send_header("Location", server.redirect)
                self.end_headers()
                return
            start = self.start()
            if start is None:
                self.send_error(416)
                return
            body = server.content[start:]
            self.send_response(206 if start else 200)
            if start:
                first = start + 1 if server.wrong_range else start
                self.send_header(
                    "Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}"
                )
            self.send_header(
                "Content-Length", str(len(body) if server.announced is None else server.announced)
            )
            if server.etag:
                self.send_header("ETag", server.etag)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[: server.sends])

        def start(self) -> int | None:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if match is None or not server.knows_ranges or self.headers.get("If-Range") != server.etag:
                return 0
            return int(match[1]) if int(match[1]) < len(server.content) else None

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(state)) as listening:
        state.port = listening.server_address[1]
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield state
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    for name in download.OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def refused(url: str, message: str, **options) -> None:
    with pytest.raises(DownloadError, match=message) as error:
        fetch(url, show_progress=False, **options)
    assert "\n" not in str(error.value) and url.partition("#")[0] in str(error.value)


def test_a_file_is_fetched_once(server, tmp_path, capsys):
    path = fetch(server.url("a%20net.pkl?x=1"))
    assert path.read_bytes() == CONTENT
    assert path.parent == tmp_path / "cache" / "downloads" and path.name.endswith("-a_net.pkl")
    assert "1.02M" in capsys.readouterr().err  # the progress bar
    assert fetch(server.url("a%20net.pkl?x=1")) == path
    assert len(server.requests) == 1
    assert {p.suffix for p in path.parent.iterdir()} == {".pkl", ".lock"}


def test_different_addresses_have_different_files(server):
    paths = {
        fetch(server.url(name), show_progress=False) for name in ("net.pkl", "other/net.pkl", "net.pkl?v=2")
    }
    assert len(paths) == 3


def broken_off(server: Server, num_bytes: int) -> None:
    server.sends = num_bytes
    refused(server.url(), rf"broke off after {num_bytes} of {len(CONTENT)} bytes|cannot be reached")
    server.sends = None
    assert not cached_path(server.url()).exists()


def test_a_broken_download_goes_on_where_it_ended(server):
    broken_off(server, 300_000)
    assert fetch(server.url(), show_progress=False).read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=300000-"
    assert server.requests[-1]["If-Range"] == '"v1"'


@pytest.mark.parametrize("change", ["another version", "no ranges", "a weak tag"])
def test_otherwise_it_starts_again(server, change):
    if change == "a weak tag":
        server.etag = 'W/"v1"'
    broken_off(server, 300_000)
    if change == "another version":
        server.content, server.etag = CONTENT[::-1], '"v2"'
    elif change == "no ranges":
        server.knows_ranges = False
    assert fetch(server.url(), show_progress=False).read_bytes() == server.content


def test_a_download_that_was_killed_at_its_end_starts_again(server):
    broken_off(server, 300_000)
    part = cached_path(server.url()).with_name(cached_path(server.url()).name + ".part")
    part.write_bytes(CONTENT)
    assert fetch(server.url(), show_progress=False).read_bytes() == CONTENT


def test_another_part_than_asked_for_is_refused(server):
    broken_off(server, 300_000)
    server.wrong_range = True
    refused(server.url(), "sent another part than asked for")
    server.wrong_range = False
    assert fetch(server.url(), show_progress=False).read_bytes() == CONTENT


def test_fewer_bytes_than_announced_are_refused(server):
    server.announced = len(CONTENT) + 10
    refused(server.url(), r"broke off after 1024000 of 1024010|cannot be reached")
    assert not cached_path(server.url()).exists()


def test_checksums(server, monkeypatch):
    wrong = "0" * 64
    refused(server.url(), f"has the SHA-256 {SHA256}, not {wrong}", sha256=wrong)
    refused(f"{server.url()}#sha256={wrong}", "it was not kept")
    assert not list(cached_path(server.url()).parent.glob("*.part"))
    monkeypatch.setitem(download.KNOWN_SHA256, server.url(), wrong)
    refused(server.url(), "it was not kept")
    path = fetch(f"{server.url()}#sha256={SHA256.upper()}", show_progress=False)
    assert path.read_bytes() == CONTENT and path == cached_path(server.url())
    refused(server.url(), "does not have the SHA-256 0+; delete that file")
    refused(server.url(), "is not 64 hexadecimal digits", sha256="abc")


@pytest.mark.parametrize("variable", [None, *download.OFFLINE_VARIABLES])
def test_offline(server, monkeypatch, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    refused(server.url(), "has not been downloaded yet, and downloads are off", offline=variable is None)
    assert not server.requests
    if variable:
        monkeypatch.setenv(variable, "0")
    path = fetch(server.url(), show_progress=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    assert fetch(server.url(), offline=variable is None) == path


def test_only_https_is_fetched():
    for url in (
        "http://example.org/net.pkl",
        "ftp://example.org/net.pkl",
        "file:///etc/passwd",
        "https:///net.pkl",
    ):
        refused(url, "only https addresses are fetched")
    refused("https://[broken/net.pkl", "is no address")


def test_redirects_stay_safe(server):
    server.redirect = server.url("elsewhere.pkl")
    assert fetch(server.url(), show_progress=False).read_bytes() == CONTENT
    cached_path(server.url()).unlink()
    for target in ("http://example.org/net.pkl", "file:///etc/passwd"):
        server.redirect = target
        with pytest.raises(DownloadError, match=r"only https addresses are fetched|not allowed"):
            fetch(server.url(), show_progress=False)
        assert not cached_path(server.url()).exists()


@pytest.mark.parametrize("status", [404, 403, 500])
def test_answers_of_the_server_are_told(server, status):
    server.status = status
    refused(server.url(), f"the server answers {status} ")


def test_no_connection(server):
    refused("https://127.0.0.1:1/net.pkl", "cannot be reached")
    refused(server.url().replace("http://", "https://"), "cannot be reached")  # it does not speak TLS


def test_a_cache_that_cannot_be_written(server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "file"))
    refused(server.url(), "cannot be stored in .*; set STYLESAN_CACHE")


def test_a_full_disk(server, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    refused(server.url(), "No space left on device")
    assert not cached_path(server.url()).exists()


def test_processes_that_ask_together_download_once(server):
    paths: list[object] = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(server.url(), show_progress=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and len(paths) == 4 and len(server.requests) == 1


def test_paths_are_no_addresses():
    assert not download.is_url("runs/net.pkl") and not download.is_url(r"C:\runs\net.pkl")
    assert download.is_url("https://example.org/net.pkl")
