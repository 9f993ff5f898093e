"""A pytest plugin: the processor time of every test, and a budget for those of the fast tier.

Times by the clock depend on what else a machine does, and so say little about a test. Processor
time is that of the test's own process and of the processes that it has waited for, on all cores.
"""

import collections
import os

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("processor time")
    group.addoption(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="fail when a test that is not marked slow takes more processor time (its share of a "
        "fixture included), and name it",
    )
    group.addoption(
        "--processor-time",
        type=int,
        default=0,
        metavar="N",
        help="print the processor time of each file and of the N largest tests",
    )


def _seconds():
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.began_at = _seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    now = _seconds()
    report.processor_time, item.began_at = now - item.began_at, now
    report.is_slow = item.get_closest_marker("slow") is not None
    return report


def _reports(terminal):
    kinds = ("passed", "failed", "error", "skipped", "xfailed", "")
    reports = [report for kind in kinds for report in terminal.stats.get(kind, [])]
    return [report for report in reports if hasattr(report, "processor_time")]


def _over(terminal, config):
    budget = config.getoption("--budget")
    if budget is None:
        return {}
    by_test = collections.Counter()
    for report in _reports(terminal):
        if not report.is_slow:
            by_test[report.nodeid] += report.processor_time
    return {test: seconds for test, seconds in by_test.most_common() if seconds > budget}


def pytest_sessionfinish(session):
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker and session.exitstatus == 0 and _over(terminal, session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    over = _over(terminalreporter, config)
    if over:
        terminalreporter.section("over the budget of processor time: mark slow, or make quicker")
        for test, seconds in over.items():
            terminalreporter.line(f"{seconds:8.1f} s {test}")
    largest = config.getoption("--processor-time")
    if largest:
        reports = sorted(_reports(terminalreporter), key=lambda report: -report.processor_time)
        by_file = collections.Counter()
        for report in reports:
            by_file[report.nodeid.partition("::")[0]] += report.processor_time
        terminalreporter.section(f"processor time: {sum(by_file.values()):.0f} s")
        for path, seconds in by_file.most_common():
            terminalreporter.line(f"{seconds:8.1f} s {path}")
        terminalreporter.line("")
        for report in reports[:largest]:
            seconds = report.processor_time
            terminalreporter.line(f"{seconds:8.1f} s {report.when:8} {report.nodeid}")
