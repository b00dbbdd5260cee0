"""The version of the package, which pyproject.toml alone says."""

from __future__ import annotations

import tomllib
from pathlib import Path


def _version() -> str:
    """The version that pyproject.toml gives: its own words in a checkout, otherwise what was installed of it.

    A checkout comes first, because another version may be installed beside one that is used by PYTHONPATH.
    """
    try:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "unitvis":
            return project["version"]
    except (OSError, LookupError, ValueError):  # installed: whatever lies beside the package is not its own
        pass
    from importlib import metadata  # which imports much that a worker process does not need

    return metadata.version("unitvis")


__version__ = _version()
