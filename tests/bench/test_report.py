"""The report on ``stored_result.json``: its tables, targets, repeatability and figures, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the report draws with matplotlib; pip install 'mlot-kernels[demo]'")
pytest.importorskip("rich", reason="the report prints with rich; pip install 'mlot-kernels[demo]'")

from rich.console import Console

from bench import report
from bench.targets import judge, load, number, seconds_text

STORED = Path(__file__).with_name("stored_result.json")
FIGURES = {"time_rank_truncate", "time_multi_level_ot", "memory", "copy_rate", "speedup", "errors"}
FAILURE = "the reference check failed: output 0: 0.2 off, at most 0.001"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page's text and its folder."""
    folder = tmp_path_factory.mktemp("report")
    report.main([str(STORED), "--output", str(folder)])
    return (folder / "stored_result.md").read_text(), folder


@pytest.fixture
def stored():
    return json.loads(STORED.read_text())


def read(tmp_path, document):
    path = tmp_path / "example.json"
    path.write_text(json.dumps(document))
    return report.read(path)


def section(page, title):
    """From a heading to the next one of its rank or above."""
    rank = title.split()[0]
    return re.split(rf"^#{{1,{len(rank)}}} ", page.split(f"{title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def row(text, *cells):
    """The one row of a table that starts with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    found = [each for each in rows if each[: len(cells)] == list(cells)]
    assert len(found) == 1, (cells, found)
    return found[0][len(cells) :]


def test_the_head_says_where_the_figures_come_from(made):
    page, _ = made
    head = page.split("## ")[0]
    assert "# Benchmarks on example-machine" in head
    assert "Example CPU, vendor ExampleVendor, family 1, model 2, 2 cores" in head
    assert "Commit: `111111111111` with uncommitted changes" in head
    assert "2020-02-02 10:00 UTC" in head
    assert "`make bench`, then `python -m bench.report bench/results/stored_result.json`" in head
    assert "triton" not in head  # it is null: not installed
    assert "9 rounds" in head
    assert "4 sets" in head


def test_rates(made):
    rates = section(made[0], "## Read and copy rates")
    assert row(rates, "cpu", "1") == ["10.0 [9.80, 10.2]", "8.00 [7.84, 8.16]"]
    assert row(rates, "cpu", "2") == ["20.0 [19.6, 20.4]", "16.0 [15.7, 16.3]"]


def test_a_win(made):
    table = section(made[0], "### rank_truncate").split("Peak memory")[0]
    times = ["**8.00 ms** [7.84, 8.16]", "160 ms [157, 163]", "800 ms [784, 816]", "320 ms [314, 326]"]
    assert row(table, "151,936", "both") == [*times, "100x", "40.0x", "1.33x"]
    assert "In all rows: sequences 2, rows 32, dtype float32, device cpu, threads 2." in table


def test_a_loss_is_marked_and_so_is_a_wide_spread(made):
    table = section(made[0], "### row_entropy").split("Peak memory")[0]
    assert row(table, "forward") == ["**4.00 ms** [3.60, 4.08]", "8.00 ms [7.84, 8.16]", "2.00x", "4.00x"]
    slower = ["**10.0 ms** [9.00, 12.5]†", "5.00 ms [4.90, 5.10]", "**0.500x, slower**", "3.33x"]
    assert row(table, "both") == slower


def test_a_failure_has_its_reason_and_no_time(made, stored):
    assert any(entry["failure"] == f"{FAILURE} | row 3" for entry in stored["results"])
    table = section(made[0], "### rank_truncate")
    cells = row(table.split("Peak memory")[0], "151,936", "forward")
    assert cells[3] == "failed (1)"
    assert cells[5] == "-"  # no speed-up against it either
    assert f"(1) torch.compile: {FAILURE} | row 3" in table
    cells = row(section(made[0], "### sorted_l1").split("Peak memory")[0], "both")
    assert cells == ["failed (1)", "900 ms [882, 918]", "-", "-"]  # ours: no time, so nothing that follows from it


def test_the_time_of_a_failure_is_not_read(tmp_path, stored):
    entry = next(entry for entry in stored["results"] if entry["contender"] == "cpu")
    entry["failure"] = "wrong"
    contents = [each for each in read(tmp_path, stored).entries if each.failure == "wrong"]
    assert [each.seconds for each in contents] == [None]


def test_a_peer_that_was_not_measured(made):
    cells = row(section(made[0], "### rank_truncate").split("Peak memory")[0], "32,000", "forward")
    assert cells[3] == "not measured"
    assert cells[4:] == ["100x", "-", "1.50x"]


def test_memory_and_errors(made):
    table = section(made[0], "### multi_level_ot").split("Peak memory; errors")[1]
    cells = row(table, "32", "50,000", "float32", "both")
    assert cells == ["12.2 MiB; 1.0e-07 / 2.0e-07", "160 MiB; 3.0e-07 / 6.0e-07"]
    table = section(made[0], "### rank_truncate").split("Peak memory; errors")[1]
    assert row(table, "151,936", "forward") == ["-; 1.0e-07 / -"] * 3 + ["failed"]


def test_targets(made):
    table = section(made[0], "## Targets")
    assert row(table, "rank_truncate forward, V = 151,936, float32, CPU") == [
        "at most 1.6x the floor",
        "1.50x the floor (cpu)",
        "**reached**",
    ]
    assert row(table, "rank_truncate backward, V = 151,936, float32, CPU")[1:] == [
        "1.25x the floor (cpu)",
        "**missed**",
    ]
    assert row(table, "rank_truncate forward, V = 151,936, bfloat16, CPU")[1:] == [
        "no result in bfloat16",
        "**not measured**",
    ]
    assert row(table, "rank_truncate forward, V = 151,936, float32, GPU")[1:] == [
        "no result on device cuda",
        "**not measured**",
    ]
    assert row(table, "L1 cost, 256 x 256 x 50, one thread, float32, CPU") == [
        "at most 45.0 us",
        "40.0 us (cpu), on another machine",
        "**not comparable**",
    ]
    failed = row(table, "sorted_l1 both, teacher's V = 151,936, float32, CPU")
    assert failed[1:] == ["failed: the reference check failed: gradient 0: 0.5 off, at most 0.001", "**missed**"]


def test_a_target_without_sizes_is_held_against_the_worst(stored, tmp_path):
    targets = [dataclasses.replace(t, size={}) for t in load() if t.subject == "multi_level_ot" and t.device == "cpu"]
    verdicts = {target.name: judge(target, read(tmp_path, stored)) for target in targets}
    speed = verdicts["Multi-Level-OT both against the published code, float32, CPU"]
    assert (speed.measured, speed.verdict) == ("50.0x as fast as published (cpu, worst of 3 sizes)", "missed")
    peaks = [verdicts[f"Multi-Level-OT both, peak beyond the inputs, {d}, CPU"] for d in ("float32", "bfloat16")]
    assert [peak.verdict for peak in peaks] == ["reached", "missed"]


def test_a_time_is_comparable_on_the_machine_that_it_was_set_on(tmp_path, stored):
    target = next(target for target in load() if target.subject == "pairwise_cost" and target.measure == "seconds")
    stored["machine"] |= {"cpu_vendor": "AuthenticAMD", "cpu_family": 26, "cores": 2}
    assert judge(target, read(tmp_path, stored)).verdict == "reached"
    gpu = dataclasses.replace(target, machine={"gpu": {"name": "NVIDIA H200"}})
    assert judge(gpu, read(tmp_path, stored)).verdict == "not comparable"
    stored["machine"]["gpu"] = {"name": "NVIDIA H200", "capability": "9.0", "memory": 1, "driver": "1"}
    assert judge(gpu, read(tmp_path, stored)).verdict == "reached"


@pytest.mark.parametrize(
    ("remove", "target", "missing"),
    [
        ({"contender": "cpu"}, {"measure": "floor"}, "no result of backend cpu"),
        ({"contender": "eager"}, {"measure": "speedup"}, "no result of peer eager"),
        ({"contender": "read", "threads": 2}, {"measure": "floor"}, "no floor"),
        ({"subject": "rank_truncate"}, {"measure": "floor"}, "no result of rank_truncate"),
        ({"subject": "rank_truncate", "direction": "forward"}, {"direction": "forward"}, "direction forward"),
    ],
)
def test_what_is_missing_is_named(tmp_path, stored, remove, target, missing):
    about = {"subject": "rank_truncate", "dtype": "float32", "device": "cpu"} | target
    (target, *_) = [each for each in load() if about.items() <= dataclasses.asdict(each).items()]
    assert judge(target, read(tmp_path, stored)).verdict in ("reached", "missed")
    stored["results"] = [entry for entry in stored["results"] if not remove.items() <= entry.items()]
    verdict = judge(target, read(tmp_path, stored))
    assert verdict.verdict == "not measured"
    assert missing in verdict.measured


def test_every_target_of_the_design_is_there():
    """The figures to reach, CPU then GPU, as the design's table has them."""
    of = {}
    for target in load():
        bound = target.at_most if target.at_most is not None else target.at_least
        of.setdefault((target.subject, target.device), []).append(bound)
    assert {key: sorted(bounds) for key, bounds in of.items()} == {
        ("rank_truncate", "cpu"): [0.92, 1.12, 1.6, 2.4, 30, 75],
        ("rank_truncate", "cuda"): [1.15, 1.15, 1.5, 1.5, 4, 4, 7, 7],
        ("sorted_l1", "cpu"): [2.2, 4.5, 60, 150],
        ("sorted_l1", "cuda"): [1.4, 1.6, 2],
        ("topk_softmax", "cpu"): [1.3, 1.9],
        ("topk_softmax", "cuda"): [1.25, 1.25],
        ("sinkhorn", "cpu"): [40e-6, 70e-6, 1.1e-3, 3e-3],
        ("sinkhorn", "cuda"): [15e-6, 35e-6],
        ("pairwise_cost", "cpu"): [45e-6],
        ("pairwise_cost", "cuda"): [20],
        ("multi_level_ot", "cpu"): [1.2, 1.2, 40, 60],
        ("multi_level_ot", "cuda"): [10, 10],
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"at_mots": 2}, "at_mots"),
        ({"subject": "rank_truncated"}, "rank_truncated"),
        ({"direction": "forwards"}, "forwards"),
        ({"dtype": "fp32"}, "fp32"),
        ({"measure": "flor"}, "flor"),
        ({"size": {"vocab": 1}}, "vocab"),
        ({"contenders": ["cpp"]}, "cpp"),
        ({"contenders": []}, "contenders"),
        ({"threads": None}, "threads"),
        ({"at_least": 2}, "at_most alone"),
        ({"against": "eager"}, "against"),
        ({"machine": {"cores": 2}}, "machine"),
        ({"measure": "speedup", "against": "eagre"}, "eagre"),
        ({"measure": "seconds", "machine": {"core": 2}}, "core"),
        ({"measure": "seconds", "machine": {"gpu": {"nane": "x"}}}, "nane"),
    ],
)
def test_a_misspelt_target_is_an_error(tmp_path, wrong, message):
    right = {key: value for key, value in dataclasses.asdict(load()[0]).items() if value is not None}
    path = tmp_path / "targets.json"
    path.write_text(json.dumps([right]))
    assert load(path) == load()[:1]
    path.write_text(json.dumps([right | wrong]))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_target_without_a_key_is_an_error(tmp_path):
    right = {key: value for key, value in dataclasses.asdict(load()[0]).items() if value is not None}
    del right["direction"]
    (tmp_path / "targets.json").write_text(json.dumps([right]))
    with pytest.raises(ValueError, match="no key direction"):
        load(tmp_path / "targets.json")


def test_repeatability(made):
    """Of the five medians that both runs have, three lie within the larger interquartile range."""
    text = section(made[0], "## Repeatability")
    assert text.lstrip().startswith("3 of 5 medians (60%)")
    assert "`222222222222`, 2020-01-01 10:00 UTC" in text
    assert "`111111111111` with uncommitted changes, 2020-02-02 10:00 UTC" in text
    moved = [line for line in text.splitlines() if line.startswith("| rank_truncate")]
    assert [line.split(" | ")[3:6] for line in moved] == [
        ["6.00 ms", "8.00 ms", "+33%"],
        ["7.00 ms", "5.00 ms", "-29%"],
    ]


def test_at_most_ten_that_moved_are_listed(tmp_path, stored):
    timed = [entry for entry in stored["results"] if entry["seconds"]]
    stored["previous"]["results"] = copy.deepcopy(timed)
    for entry in stored["previous"]["results"]:
        entry["seconds"]["median"] *= 2
    text = section(report.page(read(tmp_path, stored), "example", []), "## Repeatability")
    assert text.lstrip().startswith(f"0 of {len(timed)} medians (0%)")
    assert text.count("-50%") == 10


@pytest.mark.parametrize("previous", [None, "other settings"])
def test_without_a_run_to_compare_with_a_line_says_so(tmp_path, stored, previous):
    if previous is None:
        stored["previous"] = None
    else:
        stored["previous"]["settings"]["turns"] = 1
    text = section(report.page(read(tmp_path, stored), "example", []), "## Repeatability")
    assert text.strip() == "There is no run before this one on this machine with the same settings."


def test_figures_are_there_and_are_named_on_the_page(made):
    page, folder = made
    files = sorted((folder / "stored_result").iterdir())
    assert {path.stem for path in files} == FIGURES
    for path in files:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.findall(".//{http://www.w3.org/2000/svg}text")  # text, and not outlines
        assert f"(stored_result/{path.name})" in page
    assert "Left out: it needs two sizes" in section(page, "### Time of sorted_l1 against the vocabulary")
    caption = section(page, "### Speed-up of the best of ours against each peer")
    assert "Made by `python -m bench.report bench/results/stored_result.json`" in caption
    assert "example-machine, 2020-02-02" in caption


def test_a_figure_shows_the_loss_and_the_failure(made):
    texts = [element.text for element in ElementTree.parse(made[1] / "stored_result" / "speedup.svg").iter()]
    assert "0.500x" in texts
    assert "100x" in texts
    assert texts.count("failed") == 2  # torch.compile's, and ours against torch.sort


def test_memory_against_tokens_needs_two_numbers_of_rows(tmp_path, stored):
    stored["results"] = [entry for entry in stored["results"] if entry["size"].get("rows") != 64]
    path = tmp_path / "example.json"
    path.write_text(json.dumps(stored))
    report.main([str(path)])
    assert not (tmp_path / "example" / "memory.svg").exists()
    assert "Left out" in section((tmp_path / "example.md").read_text(), "### Peak memory against tokens")


def test_the_same_result_gives_the_same_bytes(made, tmp_path):
    _, folder = made
    (tmp_path / "stored_result").mkdir()
    (tmp_path / "stored_result" / "stale.svg").write_text("a figure that this result does not have")
    report.main([str(STORED), "--output", str(tmp_path)])
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 1 + len(FIGURES)
    for path in files:
        assert (folder / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_the_summary():
    console = Console(file=io.StringIO(), width=160)
    report.summarize(report.read(STORED), console)
    printed = console.file.getvalue()
    assert "eager 0.500x, slower" in printed
    assert "2 reached" in printed
    assert "3 missed" in printed
    assert "1 not comparable" in printed
    assert printed.count("FAILED") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.update(format=2), "format must be 1, got 2"),
        (lambda stored: stored.pop("machine"), "no key 'machine'"),
        (lambda stored: stored["machine"].pop("cores"), "machine: no key 'cores'"),
        (lambda stored: stored["results"][4].pop("traffic"), r"results\[4\]: no key 'traffic'"),
        (lambda stored: stored["results"][4]["seconds"].pop("upper"), r"results\[4\]: seconds: no key 'upper'"),
        (lambda stored: stored["results"][4].update(dtype="fp32"), r"results\[4\]: dtype must be one of .*'fp32'"),
        (lambda stored: stored["results"][4].update(seconds=None), r"results\[4\]: there are neither"),
        (lambda stored: stored["results"].append(stored["results"][4]), "a second rank_truncate of"),
        (lambda stored: stored["previous"]["results"][0].pop("seconds"), r"previous results\[0\]: no key 'seconds'"),
    ],
)
def test_what_is_not_the_format_is_refused(tmp_path, stored, capsys, change, message):
    change(stored)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, stored)
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "example.json")])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "example.md").exists()


def test_numbers_have_three_digits():
    assert [number(x) for x in (0.0123, 0.31, 1.6, 62.04, 151.6, 1234.5, 0)] == [
        "0.0123",
        "0.310",
        "1.60",
        "62.0",
        "152",
        "1234",
        "0",
    ]
    assert [seconds_text(x) for x in (40e-6, 1e-3, 0.0123, 2.5)] == ["40.0 us", "1.00 ms", "12.3 ms", "2.50 s"]
