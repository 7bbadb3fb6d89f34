#!/usr/bin/env python3
"""Makes what the nodes of a deployment know each other by, once: a key and its certificate, in a file for Terraform.

`handover_key.py`, or `handover_key.py FILE`; by default terraform/handover.auto.tfvars.json. What is there stays.
"""

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
except ModuleNotFoundError as error:
    sys.exit(f"error: Python has no module {error.name}; run `make bake`, which sets up .venv, and use its Python")

FILE = Path(__file__).resolve().parents[1] / "terraform" / "handover.auto.tfvars.json"
_YEARS = 50  # it is trusted by itself alone, and replaced by whoever wants to


def make_pair(now: datetime) -> dict[str, str]:
    """Certificate and key as PEM; the certificate is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mini-llm handover")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A node's clock may be behind at its first boot.
        .not_valid_before(now - timedelta(days=365))
        .not_valid_after(now + timedelta(days=365 * _YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {"certificate": certificate.public_bytes(serialization.Encoding.PEM).decode(), "key": secret.decode()}


def main(words: list[str]) -> int:
    """Writes the file, for its owner alone."""
    if words[:1] in (["-h"], ["--help"]) or len(words) > 1:
        print(__doc__)
        return 0 if words[0] in ("-h", "--help") else 2
    path = Path(words[0]) if words else FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        print(f"{path} is there already; running nodes know each other by it, so it stays")
        return 0
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    with os.fdopen(descriptor, "w") as file:
        json.dump({"handover": make_pair(datetime.now(UTC))}, file, indent=1)
        file.write("\n")
    print(f"{path} is made; keep it, and keep it secret")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
