"""Running code that a model wrote against tests, in a sandbox: the parent's side. Linux on x86_64 only.

`run` starts `sandboxed.py` beside this file as a fresh `python -I -S` and believes it only if it exits with 0 and gives
back a nonce made for this run. What holds the code, all of it checked by `verify` before the first run:

    files       an empty folder in memory; of the host only its shared libraries and Python's own, read-only; no /proc
    secrets     an empty environment, no file descriptor of the parent
    processes   user and PID namespaces, an unprivileged uid (also where the parent is root), no further process
    network     a network namespace without interfaces, and no socket (unless `allow_network`)
    amounts     CPU time, address space, file size and number, wall time with a kill of the whole group, output
    kernel      no capabilities, no new privileges, a seccomp list of denied system calls

What remains: holes in the kernel behind the system calls that are left (there is no virtual machine), and use of the
processor up to the limits, which other work on the machine feels. What the answer can still get wrong as right is what
the tests cannot tell: see the judge.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hfgen.kit import checks

_SCRIPT = Path(__file__).with_name("sandboxed.py")
_PASSED, _FAILED, _BAD_TESTS = 0, 10, 3  # exit codes of the script; any other means that it could not do its work
_OUTPUT = 64 * 1024  # bytes that are read of it
_GRACE = 5.0  # seconds after its own deadline until it is killed from here


class SandboxError(RuntimeError):
    """The sandbox, or a part of it, cannot be had on this machine."""


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Args:
        cpu_seconds: Processor time of the answer, and of the tests.
        wall_seconds: From the start to the kill of everything.
        memory_mb: Address space of the answer, and of the tests, in MiB.
        file_mb: Size of a file in MiB; all files together may have four times this, in memory.
        files: Open files.
        processes: Processes and threads of the answer; 1 means that it cannot make any.
        allow_network: Leave it in the host's network.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_mb: int = 512
    file_mb: int = 1
    files: int = 32
    processes: int = 1
    allow_network: bool = False

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "file_mb", "processes"):
            checks.integer("Limits", name, getattr(self, name), low=1)
        checks.integer("Limits", "memory_mb", self.memory_mb, low=64)
        checks.integer("Limits", "files", self.files, low=16)
        checks.number("Limits", "wall_seconds", self.wall_seconds, low=0.0, high=3600.0)
        checks.boolean("Limits", "allow_network", self.allow_network)

    def as_json(self) -> str:
        return json.dumps(
            {
                "cpu_seconds": self.cpu_seconds, "wall_seconds": self.wall_seconds, "memory_bytes": self.memory_mb << 20,
                "file_bytes": self.file_mb << 20, "files": self.files, "processes": self.processes,
                "network": self.allow_network,
            }
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """`passed`, and in `reason` why not: the exception, or what ended the run. Hostile code can write to `reason`."""

    passed: bool
    reason: str = ""


def run(code: str, tests: str, limits: Limits | None = None) -> Outcome:
    """Runs `code`, then `tests` (Python with asserts) with stand-ins for what `code` defines.

    Raises:
        SandboxError: the sandbox cannot be had.
        ValueError: the tests are no Python, or hold no assert.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SandboxError(_refusal(f"this is {sys.platform} on {platform.machine()}"))
    if not sys.executable:
        raise SandboxError(_refusal("sys.executable is empty, so there is no Python to start"))
    limits = limits if limits is not None else Limits()
    nonce = secrets.token_hex(16)
    status, output, late = _start(json.dumps({"code": code, "tests": tests, "nonce": nonce}), limits)
    if late:
        return Outcome(False, f"not done after {limits.wall_seconds:g} s")
    if status >= 0 and status not in (_PASSED, _FAILED, _BAD_TESTS):
        raise SandboxError(_refusal(output))
    if status == _BAD_TESTS:
        raise ValueError(f"{output}; give Python code with at least one assert")
    if status == _PASSED and secrets.compare_digest(output.encode(), nonce.encode()):
        return Outcome(True)
    return Outcome(False, output or "ended by a limit")


def _start(payload: str, limits: Limits) -> tuple[int, str, bool]:
    """(exit status, output, whether time ran out) of one sandbox; all of it has ended, or been killed, then."""
    with os.fdopen(os.memfd_create("payload"), "wb") as file:  # no pipe: nothing to wait for while it is written
        file.write(payload.encode("utf-8", "surrogatepass"))
        file.seek(0)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SCRIPT), limits.as_json()], stdin=file, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={}, cwd="/", start_new_session=True,
        )  # fmt: skip
    try:
        output = _read(process, start + limits.wall_seconds + _GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # before it is waited for: until then the number is its own
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    return process.returncode, output, time.monotonic() - start >= limits.wall_seconds


def _read(process: subprocess.Popen[bytes], deadline: float) -> str:
    """Its output, cut at `_OUTPUT` bytes, once it has exited (it is not waited for) or the deadline is over."""
    assert process.stdout is not None
    found, poll = b"", select.poll()  # select knows no descriptor above 1023
    poll.register(process.stdout, select.POLLIN)
    while len(found) < _OUTPUT and (left := deadline - time.monotonic()) > 0:
        if not poll.poll(left * 1000):
            break
        more = os.read(process.stdout.fileno(), 4096)
        if not more:
            while time.monotonic() < deadline:  # its last process closes the pipe only just before it has exited
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.001)
            break
        found += more
    return found[:_OUTPUT].decode("utf-8", "replace")


def _refusal(reason: str) -> str:
    return (
        f"code that a model wrote cannot be run safely here: {reason.strip()[-300:]}; it takes Linux 5.12 or later on "
        "x86_64 where user namespaces may be made (Ubuntu: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; "
        "Docker: --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt "
        "systempaths=unconfined)"
    )


@functools.lru_cache(maxsize=8)
def verify(limits: Limits) -> None:
    """Runs harmless attempts to get out, once per process and set of limits.

    Raises:
        SandboxError: the sandbox cannot be had, or one of the attempts succeeded.
    """
    processes, mb = limits.processes, limits.memory_mb
    attempts = _ATTEMPTS.replace("PROCESSES", str(processes)).replace("MEMORY", str(mb << 20))
    network = "" if limits.allow_network else "'network', "
    outcome = run(
        attempts, f"assert held() == ['files', {network}'processes', 'memory', 'environment'], held()", limits
    )
    if not outcome.passed:
        raise SandboxError(_refusal(f"the walls that hold are only: {outcome.reason}"))


_ATTEMPTS = """
import os

def refused(action):
    try:
        action()
    except (OSError, MemoryError):
        return True

def write():
    for path in ("/probe", "/usr/lib/probe", os.path.dirname(os.__file__) + "/probe"):
        if not refused(lambda: open(path, "w")):
            return
    raise OSError

def connect():
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))

def fork():
    read, keep = os.pipe()
    for _ in range(PROCESSES):
        if not os.fork():
            os.close(keep)
            os.read(read, 1)
            os._exit(0)

def held():
    walls = {"files": write, "network": connect, "processes": fork, "memory": lambda: bytearray(MEMORY)}
    found = [name for name, action in walls.items() if refused(action)]
    hidden = not set(os.listdir("/")) & {"etc", "proc", "home", "dev"} and os.getuid() and os.getppid() == 0
    return found + ["environment"] * bool(hidden and not set(os.environ) - {"LC_CTYPE"})
"""
