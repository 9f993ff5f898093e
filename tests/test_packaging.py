"""What an installation holds and needs."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    if "setuptools" in done.stderr and "No module named" in done.stderr:
        pytest.skip("building a wheel without the network needs setuptools")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_installs_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"loro_jax"}
    assert "loro_jax/py.typed" in names
    for file in ("train.txt", "valid.txt", "tokenizer.model", "LICENSE.txt"):
        assert f"loro_jax/text/corpus/{file}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_embedded_corpus_is_at_most_two_megabytes():
    files = (ROOT / "loro_jax" / "text" / "corpus").iterdir()
    assert sum(file.stat().st_size for file in files) < 2_000_000


CORE = """
import sys
blocked = ("flax", "orbax", "grain", "tensorflow",
           "ml_collections", "sentencepiece", "matplotlib")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
import loro_jax, loro_jax.memory
assert loro_jax.__file__.startswith(sys.argv[1]), loro_jax.__file__
import jax.numpy as jnp
tx = loro_jax.loro(0.1)
tx.init({"w": loro_jax.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))})
try:
    import loro_jax.training
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(folder, *arguments):
    """Runs Python in the folder, without the checkout on its path."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )


def test_the_core_needs_neither_flax_nor_the_checkout(installed):
    done = run(installed, "-c", CORE, str(installed))
    assert done.returncode == 0, done.stderr
    assert "run it from a checkout" in done.stdout


COMMANDS = """
import sys
sys.path.insert(0, sys.argv[1])

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "sentencepiece":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Block())
from loro_jax.__main__ import main
for arguments in (["memory"], ["evaluate", "x", "y"], ["prepare", "--help"]):
    print(main(arguments))
del sys.meta_path[0]
main(["verify", "--help"])
"""


def test_commands_of_an_installation_say_what_they_need(installed):
    done = run(installed, "-c", COMMANDS, str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1\n1\n1\nusage: python -m loro_jax verify")
    memory, evaluate, prepare = done.stderr.splitlines()
    for line, name in ((memory, "memory"), (evaluate, "evaluate")):
        assert line.startswith(f"error: python -m loro_jax {name} needs the networks in models/")
        assert "run it from a checkout" in line
    assert "needs sentencepiece, which is not installed" in prepare
