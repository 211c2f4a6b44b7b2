"""A Lepton workspace on loopback: the requests of the real client, and jobs that really run.

It speaks what nemo-run and this project ask of the service, from the client's own models; the rest
of the service, its limits and its words are not here. Each node of a job is a process in a root of
its own, with the job's mounts. ``wget`` brings the one file that nemo-run's script fetches.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CONTAINER = Path(__file__).parents[1] / "rig" / "container.sh"
TOKEN = "workspace-token-of-the-test"  # noqa: S105 - of a server on loopback
NODE = {"node": {"id": "node-0", "name": "node-0"}}
WGET = """#!/bin/sh
[ "$1" = -O ] && case "$3" in */lepton_env_to_pytorch.sh) ;; *) exit 4 ;; esac
echo 'export MASTER_ADDR=127.0.0.1 MASTER_PORT="$RIG_PORT" NODE_RANK="$RIG_NODE"' > "$2"
"""


@dataclass
class RigJob:
    """A job: its nodes are processes, its state follows from how they end."""

    body: dict[str, Any]
    root: Path
    is_stopped: bool = False
    is_deleted: bool = False
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.body["metadata"]["id"]

    @property
    def state(self) -> str:
        codes = [process.poll() for process in self.processes]
        if self.is_deleted:
            return "Archived"
        if any(code is None for code in codes):
            return "Running"
        if self.is_stopped:
            return "Stopped"
        return "Failed" if any(codes) else "Completed"

    @property
    def nodes(self) -> list[str]:
        return [f"{self.id}-{index}-abcde" for index in range(self.body["spec"]["completions"])]

    def start(self, port: int) -> None:
        for index, name in enumerate(self.nodes):
            node = self.root / name
            node.mkdir()
            script = f"set -e; sh {CONTAINER}; exec chroot {node}/root "
            script += shlex.join(self.body["spec"]["container"]["command"])
            with (self.root / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
                    env=self._environment(node, index, port),
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.is_stopped = True
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def view(self) -> dict[str, Any]:
        active = len(self.processes) if self.state == "Running" else 0
        failed = 1 if self.state == "Failed" else 0
        succeeded = sum(process.poll() == 0 for process in self.processes)
        status = {"state": self.state, "active": active, "ready": active, "failed": failed}
        return self.body | {"status": status | {"succeeded": succeeded}}

    def _environment(self, node: Path, index: int, port: int) -> dict[str, str]:
        pairs = []
        for mount in self.body["spec"].get("mounts") or []:
            source = self.root / "volumes" / mount.get("path", "/").strip("/")
            source.mkdir(parents=True, exist_ok=True)
            pairs.append(f"{source}:{mount['mount_path']}")
        given = {
            env["name"]: env.get("value") or f"secret {env['value_from']['secret_name_ref']}"
            for env in self.body["spec"].get("envs") or []
        }
        kept = {name: os.environ[name] for name in ("DEMO_STEPS", "PYTHONPATH")}
        return {
            **kept,
            **given,
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "HOME": "/root",
            "RIG_IMAGE": "",
            "RIG_ROOT": str(node),
            "RIG_MOUNTS": ",".join(pairs),
            "RIG_NODE": str(index),
            "RIG_PORT": str(port),
        }


class Workspace:
    """The service: jobs by id, the requests that came, and what to answer wrong."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: dict[str, RigJob] = {}
        self.bodies: list[str] = []
        # Requests whose "METHOD /path" fits get this status, or no answer for so many seconds.
        self.faults: dict[str, int] = {}
        self.stalls: dict[str, float] = {}
        (root / "bin").mkdir(parents=True)
        (root / "bin" / "wget").write_text(WGET)
        (root / "bin" / "wget").chmod(0o755)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        request = f"{method} {path}"
        time.sleep(sum(s for pattern, s in self.stalls.items() if re.fullmatch(pattern, request)))
        for pattern, status in self.faults.items():
            if re.fullmatch(pattern, request):
                return status, {"message": f"the rig answers {status}"}
        parts = path.strip("/").split("/")
        if parts[0] == "dedicated-node-groups":
            name = "group" if len(parts) == 1 else "node-0"
            return 200, [{"metadata": {"id": f"{name}-id", "name": name}, "spec": {}, "status": {}}]
        if request == "GET /usersecrets":
            return 200, [{"name": "HF_TOKEN"}]
        if request == "POST /jobs":
            return self._create(body)
        job = self.jobs.get(parts[1]) if parts[0] == "jobs" and len(parts) > 1 else None
        if job is None:
            return 404, {"message": f"nothing at {path}"}
        return self._answer_job(job, method, parts[2:], body)

    def _answer_job(self, job: RigJob, method: str, rest: list[str], body: Any) -> tuple[int, Any]:
        if method == "DELETE":  # into the archive, from which it still answers
            job.stop(signal.SIGKILL)
            job.is_deleted = True
        if method == "PATCH" and body["spec"].get("stopped"):
            job.stop()
        if rest == ["replicas"]:
            nodes = job.nodes
            return 200, [{"id": n, "metadata": {"id": n}, "status": NODE} for n in nodes]
        return 200, job.view()

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        job = RigJob(body, self.root)
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,33}[a-z0-9]", job.id):
            return 400, {"message": f"invalid id {job.id}"}
        if job.id in self.jobs:
            return 409, {"message": f"job {job.id} exists"}
        self.jobs[job.id] = job
        job.start(30_000 + os.getpid() % 10_000 + len(self.jobs))
        if job.id.startswith("data-mover"):
            for process in job.processes:  # nemo-run would look again in five seconds
                process.wait()
        return 201, job.view()

    def stream(self, job: RigJob, node: str) -> Iterator[bytes]:
        with (self.root / f"{node}.log").open("rb") as log:
            while True:
                is_last = job.state != "Running"
                block = log.read()
                if block:
                    yield block
                elif is_last:
                    return
                time.sleep(0.05)


def handler_of(workspace: Workspace) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *_: object) -> None:
            return

        def do(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            path = self.path.partition("?")[0]
            workspace.bodies.append(text)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.send(401, {"message": "who are you?"})
            log = re.fullmatch(r"/jobs/([^/]+)/replicas/([^/]+)/log", path)
            if log and log[1] in workspace.jobs:
                return self.send_log(workspace.stream(workspace.jobs[log[1]], log[2]))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                body = json.loads(text) if text else None
                self.send(*workspace.answer(self.command, path, body))
            return None

        do_GET = do_POST = do_PATCH = do_DELETE = do  # noqa: N815 - names of the base class

        def send(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def send_log(self, blocks: Iterator[bytes]) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for block in (*blocks, b""):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
                    self.wfile.flush()

    return Handler


@pytest.fixture
def workspace(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """Run a workspace with one node group; profile ``lepton`` is in it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("jobs of a Lepton workspace of our own need root for namespaces")
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("jobs of a Lepton workspace need namespaces, which root may not make here")
    served = Workspace(tmp_path / "lepton")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(served)) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setenv("LEPTON_WORKSPACE_ID", "rig")
        monkeypatch.setenv("LEPTON_WORKSPACE_TOKEN", TOKEN)
        monkeypatch.setenv("LEPTON_WORKSPACE_URL", f"http://127.0.0.1:{server.server_port}")
        (demo / "env.toml").write_text(
            '[lepton]\nexecutor = "lepton"\ncontainer_image = "python:3.11"\ngpus_per_node = 0\n'
            'node_group = "group"\nresource_shape = "cpu.small"\nnemo_run_dir = "/store/nemo-run"\n'
            'workspace = "/store/work"\nstartup_commands = ["export PATH='
            f'{Path(sys.executable).parent}:$PATH"]\n'
            '[[lepton.mounts]]\npath = "/"\nmount_path = "/store"\nfrom = "node-nfs:rig"\n'
        )
        yield served
        for job in list(served.jobs.values()):
            job.stop(signal.SIGKILL)
            for process in job.processes:
                process.wait()
        server.shutdown()
        thread.join()
