"""Runs clusters that outlive their program, each in a home of its own."""

from __future__ import annotations

import datetime
import ipaddress
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support.processes import free_port
from support.runs import config
from tg_tinker import ResourceConfig, TrainingConfig


@dataclass(frozen=True)
class Machine:
    """A home, and the environment of its programs."""

    home: Path
    environment: Mapping[str, str]

    def run(self, *words: str, code: int = 0, answer: str = "") -> str:
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-c", "from tg_tinker.cli.main import main; main()", *words],
                env=self.environment, input=answer, capture_output=True, text=True, timeout=120,
                check=False,
            )  # fmt: skip
            if "timed out during startup" not in done.stderr:
                break  # else the machine was busy: Ray waits 30 s and has no setting for it
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def train(self, *words: str) -> list[str]:
        """Returns what a program of its own prints that trains one step and ends without
        closing."""
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, *words], env=self.environment, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()


def machine(tmp_path: Path, name: str, **more: str) -> Machine:
    """Makes a machine whose token and files of Ray no other cluster here uses."""
    for folder in ("user", name):
        (tmp_path / folder).mkdir(mode=0o700, exist_ok=True)
    mine = {
        "HOME": str(tmp_path / "user"), "RAY_TMPDIR": str(tmp_path / name),
        "TG_TINKER_HOME": str(tmp_path / name / "home"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return Machine(tmp_path / name / "home", others | mine | more)


def up(one: Machine, *words: str, port: int, code: int = 0) -> str:
    more = ("--port", str(port), "--dashboard-port", str(free_port()))
    return one.run("up", *more, *words, code=code)


def here(model: Path | str) -> TrainingConfig:
    return config(Path(model), resources=ResourceConfig(num_cpus=1, num_threads=1))


ROOT = Path(__file__).parents[2]


TRAIN = """
import sys
from tg_tinker import LoRAConfig, ServiceClient, TrainingConfig

service = ServiceClient()
if len(sys.argv) == 2:
    lora = LoRAConfig(rank=2, target_modules="all-linear")
    tc = service.create_training_client(TrainingConfig(model_ref=sys.argv[1], lora_config=lora))
else:
    tc = service.get_training_client(sys.argv[2])
tc.forward_backward({"input_ids": [[1, 2, 3, 4]]})
print(tc.id, tc.optim_step().result().step)
"""


def certificates(folder: Path, days: float = 90) -> dict[str, str]:
    """Makes one authority and one certificate for all addresses of this machine, as Ray's TLS
    requires."""
    now = datetime.datetime.now(datetime.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    own = node_address()
    addresses = [x509.IPAddress(ipaddress.ip_address(a)) for a in ("127.0.0.1", "127.0.0.2", own)]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([*addresses, x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *private))
    (folder / "key.pem").chmod(0o600)
    return {
        "RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": str(folder / "cert.pem"),
        "RAY_TLS_SERVER_KEY": str(folder / "key.pem"), "RAY_TLS_CA_CERT": str(folder / "cert.pem"),
    }  # fmt: skip


def node_address() -> str:
    """Returns the address that Ray takes for this machine's."""
    from ray._private.services import get_node_ip_address

    return str(get_node_ip_address())
