#!/usr/bin/env python3
"""The description at /openapi.json against the running server: is it valid, and does the server do what it says, also
for requests that it does not allow? And /metrics, as Prometheus reads it.

tests/openapi.py KVKEEP: the release binary. Needs the packages of .venv-schemathesis (tests/openapi.sh).
"""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client.openmetrics.parser import text_string_to_metric_families

HERE = pathlib.Path(__file__).parent
KEY = "operator-of-this-test-0123"
TENANT = "tenant-of-this-test-0123"


def main():
    kvkeep = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        keys = pathlib.Path(folder) / "keys"
        keys.touch(mode=0o600)
        keys.write_text(f"{KEY}\n{TENANT} alice\n")
        # Small, so that what is generated is refused or answered soon.
        arguments = ["--port", "0", "--context-tokens", "256", "--ram-gb", "0.1", "--api-key-file", str(keys)]
        arguments += ["--disk", str(pathlib.Path(folder) / "disk")]
        server = subprocess.Popen([kvkeep, "serve", *arguments], stderr=subprocess.PIPE, text=True)
        try:
            url = address(server)
            check_description(url)
            code = run_schemathesis(url)
            check_metrics(url)
        finally:
            server.terminate()
            server.communicate(timeout=60)
    sys.exit(code)


def address(server):
    said = []
    for line in server.stderr:
        said.append(line)
        if found := re.search(r"listening at (http://\S+)", line):
            return found.group(1)
    sys.exit("the server did not start: " + "".join(said))


def get(url, key=KEY):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode(), answer.headers


def check_description(url):
    description = json.loads(get(url + "/openapi.json")[0])
    assert description["openapi"].startswith("3.1."), description["openapi"]
    OpenAPIV31SpecValidator(description).validate()
    operations = [one for path in description["paths"].values() for one in path.values()]
    assert all(one.get("summary") and one["responses"] for one in operations), "each operation is described"
    print(f"ok   {len(operations)} operations are described, in valid OpenAPI {description['openapi']}")


def run_schemathesis(url):
    command = [shutil.which("schemathesis", path=str(pathlib.Path(sys.executable).parent)), "--config-file",
               str(HERE / "schemathesis.toml"), "run", url + "/openapi.json", "-H", f"Authorization: Bearer {KEY}"]
    return subprocess.run(command, timeout=600).returncode


def check_metrics(url):
    text, headers = get(url + "/metrics")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0"), headers["Content-Type"]
    families = list(text_string_to_metric_families(text))
    # Conventions: base units, counters are totals, everything is explained.
    for family in families:
        assert family.documentation, family.name
        assert family.name.startswith("kvkeep_"), family.name
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent)$", family.name), family.name
        assert (family.type == "counter") == any(one.name.endswith("_total") for one in family.samples), family.name
    print(f"ok   {len(families)} families at /metrics are valid OpenMetrics")


if __name__ == "__main__":
    main()
