"""Which subjects of commits pass, and which do not."""

import subprocess
import sys

import pytest

from tests import commit_subject

TOO_LONG = "Say " + "x" * (commit_subject.LONGEST - 3)


@pytest.mark.parametrize(
    "subject",
    [
        "Add a router",
        "Place, then run",
        "On JAX, walk under a capacity",
        "Address what fails",
        "Feed masks to the bridge",
        "Bring back the table",
        TOO_LONG[:-1],
        "Merge branch 'x' of a place whose name is longer than a subject of ours may ever be",
        "fixup! Add a router",
    ],
)
def test_good_subjects(subject):
    assert commit_subject.faults(subject) == []


@pytest.mark.parametrize(
    ("subject", "fault"),
    [
        (TOO_LONG, "must have at most 72 characters, not 73"),
        ("add a router", "must begin with a capital"),
        ("", "must begin with a capital"),
        ("feat: add a router", "must begin with a capital"),
        ("Add a router.", "must not end with a full stop"),
        ("Added a router", "must be a command"),
        ("Adds a router", "must be a command"),
        ("Adding a router", "must be a command"),
    ],
)
def test_bad_subjects(subject, fault):
    (found,) = commit_subject.faults(subject)
    assert found.startswith(fault)


def test_the_subject_is_the_first_line_that_says_something():
    assert (
        commit_subject.subject_of("\n# Please enter\nAdd it\n\nadded.\n# On branch x\n") == "Add it"
    )


@pytest.mark.parametrize(("message", "status"), [("Add it\n\nwhy.\n", 0), ("# only\nadd it.\n", 1)])
def test_the_command(tmp_path, message, status):
    (tmp_path / "message").write_text(message)
    done = subprocess.run(
        [sys.executable, commit_subject.__file__, tmp_path / "message"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    assert done.stderr.count("Received: add it.") == 2 * status
