"""A RabbitMQ of the tests' own, by Debian's package: own name, ports, cookie and directory; nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import pika
from pika.exceptions import AMQPError

from tests.services import free_port

# Debian's /usr/sbin/rabbitmq-server changes to the user and the files of the system's own server; this does not.
PROGRAM = "/usr/lib/rabbitmq/bin/rabbitmq-server"


class RabbitMQ:
    """Keeps its port and its queues over `kill` and `start`. Needs no root, and no server of the system's."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}"
        self._home = Path(tempfile.mkdtemp(prefix="rabbitmq-"))
        self._log = self._home / "log"
        (self._home / "plugins").write_text("[].")
        (self._home / "rabbitmq.conf").write_text("disk_free_limit.absolute = 1MB\n")
        names = free_port()
        self._environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self._home),  # for the Erlang cookie, which is made there
            # Erlang's register of names. One is started below, so that no node starts a daemon that outlives it.
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(names),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(self._home / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._home / "plugins"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_MNESIA_BASE": str(self._home),
            "RABBITMQ_NODENAME": f"test{uuid.uuid4().hex}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            # So the script becomes the server instead of waiting for it: a signal to the one is a signal to the other.
            "RUNNING_UNDER_SYSTEMD": "true",
            # One scheduler that does not spin: the tests want the processor too.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        }
        self._names = subprocess.Popen(["epmd"], env=self._environment)
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> RabbitMQ:
        """Start it and wait until it takes connections."""
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                [PROGRAM], env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while True:
            try:
                pika.BlockingConnection(pika.URLParameters(self.url)).close()
            except AMQPError:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"RabbitMQ did not start:\n{self._log.read_text()}") from None
                time.sleep(0.1)
            else:
                return self

    @property
    def is_running(self) -> bool:
        return self._server is not None

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._signal(signal.SIGKILL)
        if self._server is not None:
            self._server.wait()
            self._server = None

    def pause(self) -> None:
        """Leave connections open but answer nothing (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End a `pause` (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, number)

    def close(self) -> None:
        """Kill it, and remove all that it has written."""
        self.kill()
        self._names.kill()
        self._names.wait()
        shutil.rmtree(self._home)
