"""A Hub in memory, for the real client to upload to and download from: one user, no data sets.

with HubServer(token="secret") as hub:
    ...  # a process with HF_ENDPOINT=hub.address and HF_HUB_DISABLE_XET=1
    hub.repos["org/name"].files("main")
    hub.repos["spaces/org/name"].files("main")
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_BYTES = 1 << 16  # larger files, and checkpoints, go to LFS


class Repo:
    """Commits by hash; branches and tags point at them."""

    def __init__(self, url, private):
        self.url, self.private = url, private
        self.commits, self.branches, self.tags = {}, {}, {}
        self.commit("main", {".gitattributes": (b"*.ckpt filter=lfs\n", False)})

    def commit(self, branch, files):
        """``files``: path -> (content, is in LFS)."""
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision):
        return self.branches.get(revision) or self.tags.get(revision) or revision

    def files(self, revision):
        return self.commits[self.sha(revision)]


class HubError(Exception):
    """Answered as an HTTP status with the Hub's error code."""

    def __init__(self, status, message, code=None, url=None):
        super().__init__(message)
        self.status, self.code, self.url = status, code, url


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self):
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append(f"{self.command} /{path}")
        try:
            known = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if not known and not path.startswith("lfs/"):  # whose addresses are handed out
                if self.command not in ("GET", "HEAD") or hub.repo_of(path).private:
                    raise HubError(401, "Invalid username or password.")
            self.send(200, *hub.route(self.command, path, body))
        except HubError as error:
            headers = {"X-Error-Message": str(error)}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.send(error.status, {"error": str(error), "url": error.url}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status, content, headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class HubServer:
    """``token``: what clients must send to write, or to see private repos.

    While ``refuses_uploads`` is set, no LFS file is taken; while ``refuses_tags`` is, no tag. With
    ``overtaken``, somebody else commits to a repo as soon as its files have been listed.
    """

    def __init__(self, token):
        self.token, self.repos, self.lfs = token, {}, {}
        self.requests, self.refuses_uploads = [], False
        self.refuses_tags = self.overtaken = False

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.hub = True, self
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def repo_of(self, path):
        parts = path.removeprefix("api/").removeprefix("models/").split("/")
        try:
            return self.repos[
                "/".join(parts[: 3 if parts[0] == "spaces" else 2]).removesuffix(".git")
            ]
        except KeyError:
            raise HubError(404, f"no repo at {path}", "RepoNotFound") from None

    def route(self, method, path, body):
        """Content, and optionally headers, of the answer."""
        if path == "api/repos/create":
            return self.create(json.loads(body))
        if path == "api/validate-yaml":
            return [{"errors": [], "warnings": []}]
        if path == "lfs/verify":
            return [{}]
        if path.startswith("lfs/"):
            return self.put_lfs(path.removeprefix("lfs/"), body)
        repo = self.repo_of(path)
        if path.endswith("info/lfs/objects/batch"):
            return self.offer_lfs(json.loads(body)["objects"])
        if not path.startswith("api/"):
            _, _, _, revision, name = path.split("/", 4)  # org/name/resolve/revision/file
            return self.download(repo, revision, name)
        command, _, argument = "/".join(path.split("/")[4:]).partition("/")
        revision = argument or "main"
        if command in ("", "revision"):
            return self.info(path, repo, revision)
        if command == "refs":
            return self.refs(repo)
        if command == "tree":
            listed = repo.files(revision)
            if self.overtaken:
                repo.commit("main", {**listed, "theirs.txt": (b"1", False)})
            return [
                [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": len(content)}
                    for name, (content, _) in listed.items()
                ]
            ]
        if command == "preupload":
            return self.preupload(json.loads(body)["files"])
        if command == "commit":
            return self.commit(repo, revision, [json.loads(line) for line in body.splitlines()])
        if command in ("tag", "branch"):
            return self.point(repo, command, revision, json.loads(body or b"{}"))
        raise HubError(404, f"no {method} {path}")

    def create(self, request):
        repo_id = f"{request['organization']}/{request['name']}"
        if request.get("type") == "space":
            repo_id = f"spaces/{repo_id}"
        if repo_id in self.repos:
            raise HubError(409, "You already created it", url=self.repos[repo_id].url)
        private = request.get("private") or request.get("visibility") == "private"
        url = f"{self.address}/{repo_id}"
        self.repos[repo_id] = Repo(url, bool(private))
        return [{"url": url}]

    def info(self, path, repo, revision):
        if repo.sha(revision) not in repo.commits:
            raise HubError(404, f"no revision {revision}", "RevisionNotFound")
        repo_id = "/".join(path.split("/")[2:4])
        siblings = [{"rfilename": name} for name in repo.files(revision)]
        return [
            {"id": repo_id, "sha": repo.sha(revision), "private": repo.private}
            | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        ]

    def refs(self, repo):
        def listed(kind, names):
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}
                for name, sha in names.items()
            ]

        tags = listed("tags", repo.tags)
        return [{"branches": listed("heads", repo.branches), "tags": tags, "converts": []}]

    def preupload(self, files):
        def mode(file):
            large = file["size"] > LFS_BYTES or file["path"].endswith(".ckpt")
            return "lfs" if large else "regular"

        return [
            {
                "files": [
                    {"path": file["path"], "uploadMode": mode(file), "shouldIgnore": False}
                    for file in files
                ]
            }
        ]

    def offer_lfs(self, objects):
        for item in objects:
            if item["oid"] not in self.lfs:
                item["actions"] = {
                    "upload": {"href": f"{self.address}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.address}/lfs/verify"},
                }
        return [{"transfer": "basic", "objects": objects}]

    def put_lfs(self, oid, content):
        if self.refuses_uploads:
            raise HubError(403, "storage is full")
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "content of another hash")
        self.lfs[oid] = content
        return [b""]

    def commit(self, repo, branch, lines):
        files = dict(repo.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit", repo.sha(branch)) != repo.sha(branch):
                    raise HubError(
                        412, "A commit has happened since. Please refresh and try again."
                    )
            elif line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = (self.lfs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files)
        return [{"commitOid": sha, "commitUrl": f"{repo.url}/commit/{sha}"}]

    def point(self, repo, kind, argument, request):
        if kind == "tag":
            names, name, start = repo.tags, request["tag"], argument
        else:
            names, name, start = repo.branches, argument, request.get("startingPoint", "main")
        if name in names:
            raise HubError(409, f"{kind} {name} exists")
        if kind == "tag" and self.refuses_tags:
            raise HubError(500, "no tags today")
        names[name] = repo.sha(start)
        return [{}]

    def download(self, repo, revision, name):
        if repo.sha(revision) not in repo.commits:
            raise HubError(404, f"no revision {revision}", "RevisionNotFound")
        if name not in repo.files(revision):
            raise HubError(404, f"no file {name}", "EntryNotFound")
        content, _ = repo.files(revision)[name]
        etag = hashlib.sha256(content).hexdigest()
        return [content, {"X-Repo-Commit": repo.sha(revision), "ETag": f'"{etag}"'}]
