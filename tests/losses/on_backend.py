"""``python -m tests.losses.on_backend BACKEND [--full]``: losses whose gradients meet, against ``reference``.

For processes in which a GPU's kernels run on a CPU; the tests of either kind of kernels start it.
"""

import sys

import torch

from mlot_kernels import BackendUnavailable
from mlot_kernels.losses.cases import LOSSES, cases
from mlot_kernels.parity import run

QUICK = {("HybridLoss", "observed"), ("ULDLoss", "merged rows"), ("RankingLoss", "paper")}


def main(backend: str, full: bool) -> None:
    compared = 0
    for name in LOSSES:
        for case in cases(name, torch.float32):
            if case.waits or not (full or (name, case.name) in QUICK):
                continue
            try:
                ours, expected = ([x for part in run(case, each) for x in part] for each in (backend, "reference"))
            except BackendUnavailable as refused:  # by name, of an operator inside
                if not full:
                    raise
                print(f"{name}, {case.name}: {refused}")
                continue
            for a, b in zip(ours, expected, strict=True):
                # Two ways of adding in float32, some through Sinkhorn's iteration; the sharp tests are parity's.
                torch.testing.assert_close(
                    a,
                    b,
                    rtol=1e-4,
                    atol=5e-5,
                    equal_nan=True,
                    msg=lambda m, which=f"{name}, {case.name}": f"{which}: {m}",
                )
            compared += 1
    print(f"{compared} cases agree")


if __name__ == "__main__":
    main(sys.argv[1], "--full" in sys.argv)
