"""The package imports no trainer, and knows none of its own adapters by itself."""

import subprocess
import sys

FOREIGN = ("trl", "transformers", "accelerate", "datasets", "liger_kernel", "distillkit", "tokenizers")

SCRIPT = f"""
import sys
import mlot_kernels
found = [name for name in sys.modules if name.partition(".")[0] in {FOREIGN!r} or "mlot_kernels.integrations" in name]
assert not found, found
"""


def test_importing_the_package_imports_no_trainer():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
