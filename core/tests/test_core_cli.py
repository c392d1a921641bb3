"""The command line: help, exit codes, where output goes, and all faults of a request at once."""

import importlib
import json
import subprocess
import sys
from typing import Annotated

import pytest

from eff import registry
from eff.cli import main
from eff.cli.app import MODULES, _name, app
from eff.errors import ConfigError
from eff.method import Field, MethodConfig
from eff.options import check_config, split_assignments
from eff.schemas import DataSpec
from eff.testing.samples import DATA, MODEL


def run(capsys, *arguments):
    """Run the command; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as caught:
        main([str(item) for item in arguments])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


COMMANDS = [
    "list-plugins",
    "info",
    "apply",
    "train",
    "evaluate",
    "predict",
    "export",
    "bench",
    "compare",
    "sweep",
    "verify",
    "new",
    "check",
    "doctor",
    "demo",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and f"Example: eff {name}" in out


def test_no_command_is_missing_from_this_list_or_the_table_of_modules():
    assert set(COMMANDS) == set(MODULES)
    for module in set(MODULES.values()):
        importlib.import_module(f"eff.cli.{module}")
    assert sorted(map(_name, app.registered_commands)) == sorted(MODULES)


def test_listing_imports_the_module_of_no_other_command():
    code = "import sys; from eff.cli import main\ntry: main(['list-plugins'])\nexcept SystemExit: pass\nprint([m for m in sys.modules if m in ('eff.cli.runs', 'eff.cli.use', 'rich')], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_help_shows_brackets_as_they_are(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0 and "[required]" in out and "\\[" not in out


def test_an_unknown_command_is_refused_once(capsys):
    code, _, err = run(capsys, "swep")
    assert code == 2 and err.count("No such command") == 1 and err.count("sweep") <= 1


def test_train_apply_evaluate_predict_from_the_shell(capsys, tmp_path, install, method_code):
    install("quant_made", method_code("@hookimpl\ndef transform(self, model, run): return model"))
    folder = tmp_path / "a"
    code, out, _ = run(capsys, "train", MODEL, "--data", DATA, "--epochs", 1, "--out", folder, "--json")
    assert code == 0 and json.loads(out)["training"]["steps"] == 4
    code, out, _ = run(
        capsys, "apply", "quant_made", folder, "-o", "strength=5", "--epochs", 1, "--out", tmp_path / "b"
    )
    assert code == 0 and "before" in out and "after" in out
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["methods"][0]["config"] == {"strength": 5}
    code, out, _ = run(capsys, "evaluate", tmp_path / "b", "--json")
    assert code == 0 and "accuracy" in json.loads(out)["metrics"]["values"]
    from PIL import Image

    Image.new("L", (8, 8), 128).save(tmp_path / "photo.png")
    code, out, _ = run(capsys, "predict", tmp_path / "b", tmp_path / "photo.png", "--json")
    assert code == 0 and len(json.loads(out)[0]["rows"]) == 4


def test_dry_run_prints_the_recipe_and_touches_nothing(capsys, tmp_path, install, method_code, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install("quant_made", method_code())
    before = sorted(tmp_path.iterdir())
    code, out, _ = run(capsys, "apply", "quant_made", MODEL, "--lr", 0.5, "--dry-run")
    assert code == 0 and "lr: 0.5" in out and "train with quant_made 0.3" in out
    code, out, _ = run(capsys, "apply", "quant_made", MODEL, "--lr", 0.5, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["recipe"]["train"]["lr"] == 0.5 and "train with quant_made 0.3" in plan["plan"]
    assert sorted(tmp_path.iterdir()) == before


def test_faults_of_every_part_of_a_request_are_reported_together(capsys, tmp_path, install, method_code):
    install("quant_made", method_code())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    code, _, err = run(
        capsys, "apply", "quant_made", "gone.pt", "-o", "strength=12", "--device", "abacus", "--data", "digitz",
        "--out", tmp_path / "full",
    )  # fmt: skip
    assert code == 2 and len(err.splitlines()) == 5
    for part in (
        "strength must be",
        "device 'abacus'",
        "gone.pt: there is no",
        "did you mean 'digits'",
        "is not empty",
    ):
        assert part in err
    code, _, err = run(capsys, "apply", "quant_made", MODEL, "--epochs", -1, "--lr", "inf", "-o", "strength=12")
    assert code == 2 and "--epochs" in err and "--lr" in err and "strength must be" in err


def test_resume_refuses_what_it_would_ignore(capsys, tmp_path):
    code, _, err = run(capsys, "apply", "--resume", tmp_path, "--lr", 0.1, "--seed", 3, "--json")
    assert code == 2 and "leave out --lr, --seed" in err


@pytest.mark.parametrize(
    "command",
    [
        ("apply", "quant_lsq,,train_adamp", MODEL),
        ("sweep", "quant_lsq,,train_adamp", MODEL, "-s", "weight_bits=2,3"),
        ("evaluate", MODEL, "--method", "quant_lsq,,train_adamp"),
        ("evaluate", MODEL, "--method", ""),
    ],
)
def test_a_name_that_is_missing_between_commas_is_refused(capsys, command):
    code, _, err = run(capsys, *command)
    assert code == 2 and "a name is missing between the commas" in err


def test_all_wrong_options_are_reported_together_with_suggestions(capsys, install, method_code, tmp_path):
    install("quant_made", method_code())
    code, out, err = run(
        capsys, "apply", "quant_made", MODEL, "-o", "strenght=2", "-o", "strength=12", "--out", tmp_path / "x"
    )
    assert code == 2 and out == ""
    assert "quant_made: option 'strenght' is unknown; did you mean 'strength'?" in err
    assert "quant_made: strength must be between 1 and 9, got 12" in err
    assert not (tmp_path / "x").exists()


def test_bounds_that_are_left_out_are_said_to_be():
    class Bounded(MethodConfig):
        share: float = Field(0.5, ge=0, lt=1)
        width: float = Field(1.0, gt=0)
        pair: tuple[Annotated[float, Field(lt=1)], ...] = (0.5,)

    for options, message in (
        ({"share": 1}, "share must be at least 0 and below 1, got 1"),
        ({"width": 0}, "width must be above 0, got 0"),
        ({"pair": [1.0]}, "pair must be below 1.0, got 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_config("quant_made", Bounded, options)


def test_an_unknown_plugin_exits_with_2(capsys):
    code, _, err = run(capsys, "apply", "quant_nope", "model.pt")
    assert code == 2 and err.startswith("eff: plugin 'quant_nope' is not installed")


def test_an_option_out_of_range_names_the_flag(capsys, install, method_code):
    install("quant_made", method_code())
    code, _, err = run(capsys, "apply", "quant_made", "m.pt", "--epochs", -1, "--seed", -5, "--dry-run")
    assert code == 2 and "--epochs: input should be greater than or equal to 0" in err and "--seed:" in err


def test_a_failed_run_exits_with_1(capsys, tmp_path):
    code, _, err = run(capsys, "train", MODEL, "--data", DATA, "--epochs", 2, "--lr", 1e30, "--out", tmp_path / "x")
    assert code == 1 and "the loss is" in err


def test_info_shows_options_and_schema(capsys, install, method_code):
    install("quant_made", method_code())
    code, out, _ = run(capsys, "info", "quant_made")
    assert code == 0 and "strength" in out and "1..9" in out
    code, out, _ = run(capsys, "info", "quant_made", "--schema")
    assert json.loads(out)["properties"]["strength"]["maximum"] == 9


def test_an_unknown_family_gets_a_suggestion(capsys):
    code, _, err = run(capsys, "list-plugins", "--family", "quantt")
    assert code == 2 and "did you mean 'quant'" in err


def test_check_passes_a_good_plugin_and_fails_a_bad_one(capsys, install, method_code):
    install("quant_made", method_code("@hookimpl\ndef transform(self, model, run): return model"))
    code, out, _ = run(capsys, "check", "quant_made")
    assert code == 0 and "0 failed" in out
    install(
        "quant_random",
        method_code(
            "@hookimpl\ndef transform(self, model, run):\n    import os, torch\n    with torch.no_grad(): model.fc.bias += int.from_bytes(os.urandom(2), 'big') / 65536\n    return model"
        ),
    )
    code, out, _ = run(capsys, "check", "quant_random")
    assert code == 1 and "draw random numbers" in out.replace("\n", " ")


def test_a_claim_that_does_not_hold_exits_with_1_and_says_so(capsys, install, method_code):
    claim = """
    from eff.method import Claim, Check
    claims = (Claim(id="c", statement="s", run="made_dummy_quant_made:measure", checks=(Check(left="a", right="b", margin=1.0),), paper="p", minutes=0.1, seeds=(0, 1)),)
    """
    module = install(
        "quant_made",
        method_code(claim)
        + "\ndef measure(run): return {'a': [2.0 + s for s in run.seeds], 'b': [1.6 + s for s in run.seeds]}\n",
    )
    assert module == "made_dummy_quant_made"
    code, out, _ = run(capsys, "verify", "quant_made", "--json")
    (result,) = json.loads(out)
    assert code == 1 and result["holds"] is False
    assert result["checks"][0]["gap"] == pytest.approx(0.4)


CLAIM = """
from eff.method import Claim, Check
claims = (Claim(id="c", statement="s", run="made_dummy_{name}:measure", checks=(Check(left="net_a", right=0.001),), paper="p", minutes=0.1, seeds=(0,), unit="%", units={{"a": "m"}}),)
"""


def test_one_claim_that_cannot_run_does_not_take_the_others_with_it(capsys, install, method_code, monkeypatch):
    for name, body in (
        ("quant_good", "return {'net_a': [0.00234], 'b': [3.0]}"),
        ("quant_bad", "raise FileNotFoundError('no photos')"),
    ):
        install(name, method_code(CLAIM.format(name=name)) + f"\ndef measure(run): {body}\n")
    real = registry.discover
    monkeypatch.setattr(
        "eff.claims.discover", lambda: [row for row in real() if row.name in ("quant_good", "quant_bad")]
    )
    code, out, err = run(capsys, "verify", "--all")
    assert code == 1
    assert "quant_good c" in out and "0.00234 m" in out and "3.00 %" in out and "holds" in out
    assert "claim 'c' could not be run: no photos" in " ".join(err.split())


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("digits", "digits"),
        ("folder:a/b?train=5&seed=1", "folder:a/b?train=5&seed=1"),
        ("x.npz", "npz:x.npz"),
        ("C:\\data.npz", "npz:C:\\data.npz"),
    ],
)
def test_data_specs_read_back_what_they_print(text, again):
    assert str(DataSpec.parse(text)) == again
    assert DataSpec.parse(again) == DataSpec.parse(text)


def test_options_are_typed_by_the_schema(install, method_code):
    from eff.registry import load_method

    install(
        "quant_made",
        method_code(
            config="names: tuple[str, ...] = Field((), description='n')\n    level: float | None = Field(1.0, description='l')"
        ),
    )
    config_type = load_method("quant_made").config_type()
    given = split_assignments(["names=a,b", "level=null"], ["quant_made"])["quant_made"]
    config = check_config("quant_made", config_type, given)
    assert config.names == ("a", "b") and config.level is None


def test_a_model_in_the_working_folder_is_found(tmp_path):
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))\n"
    )
    command = [
        sys.executable,
        "-c",
        "from eff.cli import main; import sys; sys.path = [p for p in sys.path if p]; main()",
    ]
    done = subprocess.run(
        [*command, "train", "my_network:make", "--data", DATA, "--epochs", "0", "--out", "run"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.pt").exists()
