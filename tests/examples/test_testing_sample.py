"""examples/testing_sample: what its README installs, and how it is started. `tox -e sample` runs its suite."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

import httpx

from tests.services import free_port

from .processes import EXAMPLES, answers, until

HERE = EXAMPLES / "testing_sample"


def requirement(text: str) -> str:
    """Without its version."""
    return re.split("[<>=~!;]", text)[0]


def test_the_readme_installs_what_its_suite_is_run_with():
    """So that a package missing from one of them is missed by the run of the other."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(EXAMPLES.parent / "tox.ini")
    (line,) = re.findall(r"^    pip install (.*)$", (HERE / "README.md").read_text(), re.MULTILINE)
    ours, *others = shlex.split(line)

    assert ours == "broadcastable[cli,server]"
    assert sorted(others) == sorted(requirement(each) for each in tox["testenv:sample"]["deps"].split())


def test_the_application_starts_as_its_first_lines_say(tmp_path: Path):
    """The key is made first, and both the stream server and the application have it."""
    directory, log = tmp_path / "sample", tmp_path / "log"
    shutil.copytree(HERE, directory, ignore=shutil.ignore_patterns("chat.db*", "__pycache__"))
    port, stream_port = free_port(), free_port()
    lines = re.findall(r"^\$ (.*)$", ast.get_docstring(ast.parse((HERE / "app.py").read_text())) or "", re.MULTILINE)
    options = {"broadcastable server &": f" --port {stream_port} &", "uvicorn app:app": f" --port {port}"}
    script = "\n".join(line.removesuffix(" &") + options.get(line, "") for line in lines)
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("BROADCASTABLE_")},
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
        "BROADCASTABLE_SERVER_URL": f"http://127.0.0.1:{stream_port}/v1/streams",
    }
    with log.open("ab") as output:
        shell = subprocess.Popen(
            ["sh", "-ec", script], cwd=directory, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            until(lambda: answers(client, "/openapi.json"), log)
            room = client.post("/rooms", json={"name": "garden"}).raise_for_status().json()["id"]
            message = {"author": "Ada", "text": "Hello"}
            client.post(f"/rooms/{room}/messages", json=message).raise_for_status()
            url = httpx.URL(until(lambda: given(client, room), log)).copy_merge_params({"offset": "-1"})

            (event,) = until(lambda: httpx.get(url).raise_for_status().json(), log)

            assert event["value"]["text"] == "Hello"
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(15)


def given(client: httpx.Client, room: int) -> str | None:
    """Where to read the room; nothing as long as the stream server is not there."""
    response = client.get(f"/rooms/{room}")
    return response.json()["messages"] if response.status_code == 200 else None
