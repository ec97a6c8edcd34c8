"""What tests of the deployment files share: reading them as their own tools do, and the schemas they are held to."""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SCHEMAS = ROOT / "tests" / "schemas"
SECRETS = {"ROLLCAST_TOKEN_FILE": "deploy/secrets/token", "ROLLCAST_GRAFANA_PASSWORD_FILE": "deploy/secrets/grafana"}
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def compose(environment: Mapping[str, str] = SECRETS) -> dict[str, Any]:
    """docker-compose.yml as Compose reads it. Raises `ValueError` where Compose refuses: a required variable unset."""

    def value(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if environment.get(name):
            return environment[name]
        if kind == "-":
            return text
        raise ValueError(f"required variable {name} is missing a value: {text}")

    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, Any] = yaml.safe_load(VARIABLE.sub(value, "\n".join(lines)))
    return found


def strict(node: Any) -> Any:
    """A Kubernetes schema that refuses unknown keys, as `kubectl apply` does."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    inside = {key: strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        inside.setdefault("additionalProperties", False)
    return inside


def pod_templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template of a manifest: whatever has a `spec` with containers."""
    if isinstance(node, dict):
        spec = node.get("spec")
        if isinstance(spec, dict) and "containers" in spec:
            yield node
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for item in node:
            yield from pod_templates(item)
