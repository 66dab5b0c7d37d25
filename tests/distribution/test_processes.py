"""Several processes train the curve of one, also after one of them was killed."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "train_processes.py"
PAGE = Path(__file__).parents[2] / "docs" / "devices.md"
EPOCHS, LIMIT = 20, 400


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def run(processes, folder, *options):
    """Starts the processes, and ends them all where one fails; returns their exit codes."""
    folder.mkdir(exist_ok=True)
    address = f"localhost:{free_port()}"
    logs = [(folder / f"log-{index}").open("w") for index in range(processes)]
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(index), str(processes), address, folder, *options],
            stdout=log,
            stderr=log,
        )
        for index, log in enumerate(logs)
    ]
    deadline = time.monotonic() + LIMIT
    try:
        while any(process.poll() is None for process in running):
            if time.monotonic() > deadline or any(process.poll() for process in running):
                break
            time.sleep(0.2)
        return [process.poll() for process in running]
    finally:
        for process, log in zip(running, logs, strict=True):
            process.kill()
            process.wait()
            log.close()


def curve(folder, process=0):
    lines = (folder / f"{process}.jsonl").read_text().splitlines()
    return {entry["epoch"]: entry["loss"] for entry in map(json.loads, lines)}


def assert_same_curve(folder, process, alone):
    found = curve(folder, process)
    assert list(found) == list(range(EPOCHS))
    np.testing.assert_allclose(list(found.values()), list(alone.values()), rtol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert run(1, folder) == [0], (folder / "log-0").read_text()[-3000:]
    losses = curve(folder)
    assert losses[EPOCHS - 1] < 0.2 * losses[0]
    return losses


def test_two_processes_go_on_after_one_was_killed(alone, tmp_path):
    codes = run(2, tmp_path, "--die-in-epoch", "8")
    assert codes[1] == -9
    assert max(curve(tmp_path)) == 7
    assert run(2, tmp_path) == [0, 0], (tmp_path / "log-0").read_text()[-3000:]
    for process in range(2):
        assert_same_curve(tmp_path, process, alone)


def test_four_processes_hold_some_of_the_experts_each(alone, tmp_path):
    assert run(4, tmp_path, "--experts") == [0] * 4, (tmp_path / "log-0").read_text()[-3000:]
    assert_same_curve(tmp_path, 3, alone)


def test_a_checkpoint_of_several_processes_goes_on_in_one(alone, tmp_path):
    run(2, tmp_path, "--experts", "--die-in-epoch", "15")
    (tmp_path / "1.jsonl").unlink()
    assert run(1, tmp_path) == [0], (tmp_path / "log-0").read_text()[-3000:]
    assert_same_curve(tmp_path, 0, alone)
