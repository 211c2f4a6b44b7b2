"""A real Slurm cluster of two nodes on this machine, for as long as standard input stays open.

    python slurm_rig.py DIRECTORY [--accounting]

Each node is a slurmd in network, host-name and mount namespaces of its own, so that what crosses
nodes crosses a network. Prints one line once both nodes are idle; ``DIRECTORY/environment`` then
has the variables that clients need. Ends with the process that started it, however that ends.
Needs root and Debian's packages slurmctld, slurmd, slurm-client, munge, iproute2, util-linux; with
gcc, libslurm-dev and squashfs-tools it also has ``srun --container-image`` (see pyxis.c).
``--accounting`` adds slurmdbd over a MariaDB of its own (slurmdbd, slurm-wlm-mysql-plugin,
mariadb-server), which is what ``sacct`` asks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
NODES = ("n1", "n2")
CPUS, GPUS = 8, 4
WAIT_SECONDS = 40

CONFIGURATION = """
ClusterName=rig
SlurmctldHost={head}({network}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
{accounting}
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
KillWait=8
CompleteWait=0
MinJobAge=3600
OverTimeLimit=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={root}/munge.socket"""
DATABASE_DAEMON = """AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
DbdHost={head}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs={cpus} Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{gpus}"
)


class Rig:
    """The daemons and the network; every part is undone by ``close``, the last one first."""

    def __init__(self, root: Path, *, has_accounting: bool) -> None:
        self.root = root
        self._has_accounting = has_accounting
        self._undo = contextlib.ExitStack()
        # One number keeps the names, addresses and ports of several rigs apart.
        self._number = os.getpid() % 10_000
        self._network = f"10.{200 + self._number // 250 % 50}.{self._number % 250}"
        self._port = 20_000 + self._number * 3 % 20_000

    def open(self) -> None:
        for name in ("state", "spool"):
            (self.root / name).mkdir(parents=True)
        self._lay_network()
        self._configure()
        self._start_munge()
        if self._has_accounting:
            self._start_accounting()
        self._start("slurmctld", ["slurmctld", "-D", "-c"])
        for name in NODES:
            command = f"hostname {name}; mount --bind {self.root}/hosts /etc/hosts; "
            command += f"exec slurmd -D -N {name}"
            inside = ["nsenter", f"--net=/run/netns/{self._space(name)}"]
            inside += ["unshare", "--uts", "--mount", "--propagation", "private"]
            self._start(f"slurmd.{name}", [*inside, "sh", "-c", command])
        self._undo.callback(self._end_jobs)
        self._wait_until_idle()

    def close(self) -> None:
        self._undo.close()
        for root in Path("/tmp").glob(".rig-root.*"):  # noqa: S108 - of containers, see pyxis.c
            with contextlib.suppress(OSError):
                root.rmdir()

    def _lay_network(self) -> None:
        bridge = f"nmrig{self._number}"
        _do("ip", "link", "add", bridge, "type", "bridge")
        self._undo.callback(_try, "ip", "link", "del", bridge)
        _do("ip", "address", "add", f"{self._network}.1/24", "dev", bridge)
        _do("ip", "link", "set", bridge, "up")
        hosts = [f"127.0.0.1 localhost\n{self._network}.1 {os.uname().nodename}\n"]
        for index, name in enumerate(NODES):
            space, cable = self._space(name), f"nm{index}r{self._number}"
            address = f"{self._network}.{10 + index}"
            hosts.append(f"{address} {name}\n")
            _do("ip", "netns", "add", space)
            self._undo.callback(_try, "ip", "netns", "del", space)
            _do(*("ip", "link", "add", cable, "type", "veth", "peer", "eth0", "netns", space))
            self._undo.callback(_try, "ip", "link", "del", cable)
            _do("ip", "link", "set", cable, "master", bridge, "up")
            inside = ("ip", "-netns", space)
            _do(*inside, "address", "add", f"{address}/24", "dev", "eth0")
            _do(*inside, "link", "set", "lo", "up")
            _do(*inside, "link", "set", "eth0", "up")
        (self.root / "hosts").write_text("".join(hosts))

    def _configure(self) -> None:
        nodes = [
            NODE.format(
                name=name,
                address=f"{self._network}.{10 + index}",
                port=self._port + 1,
                cpus=CPUS,
                gpus=GPUS,
            )
            for index, name in enumerate(NODES)
        ]
        head = os.uname().nodename.partition(".")[0]
        text = CONFIGURATION.format(
            head=head,
            network=self._network,
            port=self._port,
            root=self.root,
            nodes="\n".join(nodes),
            accounting=self._accounting(ACCOUNTING) if self._has_accounting else NO_ACCOUNTING,
        )
        (self.root / "slurm.conf").write_text(text)
        # slurmd looks for cgroups that nothing here uses; this plugin needs none to be mounted.
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True)
        is_new = version.stdout.split()[-1] >= "23.11"
        plugin = "disabled" if is_new else "cgroup/v1"
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        # A GPU needs a file; what is in it does not matter.
        for index in range(GPUS):
            (self.root / f"gpu{index}").touch()
        lines = (f"NodeName={n} Name=gpu File={self.root}/gpu[0-{GPUS - 1}]\n" for n in NODES)
        (self.root / "gres.conf").write_text("".join(lines))
        tools = self.root / "bin"
        tools.mkdir()
        if self._build_containers():
            shutil.copy(HERE / "enroot.sh", tools / "enroot")
            (tools / "enroot").chmod(0o755)
        os.environ["SLURM_CONF"] = f"{self.root}/slurm.conf"
        os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
        (self.root / "environment").write_text(f"SLURM_CONF={self.root}/slurm.conf\n")

    def _build_containers(self) -> bool:
        """Compile the stand-in for pyxis, where the tools for it are."""
        tools = all(shutil.which(tool) for tool in ("gcc", "mksquashfs"))
        if not tools or not Path("/usr/include/slurm/spank.h").exists():
            return False
        plugin = self.root / "pyxis.so"
        _do("gcc", "-shared", "-fPIC", "-O1", "-o", str(plugin), str(HERE / "pyxis.c"))
        (self.root / "plugstack.conf").write_text(f"required {plugin} {HERE / 'container.sh'}\n")
        return True

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        socket = self.root / "munge.socket"
        options = [f"--key-file={key}", f"--socket={socket}", f"--seed-file={self.root}/seed"]
        options += [f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/munged.log"]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        _until(socket.exists, "munged")

    def _accounting(self, text: str) -> str:
        head = os.uname().nodename.partition(".")[0]
        return text.format(root=self.root, head=head, port=self._port + 2)

    def _start_accounting(self) -> None:
        """Start slurmdbd over a database of its own, which listens on a socket only."""
        data, socket = self.root / "database", self.root / "database.socket"
        own = ["--no-defaults", "--user=root", f"--datadir={data}"]
        _do(
            "mariadb-install-db", *own, "--skip-test-db", "--auth-root-authentication-method=socket"
        )
        options = [
            f"--socket={socket}",
            f"--pid-file={self.root}/database.pid",
            "--skip-networking",
        ]
        options += ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M"]
        options += ["--innodb-lock-wait-timeout=900", "--skip-log-bin"]
        self._start("database", ["mariadbd", *own, *options])
        ping = ("mariadb-admin", "--no-defaults", f"--socket={socket}", "ping")
        _until(lambda: "alive" in _try(*ping), "the database")
        configuration = self.root / "slurmdbd.conf"
        configuration.write_text(self._accounting(DATABASE_DAEMON))
        configuration.chmod(0o600)
        os.environ["MYSQL_UNIX_PORT"] = str(socket)
        self._start("slurmdbd", ["slurmdbd", "-D"])
        _until(lambda: "rig" in _try("sacctmgr", "-i", "-n", "add", "cluster", "rig"), "slurmdbd")

    def _start(self, name: str, command: list[str]) -> None:
        with (self.root / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._undo.callback(_stop, process)

    def _end_jobs(self) -> None:
        """End what runs, so that no process of a job outlives its slurmd."""
        _try("scancel", "--signal=KILL", "--full", "--user=root")
        _try("scancel", "--user=root")
        with contextlib.suppress(TimeoutError):
            _until(lambda: not _try("squeue", "-h", "-t", "R,CG"), "the jobs", 10)

    def _wait_until_idle(self) -> None:
        _until(lambda: _try("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2, "the nodes")

    def _space(self, node: str) -> str:
        return f"nmrig{self._number}-{node}"


def _do(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30, stdout=subprocess.DEVNULL)


def _try(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout


def _until(condition, what: str, seconds: float = WAIT_SECONDS) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come up in {seconds} s")
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)


def main() -> None:
    rig = Rig(Path(sys.argv[1]).absolute(), has_accounting="--accounting" in sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        rig.open()
        print("up", flush=True)
        sys.stdin.buffer.read()
    finally:
        rig.close()


if __name__ == "__main__":
    main()
