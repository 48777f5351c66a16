#!/usr/bin/env python3
"""The description at /openapi.json against the running server: is it valid, and does the server do what it says, also
for requests that it does not allow? And /metrics, as Prometheus reads it.

tests/openapi.py KVKEEP: the release binary. Needs the packages of .venv-schemathesis (tests/openapi.sh).
"""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from serving import Server

HERE = pathlib.Path(__file__).parent
KEY = "operator-of-this-test-0123"


def main():
    kvkeep = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        keys = pathlib.Path(folder) / "keys"
        keys.touch(mode=0o600)
        keys.write_text(f"{KEY}\n")
        # Small, so that what is generated is refused or answered soon.
        flags = ["--context-tokens=256", "--ram-gib=0.1", "--log-level=warn", f"--api-key-file={keys}"]
        with Server(kvkeep, *flags) as server:
            check_description(server)
            code = run_schemathesis(server.url)
            check_metrics(server)
    sys.exit(code)


def check_description(server):
    description = json.loads(server.get("/openapi.json"))
    assert description["openapi"].startswith("3.1."), description["openapi"]
    OpenAPIV31SpecValidator(description).validate()
    operations = [one for path in description["paths"].values() for one in path.values()]
    assert all(one.get("summary") and one["responses"] for one in operations), "each operation is described"
    print(f"ok   {len(operations)} operations are described, in valid OpenAPI {description['openapi']}")


def run_schemathesis(url):
    command = [pathlib.Path(sys.executable).with_name("schemathesis"), "--config-file", HERE / "schemathesis.toml", "run",
               url + "/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "schemathesis_hooks"}
    return subprocess.run(command, env=environment, timeout=600).returncode


def check_metrics(server):
    families = list(text_string_to_metric_families(server.get("/metrics", key=KEY)))
    # Conventions: base units, counters are totals, everything is explained.
    for family in families:
        assert family.documentation, family.name
        assert family.name.startswith("kvkeep_"), family.name
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent)$", family.name), family.name
        assert (family.type == "counter") == any(one.name.endswith("_total") for one in family.samples), family.name
    print(f"ok   {len(families)} families at /metrics are valid OpenMetrics")


if __name__ == "__main__":
    main()
