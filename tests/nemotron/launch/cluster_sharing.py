"""Many jobs at once, and many nodes at one packing, on a real Slurm; one line for each that holds.

    python cluster_sharing.py [--only submit,eight,pack,kill,stop,ray-here,ray] [--keep DIRECTORY]

Fifty submissions at the same moment, eight runs into one output directory, and a packing of 40
files on both nodes: left alone, with a node that is killed on the way, told to stop and queued
again, and on Ray. Needs what cluster_matrix.py needs; takes about six minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cluster_matrix import Place, Report, Slurm, place_on, same_files, start_now, until
from conftest import open_cluster

import nemotron
from nemotron.cli.app import main as nemotron_main

PACK = "data_prep/sft_packing"
WORDS = ("the", "river", "runs", "to", "sea", "under", "seven", "bridges", "Anna", "counts")
CHATS = ("blend_path=chats", "num_shards=4")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(LINES), help="which lines, with commas")
    parser.add_argument("--keep", type=Path, help="where to leave all files")
    arguments = parser.parse_args()
    chosen = [LINES[name] for name in arguments.only.split(",")]
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="sharing-"))
    os.environ["PYTHONPATH"] = str(Path(nemotron.__file__).parents[1])
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    report = Report()
    try:
        with open_cluster(root / "slurm") as cluster:
            place = place_on(root / "here", cluster)
            write_chats(place.directory / "chats")
            report.line("local", "packing", lambda: pack_here(place))
            for name, prove in chosen:
                report.line("plain", name, partial(prove, place))
    finally:
        if arguments.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    print(f"{report.num_failed} failed")
    return 1 if report.num_failed else 0


def write_chats(directory: Path) -> None:
    directory.mkdir()
    chance = random.Random(0)
    for number in range(40):
        rows = [
            {
                "messages": [
                    {"role": role, "content": " ".join(chance.choices(WORDS, k=60))}
                    for role in ("user", "assistant") * 2
                ]
            }
            for _ in range(1200)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{number:02}.jsonl").write_text(text)


def at_once(place: Place, count: int, words: Callable[[int], tuple[str, ...]]) -> list[str]:
    """Submit so often at the same moment, from processes that have imported all; return the ids."""
    from nemotron.launch.lazy import load_nemo

    load_nemo()
    moment = time.time() + 2
    directory = place.directory / f"said-{count}"
    directory.mkdir()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            submit_at(moment, place, directory / str(number), words(number))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [(directory / str(number)).read_text() for number in range(count)]
    assert codes == [0] * count, f"{codes}: {said[codes.index(max(codes))]}"
    return [text.splitlines()[-1] for text in said]


def submit_at(moment: float, place: Place, said: Path, words: tuple[str, ...]) -> None:
    """Be a process that submits; never return."""
    code = 1
    try:
        os.environ.update(place.environment)
        os.chdir(place.directory)
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        time.sleep(max(0.0, moment - time.time()))
        code = nemotron_main(["steps", "run", PACK, "-c", "tiny", "-b", "p", *words])
        sys.stdout.flush()
    finally:
        os._exit(code)


def submit_fifty(place: Place) -> str:
    ids = at_once(
        place, 50, lambda number: (f"output_dir=out-{number}", "run.env.run_command=true")
    )
    assert len(set(ids)) == 50, "two have the same id"
    for job_id in ids:
        place.wait(job_id)
    numbers = {place.number(job_id) for job_id in ids}
    assert len(numbers) == 50, "two are the same job"
    seconds = {job_id.partition("-d")[0] for job_id in ids}
    return f"50 ids in {len(seconds)} different second(s), 50 jobs of Slurm, all succeeded"


def run_eight(place: Place) -> str:
    ids = at_once(place, 8, lambda _: (*CHATS, "output_dir=one"))
    codes = {job_id: place.nemotron("jobs", "wait", job_id, code=None).returncode for job_id in ids}
    assert sorted(codes.values()) == [0] + [7] * 7, codes
    (holder,) = [job_id for job_id, code in codes.items() if code == 0]
    for job_id in ids:
        error = place.status(job_id)["error"]
        assert job_id == holder or f"job {holder}, pid " in str(error), error
    return "one ran, seven ended with 7 and named it"


def pack_here(place: Place) -> str:
    place.nemotron("steps", "run", PACK, "-c", "tiny", *CHATS, "output_dir=wanted")
    return "to compare with"


def pack_on_two(place: Place) -> str:
    place.run(PACK, *CHATS, "run.env.nodes=2", "output_dir=two")
    return same_files(place.directory / "two", place.directory / "wanted")


def kill_a_node(place: Place) -> str:
    """Kill the step on the second node once some of its tasks are done; run it again."""
    words = (*CHATS, "run.env.nodes=2", "output_dir=killed")
    tokens = place.directory / ".killed.work" / "tokens"
    job_id = place.start(PACK, *words)
    until(lambda: len(list(tokens.glob("[!.]*.json"))) >= 6)
    os.kill(process_on_second_node(job_id), signal.SIGKILL)
    place.wait(job_id, code=8)
    assert not (place.directory / "killed").exists()
    shown = place.run(PACK, *words)
    (done,) = [line for line in shown.splitlines() if "were done by an earlier run" in line]
    equal = same_files(place.directory / "killed", place.directory / "wanted")
    return f"exit code 8; again: {done.partition('tokenize: ')[2]}; {equal}"


def stop_and_go_on(place: Place) -> str:
    """Tell both nodes to stop, as Slurm does ahead of a time limit; it queues itself again."""
    tokens = place.directory / ".stopped.work" / "tokens"
    words = (*CHATS, "run.env.nodes=2", "run.env.requeue=true", "output_dir=stopped")
    job_id = place.start(PACK, *words)
    until(lambda: len(list(tokens.glob("[!.]*.json"))) >= 6)
    slurm = Slurm(place.environment)
    slurm("scancel", "--signal=TERM", place.number(job_id))
    until(lambda: place.status(job_id)["restarts"] == 1)
    assert not (place.directory / "stopped").exists()
    start_now(slurm, place.number(job_id))
    place.wait(job_id)
    log = place.nemotron("jobs", "logs", job_id).stdout
    assert "stopped by SIGTERM" in log
    (done,) = [line for line in log.splitlines() if "were done by an earlier run" in line]
    equal = same_files(place.directory / "stopped", place.directory / "wanted")
    left = [path.name for path in tokens.parent.iterdir() if path.name != "tokens"]
    assert not left, left
    return f"queued again by itself: {done.partition('tokenize: ')[2]}; {equal}"


def pack_on_ray_here(place: Place) -> str:
    words = ("-c", "tiny", *CHATS, "execution_mode=ray", "output_dir=ray-here")
    place.nemotron("steps", "run", PACK, *words)
    return same_files(place.directory / "ray-here", place.directory / "wanted")


def pack_on_ray(place: Place) -> str:
    words = (*CHATS, "run.env.nodes=2", "execution_mode=ray", "output_dir=ray")
    job_id = place.start(PACK, *words)
    until(lambda: {b"0", b"1"} <= nodes_of(job_id, b"ray::_remote"))
    place.wait(job_id)
    log = place.nemotron("jobs", "logs", job_id).stdout
    (line,) = [line for line in log.splitlines() if "Ray has" in line]
    assert not nodes_of(job_id, b""), "something of the job still runs"
    equal = same_files(place.directory / "ray", place.directory / "wanted")
    return f"{line.partition(': ')[2]}, tasks on both; {equal}"


def nodes_of(job_id: str, word: bytes) -> set[bytes]:
    """Return the numbers of the nodes on which a job runs a command with this word."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pairs = (path / "environ").read_bytes().split(b"\0")
            is_of_job = f"NEMOTRON_JOB={job_id}".encode() in pairs
            if is_of_job and word in (path / "cmdline").read_bytes():
                found |= {pair[-1:] for pair in pairs if pair.startswith(b"NEMOTRON_NODE=")}
    return found


def process_on_second_node(job_id: str) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        wanted = {b"NEMOTRON_NODE=1", f"NEMOTRON_JOB={job_id}".encode()}
        if wanted <= set(environment) and b"sft_packing.step" in command:
            return int(path.name)
    raise AssertionError("the second node runs nothing")


LINES = {
    "submit": ("fifty submissions", submit_fifty),
    "eight": ("eight into one directory", run_eight),
    "pack": ("packing on two nodes", pack_on_two),
    "kill": ("packing, a node killed", kill_a_node),
    "stop": ("packing, told to stop", stop_and_go_on),
    "ray-here": ("packing on Ray, on this machine", pack_on_ray_here),
    "ray": ("packing on two nodes, on Ray", pack_on_ray),
}


if __name__ == "__main__":
    sys.exit(main())
