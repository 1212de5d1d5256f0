"""``python -m mlot_kernels info | selftest | tune``."""

from __future__ import annotations

import argparse
import sys

from mlot_kernels import info, selftest, tune


def main(arguments: list[str] | None = None) -> int:
    """Run a command of the command line ``arguments``, by default the process's, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlot_kernels", description="Fused losses for distillation.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "print what a bug report needs: the machine, the software, and which backend runs each operator, and why"
    commands.add_parser("info", help=about, description=about)
    about = "check every operator and loss on this machine: against its definition, and its gradient"
    selftest.add_arguments(
        commands.add_parser(
            "selftest",
            help=about,
            description=about,
            epilog="exit status: 0 all passed, 1 something failed, 2 nothing could be tested",
        )
    )
    about = "find the tiles and warps with which the Triton kernels are fastest on this GPU, and write them down"
    tune.add_arguments(
        commands.add_parser(
            "tune",
            help=about,
            description=about,
            epilog="exit status: 0 the table is written, 2 nothing could be measured or written",
        )
    )
    parsed = parser.parse_args(arguments)
    if parsed.command == "selftest":
        return selftest.main(parsed)
    if parsed.command == "tune":
        return tune.main(parsed)
    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
