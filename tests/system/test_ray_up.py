"""Tests the repository's cluster.yaml as it is, and the commands of docs/deployment.md word for
word.

`ray up` reaches two machines by ssh, under TLS. Each machine has its own network, processes, /etc,
/tmp and home, in namespaces of Linux. So the file keeps its addresses and user, and its `ray stop`,
which ends every cluster of a machine, reaches no other cluster of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.processes import SOAK

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/deployment.md").read_text()
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
HEAD = CLUSTER["provider"]["head_ip"]
(OTHER,) = CLUSTER["provider"]["worker_ips"]
OPERATOR = HEAD.rpartition(".")[0] + ".1"
ADDRESSES = {"operator": OPERATOR, "head": HEAD, "other": OTHER}
UNSHARE = (
    "unshare",
    "--mount",
    "--uts",
    "--net",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
NEEDED = (
    "setpriv",
    "unshare",
    "nsenter",
    "ip",
    "/usr/sbin/sshd",
    "ssh",
    "ssh-keygen",
    "rsync",
    "openssl",
)

JOB = """
from tg_tinker import ServiceClient
print("joined:", len(ServiceClient().cluster_status().machines))
"""

# $1: folder of the machine, $2: its address, $3: the operator's, $4...: folder=address of the
# others, which the operator's machine starts: they end with it. Links lead to what lies in /tmp.
MACHINE = r"""
set -e
mount --bind "$1/etc" /etc; mount -t tmpfs tmpfs /run; mkdir /run/sshd
[ "$2" != "$3" ] || mount --rbind /tmp /mnt
mount -t tmpfs tmpfs /tmp
for old in /mnt/*; do case $old in /mnt/ray*) ;; *) ln -s "$old" /tmp;; esac; done
hostname "$(basename "$1")"; ip link set lo up
if [ "$2" = "$3" ]; then
  ip link add lan type bridge; ip address add "$2/24" dev lan; ip link set lan up
  for machine in "${@:4}"; do
    UNSHARE bash "$1/../machine.sh" "${machine%=*}" "${machine#*=}" "$3" &
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    ip link add "port$!" type veth peer name eth0 netns $!
    ip link set "port$!" master lan up
  done
else
  until ip link set eth0 up 2>/dev/null; do sleep 0.1; done
  ip address add "$2/24" dev eth0; ip route add default via "$3"
  /usr/sbin/sshd -f /dev/null -h "$1/host_key" -o UsePAM=no -o StrictModes=no
fi
touch "$1/ready"
while :; do sleep 1 & wait $!; done  # the shell reaps what has lost its parent
"""


def made(folder: Path, address: str) -> None:
    """Makes what is on a machine before it runs: /etc, and the home of cluster.yaml's user."""
    home, user = folder / "home", CLUSTER["auth"]["ssh_user"]
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / "bin").mkdir()
    pip = home / "bin/pip"  # for nothing outside can be reached
    wheel = "/opt/tg-tinker/tg_tinker-0.1.0-py3-none-any.whl"
    pip.write_text(f'#!/bin/sh\n[ "$*" = "install {wheel}" ]\n')
    pip.chmod(0o755)
    shutil.copytree("/etc", folder / "etc", symlinks=True)
    accounts = folder / "etc/passwd"
    accounts.write_text(f"{user}:x:0:0::{home}:/bin/bash\n" + accounts.read_text())
    path = f"export PATH={home}/bin:{Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}\n"
    (home / ".bashrc").write_text(path)
    make_key(folder / "host_key")
    if address != OPERATOR:
        certify(folder, address)


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def certify(folder: Path, address: str) -> None:
    """Runs the guide's own commands; the authority is made once."""
    authority, certificate = re.findall(r"^openssl req .*?(?=^openssl req|```)", GUIDE, re.S | re.M)
    script = certificate.replace("10.0.0.1", address)
    if not (folder.parent / "ca.crt").exists():
        script = authority + script
    there = folder / "etc/tg-tinker"
    there.mkdir()
    subprocess.run(["bash", "-ec", script], cwd=folder.parent, check=True, capture_output=True)
    for name in ("ca.crt", "node.crt", "node.key"):
        shutil.copy(folder.parent / name, there)
    (there / "node.key").chmod(0o600)


class Operator:
    """A computer from which the two machines are started."""

    def __init__(self, folder: Path, process: int) -> None:
        self.home = folder / "operator/home"
        self._process = process
        self._environment = {
            "HOME": str(self.home), "LOGNAME": CLUSTER["auth"]["ssh_user"],
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(ROOT), "TERM": "dumb",
        }  # fmt: skip

    def run(self, command: str, code: int | None = 0) -> str:
        """Returns the output of a command in a folder with the repository's cluster.yaml."""
        inside = f"cd ~ && {command}"
        done = subprocess.run(
            ["nsenter", f"--target={self._process}", "--mount", "--uts", "--net", "--pid",
             "bash", "-c", inside], env=self._environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert code in (done.returncode, None), done.stdout
        return done.stdout

    def configure_head(self, settings: str) -> None:
        with (self.home.parents[1] / "head/home/.bashrc").open("a") as file:
            file.write(settings)

    def on(self, address: str, command: str) -> str:
        return self.run(f"ssh -q -o StrictHostKeyChecking=no {address} {command!r}", code=None)


@pytest.fixture
def operator() -> Iterator[Operator]:
    if not SOAK:
        pytest.skip("make soak")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)} here")
    if subprocess.run([*UNSHARE, "ip", "link", "add", "lan", "type", "bridge"], check=False,
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip("no namespaces for machines of their own here: that takes root")
    with tempfile.TemporaryDirectory(prefix="tg", ignore_cleanup_errors=True) as name:
        yield from running(Path(name))


def running(folder: Path) -> Iterator[Operator]:
    for machine, address in ADDRESSES.items():
        made(folder / machine, address)
    home = folder / "operator/home"
    make_key(home / ".ssh/id_ed25519")
    for machine in ("head", "other"):
        keys = folder / machine / "home/.ssh/authorized_keys"
        shutil.copy(home / ".ssh/id_ed25519.pub", keys)
    shutil.copy(ROOT / "cluster.yaml", home)
    script = folder / "machine.sh"
    script.write_text(MACHINE.replace("UNSHARE", " ".join(UNSHARE)))
    others = [f"{folder / machine}={ADDRESSES[machine]}" for machine in ("head", "other")]
    started = subprocess.Popen(
        [
            "setpriv",
            "--pdeathsig",
            "KILL",
            *UNSHARE,
            "bash",
            script,
            folder / "operator",
            OPERATOR,
            OPERATOR,
            *others,
        ]
    )
    try:
        deadline = time.monotonic() + 120
        while not all((folder / machine / "ready").exists() for machine in ADDRESSES):
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text()
        yield Operator(folder, int(children))
    finally:
        os.kill(started.pid, signal.SIGKILL)  # and with it everything in its namespaces
        started.wait()


def lines(beginning: str) -> str:
    """Returns the lines of the guide from this beginning to the end of their block."""
    found = re.search(f"^{re.escape(beginning)}.*?(?=```)", GUIDE, re.S | re.M)
    assert found is not None
    return found[0]


def started(operator: Operator, up: str, status: str) -> str:
    """Returns the output of `status` once both machines have joined.

    As the guide describes, it runs `ray up` again where a machine did not start: Ray gives up after
    30 s, which a busy computer may need.
    """
    for _ in range(3):
        assert "Usage stats collection is disabled." in operator.run(up, code=None)
        operator.configure_head(lines("umask 077\n"))  # not before: cluster.yaml brings its own
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            if re.search(f"^{OTHER} ", said := operator.run(status, code=None), re.M):  # a row
                return said
            time.sleep(2)
    pytest.fail(said)


@pytest.mark.program
@pytest.mark.timeout(900)
def test_ray_up_starts_two_machines_under_tls_and_ray_down_ends_the_head(
    operator: Operator,
) -> None:
    token, up, status, send, submit, down = lines("umask 077; ray get-auth-token").splitlines()
    operator.run(token)
    said = started(operator, up, status)
    assert f"cluster at {HEAD}:6379, under TLS" in said

    (operator.home / "train.py").write_text(JOB)
    operator.run(send)
    assert "joined: 2" in operator.run(submit)

    stranger = status.replace("tg-tinker", f"RAY_AUTH_TOKEN={'0' * 64} ray")
    assert "InvalidAuthToken" in operator.run(stranger, code=1)

    for address in (HEAD, OTHER):
        open_to_others = "find ~/.ray ~/.tg-tinker ~/ray_* /tmp/ray -type f -perm /077 2>&-"
        assert operator.on(address, open_to_others) == ""
    assert "auth_token" in operator.on(OTHER, "ls .ray")

    assert "gcs_server" in operator.on(HEAD, "ps -A")
    operator.run(down)
    assert not {"gcs_server", "raylet"} & {*operator.on(HEAD, "ps -A").split()}
