"""Several hosts on one machine: network namespaces of Linux, each with an address of its own, joined by a switch. Needs root.

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
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = count()


def ip(*words): return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def impossible():   # why there can be no such hosts here, or ""
    "Try it: root in a container is often not allowed to."
    try:
        with Hosts(1): return ""
    except (OSError, subprocess.CalledProcessError) as error: return f"no network namespaces here: {(getattr(error, 'stderr', '') or str(error)).strip()}"


class Hosts:
    "Hosts 0 … n-1, and a switch, which is a small computer too: `start(\"switch\", …)`. All go in the end, with all their processes."
    def __init__(self, n):
        name = f"minikl{os.getpid()}-{next(NUMBER)}"
        self.names = {"switch": f"{name}-switch", **{i: f"{name}-{i}" for i in range(n)}}
        self.address = {"switch": "10.77.0.254", **{i: f"10.77.0.{i + 1}" for i in range(n)}}

    def __enter__(self):
        try:
            for host, name in self.names.items():
                ip("netns", "add", name)
                self.phone_book(name)
                ip("-n", name, "link", "set", "lo", "up")
                if host == "switch":
                    ip("-n", name, "link", "add", "cable", "type", "bridge")
                else:
                    ip("-n", name, "link", "add", "cable", "type", "veth", "peer", "name", f"port{host}", "netns", self.names["switch"])
                    ip("-n", self.names["switch"], "link", "set", f"port{host}", "up", "master", "cable")
                ip("-n", name, "address", "add", f"{self.address[host]}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
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

    def phone_book(self, name):
        "The file /etc/hosts of a host: there is nobody to ask for names here, and every question would wait until it times out."
        Path("/etc/netns", name).mkdir(parents=True)
        lines = ["127.0.0.1 localhost", f"127.0.0.1 {socket.gethostname()}", *(f"{kind}{address} {self.names[host]}" for kind in ("", "::ffff:") for host, address in self.address.items())]
        Path("/etc/netns", name, "hosts").write_text("\n".join(lines) + "\n")

    def start(self, host, *command, **environment):   # Popen
        "Start a program on a host."
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", **environment}
        return subprocess.Popen(["ip", "netns", "exec", self.names[host], *map(str, command)], cwd=ROOT, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def kill(self, host):
        "Every process of a host at once, as if somebody had stepped on its switch; but its system still closes the connections."
        for pid in ip("netns", "pids", self.names[host]).split():
            try: os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError: pass

    def cable(self, host, state):
        "Pull the network cable of a host (`down`), or plug it in again (`up`): here nothing closes a connection."
        ip("-n", self.names["switch"], "link", "set", f"port{host}", state)

    def torchrun(self, host, *command, nnodes=2, meet="switch", run="run", restarts=0, **environment):
        "Start one process of a script under torchrun, which meets its fellows of the same `run` at port 29400 of `meet`."
        is_host = int(host == meet)
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **environment}   # else a host that joins later waits for an address that is not told again (PyTorch 2.13)
        return self.start(host, sys.executable, "-m", "torch.distributed.run", f"--nnodes={nnodes}", "--nproc-per-node=1", f"--max-restarts={restarts}",
                          "--rdzv-backend=c10d", f"--rdzv-id={run}", f"--rdzv-endpoint={self.address[meet]}:29400", f"--rdzv-conf=is_host={is_host},last_call_timeout=2,keep_alive_interval=1",
                          f"--local-addr={self.address[host]}", *command, **environment)

    def meeting_place(self):
        "A store on the switch at which hosts find each other: so any of them may go."
        code = f"import time, torch.distributed as dist; store = dist.TCPStore({self.address['switch']!r}, 29400, is_master=True, wait_for_workers=False); time.sleep(1e6)"
        return self.start("switch", sys.executable, "-c", code)
