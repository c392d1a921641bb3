"""The packaging of the shipped plugins, held against the template and against each other."""

import re
import sys
from pathlib import Path

import pytest

from eff import hookspecs, registry
from eff.scaffold import new_plugin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "core", *sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))]


def packaging(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


METHODS = [folder for folder in PACKAGES if "eff.plugins" in packaging(folder)["project"].get("entry-points", {})]


def test_shipped_methods_are_listed_for_suggestions():
    assert set(registry.SHIPPED) == {folder.name for folder in METHODS}


def test_the_contract_number_is_the_same_in_its_two_homes():
    assert registry.CONTRACT == hookspecs.CONTRACT


@pytest.mark.parametrize("folder", METHODS, ids=lambda folder: folder.name)
def test_a_method_package_has_not_drifted_from_the_template(folder, tmp_path):
    pytest.importorskip("cookiecutter", reason="rendering needs cookiecutter")
    rendered = new_plugin(folder.name, tmp_path)
    ours, template = packaging(folder), packaging(rendered)
    assert ours["build-system"] == template["build-system"]
    for key in ("name", "dynamic", "readme", "license", "requires-python"):
        assert ours["project"][key] == template["project"][key], key
    assert set(template["project"]["keywords"][:2]) <= set(ours["project"]["keywords"])
    own, made = (project["project"]["entry-points"]["eff.plugins"] for project in (ours, template))
    assert list(own) == list(made)
    assert own[folder.name].partition(":")[0] == made[folder.name].partition(":")[0]
    assert ours["tool"]["hatch"] == template["tool"]["hatch"]
    for path in (
        "README.md",
        *(f"src/eff_{folder.name}/{name}.py" for name in ("__init__", "plugin", "config", "claims")),
    ):
        assert (folder / path).is_file() and (rendered / path).is_file(), path
    assert not (folder / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_packages_state_licence_version_source_and_ranges(folder):
    project = packaging(folder)
    assert project["project"]["license"] == "Apache-2.0"
    assert project["tool"]["hatch"]["version"]["path"].endswith("__init__.py")
    assert (folder / "README.md").read_text(encoding="utf-8").strip(), "README.md is empty"
    for line in project["project"]["dependencies"]:
        if line.startswith("eff-"):
            assert re.search(r">=[\d.]+,<\d", line), f"{line}: give a range"
        assert "==" not in line.partition(";")[0], f"{line}: pins one version"


def test_the_import_rules_know_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = set(settings["tool"]["importlinter"]["root_packages"])
    assert known == {"eff", *(f"eff_{folder.name}" for folder in PACKAGES[1:])}


def test_the_readme_says_where_every_package_is():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [folder.name for folder in PACKAGES[1:] if f"plugins/{folder.name}/" not in readme]
    assert not missing
