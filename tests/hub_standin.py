# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A small local stand-in for the Hugging Face Hub: repositories are created, committed to and downloaded over HTTP.

It implements the requests of `huggingface_hub` for pushing and loading files: creation, upload mode, commit, repository
    information, file tree and files. Every file is uploaded inside the commit, none through LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class HubStandIn:
    """State and URL of the stand-in.

    Attributes:
        url: Value for the environment variable `HF_ENDPOINT`.
        repositories: Files by repository id; ids of Spaces start with `spaces/`.
        commits: Repository id and commit message of every commit, in order.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """Environment variables that direct `huggingface_hub` to the stand-in only."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "stand-in",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def revision(self, repository: str) -> str:
        files = self.repositories[repository]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


def make_handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer_json(self, value: object, status: int = 200) -> None:
            self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

        def missing(self, code: str) -> None:
            self.answer(404, b"{}", X_Error_Code=code, Content_Type="application/json")

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body, path = self.read_body(), unquote(urlsplit(self.path).path)
            if path == "/api/repos/create":
                request = json.loads(body)
                repository = "/".join(
                    part for part in (request.get("organization") or "tester", request["name"]) if part
                )
                if request.get("type") == "space":
                    assert request["sdk"], "the Hub makes no Space without one"
                    repository = f"spaces/{repository}"
                hub.repositories.setdefault(repository, {})
                return self.answer_json({"url": f"{hub.url}/{repository}", "name": repository, "id": repository})
            if path == "/api/validate-yaml":
                return self.answer_json({"errors": [], "warnings": []})
            parts = path.removeprefix("/api/models/").removeprefix("/api/spaces/").split("/")
            repository, action = "/".join(parts[:2]), parts[2]
            if path.startswith("/api/spaces/"):
                repository = f"spaces/{repository}"
            if repository not in hub.repositories:
                return self.missing("RepoNotFound")
            if action == "preupload":
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                return self.answer_json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
            if action == "commit":
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                for line in lines:
                    value = line["value"]
                    if line["key"] == "header":
                        hub.commits.append((repository, value["summary"]))
                    elif line["key"] == "file":
                        hub.repositories[repository][value["path"]] = base64.b64decode(value["content"])
                    else:
                        return self.answer_json({"error": f"{line['key']} is not known here"}, 400)
                revision = hub.revision(repository)
                return self.answer_json(
                    {"commitUrl": f"{hub.url}/{repository}/commit/{revision}", "commitOid": revision}
                )
            self.missing("EntryNotFound")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            is_api = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repository = "/".join(parts[:2])
            if repository not in hub.repositories:
                return self.missing("RepoNotFound")
            files, revision = hub.repositories[repository], hub.revision(repository)
            if is_api and parts[2:3] in ([], ["revision"]):
                siblings = [{"rfilename": name} for name in files]
                return self.answer_json({"id": repository, "sha": revision, "siblings": siblings, "private": False})
            if is_api and parts[2] == "tree":
                below = "/".join(parts[4:])
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                    if name.startswith(below)
                ]
                return self.answer_json(entries) if entries or not below else self.missing("EntryNotFound")
            name = "/".join(parts[4:])
            if parts[2:3] == ["resolve"] and name in files:
                etag = hashlib.sha1(files[name]).hexdigest()
                return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=revision)
            self.missing("EntryNotFound")

        do_HEAD = do_GET

    return Handler


@contextmanager
def hub_standin() -> Iterator[HubStandIn]:
    """Runs a stand-in on a free local port during the block."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
