"""Several hosts on one machine: network namespaces of Linux, joined by a switch.

Each has an address of its own. Needs root.

    with Hosts(2) as hosts:
        process = hosts.start(0, "ping", "-c1", hosts.address[1])
        hosts.kill(1)
"""
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = count()
PORT = 29400   # where hosts of a run meet


def ip(*words):   # what it printed
    "Call the command `ip`."
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    return done.stdout


def impossible():   # why there can be no such hosts here, or ""
    "Try it: root in a container is often not allowed to."
    try:
        with Hosts(1):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"no network namespaces here: {said.strip()}"


class Hosts:
    """Hosts 0 … n-1, and a switch, which is a small computer too.

    `start("switch", …)` starts a program on it. All go in the end, with all their
    processes.
    """
    def __init__(self, n):
        name = f"minikl{os.getpid()}-{next(NUMBER)}"
        self.names = {"switch": f"{name}-switch"}
        self.address = {"switch": "10.77.0.254"}
        for host in range(n):
            self.names[host] = f"{name}-{host}"
            self.address[host] = f"10.77.0.{host + 1}"

    def __enter__(self):
        try:
            for host in self.names:
                self.build(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for host, name in self.names.items():
            if Path("/run/netns", name).exists():
                self.kill(host)
                ip("netns", "delete", name)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)

    def build(self, host):
        "Make a namespace, and plug its cable into the switch, which is made first."
        name = self.names[host]
        ip("netns", "add", name)
        self.phone_book(name)
        ip("-n", name, "link", "set", "lo", "up")
        cable = ["-n", name, "link", "add", "cable", "type"]
        if host == "switch":
            ip(*cable, "bridge")
        else:
            switch = self.names["switch"]
            port = f"port{host}"
            ip(*cable, "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "up", "master", "cable")
        ip("-n", name, "address", "add", f"{self.address[host]}/24", "dev", "cable")
        ip("-n", name, "link", "set", "cable", "up")

    def phone_book(self, name):
        """The file /etc/hosts of a host.

        There is nobody to ask for names here, and every question would wait until it
        times out.
        """
        lines = ["127.0.0.1 localhost", f"127.0.0.1 {socket.gethostname()}"]
        for kind in ("", "::ffff:"):
            for host, address in self.address.items():
                lines.append(f"{kind}{address} {self.names[host]}")
        folder = Path("/etc/netns", name)
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def start(self, host, *command, **environment):   # Popen
        "Start a program on a host."
        own = {
            "GLOO_SOCKET_IFNAME": "cable",
            "PYTHONPATH": str(ROOT),
            "TQDM_DISABLE": "1",
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **own, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def kill(self, host):
        """Every process of a host at once, as if somebody had stepped on its switch.

        But its system still closes the connections.
        """
        for pid in ip("netns", "pids", self.names[host]).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cable(self, host, state):
        """Pull the network cable of a host (`down`), or plug it in again (`up`).

        Here nothing closes a connection.
        """
        ip("-n", self.names["switch"], "link", "set", f"port{host}", state)

    def torchrun(
        self,
        host,              # number of the host that the process runs on
        *command,          # script and its arguments
        nnodes=2,          # hosts of the run
        meet="switch",     # where they meet
        run="run",         # name of the run
        restarts=0,        # how often torchrun may begin again
        **environment,
    ):                     # Popen
        "Start one process of a script under torchrun, which finds those of its run."
        # else a host that joins later waits for an address that is not told again
        # (PyTorch 2.13)
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **environment}
        is_host = int(host == meet)
        meeting = f"is_host={is_host},last_call_timeout=2,keep_alive_interval=1"
        options = [
            f"--nnodes={nnodes}",
            "--nproc-per-node=1",
            f"--max-restarts={restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={run}",
            f"--rdzv-endpoint={self.address[meet]}:{PORT}",
            f"--rdzv-conf={meeting}",
            f"--local-addr={self.address[host]}",
        ]
        launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        return self.start(host, *launcher, *command, **environment)

    def meeting_place(self):   # Popen
        "A store on the switch at which hosts find each other: so any of them may go."
        place = f"{self.address['switch']!r}, {PORT}"
        code = (
            "import time, torch.distributed as dist; "
            f"store = dist.TCPStore({place}, is_master=True, wait_for_workers=False); "
            "time.sleep(1e6)"
        )
        return self.start("switch", sys.executable, "-c", code)
