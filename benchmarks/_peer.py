"""A library in a process and an environment of its own, asked by lines of JSON through pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Peer:
    """A worker script that answers each line on its stdin by one on its stdout.

    :param name: of the environment, build/NAME, which is created at the first run.
    :param requirements: packages to install there, at the versions of constraints.txt where it has them. None: the
        process runs in the environment of the caller.
    :param worker: the script, in the folder of this file.
    :param arguments: of the script.
    """

    def __init__(self, name: str, requirements: Sequence[str] | None, worker: str, *arguments: str) -> None:
        self.name = name
        python = sys.executable if requirements is None else _environment(name, requirements)
        command = [python, Path(__file__).with_name(worker), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.send(message)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name}'s process ended before it answered, with code {self.process.wait()}")
        return dict(json.loads(answer))

    def close(self) -> None:
        """End the process and free its memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answer each line of JSON on stdin, the arguments, by a line on stdout: the loop of a worker."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the prints of a library must not mix with the answers
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


def _environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the Python of an environment, which is created if it does not exist."""
    folder, constraints = ROOT / "build" / name, ROOT / "constraints.txt"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(requirements) + "\n" + constraints.read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"==> installing {name} into {folder.relative_to(ROOT)}", file=sys.stderr)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", constraints]
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([*pip, *requirements], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name} could not be installed: {error}")
        stamp.write_text(wanted)
    return python
