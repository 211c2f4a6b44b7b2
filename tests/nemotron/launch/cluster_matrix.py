"""The four tiny steps on real clusters, every way there is; one line for each thing that holds.

    python cluster_matrix.py [--only accounting,plain,container,ssh] [--keep DIRECTORY]

The clusters are those of the rig: a real Slurm of two nodes in network namespaces, with slurmdbd
and without, with the stand-in for containers and --force-squash, and over ssh to a login node. On
each, the four steps run attached (-r) and detached (-b, then ``jobs wait``), and what they write is
compared with what the same commands write on this machine, file by file. Then a training over both
nodes (TP 2 x DP 2), a job that fails, one that is cancelled behind our back, one that ``scontrol
requeue`` takes away, and one that reaches its time limit.

Needs root, pytest and the packages of .ci/cluster-packages; accounting needs slurmdbd,
mariadb-server and slurm-wlm-mysql-plugin as well. Takes about 15 minutes on two cores; exits 1 if
a line fails.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from conftest import PROFILE, open_cluster, open_login_node

import nemotron

WAYS = ("accounting", "plain", "container", "ssh")
PEFT = "peft/megatron_bridge"


class Tiny(NamedTuple):
    """Where a step of the tiny configs writes, below ``output``, and what is passed to it here."""

    path: str
    words: tuple[str, ...] = ()


STEPS = {
    "data_prep/sft_packing": Tiny("data_prep/sft_packing/tiny"),
    "convert/hf_to_megatron": Tiny("convert/hf_to_megatron/tiny"),
    PEFT: Tiny("peft/megatron_bridge/tiny", ("train.train_iters=20",)),
    "convert/merge_lora": Tiny("convert/merge_lora/tiny/hf"),
}
# What a step makes; the rest says when, where and by which job.
RESULTS = (".parquet", ".safetensors", ".distcp", ".jinja", "tokenizer.json")
TWO_NODES = (
    *("recipe.tensor_model_parallel_size=2", "recipe.data_parallel_size=2"),
    "train.train_iters=12",
)
# One thread everywhere: a rank that has a node to itself would add in another order.
ONE_THREAD = "run.env.env_vars.OMP_NUM_THREADS=1"
ENOUGH_SECONDS = 300


@dataclass
class Report:
    """The lines, and how many of them failed."""

    num_failed: int = 0

    def line(self, way: str, cell: str, prove: Callable[[], str]) -> None:
        start = time.monotonic()
        try:
            said, word = prove(), "ok  "
        except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
            said, word = f"{type(error).__name__}: {error}", "FAIL"
            self.num_failed += 1
        print(f"{word} {way:<10} {cell:<34} {time.monotonic() - start:5.1f} s  {said}", flush=True)


@dataclass(frozen=True)
class Place:
    """A working directory whose profile ``p`` is a cluster, and where its jobs find theirs."""

    directory: Path
    workspace: Path
    options: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def nemotron(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run the command line; ``code`` is what it must end with, None: anything."""
        done = subprocess.run(
            [sys.executable, "-m", "nemotron", *words],
            cwd=self.directory,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ENOUGH_SECONDS,
            check=False,
        )
        if code is not None:
            said = (done.stdout + done.stderr)[-1500:]
            assert done.returncode == code, f"{' '.join(words)}: {done.returncode}, {said}"
        return done

    def run(self, step: str, *words: str, code: int = 0) -> str:
        """Run a step attached; return what was shown."""
        words = ("steps", "run", step, "-c", "tiny", "-r", "p", *self.options, *words)
        done = self.nemotron(*words, code=code)
        return done.stdout + done.stderr

    def start(self, step: str, *words: str) -> str:
        """Start a step detached; return the job's id."""
        words = ("steps", "run", step, "-c", "tiny", "-b", "p", *self.options, *words)
        return self.nemotron(*words).stdout.strip()

    def wait(self, job_id: str, code: int = 0) -> None:
        """Wait for a job, which must end with ``code``."""
        done = self.nemotron("jobs", "wait", job_id, code=None)
        log = self.nemotron("jobs", "logs", job_id).stdout[-1500:]
        assert done.returncode == code, f"{done.returncode}, wanted {code}: {done.stderr}{log}"

    def status(self, job_id: str) -> dict[str, object]:
        return json.loads(self.nemotron("jobs", "status", job_id, "--json").stdout)

    def number(self, job_id: str) -> str:
        placement = self.status(job_id)["placement"]
        assert isinstance(placement, dict)
        return str(placement["id"])

    def losses(self, name: str) -> dict[int, float]:
        """Return the loss of every iteration that a run has done so far."""
        path = self.workspace / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines]
        return {e["iteration"]: e["lm_loss"] for e in events if e["event"] == "step"}


class Local(Place):
    """This machine, for comparison."""

    def run(self, step: str, *words: str, code: int = 0) -> str:
        done = self.nemotron("steps", "run", step, "-c", "tiny", *words, ONE_THREAD, code=code)
        return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(WAYS), help="which ways, with commas")
    parser.add_argument("--keep", type=Path, help="where to leave all files")
    arguments = parser.parse_args()
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="matrix-"))
    os.environ["PYTHONPATH"] = str(Path(nemotron.__file__).parents[1])
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    ways, report = arguments.only.split(","), Report()
    try:
        local = make_local(root / "local", report)
        if "accounting" in ways:
            with open_cluster(root / "slurm-accounting", "--accounting") as cluster:
                prove(report, "accounting", place_on(root / "accounting", cluster), local)
        if set(ways) - {"accounting"}:
            with open_cluster(root / "slurm") as cluster:
                prove_without_accounting(report, root, cluster, ways, local)
    finally:
        if arguments.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    print(f"{report.num_failed} failed")
    return 1 if report.num_failed else 0


def make_local(directory: Path, report: Report) -> Place:
    """Run what is compared with, on this machine."""
    directory.mkdir(parents=True)
    (directory / "pyproject.toml").touch()
    local = Local(directory, directory, ())

    def make() -> str:
        for step, tiny in STEPS.items():
            local.run(step, *tiny.words)
        local.run(PEFT, *TWO_NODES, "checkpoint.save=two")
        local.run(PEFT, "train.train_iters=40", "checkpoint.save=whole")
        return "the four steps, TP 2 x DP 2, and 40 iterations, to compare with"

    report.line("local", "", make)
    return local


def place_on(directory: Path, cluster: Path, profile: str = "", workspace: str = "") -> Place:
    directory.mkdir(parents=True)
    (directory / "pyproject.toml").touch()
    text = PROFILE + f'\n[p]\nextends = "rig"\n{profile}'
    (directory / "env.toml").write_text(text)
    path = f"{cluster}/bin:{os.environ['PATH']}"
    environment = {"SLURM_CONF": f"{cluster}/slurm.conf", "PATH": path}
    return Place(directory, directory / workspace, (ONE_THREAD,), environment)


def prove_without_accounting(
    report: Report, root: Path, cluster: Path, ways: list[str], local: Place
) -> None:
    if "plain" in ways:
        prove(report, "plain", place_on(root / "plain", cluster), local)
    if "container" in ways:
        jobs = root / "container" / "jobs"
        image = f'container_image = "registry.example/team/demo:1"\nremote_job_dir = "{jobs}"\n'
        place = place_on(root / "container", cluster, image)
        forced = replace(place, options=(*place.options, "--force-squash"))
        prove(report, "container", forced, local)
    if "ssh" in ways:
        sshd = shutil.which("sshd")
        assert sshd is not None, "no sshd"
        (root / "sshd").mkdir()
        with open_login_node(root / "sshd", cluster, sshd) as node:
            profile = node.profile(root / "ssh" / "there")
            place = place_on(root / "ssh", cluster, profile, "there/workspace")
            # Only the login node knows the cluster.
            far = replace(place, environment=node.environment())
            prove(report, "ssh", far, local, cluster=place.environment)


def prove(
    report: Report,
    way: str,
    place: Place,
    local: Place,
    *,
    cluster: dict[str, str] | None = None,
) -> None:
    """Print the lines of one way to a cluster."""
    slurm = Slurm(cluster or place.environment)
    for mode, step in itertools.product(("-r", "-b"), STEPS):
        report.line(way, f"{step} {mode}", partial(run, place, local, mode, step))
    report.line(way, "peft TP 2 x DP 2 on two nodes", lambda: train_on_two_nodes(place, local))
    report.line(way, "a failing job's code", lambda: fail(place))
    report.line(way, "scancel", lambda: cancel(place, slurm))
    report.line(way, "scontrol requeue", lambda: requeue(place, slurm, local))
    report.line(way, "time limit", lambda: run_out_of_time(place))


@dataclass(frozen=True)
class Slurm:
    """Slurm's own commands, as an administrator uses them."""

    environment: dict[str, str]

    def __call__(self, *command: str) -> str:
        environment = os.environ | self.environment
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout


def run(place: Place, local: Place, mode: str, step: str) -> str:
    """Run a step where nothing of it is yet; compare what it writes."""
    output = place.workspace / "output" / STEPS[step].path
    shutil.rmtree(output, ignore_errors=True)
    if mode == "-r":
        place.run(step, *STEPS[step].words)
    else:
        place.wait(place.start(step, *STEPS[step].words))
    return same_files(output, local.workspace / "output" / STEPS[step].path)


def same_files(found: Path, wanted: Path) -> str:
    """Say how many files of results are equal, all that there are."""
    names = sorted(
        str(path.relative_to(wanted))
        for path in wanted.rglob("*")
        if path.is_file() and path.name.endswith(RESULTS)
    )
    assert names, f"nothing in {wanted}"
    _, different, missing = filecmp.cmpfiles(wanted, found, names, shallow=False)
    assert not different, f"these differ: {different}"
    assert not missing, f"not there: {missing}"
    return f"{len(names)} files have the bytes of the local run"


def train_on_two_nodes(place: Place, local: Place) -> str:
    place.run(PEFT, *TWO_NODES, "run.env.nodes=2", "checkpoint.save=two")
    found, wanted = place.losses("two"), local.losses("two")
    assert found.keys() == wanted.keys() != set()
    largest = max(abs(found[step] - wanted[step]) for step in wanted)
    assert largest <= 1e-5, f"a loss differs by {largest:.1e}"
    return f"largest difference of {len(found)} losses {largest:.1e}"


def fail(place: Place) -> str:
    shown = place.run("data_prep/sft_packing", "num_shards=5000", "output_dir=x", code=4)
    assert "error[too_many_tiny_shards]" in shown, shown[-500:]
    return "exit code 4, and the step's own error"


@contextlib.contextmanager
def training(place: Place, name: str, *words: str) -> Iterator[tuple[str, str]]:
    """Start a training; yield the job's id and Slurm's once it has done some steps."""
    job_id = place.start(PEFT, f"checkpoint.save={name}", *words)
    number = place.number(job_id)  # over ssh this may take longer than a training
    until(lambda: len(place.losses(name)) >= 12)
    yield job_id, number


def cancel(place: Place, slurm: Slurm) -> str:
    with training(place, "cancelled", "train.train_iters=4000") as (job_id, number):
        slurm("scancel", number)
        place.wait(job_id, code=130)
    assert place.status(job_id)["status"] == "cancelled"
    return "exit code 130, cancelled"


def requeue(place: Place, slurm: Slurm, local: Place) -> str:
    """Take a job's nodes away and give them back, as an administrator does."""
    words = ("train.train_iters=40", "checkpoint.save_interval=5")
    with training(place, "requeued", *words) as (job_id, number):
        slurm("scontrol", "requeue", number)
        until(lambda: place.status(job_id)["status"] == "queued")
        num_done = len(place.losses("requeued"))
        assert num_done < 40, "it ended before it was taken away"
        start_now(slurm, number)
        place.wait(job_id)
    assert place.status(job_id)["restarts"] == 1
    assert "resuming from " in place.nemotron("jobs", "logs", job_id).stdout
    return f"after {num_done} steps; {same_adapter(place, local, 'requeued')}"


def start_now(slurm: Slurm, number: str) -> None:
    """Spare a job that is queued again the two minutes that Slurm lets it wait."""
    until(lambda: "JobState=PENDING" in slurm("scontrol", "-o", "show", "job", number))
    slurm("scontrol", "update", f"JobId={number}", "StartTime=now+3")


def run_out_of_time(place: Place) -> str:
    # It would take hours; the limit is a minute.
    job_id = place.start(
        PEFT, "train.train_iters=100000", "checkpoint.save=timeless", "run.env.time=1"
    )
    place.wait(job_id, code=75)
    assert place.status(job_id)["status"] == "preempted"
    num_done = len(place.losses("timeless"))
    saves = {path.name for path in (place.workspace / "timeless").glob("iter_*")}
    assert f"iter_{num_done:07d}" in saves, f"{num_done} steps done, saved are {sorted(saves)}"
    return f"exit code 75, all {num_done} steps that were done are saved"


def same_adapter(place: Place, local: Place, name: str) -> str:
    file = "iter_0000040/adapter_model.safetensors"
    found, wanted = place.workspace / name / file, local.workspace / "whole" / file
    assert found.read_bytes() == wanted.read_bytes(), "the adapters differ"
    return "the adapter has the bytes of an uninterrupted run"


def until(condition: Callable[[], object], seconds: float = ENOUGH_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
