"""`eff new`: the rendered package installs, shows up, runs and passes its own tests."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from eff.errors import OutputError, RequestError
from eff.scaffold import new_plugin
from eff.testing.samples import DATA, MODEL

pytest.importorskip("cookiecutter", reason="eff new needs cookiecutter")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "is no plugin name"),
        ("Quant_mine", "is no plugin name"),
        ("qant_mine", "there is no family 'qant'; did you mean 'quant'"),
    ],
)
def test_a_wrong_name_is_refused(name, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "eff-quant-mine").mkdir()
    with pytest.raises(OutputError, match="eff-quant-mine exists"):
        new_plugin("quant_mine", tmp_path)


def test_a_title_that_would_break_the_files_is_refused(tmp_path):
    with pytest.raises(RequestError, match="--title holds a quote"):
        new_plugin("quant_mine", tmp_path, title='say "hi"')


def test_the_rendered_package_works_in_a_fresh_environment(tmp_path):
    package = new_plugin("quant_mine", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eff-quant-mine"]
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    # The fresh environment borrows torch and eff from this one; only the new package is installed in it.
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    borrowed = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    Path(site.stdout.strip(), "borrowed.pth").write_text(borrowed)

    def run(*command):
        done = subprocess.run([python, "-m", *map(str, command)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", package)
    rows = {row["name"]: row for row in json.loads(run("eff", "list-plugins", "--json"))}
    assert rows["quant_mine"]["status"] == "ok"
    report = json.loads(
        run("eff", "apply", "quant_mine", MODEL, "--data", DATA, "-o", "bits=3", "--out", "run", "--json")
    )
    assert report["methods"][0]["config"] == {"bits": 3}
    assert "0 failed" in run("eff", "check", "quant_mine")
    assert " passed" in run("pytest", "-q", "-p", "no:cacheprovider", package / "tests")
    assert sys.executable != str(python)
