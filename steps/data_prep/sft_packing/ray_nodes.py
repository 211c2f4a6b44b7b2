"""Runs Ray on the nodes of one job: the first node runs its head, the others lend it their cores.

The job's script says where the first node is, and gives all nodes a key that nobody else has; Ray
takes work only from those who know the key. The nodes meet on the board (see ``team.py``) before
the work and part after it.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.executors import connected_ray, ray_missing
from nemotron.steps.data_prep.sft_packing.team import Helper, Leader

_LAST_SECONDS = 10


@contextmanager
def leading_ray(leader: Leader, num_cores: int) -> Iterator[None]:
    """Run the head of a Ray cluster, wait until all nodes have joined it, and stop it at the end.

    Args:
        leader: This node.
        num_cores: How many tasks this node takes at a time.

    Raises:
        NemotronError: ``ray_missing``, ``nodes_apart``, and what another node reports.
    """
    address = _set_environment(os.environ)
    host, _, port = address.partition(":")
    head = ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false"]
    with _ray_node(*head, num_cores=num_cores), leader.leading():
        with connected_ray(log_to_driver=False) as ray:
            leader.meet(lambda: sum(node["Alive"] for node in ray.nodes()) == leader.count)
            num_all = int(ray.cluster_resources()["CPU"])
        print(f"{STEP}: Ray has {num_all} cores on {leader.count} nodes", flush=True)
        yield


def lend_to_ray(helper: Helper, num_cores: int) -> None:
    """Add this node to the first one's Ray cluster until all is done.

    Raises:
        NemotronError: ``worker_died``, ``nodes_apart``.
    """
    address = _set_environment(os.environ)
    with helper.helping(), _ray_node(f"--address={address}", num_cores=num_cores) as process:
        if not helper.stay(lambda: process.poll() is None):
            problem = f"ray on {socket.gethostname()} ended with exit code {process.returncode}"
            raise step_error(STEP, "worker_died", problem)


def _set_environment(environment: Mapping[str, str]) -> str:
    """Set, before Ray is imported, the head's address and the key; return the address."""
    if importlib.util.find_spec("ray") is None:
        raise ray_missing()
    host = socket.gethostbyname(environment["NEMOTRON_MASTER_ADDR"])
    address = f"{host}:{environment['NEMOTRON_MASTER_PORT']}"
    os.environ |= {
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": environment["NEMOTRON_KEY"],
    }
    return address


@contextmanager
def _ray_node(*options: str, num_cores: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
    command += [f"--num-cpus={num_cores}", "--disable-usage-stats"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_LAST_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
