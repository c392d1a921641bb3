"""`eff demo`: the main job on real data, in a minute."""

from __future__ import annotations

from pathlib import Path

from eff.errors import MissingDependencyError, PluginError
from eff.files import check_output_folder

EPOCHS = 12
MODEL = "zoo:digits_cnn?width=32"


def run_demo(out: Path, force: bool = False) -> None:
    """Train `zoo:digits_cnn` on digits, apply quant_lsq at 4 bits, print the table and what to try next.

    Raises:
        MissingDependencyError: eff-zoo, eff-quant-lsq or scikit-learn is not installed.
    """
    import typer

    from eff.cli.show import print_report
    from eff.log import TerminalLog
    from eff.registry import EXTENSIONS, find
    from eff.runner import apply
    from eff.schemas import MethodUse, Recipe, TrainOptions

    try:
        find("quant_lsq")
        find("zoo", EXTENSIONS)
    except PluginError as error:
        raise MissingDependencyError(
            f"the demo needs more packages ({error}); pip install 'eff-core[digits]' eff-zoo eff-quant-lsq"
        ) from error
    float_folder, quantized_folder = out / "digits", out / "digits-quant_lsq"
    for folder in (float_folder, quantized_folder):
        check_output_folder(folder, force)
    log = TerminalLog()
    typer.echo(f"$ eff train '{MODEL}' --data digits --epochs {EPOCHS} --out {float_folder}")
    recipe = Recipe(model=MODEL, data="digits", train=TrainOptions(epochs=EPOCHS))
    print_report(apply(recipe, float_folder, force=force, log=log), str(float_folder))
    typer.echo(f"\n$ eff apply quant_lsq {float_folder}/model.pt --out {quantized_folder}")
    recipe = Recipe(model=str(float_folder / "model.pt"), methods=(MethodUse(name="quant_lsq"),))
    print_report(apply(recipe, quantized_folder, force=force, log=log), str(quantized_folder))
    typer.echo(
        f"""
Try next:
  eff evaluate {quantized_folder}                       metrics and the table of layers
  eff compare quant_lsq quant_lsq:weight_bits=2:act_bits=2 {float_folder}/model.pt
  eff export {quantized_folder} --to onnx               a file for onnxruntime
  eff verify quant_lsq                                  does the paper's claim hold here?
  eff info quant_lsq                                    the method and its options
  eff new quant_mine                                    a method of your own
(run them as .venv/bin/eff, or activate the environment: source .venv/bin/activate)"""
    )
