"""The table of routers and checks says what passed, of what the tests of today cover."""

import json

import pytest

from tests import router_checks

RESULTS = json.loads(router_checks.RESULTS.read_text())


@pytest.mark.parametrize("backend", router_checks.BACKENDS)
def test_what_is_covered_has_passed(backend):
    """Fails where a router or a check is new: run `python -m tests.router_checks` again."""
    assert RESULTS[backend] == router_checks.covered(backend)


def test_the_page_shows_the_results():
    assert router_checks.on_page().strip() == router_checks.table(RESULTS).strip()


@pytest.mark.parametrize("router", router_checks.every_router())
def test_every_router_has_every_check(router):
    for backend in router_checks.BACKENDS:
        missing = set(router_checks.CHECKS) - set(RESULTS[backend][router])
        assert {(check, backend) for check in missing} <= router_checks.NOT_RUN


def test_a_failure_is_not_shown_as_passed(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuite><testcase classname="tests.layers.test_contract" '
        'name="test_save_and_load[moe_relu]"/>'
        '<testcase classname="tests.layers.test_contract" name="test_fit[True-moe_relu]">'
        "<failure/></testcase>"
        '<testcase classname="tests.layers.test_contract" name="test_fit[False-moe_hash]"/>'
        '<testcase classname="tests.layers.test_contract" name="test_fit[True-moe_hash]">'
        "<skipped/></testcase></testsuite>"
    )
    passed = router_checks.passed(report, "jax")
    assert passed["ReLURouter"] == ["save, load"]
    assert passed["HashRouter"] == []
