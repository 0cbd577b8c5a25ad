"""A Hub on this machine: what huggingface_hub asks of its endpoint to create, commit, upload and download.

    with FakeHub() as hub:
        subprocess.run(..., env=os.environ | hub.environment)  # HF_ENDPOINT is read when huggingface_hub is imported

It keeps commits in memory, checks the SHA-256 of every LFS object, and refuses what `hub.refuse` says.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

USER, TOKEN = "me", "hf_" + "a" * 34
LFS = (".safetensors", ".bin", ".png", ".pt")


class Repository:
    """Commits, each a whole tree, and the branches that name them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.messages: dict[str, str] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        parent = self.branches.get(branch, "")
        tree = json.dumps([(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(files.items())])
        sha = hashlib.sha1(f"{parent} {len(self.commits)} {message} {tree}".encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.branches[branch] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a commit's own name is."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class FakeHub:
    """Start and stop the server; what tests look at and set.

    Attributes:
        repositories: by name.
        requests: how often each method and kind of path was asked for.
        refuse: kind of request ("create", "lfs", "commit", ...) to HTTP status, and `times` how often still.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.unhandled: list[str] = []
        self.refuse: dict[str, int] = {}
        self.times = 10**9
        self.corrupt_lfs = False
        self.cards: list[str] = []

    def __enter__(self) -> "FakeHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process takes this for the Hub."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return names | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[revision]]


class _Handler(BaseHTTPRequestHandler):
    """The routes: method and pattern to a function of the groups, which answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _route(self) -> None:
        hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        for kind, method, pattern, answer in _ROUTES:
            if self.command == method and (match := re.fullmatch(pattern, path)):
                hub.requests[kind] += 1
                if kind in hub.refuse and hub.times > 0:
                    hub.times -= 1
                    self._json({"error": f"the server refuses to {kind}"}, hub.refuse[kind])
                else:
                    answer(self, hub, *match.groups())
                return
        hub.unhandled.append(f"{self.command} {path}")
        self._json({"error": "no such route"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _json(self, data: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(data).encode(), status, **{"Content-Type": "application/json"} | headers)

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._json({"error": code}, 404, X_Error_Code=code)

    def whoami(self, hub: FakeHub) -> None:
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, hub: FakeHub) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name'].split('/')[-1]}"
        if name in hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{hub.endpoint}/{name}"}, 409)
            return
        hub.repositories[name] = Repository(asked.get("private") or asked.get("visibility") == "private")
        self._json({"url": f"{hub.endpoint}/{name}", "name": name})

    def set_faults(self, hub: FakeHub) -> None:
        """For a process that is to meet several faults: a JSON of `refuse`, `times` and `corrupt_lfs`."""
        faults = {"refuse": {}, "times": 10**9, "corrupt_lfs": False} | json.loads(self.body)
        vars(hub).update(faults)
        self._json({})

    def branch(self, hub: FakeHub, name: str, branch: str) -> None:
        repository = hub.repositories[name]
        if branch in repository.branches:
            self._json({"error": "Reference already exists"}, 409)
            return
        repository.branches[branch] = repository.branches["main"]
        self._json({})

    def validate_yaml(self, hub: FakeHub) -> None:
        content = json.loads(self.body)["content"]
        hub.cards.append(content)
        errors = []
        try:
            data = yaml.safe_load(content.split("---")[1])
            if "license" in data and not re.fullmatch(r"[a-z0-9.-]+", str(data["license"])):
                errors.append({"message": f'"license" must be one of those known, not {data["license"]}'})
        except (yaml.YAMLError, IndexError) as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, hub: FakeHub, name: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular", "shouldIgnore": False}
            for f in files
        ]
        self._json({"files": modes})

    def lfs_batch(self, hub: FakeHub, name: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in hub.lfs:
                asked["actions"] = {
                    "upload": {"href": f"{hub.endpoint}/lfs/{asked['oid']}"},
                    "verify": {"href": f"{hub.endpoint}/verify"},
                }
            objects.append(asked)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, hub: FakeHub, oid: str) -> None:
        data = self.body[:-1] + b"x" if hub.corrupt_lfs else self.body
        if hashlib.sha256(data).hexdigest() != oid:
            self._json({"error": f"SHA-256 of the upload is not {oid[:12]}..."}, 400)
            return
        hub.lfs[oid] = data
        self._json({})

    def lfs_verify(self, hub: FakeHub) -> None:
        asked = json.loads(self.body)
        whole = len(hub.lfs.get(asked["oid"], b"")) == asked["size"]
        self._json({} if whole else {"error": "not uploaded"}, 200 if whole else 404)

    def commit(self, hub: FakeHub, name: str, revision: str) -> None:
        repository, message = hub.repositories[name], ""
        files = dict(repository.commits[repository.branches[revision]])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(revision, files, message)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{name}/commit/{sha}"})

    def _found(self, hub: FakeHub, name: str, revision: str | None) -> str | None:
        """The commit, or None after an answer that there is none."""
        if name not in hub.repositories:
            self._missing("RepoNotFound")
            return None
        sha = hub.repositories[name].resolve(revision or "main")
        if sha is None:
            self._missing("RevisionNotFound")
        return sha

    def info(self, hub: FakeHub, name: str, revision: str | None = None) -> None:
        if sha := self._found(hub, name, revision):
            files = hub.repositories[name].commits[sha]
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json({"id": name, "sha": sha, "private": hub.repositories[name].private, "siblings": siblings})

    def tree(self, hub: FakeHub, name: str, revision: str, folder: str | None) -> None:
        if sha := self._found(hub, name, revision):
            files = hub.repositories[name].commits[sha]
            self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in sorted(files.items())
                    if path.startswith(folder or "")
                ]
            )

    def refs(self, hub: FakeHub, name: str) -> None:
        branches = hub.repositories[name].branches
        refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": sha} for b, sha in branches.items()]
        self._json({"branches": refs, "tags": [], "converts": []})

    def resolve(self, hub: FakeHub, name: str, revision: str, path: str) -> None:
        sha = self._found(hub, name, revision)
        if sha is None:
            return
        data = hub.repositories[name].commits[sha].get(path)
        if data is None:
            self._json({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        first = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])  # a download goes on
        status = 206 if first else 200
        self._send(data[first:], status, ETag=etag, X_Repo_Commit=sha, X_Linked_Size=str(len(data)))


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, str, Any]] = [
    ("faults", "POST", "/faults", _Handler.set_faults),
    ("whoami", "GET", "/api/whoami-v2", _Handler.whoami),
    ("create", "POST", "/api/repos/create", _Handler.create),
    ("branch", "POST", f"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("validate", "POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("preupload", "POST", f"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("batch", "POST", f"/{_NAME}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("lfs", "PUT", "/lfs/([0-9a-f]+)", _Handler.lfs_put),
    ("verify", "POST", "/verify", _Handler.lfs_verify),
    ("commit", "POST", f"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("refs", "GET", f"/api/models/{_NAME}/refs", _Handler.refs),
    ("info", "GET", "/api/models/([^/]+(?:/[^/]+)?)", _Handler.info),
    ("info", "GET", f"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("tree", "GET", f"/api/models/{_NAME}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    ("resolve", "GET", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("resolve", "HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
