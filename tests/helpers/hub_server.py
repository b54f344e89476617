"""A small Hub-compatible server on the loopback address: repositories, branches, LFS uploads, resolve."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN, USER = "hf_tests_good", "org"


class HubServer(ThreadingHTTPServer):
    """State and faults of the server; `requests` lists what was asked.

    `cuts` uploads are cut off in the middle before the next one goes through.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cuts = 0

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts files into a repository, which is created if missing; returns the commit."""
        state = self.repos.setdefault(repo, {"private": False, "branches": {}, "commits": {}})
        parent = state["commits"].get(state["branches"].get(branch), {})
        tree = {**parent, **files}
        text = repr((len(state["commits"]), branch, sorted((p, hashlib.sha1(b).hexdigest()) for p, b in tree.items())))
        oid = hashlib.sha1(text.encode()).hexdigest()
        state["commits"][oid] = tree
        state["branches"][branch] = oid
        return oid

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo]["commits"][self.repos[repo]["branches"][branch]]

    def handle_error(self, request, client_address):
        pass  # connections that we cut


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                action(self, *match.groups())
                return
        self._body()
        self._json(404, {"error": "no such page"})

    # Answers -----------------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, status: int, value, **headers: str):
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._body()
        self._json(401, {"error": "Invalid username or password."})
        return False

    def _commit_of(self, repo: str, revision: str) -> str | None:
        """The commit of a branch, or None after answering that the branch does not exist."""
        state = self.server.repos.get(repo)
        hidden = state is not None and state["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if state is None or hidden:
            self._json(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        oid = state["branches"].get(revision, revision)
        if oid not in state["commits"]:
            self._json(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return None
        return oid

    # Pages -------------------------------------------------------------------------------------------------------

    def create(self):
        if not self._authorized():
            return
        asked = json.loads(self._body())
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.server.endpoint}/{repo}", "name": repo, "id": repo}
        if repo in self.server.repos:
            self._json(409, {"error": "You already created this model repo", **answer})
            return
        self.server.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repos[repo]["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._json(200, answer)

    def branch(self, repo: str, name: str):
        if not self._authorized():
            return
        self._body()
        branches = self.server.repos[repo]["branches"]
        status = 409 if name in branches else 200
        branches.setdefault(name, branches["main"])
        self._json(status, {"error": "Reference already exists"} if status == 409 else {})

    def preupload(self, repo: str, revision: str):
        if not self._authorized():
            return
        asked = json.loads(self._body())["files"]
        if self._commit_of(repo, revision) is not None:
            modes = ["lfs" if file["path"].endswith((".safetensors", ".png")) else "regular" for file in asked]
            files = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for file, mode in zip(asked, modes, strict=True)
            ]
            self._json(200, {"files": files})

    def lfs_batch(self, repo: str):
        if not self._authorized():
            return
        objects = []
        for item in json.loads(self._body())["objects"]:
            href = f"{self.server.endpoint}/upload/{item['oid']}"
            new = item["oid"] not in self.server.large
            objects.append({**item, **({"actions": {"upload": {"href": href}}} if new else {})})
        self._json(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        if self.server.cuts:
            self.server.cuts -= 1
            self.rfile.read(1000)
            # a reset instead of an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        body = self._body()
        if hashlib.sha256(body).hexdigest() != oid:
            self._json(400, {"error": "checksum"})
            return
        self.server.large[oid] = body
        self._send(200, b"", ETag=f'"{oid}"')

    def commit(self, repo: str, revision: str):
        if not self._authorized():
            return
        files = {}
        for line in self._body().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        if self._commit_of(repo, revision) is not None:
            oid = self.server.commit(repo, files, revision)
            url = f"{self.server.endpoint}/{repo}/commit/{oid}"
            self._json(200, {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": None})

    def validate(self):
        self._body()
        self._json(200, {"errors": [], "warnings": []})

    def info(self, repo: str, revision: str | None = None):
        oid = self._commit_of(repo, revision or "main")
        if oid is not None:
            files = self.server.repos[repo]["commits"][oid]
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json(200, {"id": repo, "modelId": repo, "sha": oid, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str):
        oid = self._commit_of(repo, revision)
        if oid is not None:
            files = self.server.repos[repo]["commits"][oid]
            rows = [
                {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for path, body in sorted(files.items())
            ]
            self._json(200, rows)

    def resolve(self, repo: str, revision: str, path: str):
        oid = self._commit_of(repo, revision)
        if oid is None:
            return
        body = self.server.repos[repo]["commits"][oid].get(path)
        if body is None:
            self._json(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        else:
            self._send(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=oid)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/upload/([0-9a-f]{64})", _Handler.upload),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (("GET",), rf"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/tree/([^/]+)(?:/.*)?", _Handler.tree),
    (("GET",), rf"/api/models/{_REPO}", _Handler.info),
]


@contextmanager
def serve() -> Iterator[HubServer]:
    """A running server."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
