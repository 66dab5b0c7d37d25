"""Whole runs, and runs that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import run, show
from benchmarks.contender import Options
from benchmarks.results import Store, path_of, read
from benchmarks.rows import select

ROOT = Path(__file__).parents[2]
DEVICE = {"name": "Some(R) CPU @ 2 GHz", "cores": 2}
HEADER = {
    "date": "2026-01-31T12:00:00Z",
    "backend": "jax",
    "quick": False,
    "command": "$",
    "device": DEVICE,
}
MEASURED = {"lines": [], "dtype": "float32"}

KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.results import Store

device = {"name": "CPU", "cores": 2}
store = Store(Path(sys.argv[1]), {"date": "today", "backend": "jax", "device": device})
store.begin("one")
store.end("one", {"lines": [1, 2], "dtype": "float32"})
store.begin("two")
os.kill(os.getpid(), signal.SIGKILL)
"""


def python(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_rows_for_a_gpu_run_on_a_cpu_in_tiny_sizes(tmp_path):
    out = tmp_path / "gpu.json"
    row = "gpu-mixed-64-2048-768-128-8"
    done = python(
        "-m", "benchmarks.run", "--backend", "torch", "--quick", "--no-peers",
        "--rows", row, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = read(out)
    result = record["rows"][row]
    assert result["failures"] == [] and result["dtype"] == "mixed_bfloat16"
    against = [(line["pass"], line["against"]) for line in result["lines"]]
    assert against == [(p, a) for p in ("forward", "gradient") for a in ("dense", "batched")]
    assert "TFLOP/s" in done.stdout


def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path):
    """Its checks and rows have tests of their own; this is the script, with one of its steps."""
    environment = {**os.environ, "QUICK": "1", "STEPS": "candidates-torch"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = ROOT / "benchmarks/accelerator/run.sh"
    done = subprocess.run(
        ["bash", script, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "candidates_torch.json").read_text())["records"]
    mine = [record for record in records if record["who"] == "grouped_mm"]
    assert [record["pass"] for record in mine] == ["forward", "by rows", "by kernels"]
    assert all(record["error"] < 5e-3 for record in mine)
    assert "candidates-torch: exit 0" in done.stdout


def test_a_quick_run_of_one_row(tmp_path):
    out = tmp_path / "one.json"
    done = python(
        "-m", "benchmarks.run", "--backend", "jax", "--quick", "--no-peers",
        "--rows", "soft", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = read(out)
    (row,) = record["rows"].values()
    assert row["failures"] == []
    assert [(line["pass"], line["against"]) for line in row["lines"]] == [
        ("forward", "dense"),
        ("gradient", "dense"),
    ]
    for line in row["lines"]:
        assert line["ratio"]["median"] > 0 and line["ratio"]["n"] == 3
        assert line["met"] == (line["ratio"]["median"] <= 1.25)
    assert record["versions"]["keras-moe"] and record["device"]["cores"] >= 1
    assert record["command"].startswith("python -m benchmarks.run --backend jax --quick")
    assert "running" not in record
    assert "tiny sizes: these numbers mean nothing" in done.stdout


def test_a_killed_process_keeps_what_it_had(tmp_path):
    out = tmp_path / "one.json"
    assert python("-c", KILLED, out).returncode == -signal.SIGKILL
    (record,) = read(out)
    assert record["rows"] == {"one": {"lines": [1, 2], "dtype": "float32"}}
    assert record["running"] == "two"


def test_the_rows_after_a_killed_one_still_run(tmp_path, monkeypatch):
    """The first process dies in the second row; another one goes on with the third."""
    path = tmp_path / "one.json"
    rows = select(["decode"])
    asked = []

    def child(command, env):
        names = json.loads(command[-1])["rows"]
        asked.append(names)
        store = Store(path, HEADER)
        for name in names:
            store.begin(name)
            if name == rows[1].name:
                return SimpleNamespace(returncode=-9)
            store.end(name, MEASURED)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run.subprocess, "run", child)
    record = run.run_backend(rows, path, HEADER, Options("jax"), None)
    assert asked == [[row.name for row in rows], [rows[2].name]]
    assert record["rows"][rows[0].name] == record["rows"][rows[2].name] == MEASURED
    assert record["rows"][rows[1].name]["error"] == "The process ended with status -9."


def test_a_row_that_fails_is_stored_and_the_others_go_on(tmp_path, monkeypatch):
    from benchmarks import child

    def measure(row, engine, options):
        if row.sizes.tokens == 8:
            raise RuntimeError("no luck\nand a long story")
        return {"lines": []}

    monkeypatch.setattr(child, "measure_row", measure)
    store = Store(tmp_path / "one.json", HEADER)
    child.run_rows(select(["decode"]), store, None, Options("jax"), None)
    errors = [row.get("error") for row in store.record["rows"].values()]
    assert errors == [None, "RuntimeError: no luck", None]


def test_a_row_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    from benchmarks import child

    def measure(row, engine, options):
        try:
            time.sleep(10)
        except Exception:
            return {"lines": ["taken for a contender's failure"]}

    monkeypatch.setattr(child, "measure_row", measure)
    store = Store(tmp_path / "one.json", HEADER)
    child.run_rows(select(["compile"]), store, None, Options("jax", row_limit=1), None)
    (row,) = store.record["rows"].values()
    assert row["error"] == "RowTooLong: The row took longer than 1 s (--row-limit)."


def test_a_machine_has_a_folder_and_a_backend_a_file():
    path = path_of(DEVICE["name"], "tensorflow-xla", quick=False, folder=Path("out"))
    assert path == Path("out/some-r-cpu-2-ghz/tensorflow-xla.json")
    assert path_of("cpu", "jax", quick=True).name == "jax_quick.json"


def test_a_run_takes_the_place_of_what_it_measured_again(tmp_path):
    path = tmp_path / "jax.json"
    first = Store(path, HEADER)
    for name in ("stays", "is measured again", "fails later"):
        first.end(name, MEASURED)
    first.end("failed", {"error": "no luck", "dtype": "float32"})
    second = Store(path, {**HEADER, "date": "2026-02-01T12:00:00Z"})
    assert second.done == set()
    newer = {**MEASURED, "took_seconds": 1.0}
    second.end("is measured again", newer)
    second.end("fails later", {"error": "no luck", "dtype": "float32"})
    older, latest = read(path)
    assert older["rows"] == {"stays": MEASURED, "fails later": MEASURED}
    assert latest["rows"]["is measured again"] == newer and "error" in latest["rows"]["fails later"]
    assert [run["date"][:10] for run in (older, latest)] == ["2026-01-31", "2026-02-01"]


@pytest.mark.parametrize(
    "change", [{"device": {**DEVICE, "cores": 16}}, {"device": {**DEVICE, "name": "other"}}]
)
def test_numbers_of_another_machine_stay(tmp_path, change):
    path = tmp_path / "jax.json"
    Store(path, HEADER).end("row", MEASURED)
    Store(path, {**HEADER, "date": "2026-02-01T12:00:00Z", **change}).end("row", MEASURED)
    assert [list(run["rows"]) for run in read(path)] == [["row"], ["row"]]


def test_a_run_of_which_nothing_is_left_goes(tmp_path):
    path = tmp_path / "jax.json"
    Store(path, HEADER).end("row", MEASURED)
    Store(path, {**HEADER, "date": "2026-02-01T12:00:00Z"}).end("row", MEASURED)
    (run,) = read(path)
    assert run["date"].startswith("2026-02-01")


def test_the_stored_command_has_no_path():
    arguments = ["--rows", "soft", "--out", "/some/where", "--quick", "--out=/else/where"]
    assert run.command_of(arguments) == "python -m benchmarks.run --rows soft --quick"


def test_a_target_is_met_or_missed_by_so_much():
    line = {"limit": 1.2, "ratio": {"median": 1.5}}
    assert show.verdict({**line, "met": False}) == "missed by 25 %"
    assert show.verdict({**line, "met": True}) == "met"
    assert show.verdict({**line, "limit": None, "met": None}) == ""
