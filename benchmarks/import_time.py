"""What `import broadcastable` costs beyond importing its own core dependencies, in fresh interpreters.

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

DEPENDENCIES = "import sqlalchemy, sqlalchemy.orm, jwt, cryptography, httpx, dramatiq, redis, msgspec"
ROUNDS = 15


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def main() -> None:
    rounds = [(seconds("pass"), seconds(DEPENDENCIES), seconds("import broadcastable")) for _ in range(ROUNDS)]
    bare, dependencies, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"{'dependencies':<16}{(dependencies - bare) * 1000:8.0f} ms")
    print(f"{'broadcastable':<16}{(ours - bare) * 1000:8.0f} ms")
    print(f"{'ratio':<16}{(ours - bare) / (dependencies - bare):8.2f}     (at most 1.15)")


if __name__ == "__main__":
    main()
