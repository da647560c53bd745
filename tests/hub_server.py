"""A Hub on loopback: as much of the Hugging Face Hub's HTTP API as huggingface_hub needs to share models.

Repositories live in memory: commits by their hash, each a mapping of paths to contents, and branches, which name
commits. Reading is free except for private repositories; writing takes a token, which may write to one namespace.
Git-LFS is the only way for large files (no Xet: set HF_HUB_DISABLE_XET=1). Faults are asked for with `fail`.

    with HubServer() as hub:
        token = hub.add_user("org")
        ...  # HF_ENDPOINT=hub.url
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = (".safetensors", ".bin", ".pt")  # what a repository's .gitattributes gives to Git-LFS


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """All versions of a repository's files."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        content = [self.refs.get(ref), message, *((name, blob_id(files[name])) for name in sorted(files))]
        commit = hashlib.sha1(repr(content).encode()).hexdigest()
        self.commits[commit], self.refs[ref] = files, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """Those on the main branch."""
        return self.commits[self.refs["main"]]


class Refusal(Exception):
    """An answer other than success, with the codes by which huggingface_hub knows what it means."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path matches."""

    method: str
    path: re.Pattern
    how: int | str
    times: int

    def hits(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method == method and bool(self.path.search(path))


class HubServer(ThreadingHTTPServer):
    """See the module."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"  # another host, as the Hub's large files have
        self.users: dict[str, str] = {}  # token -> the namespace it may write to
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # sha256 -> content
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # method, path with query
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no error of the server's."""

    def add_user(self, namespace: str) -> str:
        """A token that may write to a namespace."""
        token = "hf_" + secrets.token_hex(17)
        self.users[token] = namespace
        return token

    def add_repository(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository with these files, as somebody else made it."""
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit("main", files, "files")
        return repository

    def fail(self, method: str, path: str, how: int | str, times: int = 1) -> None:
        """
        Lets requests fail.

        Args:
            method: of the requests; path: expression found in their path.
            how: a status to answer with; "drop": the connection breaks off, in the middle of what was to be sent;
                "corrupt": the body arrives with another first byte.
            times: how many requests.
        """
        self.faults.append(Fault(method, re.compile(path), how, times))


class Handler(BaseHTTPRequestHandler):
    """One request: finds its route, checks who asks, answers."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer's head and body leave at once

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(split.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.read_chunks()
        with self.server.lock:
            self.server.requests.append((self.command, self.path))
            fault = next((each for each in self.server.faults if each.hits(self.command, split.path)), None)
            self.fault = fault and fault.how
            if fault:
                fault.times -= 1
            try:
                if isinstance(self.fault, int):
                    raise Refusal(self.fault, "Injected fault")
                if self.fault == "drop" and self.command != "GET":
                    return self.hang_up()
                if self.fault == "corrupt":
                    self.body = bytes([self.body[0] ^ 1]) + self.body[1:]
                for method, pattern, handle in ROUTES:
                    if method == self.command and (match := re.fullmatch(pattern, split.path)):
                        return handle(self, *map(unquote, match.groups()))
                raise Refusal(404, f"No such route: {self.command} {self.path}")
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self.send(json.dumps({"error": refusal.message}).encode(), status=refusal.status, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_chunks(self) -> bytes:
        """A body whose length was not known beforehand."""
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return body

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.fault == "drop" else content)
        if self.fault == "drop":
            self.hang_up()

    def send_json(self, content: Any, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Nothing: tests read `requests`."""

    # ---- who asks for what ----

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        user, owner = self.user(), repo_id.split("/")[0]
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Log in to write")
        if write and user != owner:
            raise Refusal(403, f"You have no right to write to {owner}")
        return repository

    def files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(repo_id)
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # ---- accounts and repositories ----

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self.send_json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self) -> None:
        request = json.loads(self.body)
        user = self.user()
        if user is None:
            raise Refusal(401, "Log in to create a repository")
        owner = request.get("organization") or user
        if owner != user:
            raise Refusal(403, f"You have no right to create a repository in {owner}")
        repo_id = f"{owner}/{request['name']}"
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self.send_json(url, status=409)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.server.add_repository(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        self.send_json(url)

    def create_branch(self, repo_id: str, branch: str) -> None:
        repository = self.repository(repo_id, write=True)
        if branch in repository.refs:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[branch] = repository.resolve(start)
        self.send_json({})

    def list_refs(self, repo_id: str) -> None:
        refs = self.repository(repo_id).refs
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs.items()]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def model_info(self, repo_id: str, revision: str | None = None) -> None:
        commit, files = self.files(repo_id, revision or "main")
        info = {
            "_id": repo_id,
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        private = self.server.repositories[repo_id].private
        self.send_json({**info, "private": private, "siblings": [{"rfilename": name} for name in sorted(files)]})

    def tree(self, repo_id: str, revision: str, folder: str | None = None) -> None:
        _, files = self.files(repo_id, revision)
        prefix, entries = f"{folder}/" if folder else "", {}
        for name in sorted(name for name in files if name.startswith(prefix)):
            head, deeper, _ = name.removeprefix(prefix).partition("/")
            if deeper:
                entries[prefix + head] = {"type": "directory", "path": prefix + head, "oid": "0" * 40}
            if not deeper or self.query.get("recursive", "").lower() in ("true", "1"):
                entries[name] = self.describe(name, files[name])
        if prefix and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.send_json(list(entries.values()))

    def paths_info(self, repo_id: str, revision: str) -> None:
        _, files = self.files(repo_id, revision)
        asked = (parse_qs(self.body.decode())).get("paths", [])
        self.send_json([self.describe(name, files[name]) for name in asked if name in files])

    @staticmethod
    def describe(name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "oid": blob_id(content), "size": len(content)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    # ---- down ----

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        commit, files = self.files(repo_id, revision)
        if name not in files:
            raise Refusal(404, f"{name} does not exist", "EntryNotFound")
        content = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LARGE):  # kept elsewhere
            digest = sha256(content)
            location = f"{self.server.storage}/{digest}"
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"', "Location": location}
            return self.send(b"", 302, headers | linked)
        self.send_range(content, headers)

    def download(self, digest: str) -> None:
        contents = (
            content
            for repo in self.server.repositories.values()
            for files in repo.commits.values()
            for content in files.values()
        )
        content = next(content for content in contents if sha256(content) == digest)
        self.send_range(content, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})

    def send_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.send(content, 200, headers)
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        part = content[start:stop]
        self.send(part, 206, {**headers, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"})

    # ---- up ----

    def validate_card(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        writes = "create_pr" not in self.query
        repository = self.repository(repo_id, write=writes)
        files = repository.commits.get(repository.resolve(revision) or "", {})
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": self.remote_id(file["path"], files.get(file["path"])),
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send_json({"files": modes})

    @staticmethod
    def remote_id(name: str, content: bytes | None) -> str | None:
        if content is None:
            return None
        return sha256(content) if name.endswith(LARGE) else blob_id(content)

    def large_file_batch(self, repo_id: str) -> None:
        self.repository(repo_id)
        objects = []
        for each in json.loads(self.body)["objects"]:
            oid, answer = each["oid"], {"oid": each["oid"], "size": each["size"]}
            if oid not in self.server.large_files:
                upload, verify = f"{self.server.storage}/{oid}", f"{self.server.url}/{repo_id}.git/info/lfs/verify"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        if sha256(self.body) != digest:
            raise Refusal(400, "The checksum of what arrived is not that which was announced")
        self.server.large_files[digest] = self.body
        self.send(b"")

    def verify(self, repo_id: str) -> None:
        asked = json.loads(self.body)
        if len(self.server.large_files.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(422, "The file was not uploaded")
        self.send_json({})

    def commit(self, repo_id: str, revision: str) -> None:
        proposes = "create_pr" in self.query
        repository = self.repository(repo_id, write=not proposes)
        if self.user() is None:
            raise Refusal(401, "Log in to write")
        parent = repository.resolve(revision)
        if parent is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(repository.commits[parent]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        commit = repository.commit(f"refs/pr/{number}" if proposes else revision, files, message)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}"}
        if proposes:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
        self.send_json(answer)


REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("GET", f"/api/models/{REPO}", Handler.model_info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Handler.model_info),
    ("GET", f"/api/models/{REPO}/refs", Handler.list_refs),
    ("POST", f"/api/models/{REPO}/branch/{REVISION}", Handler.create_branch),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", Handler.tree),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}/(.+)", Handler.tree),
    ("POST", f"/api/models/{REPO}/paths-info/{REVISION}", Handler.paths_info),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", Handler.large_file_batch),
    ("PUT", "/storage/([0-9a-f]{64})", Handler.upload),
    ("POST", f"/{REPO}[.]git/info/lfs/verify", Handler.verify),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(.+)", Handler.resolve),
    ("GET", f"/{REPO}/resolve/{REVISION}/(.+)", Handler.resolve),
    ("HEAD", "/storage/([0-9a-f]{64})", Handler.download),
    ("GET", "/storage/([0-9a-f]{64})", Handler.download),
]
