"""A Hub for tests: the endpoints by which ``huggingface_hub`` asks who one is, looks at, makes and commits to
repositories of models, on the loopback interface, with what arrives kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

WRITE = {"role": "write", "displayName": "all"}


@dataclass
class Repository:
    private: bool = False
    #: branch → path → content
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"main": []})

    def sha(self, branch: str) -> str:
        files = sorted((n, hashlib.sha256(b).hexdigest()) for n, b in self.branches[branch].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()


@dataclass
class Hub:
    """What the server knows and what it was asked."""

    url: str = ""
    tokens: dict[str, dict[str, Any]] = field(default_factory=lambda: {"good": WRITE})
    orgs: dict[str, str] = field(default_factory=lambda: {"lab": "write", "readers": "read"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    #: (part of a path, status): what is refused from now on
    refused: list[tuple[str, int]] = field(default_factory=list)
    lfs: bool = True
    #: seconds that a large file takes to be stored
    seconds: float = 0.0


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answered()

    def do_HEAD(self) -> None:
        self._answered()

    def do_POST(self) -> None:
        self._answered()

    def do_PUT(self) -> None:
        self._answered()

    def _answered(self) -> None:
        path = unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.asked.append(f"{self.command} {path}")
        for part, status in self.state.refused:
            if part in path:
                return self._say(status, {"error": f"refused for a test: {part}"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("/large/"):
            time.sleep(self.state.seconds)
            self.state.large[path.removeprefix("/large/")] = body
            return self._say(200, {})
        if token not in self.state.tokens:
            return self._say(401, {"error": "Invalid credentials in Authorization header"})
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return self._say(*answer(self.state, token, body, **match.groupdict()))
        return self._say(404, {"error": f"no endpoint {path}"}, {"X-Error-Code": "EntryNotFound"})

    def _say(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _whoami(hub: Hub, token: str, body: bytes) -> tuple[Any, ...]:
    orgs = [{"name": n, "roleInOrg": r} for n, r in hub.orgs.items()]
    auth = {"type": "access_token", "accessToken": hub.tokens[token]}
    return 200, {"type": "user", "name": "alice", "orgs": orgs, "auth": auth}


def _info(hub: Hub, token: str, body: bytes, repo: str, branch: str | None = None) -> tuple[Any, ...]:
    if repo not in hub.repositories:
        return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
    found, branch = hub.repositories[repo], branch or "main"
    if branch not in found.branches:
        return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
    siblings = [
        {
            "rfilename": name,
            "size": len(content),
            "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            **(
                {
                    "lfs": {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 1,
                    }
                }
                if name.endswith(".safetensors")
                else {}
            ),
        }
        for name, content in found.branches[branch].items()
    ]
    value = {"id": repo, "modelId": repo, "sha": found.sha(branch), "private": found.private}
    return 200, {**value, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "gated": False}


def _create(hub: Hub, token: str, body: bytes) -> tuple[Any, ...]:
    asked = json.loads(body)
    repo = f"{asked.get('organization') or 'alice'}/{asked['name']}"
    url = {"url": f"{hub.url}/{repo}"}
    if repo in hub.repositories:
        return 409, {"error": "You already created this model repo", **url}
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.repositories[repo] = Repository(private)
    return 200, url


def _make_branch(hub: Hub, token: str, body: bytes, repo: str, branch: str) -> tuple[Any, ...]:
    found = hub.repositories[repo]
    if branch in found.branches:
        return 409, {"error": "Reference already exists"}
    found.branches[branch], found.commits[branch] = dict(found.branches["main"]), []
    return 200, {}


def _validate(hub: Hub, token: str, body: bytes) -> tuple[Any, ...]:
    assert json.loads(body)["content"].startswith("---\n")
    return 200, {"errors": [], "warnings": [{"message": "for a test"}]}


def _preupload(hub: Hub, token: str, body: bytes, repo: str, branch: str) -> tuple[Any, ...]:
    if branch not in hub.repositories[repo].branches:
        return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
    asked = json.loads(body)
    there = hub.repositories[repo].branches[branch]
    files = [
        {
            "path": f["path"],
            "uploadMode": "lfs" if hub.lfs and f["path"].endswith(".safetensors") else "regular",
            "shouldIgnore": "*.safetensors" in asked.get("gitIgnore", "*.safetensors"),
            "oid": (
                hashlib.sha1(b"blob %d\0" % len(there[f["path"]]) + there[f["path"]]).hexdigest()
                if f["path"] in there and not f["path"].endswith(".safetensors")
                else hashlib.sha256(there[f["path"]]).hexdigest()
                if f["path"] in there
                else None
            ),
        }
        for f in asked["files"]
    ]
    return 200, {"files": files}


def _batch(hub: Hub, token: str, body: bytes, repo: str) -> tuple[Any, ...]:
    objects = [
        {
            "oid": o["oid"],
            "size": o["size"],
            **(
                {}
                if o["oid"] in hub.large
                else {"actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}", "header": {}}}}
            ),
        }
        for o in json.loads(body)["objects"]
    ]
    return 200, {"transfer": "basic", "objects": objects}


def _commit(hub: Hub, token: str, body: bytes, repo: str, branch: str) -> tuple[Any, ...]:
    found = hub.repositories[repo]
    files = dict(found.branches[branch])
    lines = [json.loads(line) for line in body.splitlines()]
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            content = hub.large[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            files[value["path"]] = content
        elif line["key"] == "deletedFile":
            del files[value["path"]]
        else:
            return 400, {"error": f"unknown {line['key']}"}
    found.branches[branch] = files
    found.commits[branch].append(lines[0]["value"])
    sha = found.sha(branch)
    return 200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"}


_NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"GET /api/whoami-v2", _whoami),
    (rf"GET /api/models/{_NAME}", _info),
    (rf"GET /api/models/{_NAME}/revision/(?P<branch>.+)", _info),
    (r"POST /api/repos/create", _create),
    (rf"POST /api/models/{_NAME}/branch/(?P<branch>.+)", _make_branch),
    (r"POST /api/validate-yaml", _validate),
    (rf"POST /api/models/{_NAME}/preupload/(?P<branch>.+)", _preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _batch),
    (rf"POST /api/models/{_NAME}/commit/(?P<branch>.+)", _commit),
)
