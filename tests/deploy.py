#!/usr/bin/env python3
"""The examples in deploy/: each can be read, names only what is there, and gives `kvkeep serve` options and variables that it has.

Usage: deploy.py BINARY. Needs PyYAML.
"""
import pathlib
import re
import subprocess
import sys

import yaml

FOLDER = pathlib.Path(__file__).parent.parent / "deploy"


def containers(document):
    """Of a compose file or a Kubernetes object, all of them with their names."""
    services = document.get("services") or {}
    pod = document.get("spec", {}).get("template", {}).get("spec", {}) if "kind" in document else {}
    yield from services.items()
    yield from ((container["name"], container) for part in ("initContainers", "containers") for container in pod.get(part, []))


def variables(container):
    given = container.get("environment") or {entry["name"]: entry.get("value") for entry in container.get("env", [])}
    return [name for name in given if name.startswith("KVKEEP_")]


def check_compose(document):
    volumes, services = set(document.get("volumes") or {}), document["services"]
    for name, service in services.items():
        assert "image" in service or "build" in service, f"{name} has no image"
        for other in service.get("depends_on", []):
            assert other in services, f"{name} waits for {other}, which is not there"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith(".") or source in volumes, f"{name} mounts {source}, which is not there"
        if "build" in service:
            assert (FOLDER / service["build"] / "Dockerfile").is_file(), f"{name} is built from nothing"
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == len(set(ports)), f"a port is given twice: {ports}"


def check_objects(objects):
    labels = [o["spec"]["template"]["metadata"]["labels"] for o in objects if o["kind"] == "Deployment"]
    for one in objects:
        selector = one["spec"]["selector"]
        selector = selector.get("matchLabels", selector)
        assert selector in labels, f"{one['kind']} {one['metadata']['name']} selects nothing: {selector}"
        pod = one["spec"].get("template", {}).get("spec", {})
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for _, container in containers(one):
            for mount in container.get("volumeMounts", []):
                assert mount["name"] in volumes, f"{container['name']} mounts {mount['name']}, which is not there"


def main():
    binary = sys.argv[1]
    known = subprocess.run([binary, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    flags, names = set(re.findall(r"--[a-z0-9-]+", known)), set(re.findall(r"KVKEEP_[A-Z0-9_]+", known))
    for path in sorted(FOLDER.glob("*.yml")):
        documents = list(yaml.safe_load_all(path.read_text()))
        if "services" in documents[0]:
            check_compose(documents[0])
        else:
            check_objects(documents)
        for name, container in (pair for document in documents for pair in containers(document)):
            words = container.get("command", []) + container.get("args", [])
            given = [word for word in words if word.startswith("--")] if "serve" in words else []
            for word in given + variables(container):
                assert word in flags | names, f"{path.name}: {name} gives {word}, which kvkeep serve does not have"
        print(f"ok   {path.name}")


if __name__ == "__main__":
    main()
