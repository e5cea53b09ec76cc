"""A Hub on 127.0.0.1 for the real `huggingface_hub` client: what it asks for, faults on demand, nothing else."""

import base64
import hashlib
import io
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_test"
USER = "user"
_LFS = (".safetensors", ".bin", ".pt", ".pth", ".png")
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Commit:
    """Files by path, as they are after the commit."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """Branches, each a list of commits, the last the newest."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class Fault:
    """What happens to requests whose `METHOD /path` matches, so many times: an answer, a cut after so many bytes, or what
    was asked without an answer."""

    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    lost: bool = False


class LoopbackHub:
    """The server; it runs from the start, since the client reads its address when it is imported."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.lock = threading.RLock()
        self.reset()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Forget everything."""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    def environment(self, **more: str) -> dict[str, str]:
        """Variables with which a client in another process uses this Hub; `HF_HOME` gives it a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        } | more

    def fail(self, pattern: str, status: int, times: int = 10**6, **headers: str) -> None:
        """Answer matching requests with a status."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, times, status, named))

    def cut(self, pattern: str, after: int, times: int = 10**6) -> None:
        """Cut the connection of matching requests when so many bytes of their body were read."""
        self.faults.append(Fault(pattern, times, cut_after=after))

    def lose(self, pattern: str, times: int = 10**6) -> None:
        """Do what matching requests ask, and cut the connection in place of an answer."""
        self.faults.append(Fault(pattern, times, lost=True))

    def create(self, repo_id: str, private: bool = False) -> Repo:
        """Make a repository with its first commit."""
        self.repos[repo_id] = Repo(private)
        self.commit(repo_id, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.repos[repo_id]

    def commit(self, repo_id: str, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        """Make a commit with exactly these files."""
        commits = self.repos[repo_id].branches.setdefault(branch, [])
        names = json.dumps([repo_id, branch, len(commits), sorted((path, _sha256(of)) for path, of in files.items())])
        commits.append(Commit(hashlib.sha1(names.encode()).hexdigest(), message, files))
        return commits[-1]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Files by path, without those of a new repository."""
        files = self.repos[repo_id].at(revision).files
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Messages of the commits that were pushed, oldest first."""
        return [commit.message for commit in self.repos[repo_id].branches[revision][1:]]

    def counted(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def fault_for(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    routes = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/models/(.+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/(.+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/(.+)/branch/([^/]+)", "branch"),
        ("GET", r"/api/(?:models/)?(.+)/tree/([^/]+)(?:/(.+))?", "tree"),
        ("GET", r"/api/(?:models/)?(.+)/revision/([^/]+)", "info"),
        ("GET", r"/api/(?:models/)?((?:datasets/)?[^/]+(?:/[^/]+)?)", "info"),
        ("POST", r"/(.+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/upload/(\w+)", "lfs_upload"),
        ("POST", r"/lfs/verify/(\w+)", "lfs_verify"),
        ("HEAD", r"/(.+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/(.+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def _handle(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        with hub.lock:
            hub.requests.append(request)
            fault = hub.fault_for(request)
        if fault is not None and fault.cut_after is not None:
            self.rfile.read(fault.cut_after)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read()
        if fault is not None and fault.lost:
            self.wfile = io.BytesIO()
            self._route(path)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault is not None:
            self._answer(fault.status, {"error": "a fault on demand"}, **fault.headers)
        else:
            self._route(path)

    def _route(self, path: str) -> None:
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                with self.server.hub.lock:
                    getattr(self, name)(*map(unquote, filter(None, match.groups())))
                return
        self._answer(404, {"error": f"no such page: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *args) -> None:
        pass

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, value=None, content: bytes | None = None, **headers) -> None:
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _is_user(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _repo(self, repo_id: str) -> Repo | None:
        """The repository if it is there and may be seen; else the answer is given."""
        repo = self.server.hub.repos.get(repo_id)
        hidden = repo is not None and repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repo is None or hidden:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repo

    def _at(self, repo_id: str, revision: str) -> Commit | None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        if repo.at(revision) is None:
            self._answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return repo.at(revision)

    # Repositories

    def whoami(self) -> None:
        if self._is_user():
            self._answer(200, {"type": "user", "name": USER, "orgs": []})

    def create_repo(self) -> None:
        if not self._is_user():
            return
        hub, asked = self.server.hub, json.loads(self.body)
        owner = asked.get("organization") or USER
        if owner != USER:
            self._answer(403, {"error": f"no rights to create a model under {owner}"})
            return
        repo_id = f"{owner}/{asked['name']}"
        value = {"url": f"{hub.endpoint}/{repo_id}"}
        if repo_id in hub.repos:
            self._answer(409, value | {"error": "You already created this model repo"})
            return
        hub.create(repo_id, bool(asked.get("private")) or asked.get("visibility") == "private")
        self._answer(200, value)

    def branch(self, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id) if self._is_user() else None
        if repo is None:
            return
        if name in repo.branches:
            self._answer(409, {"error": "Reference already exists"})
            return
        repo.branches[name] = list(repo.branches["main"])
        self._answer(200, {"success": True})

    def info(self, repo_id: str, revision: str = "main") -> None:
        commit = self._at(repo_id, revision)
        if commit is not None:
            private = self.server.hub.repos[repo_id].private
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            value = {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": private, "siblings": siblings}
            self._answer(200, value | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        commit = self._at(repo_id, revision)
        if commit is None:
            return
        start, deep = f"{folder}/" if folder else "", "recursive=true" in self.path.lower()
        found = {path: content for path, content in sorted(commit.files.items()) if path.startswith(start)}
        if folder and not found:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        inner = {start + path.removeprefix(start).split("/")[0] for path in found if "/" in path.removeprefix(start)}
        folders = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(inner)]
        files = [
            _entry(path, content) for path, content in found.items() if deep or "/" not in path.removeprefix(start)
        ]
        self._answer(200, files + folders)

    # Commits

    def validate_yaml(self) -> None:
        errors = metadata_errors(json.loads(self.body)["content"])
        self._answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        commit = self._at(repo_id, revision) if self._is_user() else None
        if commit is None:
            return
        found = []
        for file in json.loads(self.body)["files"]:
            lfs, present = file["path"].endswith(_LFS), commit.files.get(file["path"])
            oid = None if present is None else _sha256(present) if lfs else _git_sha1(present)
            found.append(
                {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._answer(200, {"files": found})

    def lfs_batch(self, repo_id: str) -> None:
        if not self._is_user() or self._repo(repo_id) is None:
            return
        hub, objects = self.server.hub, []
        for one in json.loads(self.body)["objects"]:
            actions = {name: {"href": f"{hub.endpoint}/lfs/{name}/{one['oid']}"} for name in ("upload", "verify")}
            objects.append(one if one["oid"] in hub.objects else one | {"actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            self._answer(400, {"error": "the content is not what its name says"})
            return
        self.server.hub.objects[oid] = self.body
        self._answer(200, {})

    def lfs_verify(self, oid: str) -> None:
        known = self.server.hub.objects.get(oid)
        whole = known is not None and len(known) == json.loads(self.body)["size"]
        self._answer(200 if whole else 404, {})

    def commit(self, repo_id: str, revision: str) -> None:
        current = self._at(repo_id, revision) if self._is_user() else None
        if current is None:
            return
        hub, files, message = self.server.hub, dict(current.files), ""
        for line in self.body.splitlines():
            key, value = (lambda entry: (entry["key"], entry["value"]))(json.loads(line))
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in hub.objects:
                    self._answer(400, {"error": f"{value['path']} was not uploaded"})
                    return
                files[value["path"]] = hub.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {
                    path: of for path, of in files.items() if not path.startswith(value["path"].rstrip("/") + "/")
                }
        done = hub.commit(repo_id, revision, message, files)
        url = f"{hub.endpoint}/{repo_id}/commit/{done.oid}"
        self._answer(200, {"commitUrl": url, "commitOid": done.oid, "success": True})

    # Files

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._at(repo_id, revision)
        if commit is None:
            return
        headers = {"X_Repo_Commit": commit.oid}
        content = commit.files.get(path)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers)
            return
        if path.endswith(_LFS):
            headers |= {"X_Linked_Etag": f'"{_sha256(content)}"', "X_Linked_Size": str(len(content))}
        self._answer(200, content=content, ETag=f'"{_git_sha1(content)}"', **headers)


def metadata_errors(content: str) -> list[str]:
    """What the Hub's validator says of a card's front matter, of the keys that matter here."""
    match = re.match(r"\s*---\r?\n([\S\s]*?)\r?\n---[ \t]*(\r?\n|$)", content)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    return [*_wrong_names(data), *(error for entry in data.get("model-index", []) for error in _wrong_results(entry))]


def _wrong_names(data: dict) -> list[str]:
    errors = []
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not _REPO_ID.fullmatch(value):
                errors.append(f'"{key}" with value {value!r} is not valid. Use an id from https://hf.co')
    for key in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        if key in data and not (isinstance(data[key], str) and re.fullmatch(r"[a-z0-9.-]+", data[key])):
            errors.append(f'"{key}" must be a lower-case name, got {data[key]!r}')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and 0 < len(tag) <= 128 for tag in tags):
        errors.append('"tags" must be an array of strings')
    return errors


def _wrong_results(entry: dict) -> list[str]:
    errors = []
    if not isinstance(entry.get("name"), str) or not entry.get("results"):
        errors.append('"model-index" must have a name and results')
    for result in entry.get("results", []):
        if not result.get("task", {}).get("type"):
            errors.append('"model-index.results.task.type" is required')
        if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("name", "type")):
            errors.append('"model-index.results.dataset" must have a name and a type')
        for metric in result.get("metrics", []):
            if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float, str)):
                errors.append('"model-index.results.metrics" must have a type and a value')
    return errors


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
    if path.endswith(_LFS):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
