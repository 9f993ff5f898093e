"""The budget of processor time, by a session of pytest in a folder of its own."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

FILE = """
import time
import pytest

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def costly():
    burn(0.3)

def test_quick():
    time.sleep(0.3)

def test_fixture(costly):
    pass

@pytest.mark.slow
def test_marked():
    burn(0.3)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "several"])
@pytest.mark.slow
def test_a_test_over_the_budget_is_named_and_ends_in_an_error(tmp_path, workers, monkeypatch):
    # Options of the session that runs this test.
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (tmp_path / "test_it.py").write_text(FILE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")

    def session(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "tests.processor_time", str(tmp_path)]
        done = subprocess.run(
            [*command, *workers, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        return done.returncode, done.stdout

    status, output = session("--budget=0.2")
    assert status == 1
    over = output.partition("over the budget")[2]
    assert "test_it.py::test_fixture" in over
    assert "::test_quick" not in over
    assert "::test_marked" not in over
    status, output = session("--budget=9", "--processor-time=2")
    assert status == 0
    assert "over the budget" not in output
    assert " call     test_it.py::test_marked" in output
    assert " setup    test_it.py::test_fixture" in output
