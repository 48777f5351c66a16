"""A daemon, started with the command that was built or installed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
PLACES = [Path(sys.executable).with_name("kvkeep"), *(REPOSITORY / "target" / profile / "kvkeep" for profile in ("debug", "release"))]
COMMAND = shutil.which("kvkeep") or next((str(path) for path in PLACES if path.exists()), None)


def start(socket: Path, ram_gib: float = 0.0625) -> subprocess.Popen[str]:
    if COMMAND is None:
        pytest.skip("the command kvkeep is not built")
    daemon = subprocess.Popen(
        [COMMAND, "daemon", "--socket", str(socket), "--ram-gib", str(ram_gib)], stderr=subprocess.PIPE, text=True
    )
    assert daemon.stderr is not None
    while "listening at" not in (line := daemon.stderr.readline()):
        assert line, "the daemon ended"
    return daemon


def hold(daemon: subprocess.Popen[str]) -> None:
    """It hangs, from the return of this on."""
    daemon.send_signal(signal.SIGSTOP)
    while any(task.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] != "T" for task in Path(f"/proc/{daemon.pid}/task").iterdir()):
        time.sleep(0.001)
