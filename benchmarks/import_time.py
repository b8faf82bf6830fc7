"""What `import broadcastable` costs beyond importing its own core dependencies, in fresh interpreters.

python benchmarks/import_time.py

Processor time, and the least of several rounds, so that it matters little what else the machine does. All is compiled
before, as an installer leaves it.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

DEPENDENCIES = "import sqlalchemy, sqlalchemy.orm, jwt, cryptography, httpx, dramatiq, redis, msgspec"
ROUNDS = 15

ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    seconds("import broadcastable")
    rounds = [(seconds("pass"), seconds(DEPENDENCIES), seconds("import broadcastable")) for _ in range(ROUNDS)]
    bare, dependencies, ours = (min(column) for column in zip(*rounds, strict=True))
    print(f"{'dependencies':<16}{(dependencies - bare) * 1000:8.0f} ms")
    print(f"{'broadcastable':<16}{(ours - bare) * 1000:8.0f} ms")
    print(f"{'ratio':<16}{(ours - bare) / (dependencies - bare):8.2f}     (at most 1.15)")


if __name__ == "__main__":
    main()
