"""The lowest versions are those that pyproject.toml says."""

import tomllib

import pytest

from tests.packaging import lowest

PROJECT = {
    "name": "keras-moe",
    "dependencies": ["keras>=3.12"],
    "optional-dependencies": {"plot": ["matplotlib>=3.9"], "all": ["keras-moe[plot]", "six>=1.16"]},
}


def with_extra(*requirements):
    return {**PROJECT, "optional-dependencies": {"more": list(requirements)}}


def test_each_requirement_has_its_lowest_version():
    assert lowest.floors(PROJECT) == {"keras": "3.12", "matplotlib": "3.9", "six": "1.16"}


def test_what_developers_need_is_no_users():
    project = {**PROJECT, "optional-dependencies": {"dev": ["ruff>=0.8", "mkdocs<2"]}}
    assert lowest.floors(project) == {"keras": "3.12"}


@pytest.mark.parametrize("requirement", ["keras>=3.13", "six", "six<2", "six>=1.16,<2"])
def test_what_has_no_one_lowest_version_is_refused(requirement):
    with pytest.raises(ValueError, match=f"one and the same `>=`. Received: {requirement[:3]}"):
        lowest.floors(with_extra(requirement))


def test_the_project_has_lowest_versions_and_the_tools_are_pinned():
    project = tomllib.loads((lowest.ROOT / "pyproject.toml").read_text())["project"]
    assert {"keras", "numpy", "jax", "tensorflow", "torch"} <= set(lowest.floors(project))
    assert sorted(pin.partition("==")[0] for pin in lowest.tools()) == sorted(lowest.TOOLS)
