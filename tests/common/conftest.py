"""At the end of a run of transformers' suites: what became of their tests, and why some are overridden."""

from collections import Counter, defaultdict

import pytest


OUTCOMES = {"passed": "passed", "skipped": "skipped by itself", "xfailed": "overridden", "failed": "failed"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts, reasons = defaultdict(Counter), defaultdict(set)
    for outcome in OUTCOMES:
        for report in terminalreporter.getreports(outcome):
            _, _, test = report.nodeid.partition("tests/common/")
            suite, _, name = test.partition(".py::")[2].partition("::")
            if name:
                counts[suite][outcome] += 1
            if outcome == "xfailed":
                reasons[report.wasxfail.removeprefix("reason: ")].add(name)
    if not counts:
        return
    terminalreporter.section("transformers' suites")
    columns = ["tests", *OUTCOMES.values()]
    terminalreporter.write_line(f"{'suite':28}" + "".join(f"{column:>19}" for column in columns))
    for suite, outcomes in counts.items():
        numbers = [outcomes.total(), *(outcomes[outcome] for outcome in OUTCOMES)]
        terminalreporter.write_line(f"{suite:28}" + "".join(f"{number:19}" for number in numbers))
    terminalreporter.section("overridden", sep="-")
    for reason, names in sorted(reasons.items(), key=lambda item: sorted(item[1])):
        terminalreporter.write_line(f"{', '.join(sorted(names))}: {reason}")
