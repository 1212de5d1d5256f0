"""The table of tile sizes: what ships is whole, what is malformed is named, and a launch gets what the table says."""

import contextlib
import json
import threading

import pytest
import torch

from mlot_kernels import triton_tiles, verified
from mlot_kernels.triton_tiles import PATH, STATED, TABLE, launch_options, overriding, parse
from mlot_kernels.tune import dumps

CPU = torch.device("cpu")
SMALL, LARGE, OTHER = ({"BLOCK": 64 << i, "num_warps": 2 << i} for i in range(3))
DOCUMENT = {
    "format": 1,
    "kernels": {
        "one": {"default": SMALL, "candidates": [LARGE, OTHER]},
        "two": {"default": {"num_warps": 1}, "candidates": []},
    },
    "architectures": {"sm_90": {"one": {"options": LARGE, "speed": 1.1}}, "gfx942": {"one": {"options": OTHER}}},
}


def fresh():
    return json.loads(json.dumps(DOCUMENT))


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(triton_tiles, "TABLE", parse(fresh()))
    monkeypatch.setattr(verified, "_architectures", {0: "sm_90", 1: "sm_89", 2: "gfx942"})
    triton_tiles._of_architecture.cache_clear()
    yield
    triton_tiles._of_architecture.cache_clear()


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda:0", LARGE), ("cuda:1", SMALL), ("cuda:2", OTHER), ("cpu", SMALL), ("cuda", LARGE)],
    ids=["its own entry", "an architecture without entries", "ROCm", "a CPU", "no index"],
)
def test_a_launch_gets_the_entry_of_its_architecture(table, device, expected):
    assert launch_options("one", torch.device(device)) == {**expected, **STATED}
    assert launch_options("two", torch.device(device)) == {"num_warps": 1, **STATED}


def test_a_second_launch_makes_nothing_new_and_nobody_can_change_what_it_gets(table):
    first = launch_options("one", torch.device("cuda", 0))
    assert launch_options("one", torch.device("cuda", 0)) is first
    with pytest.raises(TypeError):
        first["BLOCK"] = 1


def test_an_unknown_kernel_is_named(table):
    for device in ("cpu", "cuda:0"):
        with pytest.raises(KeyError, match=r"triton_tiles.json has no kernel 'three'; it has one, two"):
            launch_options("three", torch.device(device))


def test_an_override_holds_in_its_block_alone_and_says_what_was_launched(table):
    with contextlib.suppress(RuntimeError), overriding({"one": {"BLOCK": 16}}) as launched:
        assert launch_options("one", torch.device("cuda", 0)) == {"BLOCK": 16, "num_warps": 2, **STATED}
        assert launched == {"one"}
        with overriding() as inner:  # the defaults, whatever the device
            assert launch_options("one", torch.device("cuda", 0)) == {**SMALL, **STATED}
            assert launch_options("two", CPU) == {"num_warps": 1, **STATED}
        assert (inner, launched) == ({"one", "two"}, {"one"})
        raise RuntimeError
    assert launch_options("one", torch.device("cuda", 0)) == {**LARGE, **STATED}


def test_an_override_holds_in_the_thread_of_backward(table):
    found = []
    with overriding({"one": LARGE}):
        thread = threading.Thread(target=lambda: found.append(launch_options("one", CPU)))
        thread.start()
        thread.join()
    assert found == [{**LARGE, **STATED}]


def changed(*path, to):
    """The document with one place changed."""
    document = fresh()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return document


ONE = ("kernels", "one")
MALFORMED = {
    "no object": ([], "the file: is not of format 1"),
    "another format": (changed("format", to=2), "the file: is not of format 1"),
    "no kernels": (changed("kernels", to=[]), "must have objects kernels and architectures"),
    "no default": (changed(*ONE, to={"candidates": []}), "one: must have a default and a list of candidates"),
    "a field too many": (changed(*ONE, "why", to=""), "one: must have a default and a list of candidates"),
    "no options": (changed(*ONE, "default", to=64), "one, default: must have num_warps, got 64"),
    "no warps": (changed(*ONE, "default", to={"BLOCK": 64}), "one, default: must have num_warps"),
    "no power of two": (changed(*ONE, "default", "BLOCK", to=96), "one, default: BLOCK must be a power of two, got 96"),
    "nothing": (changed(*ONE, "default", "BLOCK", to=0), "one, default: BLOCK must be a positive integer, got 0"),
    "a word": (changed(*ONE, "default", "BLOCK", to="64"), "BLOCK must be a positive integer, got '64'"),
    "a truth": (changed(*ONE, "default", "num_warps", to=True), "num_warps must be a positive integer, got True"),
    "many warps": (changed(*ONE, "default", "num_warps", to=64), "num_warps must be at most 32, got 64"),
    "an unknown option": (changed(*ONE, "default", "num_ctas", to=1), "one, default: has an option 'num_ctas'; there"),
    "a candidate": (changed(*ONE, "candidates", 1, "BLOCK", to=3), "one, candidate 1: BLOCK must be a power of two"),
    "other options": (
        changed(*ONE, "candidates", 0, to={"num_warps": 1}),
        "one, candidate 0: must have BLOCK, num_warps, got num_warps",
    ),
    "an architecture's name": (changed("architectures", "hopper", to={}), "hopper: must be an architecture such as"),
    "an architecture's entries": (changed("architectures", "sm_90", to=[]), "sm_90: must be an architecture such as"),
    "an entry's kernel": (
        changed("architectures", "sm_90", "three", to={"options": LARGE}),
        "sm_90, three: there is no such kernel; there are one, two",
    ),
    "an entry's options": (changed("architectures", "sm_90", "one", to=LARGE), "sm_90, one: must have options, got"),
    "an entry's value": (
        changed("architectures", "sm_90", "one", "options", "num_warps", to=3),
        "sm_90, one: num_warps must be a power of two, got 3",
    ),
    "an entry that is no candidate": (
        changed("architectures", "sm_90", "one", "options", "BLOCK", to=4096),
        r"sm_90, one: \{'BLOCK': 4096, 'num_warps': 4\} are not among the kernel's candidates",
    ),
}


@pytest.mark.parametrize(("document", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_entry_is_named(document, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse(document)
    assert str(raised.value).startswith("triton_tiles.json: ")


def test_the_table_that_ships_is_whole():
    text = PATH.read_text()
    assert parse(json.loads(text)) == TABLE
    assert dumps(json.loads(text)) == text, "tune would lay it out anew"
    for name, kernel in TABLE.kernels.items():
        assert kernel.default not in kernel.candidates, name
        assert len({dumps(dict(candidate)) for candidate in kernel.candidates}) == len(kernel.candidates), name
    for entries in json.loads(text)["architectures"].values():
        for name, entry in entries.items():
            assert {"options", "speed", "device", "torch", "triton"} == entry.keys(), name
