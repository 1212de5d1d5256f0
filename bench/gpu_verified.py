"""The last part of ``gpu_check``: from what the others saw, which kernels may run unnamed on this kind of GPU.

    python -m bench.gpu_verified --out DIR

reads the results in ``DIR`` and writes ``verified.json`` there and into the package. A kernel that is in the registry
and has passed everything is ``passed``; it is ``faster_than_next`` if, summed over the sizes, it took no longer than
the backend that would run without it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.gpu_parts import SKIPPED, kernels
from mlot_kernels import verified
from mlot_kernels.backends import PREFERENCE
from mlot_kernels.registry import OPERATORS

REQUIRED = ("contract", "selftest")  # they must have run to their end
LINES = ("selftest", "stream_and_graph", "large_offsets")

Pair = tuple[str, str]  # operator, backend
Verdicts = dict[Pair, list[bool]]


def contract_verdicts(path: Path) -> Verdicts:
    """What each contract test said that names an operator and a backend in its parameters; skipped ones say nothing."""
    names = re.compile(rf"[\[-]({'|'.join(OPERATORS)})-({'|'.join(verified.NEEDED)})[\]-]")
    verdicts: Verdicts = {}
    for test in ElementTree.parse(path).iter("testcase"):
        found = names.search(test.get("name", ""))
        if found and test.find("skipped") is None:
            passed = test.find("failure") is None and test.find("error") is None
            verdicts.setdefault((found[1], found[2]), []).append(passed)
    return verdicts


def line_verdicts(path: Path) -> Verdicts:
    """What the lines of a part said; nothing where it left none."""
    verdicts: Verdicts = {}
    for line in json.loads(path.read_text()) if path.exists() else ():
        verdicts.setdefault((line["operator"], line["backend"]), []).append(line["failure"] is None)
    return verdicts


def derive(
    pairs: Iterable[Pair],
    required: Sequence[Verdicts],
    others: Sequence[Verdicts],
    benchmarks: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, dict[str, dict[str, Any]]]:
    """The table of one architecture: operator -> backend -> what was seen.

    Args:
        pairs: the kernels there are.
        required: must each have something to say on a kernel, and nothing bad.
        others: must have nothing bad to say.
        benchmarks: the entries of the benchmarks' results.
        facts: go into every entry.
    """
    kernels = set(pairs)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for operator in sorted({operator for operator, _ in kernels}):
        measured = [entry for entry in benchmarks if entry["subject"] == operator and entry["device"] == "cuda"]
        following = "reference"
        for backend in reversed(PREFERENCE["cuda"]):
            pair = operator, backend
            if pair not in kernels:
                continue
            said = [all(verdicts.get(pair, [False])) for verdicts in required]
            said += [all(verdicts.get(pair, [True])) for verdicts in others]
            said += [entry["failure"] is None for entry in measured if entry["contender"] == backend]
            faster = no_slower(measured, backend, following)
            table.setdefault(operator, {})[backend] = {
                "passed": all(said),
                "faster_than_next": faster,
                "next": following,
                **facts,
            }
            if all(said) and faster:
                following = backend
    return table


def no_slower(measured: Sequence[Mapping[str, Any]], backend: str, following: str) -> bool | None:
    """Whether a backend's medians sum up to no more than the other's; None where one of its sizes was not measured.

    Forward and backward together, or forward alone for an operator without a gradient.
    """
    direction = "both" if any(entry["direction"] == "both" for entry in measured) else "forward"

    def medians(contender: str) -> dict[str, float]:
        return {
            json.dumps([entry["size"], entry["dtype"]], sort_keys=True): entry["seconds"]["median"]
            for entry in measured
            if entry["contender"] == contender and entry["direction"] == direction and entry["seconds"] is not None
        }

    ours, theirs = medians(backend), medians(following)
    if not theirs or not theirs.keys() <= ours.keys():
        return None
    return sum(ours[key] for key in theirs) <= sum(theirs.values())


def write(table: dict[str, Any], architecture: str, paths: Iterable[Path]) -> None:
    """Replace one architecture's entries, and keep the others'."""
    document = json.loads(verified.PATH.read_text())
    document["architectures"][architecture] = table
    for path in paths:
        path.write_text(json.dumps(document, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_verified", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args(arguments).out
    check = json.loads((out / "gpu_check.json").read_text())
    ended = {part["name"] for part in check["parts"] if part["status"] in ("ok", "failed")}
    missing = [name for name in REQUIRED if name not in ended]
    if not (out / "contract.xml").exists():
        missing.append("contract.xml")
    if missing:
        print(f"nothing is verified without all of {', '.join(REQUIRED)}; there is no end of {', '.join(missing)}")
        return SKIPPED
    selftest, *others = (line_verdicts(out / f"{part}.json") for part in LINES)
    benchmarks = out / "benchmarks.json"
    facts = {name: check["versions"][name] for name in ("torch", "triton")}
    table = derive(
        kernels(),
        (contract_verdicts(out / "contract.xml"), selftest),
        others,
        json.loads(benchmarks.read_text())["results"] if benchmarks.exists() else (),
        {**facts, "commit": check["commit"]["id"], "date": check["date"]},
    )
    write(table, check["architecture"], (out / "verified.json", verified.PATH))
    print(f"{check['architecture']}: {json.dumps(table, indent=2)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
