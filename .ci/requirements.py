"""Print what pyproject.toml asks of an environment for tests and linters, torch apart."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["test"] + extras["lint"]:
    if not requirement.startswith("torch"):
        print(requirement)
