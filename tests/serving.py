"""A `kvkeep serve` of its own for a test: started, watched, stopped."""
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import urllib.request

# Loading the model takes a second; a machine that does much else takes longer.
START_S = 120


class Server:
    """With a directory of its own for the disk tier, or the given one. Its log is in `log`, line by line."""

    def __init__(self, binary, *flags, disk=None):
        self._made = None if disk else tempfile.TemporaryDirectory(prefix="kvkeep-serve-")
        self.disk = pathlib.Path(disk or self._made.name) / "cache"
        command = [binary, "serve", "--port=0", f"--disk={self.disk}", "--log-format=json", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log, self._up, self.url = [], threading.Event(), None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._up.wait(START_S) or self.url is None:
            raise RuntimeError("the server did not start:\n" + "".join(self.log))
        self.port = int(self.url.rsplit(":", 1)[1])

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            if "listening at " in line:
                self.url = line.split("listening at ")[1].strip()
                self._up.set()
        self._up.set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()
        if self._made:
            self._made.cleanup()

    def stop(self):
        """As systemd does; says how it exited."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = "killed: it did not end"
        self._reader.join(10)
        return code

    def events(self, message):
        """The log's lines with this message."""
        lines = [json.loads(line) for line in self.log if line.startswith("{")]
        return [line for line in lines if line.get("message") == message]

    def rss_bytes(self):
        return rss_bytes(self.process.pid)

    def get(self, path, key=None, timeout=60):
        request = urllib.request.Request(self.url + path)
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read().decode()


def rss_bytes(pid):
    """Memory that a process has in RAM."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


class Checks:
    """What was checked, one line each."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, name, ok, figure):
        self.passed, self.failed = self.passed + bool(ok), self.failed + (not ok)
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {figure}", flush=True)

    def end(self):
        print(f"{self.passed} passed, {self.failed} failed")
        return int(self.failed > 0)


def key_file(directory, text):
    """Keys, readable by their owner alone."""
    path = pathlib.Path(directory) / "keys"
    path.write_text(text)
    os.chmod(path, 0o600)
    return path
