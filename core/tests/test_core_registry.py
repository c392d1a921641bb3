"""Discovery, loading, the contract: good plugins, broken ones, and what the user is told."""

import json
import subprocess
import sys

import pytest

from eff.errors import EffError, PluginError
from eff.registry import CONTRACT, discover, find, forget_discovered, load_method


def row(name):
    return next(item for item in discover() if item.name == name)


def test_a_plugin_shows_up_with_what_its_metadata_say(install, method_code):
    install("quant_made", method_code())
    found = row("quant_made")
    assert (found.family, found.version, found.summary, found.status) == ("quant", "0.3", "about quant_made", "ok")


def test_listing_imports_neither_torch_nor_pydantic_nor_a_plugin():
    code = "import sys; from eff.cli import main\ntry: main(['list-plugins', '--json'])\nexcept SystemExit: pass\nprint([m for m in ('torch', 'pydantic', 'numpy', 'eff_quant_lsq') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    json.loads(done.stdout)


@pytest.mark.parametrize("range_", [">=0.1,<1", ">=0.1, <0.2", "(<1,>=0.1)", "~=0.1", ""])
def test_a_range_that_this_core_is_in_fits_however_it_is_written(install, method_code, range_):
    install("quant_made", method_code(), requires=(f"eff-core{range_}", "torch"))
    assert row("quant_made").status == "ok"


@pytest.mark.parametrize("range_", [">=0.2,<1", ">=0.0.1,<0.1", "==0.0.9"])
def test_a_range_that_this_core_is_outside_of_is_named(install, method_code, range_):
    install("quant_made", method_code(), requires=(f"eff-core{range_}",))
    assert row("quant_made").status == "broken" and "this is 0.1.0; update" in row("quant_made").reason


def test_of_two_installations_of_a_distribution_the_first_on_the_path_counts(
    install, method_code, tmp_path, monkeypatch
):
    install("quant_made", method_code())
    older = tmp_path / "older" / "Dummy.Quant_Made-0.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Name: Dummy.Quant_Made\nVersion: 0.1\n\nKeywords: eff-api-9\n")
    (older / "entry_points.txt").write_text("[eff.plugins]\nquant_made = old:Made\n")
    monkeypatch.syspath_prepend(str(older.parent))
    sys.path.append(sys.path.pop(0))
    forget_discovered()
    assert (row("quant_made").version, row("quant_made").status) == ("0.3", "ok")


def test_an_unknown_plugin_gets_near_matches(install, method_code):
    install("quant_made", method_code())
    with pytest.raises(PluginError, match="plugin 'quant_maed' is not installed; did you mean 'quant_made'"):
        find("quant_maed")


def test_a_method_of_this_repository_that_is_missing_gets_its_install_command(monkeypatch):
    monkeypatch.setattr("eff.registry.SHIPPED", ("nas_gone",))
    with pytest.raises(PluginError, match="plugin 'nas_gone' is not installed; pip install eff-nas-gone"):
        find("nas_gone")


def test_two_plugins_with_one_name_are_both_broken_and_named(install, method_code):
    install("quant_made", method_code(), distribution="dummy-one")
    install("quant_made", method_code(), distribution="dummy-two")
    with pytest.raises(PluginError, match=r"the name is taken by several distributions \(dummy-one, dummy-two\)"):
        find("quant_made")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"keywords": "eff,eff-api-2"},
            f"speaks contract 2, this eff-core 0.1.0 speaks {CONTRACT}; update dummy-quant-made",
        ),
        (
            {"keywords": "eff"},
            "states no contract; add the keyword eff-api-1 to the pyproject.toml of dummy-quant-made",
        ),
        ({"requires": ("eff-core>=7",)}, "needs eff-core>=7, this is 0.1.0; update dummy-quant-made or eff-core"),
    ],
)
def test_a_plugin_for_another_core_is_listed_as_broken_with_the_reason(install, method_code, change, reason):
    install("quant_made", method_code(), **change)
    assert (row("quant_made").status, row("quant_made").reason) == ("broken", reason)


def test_a_plugin_that_raises_on_import_is_named_and_the_others_work(install, method_code):
    install("quant_bad", "raise RuntimeError('no such chip')")
    install("quant_made", method_code())
    with pytest.raises(
        PluginError,
        match="plugin 'quant_bad' does not import: RuntimeError: no such chip; reinstall or uninstall dummy-quant-bad",
    ):
        load_method("quant_bad")
    assert load_method("quant_made").__name__ == "Made"


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            "@hookimpl\ndef transfrom(self, model, run): return model",
            "there is no hook 'transfrom'; did you mean 'transform'",
        ),
        ("def transform(self, model, run): return model", "named like a hook but not marked; put @hookimpl above it"),
        ("@hookimpl\ndef transform(self, modle, run): return modle", "argument 'modle' is not one of the hook's"),
        ("@hookimpl\ndef transform(self, model, run=None): return model", "argument 'run' has a default"),
        ("@hookimpl\ndef transform(self, model, *, run): return model", "keyword-only"),
        ("@hookimpl(wrapper=True)\ndef train_step(self, step): return None", "is a wrapper without a yield"),
        ("contract = 2", "speaks contract 2, this core speaks 1"),
    ],
)
def test_a_broken_contract_is_said_in_one_line_with_the_mend(install, method_code, hooks, message):
    install("quant_made", method_code(hooks))
    with pytest.raises(PluginError) as caught:
        load_method("quant_made")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_several_faults_are_all_reported(install, method_code):
    install(
        "quant_made",
        method_code(
            "def transform(self, model, run): return model\n@hookimpl\ndef export(self, modl, target, run): pass"
        ),
    )
    with pytest.raises(EffError) as caught:
        load_method("quant_made")
    assert len(str(caught.value).splitlines()) == 2


def test_a_configuration_that_is_no_pydantic_model_is_refused(install):
    install(
        "quant_made",
        "from eff.method import Method, Card\nclass Made(Method):\n    card = Card(title='T', authors=('A',), venue='V', year=2020, paper='p', url='u')",
    )
    with pytest.raises(PluginError, match="names no configuration"):
        load_method("quant_made")


def test_an_entry_point_to_something_else_is_refused(install):
    install("quant_made", "Made = 3")
    with pytest.raises(PluginError, match="it must name a subclass of eff.method.Method"):
        load_method("quant_made")
