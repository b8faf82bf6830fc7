"""What signing costs above the bare ECDSA P-256 signature: at most 1.5 times as much.

Run `python benchmarks/tokens.py`; it exits with 1 when the ratio is over the limit. Rounds alternate and the best
of each counts, so that a busy machine slows both or neither.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper, generate_key_pair

LIMIT = 1.5
ROUNDS = 30
CALLS = 500


def best_microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
    return best


def main() -> int:
    pair = generate_key_pair()
    gatekeeper = Gatekeeper(Settings(signing_key=pair.private_pem))
    claims = {"stream": "gid://app/Room/1/messages", "permissions": ["read"]}
    token = gatekeeper.encode(claims)
    signed_part = token.rpartition(".")[0].encode()
    key = load_pem_private_key(pair.private_pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    took = best_microseconds(
        {
            "bare signature": lambda: key.sign(signed_part, ec.ECDSA(hashes.SHA256())),
            "encode": lambda: gatekeeper.encode(claims),
            "decode": lambda: gatekeeper.decode(token),
            "server_token": gatekeeper.server_token,
        }
    )
    for name, microseconds in took.items():
        print(f"{name:<15} {microseconds:8.2f} µs")
    ratio = took["encode"] / took["bare signature"]
    print(f"encode is {ratio:.2f} times the bare signature (limit {LIMIT})")
    return ratio > LIMIT


if __name__ == "__main__":
    sys.exit(main())
