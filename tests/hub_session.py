"""Commands and code in a process that knows the Hub by its environment alone, as a user's process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer

# Runs what it gets, line by line, in one process, whose environment names the server before anything is imported.
# Waiting between attempts is left out.
DRIVER = """
import contextlib, io, json, os, sys, time, traceback
time.sleep = lambda seconds: None
names, real = {}, sys.stdout
for line in sys.stdin:
    order, out, err = json.loads(line), io.TextIOWrapper(io.BytesIO()), io.StringIO()
    answer = {"status": 0}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "argv" in order:
                from depict_hf.cli import main
                answer["status"] = main(order["argv"])
            else:
                exec(order["code"], names)
                answer["value"] = names.pop("value", None)
        except BaseException as error:
            answer |= {"status": 1, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    out.flush()
    answer |= {"out": out.buffer.getvalue().decode(), "err": err.getvalue()}
    print(json.dumps(answer), file=real, flush=True)
"""


class Session:
    """A process whose environment names the server."""

    def __init__(self, server: HubServer, home: Path):
        self.environment = environment(server.address, home)
        command = [sys.executable, "-c", DRIVER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes, text=True, env=self.environment)

    def order(self, **order) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def command(self, *argv: object) -> dict:
        return self.order(argv=[str(each) for each in argv])

    def run(self, code: str):
        answer = self.order(code=code)
        assert answer["status"] == 0, answer["trace"]
        return answer["value"]

    def upload(self, arguments: str, ready: str = "ready") -> str:
        """Address of the commit, or what is raised."""
        answer = self.order(code=f"value = upload({ready}, {arguments})")
        return answer.get("value") or answer["error"]


def environment(address: str, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_me",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
