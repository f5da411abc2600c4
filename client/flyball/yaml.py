"""YAML files, where PyYAML is installed.

Rule of this module: nothing but plain values is ever made of a file.
"""

from __future__ import annotations

from typing import Any

from flyball.errors import FlyballError


def parsed(text: str, name: str) -> Any:
    """What a YAML text says. Raises FlyballError where it is none, and where PyYAML is missing."""
    try:
        import yaml
    except ImportError as error:
        raise FlyballError(f"{name} is YAML, and PyYAML is not installed: pip install pyyaml, or give JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FlyballError(f"{name} is no YAML: {error}") from error
