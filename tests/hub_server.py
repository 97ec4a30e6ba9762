"""A stand-in for the Hugging Face Hub on the loopback interface, and for the storage that it redirects to.

It speaks what huggingface_hub asks when it reads a model repository: model info, and files by revision. Like the
real one it answers for a weights file with a redirect to another host, and for a small one with a redirect to
itself. It counts what it sends, and misbehaves when told to.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_ofSomebodyWithAccess"
LFS_SUFFIXES = (".safetensors", ".ckpt", ".bin")
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Request:
    """`kind` is "info" (model info), "resolve" (a file by revision) or "storage" (a weights file's content)."""

    kind: str
    method: str
    name: str
    range: str | None
    token: str | None


@dataclass
class Repository:
    commits: dict[str, Files] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    access: str = "public"  # or "gated" (files only with a token), "private" (nothing without one)


@dataclass
class Fault:
    """What goes wrong the next `times` times that `name` (of a file; of any, where "") is asked of `kind`."""

    kind: str
    name: str
    times: float = 1
    status: int = 0
    drop_after: int | None = None
    reset: bool = False


class HubServer:
    """Both servers; a context manager.

    Attributes:
        requests: all requests in their order.
        sent: bytes of content by file name.
        bytes_per_second: by file name, where it is slow.
        corrupt: names of weights files of which a byte is wrong.
        ignores_ranges: whether everything is sent whatever range is asked for.
        xet: whether weights files are announced as Xet's.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.bytes_per_second: dict[str, float] = {}
        self.corrupt: set[str] = set()
        self.ignores_ranges = False
        self.xet = False
        self._connections: list[socket.socket] = []
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (_Hub, _Storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.hub = self  # type: ignore[attr-defined]
            Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused, and those that are open are closed."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for connection in self._connections:
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def commit(self, repo: str, files: Files | Path, branch: str = "main", tag: str | None = None) -> str:
        """Adds a commit with these files (or those of a directory) to a branch, and gives its hash."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in sorted(files.iterdir()) if path.is_file()}
        repository = self.repositories.setdefault(repo, Repository())
        parent = repository.revisions.get(branch, "")
        hashes = [(name, _git_hash(content)) for name, content in files.items()]
        commit = hashlib.sha1(repr((repo, parent, hashes)).encode()).hexdigest()
        repository.commits[commit] = files
        repository.revisions |= {branch: commit, commit: commit} | ({tag: commit} if tag else {})
        return commit

    def fail(self, kind: str, status: int, name: str = "", times: float = 1) -> None:
        """Answers with an error status."""
        self.faults.append(Fault(kind, name, times, status=status))

    def drop(self, name: str, after: int, times: float = 1, reset: bool = False) -> None:
        """Closes the connection, or resets it, when it has sent `after` bytes of a weights file."""
        self.faults.append(Fault("storage", name, times, drop_after=after, reset=reset))

    def count(self, kind: str, method: str = "GET", name: str = "") -> int:
        return sum(
            r.kind == kind and r.method == method and (not name or r.name == name) for r in self.requests
        )

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that takes this for the Hub, with its cache in `home`."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return own | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | more

    def use(self, monkeypatch: Any, home: Path) -> None:
        """The same for this process, whose huggingface_hub has read its environment already.

        It also waits nowhere before it tries again.
        """
        from huggingface_hub import constants, file_download
        from huggingface_hub.utils import _http

        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(variable, raising=False)
        for module in (file_download, _http):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))

    def _fault(self, kind: str, name: str) -> Fault | None:
        for fault in self.faults:
            if fault.kind == kind and fault.name in ("", name) and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kind = ""

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def setup(self) -> None:
        super().setup()
        self.hub._connections.append(self.connection)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError

    def begin(self, kind: str, name: str) -> bool:
        """Writes the request down; whether it is to be answered."""
        self.token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(kind, self.command, name, self.headers["Range"], self.token))
        self.fault = self.hub._fault(kind, name)
        if self.fault is not None and self.fault.status:
            self.refuse(self.fault.status, "", "told to fail")
            return False
        return True

    def answer(self, status: int, headers: Mapping[str, str], content: bytes = b"", name: str = "") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        rate = self.hub.bytes_per_second.get(name)
        fault = self.fault
        end = len(content) if fault is None or fault.drop_after is None else fault.drop_after
        step = 1 << 16 if rate is None else max(1, int(rate / 50))
        try:
            for at in range(0, min(end, len(content)), step):
                piece = content[at : min(at + step, end)]
                self.hub.sent[name] += len(piece)
                self.wfile.write(piece)
                if rate is not None:
                    time.sleep(step / rate)
        except OSError:  # the client went away
            self.close_connection = True
        if end < len(content):
            self.close_connection = True
            if fault is not None and fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        self.fault = None
        self.answer(
            status,
            headers | ({"X-Error-Code": code} if code else {}),
            json.dumps({"error": message}).encode(),
        )

    def ranged(self, content: bytes, headers: Mapping[str, str], name: str) -> None:
        asked = self.headers["Range"]
        if not asked or self.hub.ignores_ranges:
            self.answer(200, headers, content, name)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        begin, end = int(first), min(int(last or len(content)) + 1, len(content))
        if begin >= len(content):
            self.refuse(416, "", "no such range")
            return
        headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        self.answer(206, headers, content[begin:end], name)


class _Hub(_Handler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        words = [unquote(word) for word in url.path.strip("/").split("/")]
        match words:
            case ["api", "models", owner, name]:
                self.info(f"{owner}/{name}", "main", parse_qs(url.query))
            case ["api", "models", owner, name, "revision", revision]:
                self.info(f"{owner}/{name}", revision, parse_qs(url.query))
            case [owner, name, "resolve", revision, file]:
                self.resolve(f"{owner}/{name}", revision, file)
            case ["api", "resolve-cache", "models", owner, name, commit, file]:
                content = self.hub.repositories[f"{owner}/{name}"].commits[commit][file]
                self.fault = None
                self.ranged(content, {"ETag": f'"{_git_hash(content)}"', "X-Repo-Commit": commit}, file)
            case _:
                self.begin("unknown", self.path)
                self.refuse(404, "", "no such page")

    def find(self, repo: str, revision: str, of_files: bool) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(repo)
        closed = {"public": False, "gated": of_files, "private": True}
        if repository is None or (closed[repository.access] and self.token != TOKEN):
            if repository is not None and repository.access == "gated":
                self.refuse(403 if self.token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
            elif self.token == TOKEN:
                self.refuse(404, "RepoNotFound", "Repository not found")
            else:
                self.refuse(401, "", "Invalid username or password.")
            return None
        if revision not in repository.revisions:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, repository.revisions[revision]

    def info(self, repo: str, revision: str, query: Mapping[str, Any]) -> None:
        if not self.begin("info", "") or (found := self.find(repo, revision, of_files=False)) is None:
            return
        repository, commit = found
        siblings: list[dict[str, Any]] = []
        for name, content in repository.commits[commit].items():
            siblings.append({"rfilename": name})
            if "blobs" in query:
                siblings[-1] |= {"blobId": _git_hash(content), "size": len(content)}
                if name.endswith(LFS_SUFFIXES):
                    siblings[-1]["lfs"] = {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 134,
                    }
        body = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not self.begin("resolve", name) or (found := self.find(repo, revision, of_files=True)) is None:
            return
        repository, commit = found
        content = repository.commits[commit].get(name)
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit}
        if not name.endswith(LFS_SUFFIXES):
            location = f"/api/resolve-cache/models/{repo}/{commit}/{quote(name)}"
            self.answer(307, headers | {"Location": location})
            return
        headers |= {
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Location": f"{self.hub.storage_url}/{repo}/{commit}/{quote(name)}",
        }
        if self.hub.xet:
            headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": f"{self.hub.url}/xet"}
        self.answer(302, headers)


class _Storage(_Handler):
    def do_GET(self) -> None:
        owner, repo, commit, name = (unquote(word) for word in urlsplit(self.path).path.strip("/").split("/"))
        if not self.begin("storage", name):
            return
        content = self.hub.repositories[f"{owner}/{repo}"].commits[commit][name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if name in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.ranged(content, {"ETag": etag, "Accept-Ranges": "bytes"}, name)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
