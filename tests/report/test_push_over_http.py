"""The way of a student to a server that answers as the Hub's does."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.report.test_publish import run as run, student as student

COMMAND = [sys.executable, "-c", "from l2a.cli.app import main; main()", "push"]


class Hub:
    """What the Hub answers to a push: repositories, blobs of large files and commits, all in memory."""

    def __init__(self):
        self.repos, self.blobs, self.uploads = {}, {}, []
        self.status, self.hold, self.holding = None, threading.Event(), threading.Event()
        self.hold.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, content, status=200):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if hub.status:
                    return self.answer({"error": "no"}, hub.status)
                self.answer(*hub.respond(self.command, self.path, body))

            do_GET = do_POST = do_PUT = handle_any  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def respond(self, method, path, body):
        kind = path.split("?")[0].split("/")
        if path.startswith("/api/repos/create"):
            asked = json.loads(body)
            name = f"me/{asked['name']}"
            status = 409 if name in self.repos else 200
            self.repos.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
            return {"url": f"{self.address}/{name}"}, status
        if path.startswith("/api/validate-yaml"):
            return {"errors": [], "warnings": []}, 200
        if method == "PUT":
            self.uploads.append(kind[-1])
            self.holding.set()
            self.hold.wait(60)
            assert hashlib.sha256(body).hexdigest() == kind[-1]
            self.blobs[kind[-1]] = body
            return {}, 200
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in self.blobs:
                    one["actions"] = {"upload": {"href": f"{self.address}/blob/{one['oid']}"}}
            return {"transfer": "basic", "objects": objects}, 200
        repo = self.repos["/".join(kind[3:5])]
        if "/preupload/" in path:
            files = [{"path": one["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".onnx")) else "regular"}
                     for one in json.loads(body)["files"]]  # fmt: skip
            return {"files": files}, 200
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] in ("file", "lfsFile"):
                    repo["files"][value["path"]] = value.get("oid") or value["content"]
                elif line["key"] == "deletedFile":
                    del repo["files"][value["path"]]
            return {"commitUrl": f"{self.address}/me/x/commit/{'a' * 40}", "commitOid": "a" * 40}, 200
        siblings = [{"rfilename": name} for name in repo["files"]]
        return {"id": "/".join(kind[3:5]), "private": repo["private"], "siblings": siblings}, 200


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.hold.set()
    hub.server.shutdown()
    hub.server.server_close()


@pytest.mark.slow
def test_a_push_after_a_killed_one_uploads_the_student_and_none_of_the_data(run, hub):
    hub.hold.clear()
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}
    command = [*COMMAND, str(run), "student", "--private"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as killed:
        assert hub.holding.wait(120)
        killed.send_signal(signal.SIGKILL)
    assert hub.repos["me/student"]["files"] == {}
    hub.hold.set()
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    repo = hub.repos["me/student"]
    expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert repo["private"] and repo["files"].keys() == {*expected, "onnx/model.onnx", "onnx/export.json"}
    digest = hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()
    assert repo["files"]["model.safetensors"] == digest and set(hub.blobs) == set(hub.uploads)
    assert f"uploaded: {hub.address}/me/student" in shown
    hub.status = 401
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "the Hub answers 401: the token is not valid" in refused.stderr
    assert refused.stderr.count("\n") == 1 and "hf_secret" not in refused.stderr + shown
