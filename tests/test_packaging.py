"""What pyproject.toml and CITATION.cff repeat by hand matches the code: the version, and the list of packages."""

import re
import tomllib
from pathlib import Path

import bayeslm

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_the_version_is_that_of_the_package() -> None:
    assert PYPROJECT["project"]["version"] == bayeslm.__version__
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert cited is not None
    assert cited[1] == bayeslm.__version__


def test_every_folder_with_code_is_a_listed_package() -> None:
    found = {
        ".".join((name, *module.parent.relative_to(ROOT / folder).parts))
        for name, folder in SETUPTOOLS["package-dir"].items()
        for module in (ROOT / folder).rglob("*.py")
    }
    assert found == set(SETUPTOOLS["packages"])


def test_files_that_code_reads_are_installed() -> None:
    listed = SETUPTOOLS["package-data"]["bayeslm"]
    found = {path for pattern in listed for path in (ROOT / "bayeslm").glob(pattern)}
    assert found >= {
        path for path in (ROOT / "bayeslm").rglob("*") if path.suffix in (".html", ".css", ".js", ".typed")
    }


def test_every_listed_package_is_regular() -> None:
    """A folder without __init__.py would install as a namespace package, whose types are not checked."""
    folders = SETUPTOOLS["package-dir"]
    for package in SETUPTOOLS["packages"]:
        name = max((n for n in folders if f"{package}.".startswith(f"{n}.")), key=len)
        parts = package.removeprefix(name).strip(".").split(".")
        assert ROOT.joinpath(folders[name], *parts, "__init__.py").is_file(), package
