"""The tables of the page on benchmarks, from a small stored result."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import results, table

FIXTURE = json.loads((Path(__file__).parent / "results_fixture.json").read_text())
README = f"# Title\n\nBefore.\n\n{table.BEGIN}\nold\n{table.END}\n\nAfter.\n"

EXPECTED = """\
**Some CPU, 2 cores, float32, 2026-01-31.**

| what | T, d, h, E, k | pass | target | JAX |
| --- | --- | --- | --- | --- |
| MoE, dropless, N/E >= 512 / dense FFN | 8192, 256, 1024, 8, 2 | fwd | 1.1 | 1.05 |
| MoE, dropless, N/E >= 512 / dense FFN | 8192, 256, 1024, 8, 2 | fwd+bwd | 1.15 | **1.38** (+20 %) |
| MMoE / loop of Dense | 4096, 128, 256, 8, 4 | fwd | 0.5 | 0.40 |
| MMoE / matmul chain | 4096, 128, 256, 8, 4 | fwd | 1.15 | 1.10 |
"""  # noqa: E501

RUNS = """<details markdown="1"><summary>What was run</summary>

- JAX: 2026-01-31, commit 0123456789, keras 3.15.1, jax 0.10.2, `python -m benchmarks.run`.

</details>"""

PEER = (
    "| KerasHub Mixtral | dense glu | MoE, dropless, N/E >= 512 | 8192, 256, 1024, 8, 2 "
    "| 4.32 / - |"
)


def later(date, **changes):
    """The fixture as of a later run."""
    record = copy.deepcopy(FIXTURE)
    return {**record, "date": date, **changes}


def test_the_text():
    text = table.render([FIXTURE])
    assert text.startswith(EXPECTED)
    assert text.count("\n| KerasHub") == 1 and PEER in text
    assert text.endswith(RUNS)


def test_the_newest_result_of_a_row_counts():
    newer = later("2026-02-01T12:00:00Z")
    row = newer["rows"]["dropless-8192-256-1024-8-2"]
    row["lines"][0]["ratio"]["median"] = 1.01
    newer["rows"] = {"dropless-8192-256-1024-8-2": row}
    text = table.render([FIXTURE, newer])
    assert "| fwd | 1.1 | 1.01 |" in text
    assert "| MMoE / loop of Dense |" in text  # of the older run, whose date is shown too
    assert "JAX: 2026-01-31" in text and "JAX: 2026-02-01" in text
    assert text.startswith("**Some CPU, 2 cores, float32, 2026-01-31 to 2026-02-01.**")


def test_quick_results_and_failures_are_not_shown():
    quick = later("2026-02-01T12:00:00Z", quick=True)
    assert table.render([FIXTURE, quick]) == table.render([FIXTURE])
    assert "SoftMoE" not in table.render([FIXTURE])


def test_each_backend_has_a_column():
    text = table.render([FIXTURE, later("2026-02-01T12:00:00Z", backend="torch")])
    assert "| what | T, d, h, E, k | pass | target | JAX | torch |" in text
    assert "| fwd | 1.1 | 1.05 | 1.05 |" in text


def test_only_what_is_between_the_marks_changes():
    changed = table.between_marks(README, "new\n")
    assert changed == README.replace("\nold\n", "\n\nnew\n\n")
    assert table.between_marks(changed, "new\n") == changed


@pytest.mark.parametrize(
    "readme", ["", table.BEGIN, f"{table.END}\n{table.BEGIN}", README + table.END]
)
def test_missing_marks_are_an_error(readme):
    with pytest.raises(ValueError, match=r"must hold the lines '<!-- benchmarks: begin -->' and"):
        table.between_marks(readme, "new")


def folder_with(tmp_path, record):
    (tmp_path / "results" / "some-cpu").mkdir(parents=True)
    stored = {"format": 2, "runs": [record]}
    (tmp_path / "results" / "some-cpu" / "jax.json").write_text(json.dumps(stored))
    (tmp_path / "README.md").write_text(README)
    names = {"--results": "results", "--page": "README.md", "--chart": "chart.png"}
    return [word for option, name in names.items() for word in (option, str(tmp_path / name))]


def test_check_and_write(tmp_path, capsys):
    arguments = folder_with(tmp_path, FIXTURE)
    assert table.main([*arguments, "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == README
    assert table.main(arguments) == 0
    assert table.main([*arguments, "--check"]) == 0
    assert EXPECTED.splitlines()[-1] in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "chart.png").exists()  # there is no curve to draw


def test_a_readme_without_marks_is_an_error_of_its_own(tmp_path, capsys):
    arguments = folder_with(tmp_path, FIXTURE)
    (tmp_path / "README.md").write_text("# Title\n")
    assert table.main([*arguments, "--check"]) == 2
    assert "The page must hold the lines" in capsys.readouterr().err


def test_a_chart_is_drawn_of_the_curve(tmp_path):
    record = copy.deepcopy(FIXTURE)
    lines = record["rows"]["dropless-8192-256-1024-8-2"]["lines"]
    for experts in (4, 128):
        name = f"curve-2048-256-1024-{experts}-2"
        record["rows"][name] = {"dtype": "float32", "lines": lines}
    arguments = folder_with(tmp_path, record)
    assert table.main(arguments) == 0
    first = (tmp_path / "chart.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert table.main(arguments) == 0
    assert (tmp_path / "chart.png").read_bytes() == first


def test_a_file_that_holds_no_results_is_an_error(tmp_path):
    for text in ("{}", json.dumps(FIXTURE), '{"format": 2, "runs": [{}]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json holds no benchmark results"):
            results.read_all([tmp_path / "a.json"])
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is no JSON file"):
        results.read_all([tmp_path / "a.json"])
