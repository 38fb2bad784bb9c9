"""A stand-in for the Hub: its HTTP API from memory, for the real `huggingface_hub` client, with faults on demand.

Spoken: repositories (create, info, refs, commits, branches, tags), trees and path infos, preupload, git-lfs batch and upload, commits
as NDJSON, resolving files with ranges, etags and redirect-free LFS headers, and errors with the Hub's own codes. Not spoken: Xet (set
HF_HUB_DISABLE_XET=1), and whether the Hub accepts the metadata of a card (it always says yes).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pkl", ".png", ".gz", ".arrow", ".onnx", ".pt")
NAMESPACE = "lab"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    kind: str
    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    n_requests: int = 0

    def commit(self, title: str, files: dict[str, bytes], branch: str) -> Commit:
        text = f"{self.kind}{self.name}{branch}{len(self.commits)}{title}"
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), title, files)
        self.commits.append(made)
        self.refs[branch] = made.sha
        return made

    def at(self, revision: str) -> Commit | None:
        sha = self.refs.get(revision) or self.tags.get(revision) or revision
        return next((c for c in reversed(self.commits) if c.sha == sha), None)

    def is_lfs(self, path: str, content: bytes) -> bool:
        return path.endswith(LFS_SUFFIXES)


@dataclass
class Fault:
    """What goes wrong with requests of a method and path, so many times."""

    method: str
    path: str
    what: str
    """`status:500`, `cut:1000` (the connection breaks after so many bytes), `hang up`, `size:10` (so many bytes of it are missing), `flip` (another content)."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The state behind the server."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.tokens = {"hf_owner"}

    def start(self) -> str:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return self.url

    def repository(self, name: str, kind: str = "model", *, private: bool = False) -> Repository:
        with self.lock:
            key = (kind, name)
            if key not in self.repositories:
                self.repositories[key] = Repository(kind, name, private)
                self.repositories[key].commit("initial commit", {".gitattributes": b""}, "main")
            return self.repositories[key]

    def put(self, name: str, files: dict[str, bytes], kind: str = "model", branch: str = "main", sha: str | None = None) -> str:
        """Commit files as their owner would, and return the commit, which has a given name where that matters."""
        repository = self.repository(name, kind)
        before = repository.at(repository.refs.get(branch, repository.refs["main"]))
        made = repository.commit("put", {**before.files, **files}, branch)
        repository.refs[branch] = made.sha = sha or made.sha
        return made.sha

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        return {path: content for path, content in self.repositories[kind, name].at(revision).files.items() if path != ".gitattributes"}

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    # -- answers

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None, *, length: int | None = None, sent: bytes | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent is None else sent)

    def say(self, value: object, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}})

    def refuse(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        self.answer(status, content, {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"})

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # -- routes

    def handle_any(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(size)
        parts = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        self.fault = self.hub.fault_for(self.command, path)
        if self.fault and self.fault.what.startswith("status:"):
            status = int(self.fault.what.split(":")[1])
            self.answer(status, b"{}", self.fault.headers)
            return
        if self.fault and self.fault.what == "hang up":
            self.hang_up()
            return
        for pattern, method, action in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                action(self, **match.groupdict())
                return
        self.refuse(404, "NotFound", f"no route {self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def repository_of(self, kind: str | None, name: str, *, write: bool = False) -> Repository | None:
        """Return a repository that the caller may use, or answer as the Hub does: what one may not see is not there."""
        found = self.hub.repositories.get(((kind or "model").rstrip("s/"), name))
        if self.token is not None and self.token not in self.hub.tokens:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif found is None or (found.private and self.token is None):
            self.refuse(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        elif write and self.token is None:
            self.refuse(401, "", "Invalid username or password.")
        elif write and not name.startswith(f"{NAMESPACE}/"):
            self.refuse(403, "", "You don't have the rights")
        else:
            return found
        return None

    def commit_of(self, repository: Repository, revision: str) -> Commit | None:
        found = repository.at(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def whoami(self) -> None:
        if self.token not in self.hub.tokens:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        self.say({"type": "user", "name": NAMESPACE, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or NAMESPACE}/{asked['name']}"
        kind = asked.get("type") or "model"
        if self.token not in self.hub.tokens:
            self.refuse(401, "", "Invalid username or password.")
        elif (kind, name) in self.hub.repositories:
            self.say({"url": f"{self.hub.url}/{name}", "error": "You already created this repo"}, 409)
        elif not name.startswith(f"{NAMESPACE}/"):
            self.refuse(403, "", "You don't have the rights to create a repository under this namespace")
        else:
            self.hub.repository(name, kind, private=bool(asked.get("private") or asked.get("visibility") == "private"))
            prefix = "" if kind == "model" else f"{kind}s/"
            self.say({"url": f"{self.hub.url}/{prefix}{name}", "name": name, "id": name})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repository = self.repository_of(kind, name)
        commit = repository and self.commit_of(repository, revision)
        if commit:
            siblings = [{"rfilename": path} for path in commit.files]
            self.say({"id": name, "modelId": name, "sha": commit.sha, "private": repository.private, "siblings": siblings, "tags": [], "downloads": 0})

    def refs(self, kind: str, name: str) -> None:
        if repository := self.repository_of(kind, name):
            both = {
                "branches": [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": s} for b, s in repository.refs.items()],
                "tags": [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": s} for t, s in repository.tags.items()],
            }
            self.say({**both, "converts": []})

    def commits(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository_of(kind, name)
        if repository and self.commit_of(repository, revision):
            made = [{"id": c.sha, "title": c.title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"} for c in reversed(repository.commits)]
            self.say(made)

    def branch(self, kind: str, name: str, branch: str) -> None:
        if repository := self.repository_of(kind, name, write=True):
            start = (json.loads(self.body) if self.body else {}).get("startingPoint")
            if branch in repository.refs:
                self.refuse(409, "", "Reference already exists")
                return
            repository.refs[branch] = repository.at(start or "main").sha
            self.say({})

    def tag(self, kind: str, name: str, revision: str) -> None:
        if repository := self.repository_of(kind, name, write=True):
            repository.tags[json.loads(self.body)["tag"]] = repository.at(revision).sha
            self.say({})

    def entry(self, repository: Repository, path: str, content: bytes) -> dict:
        found = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if repository.is_lfs(path, content):
            found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return found

    def tree(self, kind: str, name: str, revision: str, path: str = "") -> None:
        repository = self.repository_of(kind, name)
        commit = repository and self.commit_of(repository, revision)
        if not commit:
            return
        prefix = f"{path}/" if path else ""
        inside = {p: c for p, c in commit.files.items() if p.startswith(prefix)}
        if path and not inside:
            self.refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
            return
        if self.query.get("recursive", "").lower() in ("true", "1"):
            self.say([self.entry(repository, p, c) for p, c in inside.items()])
            return
        found = [self.entry(repository, p, c) for p, c in inside.items() if "/" not in p[len(prefix) :]]
        folders = sorted({p[len(prefix) :].split("/")[0] for p in inside if "/" in p[len(prefix) :]})
        self.say([{"type": "directory", "path": prefix + f, "size": 0, "oid": git_sha1(f.encode())} for f in folders] + found)

    def paths(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository_of(kind, name)
        commit = repository and self.commit_of(repository, revision)
        if commit:
            asked = parse_qs(self.body.decode()).get("paths", []) if b"paths=" in self.body else json.loads(self.body)["paths"]
            self.say([self.entry(repository, p, commit.files[p]) for p in asked if p in commit.files])

    def validate(self) -> None:
        self.say({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository_of(kind, name, write=True)
        commit = repository and self.commit_of(repository, revision)
        if commit:
            files = []
            for asked in json.loads(self.body)["files"]:
                known = commit.files.get(asked["path"])
                mode = "lfs" if asked["path"].endswith(LFS_SUFFIXES) else "regular"
                # The Hub names what is there already: the blob of a regular file, the SHA-256 of an LFS file.
                oid = None if known is None else hashlib.sha256(known).hexdigest() if mode == "lfs" else git_sha1(known)
                files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.say({"files": files})

    def batch(self, kind: str | None, name: str) -> None:
        if self.repository_of(kind, name, write=True) is None:
            return
        found = []
        for asked in json.loads(self.body)["objects"]:
            one = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{asked['oid']}"}, "verify": {"href": f"{self.hub.url}/verify"}}
            found.append(one)
        self.say({"transfer": "basic", "objects": found})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse(400, "", "the content is not what was announced")
            return
        self.hub.objects[oid] = self.body
        self.answer(200)

    def verify(self) -> None:
        asked = json.loads(self.body)
        self.say({}, 200 if asked["oid"] in self.hub.objects else 404)

    def make_commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository_of(kind, name, write=True)
        before = repository and self.commit_of(repository, revision)
        if not before:
            return
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        files = dict(before.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.refuse(400, "", f"LFS object {value['oid']} was not uploaded")
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                gone = value["path"]
                files = {p: c for p, c in files.items() if p != gone and not p.startswith(f"{gone.rstrip('/')}/")}
        branch = revision
        with self.hub.lock:
            if self.query.get("create_pr"):
                branch = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repository.refs)}"
            made = repository.commit(header["value"]["summary"], files, branch)
        prefix = "" if repository.kind == "model" else f"{repository.kind}s/"
        url = f"{self.hub.url}/{prefix}{name}"
        answer = {"commitUrl": f"{url}/commit/{made.sha}", "commitOid": made.sha, "success": True, "hookOutput": ""}
        if self.query.get("create_pr"):
            answer["pullRequestUrl"] = f"{url}/discussions/{branch.rsplit('/', 1)[1]}"
        self.say(answer)

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        repository = self.repository_of(kind, name)
        commit = repository and self.commit_of(repository, revision)
        if not commit:
            return
        if path not in commit.files:
            self.refuse(404, "EntryNotFound", f"{path} does not exist")
            return
        content = commit.files[path]
        etag = hashlib.sha256(content).hexdigest() if repository.is_lfs(path, content) else git_sha1(content)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if repository.is_lfs(path, content):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
        start, status = 0, 200
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, status = int(asked[1]), 206
            stop = int(asked[2]) + 1 if asked[2] else len(content)
            if start >= len(content):
                self.answer(416, headers={"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        what, _, number = self.fault.what.partition(":") if self.fault else ("", "", "")
        if what == "cut" and self.command == "GET":
            self.answer(status, content, headers, sent=content[: int(number)])
            self.hang_up()
        elif what == "size" and self.command == "GET":
            self.answer(status, content[: -int(number)], headers)
        elif what == "flip" and self.command == "GET":
            self.answer(status, bytes([content[0] ^ 1]) + content[1:], headers)
        else:
            self.answer(status, content, headers)


_REPO = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
ROUTES: list[tuple[str, str, Callable]] = [
    ("/api/whoami-v2", "GET", _Handler.whoami),
    ("/api/repos/create", "POST", _Handler.create),
    ("/api/validate-yaml", "POST", _Handler.validate),
    (_API, "GET", _Handler.info),
    (rf"{_API}/revision/(?P<revision>.+)", "GET", _Handler.info),
    (rf"{_API}/refs", "GET", _Handler.refs),
    (rf"{_API}/commits/(?P<revision>.+)", "GET", _Handler.commits),
    (rf"{_API}/branch/(?P<branch>.+)", "POST", _Handler.branch),
    (rf"{_API}/tag/(?P<revision>.+)", "POST", _Handler.tag),
    (rf"{_API}/tree/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<path>.*))?", "GET", lambda self, kind, name, revision, path: self.tree(kind, name, revision, path or "")),
    (rf"{_API}/paths-info/(?P<revision>.+)", "POST", _Handler.paths),
    (rf"{_API}/preupload/(?P<revision>.+)", "POST", _Handler.preupload),
    (rf"{_API}/commit/(?P<revision>.+)", "POST", _Handler.make_commit),
    (rf"/(?P<kind>datasets/)?{_REPO}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
    (r"/upload/(?P<oid>[0-9a-f]{64})", "PUT", _Handler.upload),
    ("/verify", "POST", _Handler.verify),
]  # fmt: skip
_FILE = rf"/(?P<kind>datasets/)?{_REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)"
ROUTES += [(_FILE, method, _Handler.resolve) for method in ("GET", "HEAD")]
