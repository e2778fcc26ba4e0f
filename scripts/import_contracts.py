"""A contract of import-linter that its own kinds cannot say: a package imports nothing but what is listed."""

import sys
from typing import cast

import grimp
from importlinter import Contract, ContractCheck, fields, output


class OnlyContract(Contract):
    """Modules of `package` import each other, the standard library and `allowed_packages`, and nothing else."""

    package = fields.StringField()
    allowed_packages = fields.SetField(subfield=fields.StringField())

    def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
        package = cast(str, self.package)
        inside = {package, *graph.find_descendants(package)}
        allowed = cast("set[str]", self.allowed_packages) | sys.stdlib_module_names
        wrong = sorted(
            f"{importer} imports {imported}"
            for importer in inside
            for imported in graph.find_modules_directly_imported_by(importer)
            if imported not in inside and imported.partition(".")[0] not in allowed
        )
        return ContractCheck(kept=not wrong, metadata={"wrong": wrong})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["wrong"]:
            output.print_error(line)
