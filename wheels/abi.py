"""``python -m wheels.abi WHEEL``: which symbols our libraries may ask torch for, from a CUDA wheel of the oldest torch.

They go into ``allowed.json``: the C functions of the stable ABI, without those that stand for single operators.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PATH = Path(__file__).parent / "allowed.json"


def symbols(wheel: Path, library: str) -> set[str]:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        path = archive.extract(f"torch/lib/{library}", folder)
        said = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r" ((?:aoti_)?torch_\w+)", said))
    return {x for x in names if not re.match(r"aoti_torch_(cpu|cuda|mps|xpu|proxy)_", x)}


def main(wheel: Path) -> None:
    cpu = symbols(wheel, "libtorch_cpu.so")
    allowed = json.loads(PATH.read_text())
    allowed["torch"] = wheel.name.split("-")[1]
    allowed["torch_symbols"] = {"cpu": sorted(cpu), "cuda": sorted(cpu | symbols(wheel, "libtorch_cuda.so"))}
    PATH.write_text(json.dumps(allowed, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
