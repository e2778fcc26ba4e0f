"""Gathers the runtime's package and the modules that it shares with the main package into one distribution."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "flashsloth_edge"


class GatherModules(BuildHookInterface):
    """Everything of the package, with the shared modules inside."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        sources = Path(self.root).parent / "src"
        gathered = Path(self.root) / PACKAGE  # in an archive of sources, where everything is in its place
        package = gathered if gathered.is_dir() else sources / PACKAGE
        included = build_data["force_include"]
        for path in sorted(package.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                included[str(path)] = str(Path(PACKAGE) / path.relative_to(package))
        if package == gathered:
            return
        shared = runpy.run_path(str(package / "shared" / "__init__.py"), {"__path__": []})["SOURCES"]
        for folder, modules in shared.items():
            for module in modules:
                included[str(sources / folder / f"{module}.py")] = f"{PACKAGE}/shared/{module}.py"
