"""A whole federation on this machine: a SuperLink and SuperNodes as processes of their own, with TLS."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from eff.errors import MissingDependencyError, RunError
from eff_fl_kit.flower.certificates import Certificates, make_certificates

_START_TIMEOUT = 60.0
_POLL = 0.2
_GRACE = 5.0


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: no telemetry, no update check, programs and settings in `home`."""
    path = os.pathsep.join([str(home / "bin"), os.environ.get("PATH", "")])
    return {
        **os.environ, "PATH": path, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
    }  # fmt: skip


def free_port() -> int:
    """Return a port of the loopback that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class LocalFederation:
    """The processes; made by `local_federation`."""

    folder: Path
    certificates: Certificates
    address: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, program: str, *arguments: str) -> None:
        """Start one of Flower's programs in a session of its own; its output goes to NAME.log."""
        with open(self.folder / f"{name}.log", "wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(self.folder / "home" / "bin" / program), *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment(self.folder / "home"), cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str) -> None:
        """Kill a process and its children at once, as a power cut would."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_GRACE)

    def stop(self) -> None:
        """End all processes: first politely, after five seconds for good."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        for name in list(self.processes):
            self.kill(name)

    def run_app(self, app: Path) -> None:
        """Submit an app folder with `flwr run`.

        Raises:
            RunError: Flower refuses it.
        """
        done = subprocess.run(
            [str(self.folder / "home" / "bin" / "flwr"), "run", str(app), "local-tls"], env=environment(self.folder / "home"), cwd=self.folder,
            capture_output=True, text=True, timeout=_START_TIMEOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            raise RunError(f"flwr run failed: {(done.stdout + done.stderr).strip()}")

    def tail(self, name: str, lines: int = 20) -> str:
        """Return the end of a process's log."""
        path = self.folder / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def _write_programs(folder: Path) -> None:
    """Write Flower's programs into `folder`, run by this Python.

    Flower starts its own programs by name; the ones on the PATH may belong to another environment.

    Raises:
        MissingDependencyError: Flower is not installed.
    """
    folder.mkdir()
    programs = {point.name: point.value for point in entry_points(group="console_scripts") if _is_flower(point)}
    if "flower-superlink" not in programs:
        raise MissingDependencyError("flwr is not installed; pip install 'eff-fl-kit[flower]'")
    for name, target in programs.items():
        module, _, function = target.partition(":")
        code = f"import sys; from {module} import {function} as main; sys.argv[0] = '{name}'; sys.exit(main())"
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
        path.chmod(0o755)


def _is_flower(point: EntryPoint) -> bool:
    return point.name.startswith(("flwr", "flower-"))


@contextlib.contextmanager
def local_federation(folder: Path, nodes: int) -> Iterator[LocalFederation]:
    """Start a SuperLink and `nodes` SuperNodes on the loopback with TLS; end them all afterwards.

    Args:
        folder: for certificates, logs and Flower's settings; exists.
        nodes: number of SuperNodes.

    Raises:
        RunError: the SuperLink does not come up within a minute.
    """
    certificates = make_certificates(folder)
    address = f"127.0.0.1:{free_port()}"
    home = folder / "home"
    home.mkdir()
    _write_programs(home / "bin")
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local-tls"\n\n[superlink.local-tls]\naddress = "{address}"\n'
        f"root-certificates = {json.dumps(str(certificates.authority))}\n"
    )
    federation = LocalFederation(folder, certificates, address)
    try:
        host, port = address.split(":")
        federation.start(
            "superlink", "flower-superlink", "--ssl-certfile", str(certificates.server), "--ssl-keyfile",
            str(certificates.key), "--ssl-ca-certfile", str(certificates.authority), "--host", host, "--port", port,
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        _wait_for(federation, port)
        for index in range(nodes):
            federation.start(
                f"node-{index}", "flower-supernode", "--root-certificates", str(certificates.authority),
                "--superlink", address, "--host", "127.0.0.1", "--port", str(free_port()),
                "--ssl-certfile", str(certificates.server), "--ssl-keyfile", str(certificates.key),
                "--ssl-ca-certfile", str(certificates.authority),
                "--node-config", f"partition-id={index} num-partitions={nodes}",
            )  # fmt: skip
        yield federation
    finally:
        federation.stop()


def _wait_for(federation: LocalFederation, port: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if federation.processes["superlink"].poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=1):
            return
        time.sleep(_POLL)
    raise RunError(f"the SuperLink does not start: {federation.tail('superlink', 3)}")


def watch(notes: Path, timeout: float, seen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Pass on each line of `notes` as it is written; return the last one, "done" or "error".

    Raises:
        RunError: there is no end within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    read = 0
    while time.monotonic() < deadline:
        lines = notes.read_text(encoding="utf-8").split("\n") if notes.exists() else [""]
        for line in lines[read:-1]:
            note = json.loads(line)
            seen(note)
            if note["event"] in ("done", "error"):
                return note  # type: ignore[no-any-return]
        read = len(lines) - 1
        time.sleep(_POLL)
    raise RunError(f"the run has not ended after {timeout:g} s and was stopped; see the logs in {notes.parent}")
