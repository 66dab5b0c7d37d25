"""The subject of a commit: at most 72 characters, a command with a capital, no full stop.

Git hands the message over in a file: `python tests/commit_subject.py .git/COMMIT_EDITMSG`. The hook
`commit-subject` of `.pre-commit-config.yaml` runs it.
"""

import re
import sys
from pathlib import Path

LONGEST = 72
BY_GIT = ("Merge ", 'Revert "', "fixup! ", "squash! ", "amend! ")
NO_COMMAND = re.compile(r"[A-Z][a-z]+(?:ing|[^e]ed|[^su]s)")  # Adding, Added, Adds
COMMANDS = {"Bias", "Bring", "Embed", "Shed", "String"}


def subject_of(message: str) -> str:
    """The first line that is neither empty nor a comment."""
    lines = (line for line in message.splitlines() if line.strip() and not line.startswith("#"))
    return next(lines, "")


def faults(subject: str) -> list[str]:
    """What is wrong with a subject; what Git wrote itself is taken as it is."""
    if subject.startswith(BY_GIT):
        return []
    first = re.split(r"[\s,:]", subject, maxsplit=1)[0]
    found = []
    if len(subject) > LONGEST:
        found.append(f"must have at most {LONGEST} characters, not {len(subject)}")
    if not subject[:1].isupper():
        found.append("must begin with a capital")
    if NO_COMMAND.fullmatch(first) and first not in COMMANDS:
        found.append(
            f"must be a command, as 'Add' and not 'Added', 'Adds' or 'Adding', not {first!r}"
        )
    if subject.endswith("."):
        found.append("must not end with a full stop")
    return found


def main(arguments: list[str]) -> int:
    (path,) = arguments
    subject = subject_of(Path(path).read_text(encoding="utf-8"))
    for fault in faults(subject):
        print(f"The subject of a commit {fault}. Received: {subject}", file=sys.stderr)
    return bool(faults(subject))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
