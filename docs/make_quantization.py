"""Write docs/quantization.md: the quantization methods on one model, by `eff compare`.

    python docs/make_quantization.py [--threads 1]

Trains zoo:digits_cnn on scikit-learn's digits for 12 epochs, then runs every method on it, with exports. Some minutes.
"""

import argparse
import platform
import tempfile
from pathlib import Path

import torch

from eff.cli.show import comparison_table, markdown_table
from eff.compare import compare
from eff.log import TerminalLog
from eff.runner import apply
from eff.schemas import Recipe, TrainOptions

SETTINGS = (
    "quant_lsq:weight_bits=8:act_bits=8",
    "quant_lsq",
    "quant_lsq:weight_bits=2:act_bits=2",
    "quant_adaquant",
    "quant_gradptq:iters=300",
    "quant_gaqat:lr=0.001",
    "quant_double_rounding:lr=0.001:epochs=10",
    "quant_lr2vq:m=4:k=16:min_params=512",
    "quant_dfp",
    "quant_adapt",
)
COLUMNS = (
    "", "accuracy", "mean weight bits", "file to ship", "onnx", "latency", "onnxruntime", "kernel latency",
    "kernel layers", "time", "peak memory",
)  # fmt: skip
INTRODUCTION = """# Quantization methods side by side

Made by `python docs/make_quantization.py`: `eff compare` over the family on one small model, `zoo:digits_cnn` trained for 12
epochs on scikit-learn's digits, each method with its own recipe where none is named. It shows what each method gives and costs
here; it does not rank them, which a model of {parameters:,} parameters cannot. Measured on {machine}.

- **file to ship**: the packed file, header included; *onnx* holds 8-bit integers or floats.
- **latency**, one sample: PyTorch with fake quantization; the ONNX file in **onnxruntime**; quantized layers on `eff-kernels`
  (**kernel latency**) with the share of them that run there. What is slower than the first row is slower than float.
- **time** is the whole run: calibration or training, exports, measurements. **peak memory** is that of the process.

"""


def main() -> None:
    """Run the comparison and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = TrainOptions(epochs=12)
        apply(
            Recipe(model="zoo:digits_cnn", data="digits", train=train, device="cpu"),
            folder / "digits",
            log=TerminalLog(),
        )
        recipe = Recipe(model=str(folder / "digits" / "model.pt"), device="cpu", export=("onnx", "packed"))
        result = compare(SETTINGS, recipe, folder / "comparison", log=TerminalLog())
    headers, rows = comparison_table(result)
    kept = [headers.index(column) for column in COLUMNS]
    table = markdown_table(
        [headers[index] for index in kept], [[row[i] if i < len(row) else "" for i in kept] for row in rows]
    )
    first = next(row.measured for row in result.rows if row.measured)
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    page = INTRODUCTION.format(parameters=first.parameters, machine=machine) + table
    Path(__file__).with_name("quantization.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
