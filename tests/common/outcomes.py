"""A plug-in of pytest that says at the end of a run what became of the suites' tests, and why some are overridden."""

from collections import defaultdict

import pytest


OUTCOMES = {"passed": "passed", "skipped": "skipped by itself", "xfailed": "overridden", "failed": "failed"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tests, reasons = defaultdict(lambda: defaultdict(set)), defaultdict(set)
    for outcome in OUTCOMES:
        for report in terminalreporter.getreports(outcome):
            suite, _, name = report.nodeid.partition("tests/common/")[2].partition(".py::")[2].partition("::")
            if name:
                tests[suite][outcome].add(name)
            if outcome == "xfailed":
                reasons[report.wasxfail.removeprefix("reason: ")].add(name)
    if not tests:
        return
    terminalreporter.section("transformers' suites")
    columns = ["tests", *OUTCOMES.values()]
    terminalreporter.write_line(f"{'suite':28}" + "".join(f"{column:>19}" for column in columns))
    for suite, outcomes in tests.items():
        numbers = [len(set().union(*outcomes.values())), *(len(outcomes[outcome]) for outcome in OUTCOMES)]
        terminalreporter.write_line(f"{suite:28}" + "".join(f"{number:19}" for number in numbers))
    terminalreporter.section("overridden", sep="-")
    for reason, names in sorted(reasons.items(), key=lambda item: sorted(item[1])):
        terminalreporter.write_line(f"{', '.join(sorted(names))}: {reason}")
