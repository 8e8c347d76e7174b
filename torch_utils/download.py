# SPDX-License-Identifier: MIT
"""Files from https addresses, kept in a cache folder: whole or not at all, resumed where a download broke off.

Cache folder: $STYLESAN_CACHE, else ~/.cache/stylesan, and there `downloads`. Nothing is fetched when
STYLESAN_OFFLINE or HF_HUB_OFFLINE is set to 1; what is in the cache is used all the same.
"""

from __future__ import annotations

import hashlib
import http
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock  # torch brings it along
from tqdm import tqdm

from torch_utils.errors import UserError

KNOWN_SHA256: dict[str, str] = {}  # address -> checksum, for files whose checksum their authors publish
OFFLINE_VARIABLES = ("STYLESAN_OFFLINE", "HF_HUB_OFFLINE")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")  # served by this machine: http does no harm
_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DownloadError(UserError):
    """An address that cannot be had; the message names it, the reason and the way out."""


def is_url(text: str) -> bool:
    """Whether `text` is an address rather than a path."""
    return "://" in text


def is_offline(offline: bool = False) -> bool:
    """Whether downloads are forbidden, by argument or by environment."""
    return offline or any(
        os.environ.get(v, "").lower() in ("1", "true", "yes", "on") for v in OFFLINE_VARIABLES
    )


def cache_folder() -> Path:
    """Where downloads are kept."""
    root = os.environ.get("STYLESAN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "stylesan") / "downloads"


def cached_path(url: str) -> Path:
    """Where the file of an address is kept: a part of the address's hash, and the file's own name."""
    address = url.partition("#")[0]
    name = re.sub(r"[^\w.+-]", "_", unquote(Path(urlsplit(address).path).name)) or "file"
    return cache_folder() / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name[-100:]}"


def fetch(url: str, sha256: str | None = None, offline: bool = False, show_progress: bool = True) -> Path:
    """The file at `url` (https, redirects too), downloaded once.

    The size must be what the server announced. Its SHA-256 is checked against `sha256`, an ending
    #sha256=... of the address, or KNOWN_SHA256, whichever is given. Only hosts in LOCAL_HOSTS may use http.
    Raises DownloadError.
    """
    expected = _expected_sha256(url, sha256)
    _check_scheme(url)
    target = cached_path(url)
    if target.exists():
        if expected is None or _sha256_of(target) == expected:
            return target
        raise DownloadError(
            f"{target}, kept from {url}, does not have the SHA-256 {expected}; delete that file"
        )
    if is_offline(offline):
        raise DownloadError(
            f"{url} has not been downloaded yet, and downloads are off (--offline, {' or '.join(OFFLINE_VARIABLES)}): "
            "allow them once, or give a local file"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # of the processes of a run, one downloads and the others wait
            if not _is_kept(target, url, expected):
                _download(url.partition("#")[0], target, expected, show_progress)
    except DownloadError:
        raise
    except urllib.error.HTTPError as error:
        raise DownloadError(
            f"{url}: the server answers {error.code} {error.reason}; check the address"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(
            f"{url} cannot be reached ({reason}); check the network, then try again"
        ) from error
    except OSError as error:  # a full disk, a folder without write permission
        where = error.filename or target.parent
        raise DownloadError(
            f"{url} cannot be stored in {where} ({error.strerror}); set STYLESAN_CACHE"
        ) from error
    return target


def _is_kept(target: Path, url: str, expected: str | None) -> bool:
    if not target.exists():
        return False
    if expected is not None and _sha256_of(target) != expected:
        raise DownloadError(
            f"{target}, kept from {url}, does not have the SHA-256 {expected}; delete that file"
        )
    return True


def _download(url: str, target: Path, expected: str | None, show_progress: bool) -> None:
    """Fill `target`.part, resuming one that is there if the server still has the same file, and rename it."""
    part, note = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.json")
    with _open_rest(url, part, note) as response:
        total, has_resumed = _total_bytes(response, part)
        note.write_text(json.dumps(_validator(response)))
        with (
            open(part, "ab" if has_resumed else "wb") as file,
            tqdm(
                desc=target.name.partition("-")[2],
                total=total,
                initial=file.tell(),
                unit="B",
                unit_scale=True,
                disable=not show_progress,
            ) as bar,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    num_bytes = part.stat().st_size
    if total is not None and num_bytes != total:
        raise DownloadError(
            f"{url} broke off after {num_bytes} of {total} bytes; run the command again to resume"
        )
    if expected is not None and (found := _sha256_of(part)) != expected:
        part.unlink()
        raise DownloadError(
            f"{url} has the SHA-256 {found}, not {expected}; it was not kept: check the address"
        )
    os.replace(part, target)
    note.unlink(missing_ok=True)


def _open_rest(url: str, part: Path, note: Path) -> Any:
    """The answer to a request for what `part` lacks, or for everything."""
    headers = _resume_headers(part, note)
    try:
        return _open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not headers:
            raise
        part.unlink()  # whole already, or longer than the file: killed just before its end
        return _open(url, {})


def _resume_headers(part: Path, note: Path) -> dict[str, str]:
    """Asks for the rest of a broken-off file, on the condition that the file has not changed since."""
    try:
        validator = json.loads(note.read_text())["validator"]
        num_bytes = part.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not isinstance(validator, str) or num_bytes == 0:
        return {}
    return {"Range": f"bytes={num_bytes}-", "If-Range": validator}


def _total_bytes(response: Any, part: Path) -> tuple[int | None, bool]:
    """(size of the whole file or None, whether the answer goes on where `part` ends)."""
    length = response.headers.get("Content-Length")
    if response.status != 206:
        return (int(length) if length and length.isdigit() else None), False
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != part.stat().st_size:
        part.unlink()
        raise DownloadError(
            f"{response.url}: the server sent another part than asked for; run the command again"
        )
    return (None if match[2] == "*" else int(match[2])), True


def _validator(response: Any) -> Mapping[str, str | None]:
    """What tells this version of the file from another: its strong ETag, or else its date."""
    tag = response.headers.get("ETag")
    is_strong = tag is not None and not tag.startswith("W/")
    return {"validator": tag if is_strong else response.headers.get("Last-Modified")}


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to another address only if that could have been given directly."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str]) -> Any:
    # Identity: with compression, neither the announced size nor a range would be that of the file.
    request = urllib.request.Request(
        url, headers={"Accept-Encoding": "identity", "User-Agent": "stylesan", **headers}
    )
    return urllib.request.build_opener(_SafeRedirects).open(request, timeout=_TIMEOUT_SECONDS)


def _check_scheme(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_allowed = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOCAL_HOSTS)
    except ValueError as error:
        raise DownloadError(f"{url!r} is no address ({error}); give one that starts with https://") from error
    if not is_allowed or not parts.hostname:
        raise DownloadError(
            f"{url}: only https addresses are fetched, because anything else can be changed on its way; "
            "use https:// or download the file yourself"
        )


def _expected_sha256(url: str, sha256: str | None) -> str | None:
    address, _, fragment = url.partition("#")
    if sha256 is None and fragment.startswith("sha256="):
        sha256 = fragment.removeprefix("sha256=")
    if sha256 is None:
        return KNOWN_SHA256.get(address)
    if not _SHA256.fullmatch(sha256.lower()):
        raise DownloadError(f"SHA-256 {sha256!r} of {address} is not 64 hexadecimal digits; copy it again")
    return sha256.lower()


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
