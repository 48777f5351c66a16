"""A disk that does not answer, for one program: its reads and writes of some files do not return until they may.

The program runs under a filter of system calls, and each call that touches such a file waits for this process to let it go. So it is the
kernel that holds the call, as it does when a disk hangs. (A file system in user space was the alternative; not every machine has one.)
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

_CALLS = (295, 296, 327, 328)  # preadv, pwritev, and their second forms, on x86-64
_USER_NOTIF, _ALLOW, _CONTINUE = 0x7FC00000, 0x7FFF0000, 1
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_SECCOMP, _SET_FILTER, _NEW_LISTENER = 317, 1, 8


def is_possible() -> bool:
    return sys.platform == "linux" and os.uname().machine == "x86_64" and os.geteuid() == 0


class SlowDisk:
    """Starts a program; `hang()` and `go_on()` hold and let go what it does with files whose path has `part` in it."""

    def __init__(self, command: list[str], part: str, **popen: Any) -> None:
        ours, theirs = socket.socketpair()
        environment = {**popen.pop("env", os.environ), "KVKEEP_LISTENER": str(theirs.fileno())}
        self.process = subprocess.Popen([sys.executable, __file__, *command], pass_fds=[theirs.fileno()], env=environment, **popen)
        theirs.close()
        message, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_LEN(4))
        assert message and ancillary, "the program ended before it was under the filter"
        self._listener = array.array("i", ancillary[0][2])[0]
        ours.close()
        self._part, self._hangs, self._held = part, False, []
        self._lock = threading.Lock()
        self.held = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def hang(self) -> None:
        with self._lock:
            self._hangs = True

    def go_on(self) -> None:
        with self._lock:
            self._hangs, held = False, self._held
            self._held = []
        for number in held:
            self._let_go(number)

    def _watch(self) -> None:
        while True:
            call = bytearray(80)
            try:
                fcntl.ioctl(self._listener, _RECEIVE, call)
            except OSError:
                if self.process.poll() is not None:
                    return
                continue
            number, pid = struct.unpack_from("<QI", call)
            (descriptor,) = struct.unpack_from("<Q", call, 32)
            with self._lock:
                if self._hangs and self._part in _path(pid, descriptor):
                    self._held.append(number)
                    self.held += 1
                    continue
            self._let_go(number)

    def _let_go(self, number: int) -> None:
        try:
            fcntl.ioctl(self._listener, _SEND, bytearray(struct.pack("<QqiI", number, 0, 0, _CONTINUE)))
        except OSError:  # the program is gone
            pass


def _path(pid: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}")
    except OSError:
        return ""


def _instruction(code: int, yes: int, no: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _filter() -> bytes:
    lines = [_instruction(0x20, 0, 0, 0)]  # the number of the call
    lines += [_instruction(0x15, len(_CALLS) - at, 0, number) for at, number in enumerate(_CALLS)]
    return b"".join([*lines, _instruction(0x06, 0, 0, _ALLOW), _instruction(0x06, 0, 0, _USER_NOTIF)])


def _main() -> None:
    """Puts this process under the filter, sends the listener away, and becomes the program."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = _filter()
    buffer = ctypes.create_string_buffer(program)
    head = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    listener = libc.syscall(_SECCOMP, _SET_FILTER, _NEW_LISTENER, ctypes.c_char_p(head))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "this process cannot put itself under a filter")
    way = socket.socket(fileno=int(os.environ.pop("KVKEEP_LISTENER")))
    way.sendmsg([b"l"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
    way.close()
    os.close(listener)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    _main()
