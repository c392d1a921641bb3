"""Write docs/quantization.md: the quantization methods side by side, by `eff compare`.

    python docs/make_quantization.py [--threads 1]

Classifiers: zoo:digits_cnn trained on scikit-learn's digits for 12 epochs. Denoisers: diffusion:digits_dit trained on them for
60. Then every method runs on the one it is for, with exports. Some minutes.
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

CLASSIFIER = (
    "quant_lsq:weight_bits=8:act_bits=8",
    "quant_lsq",
    "quant_lsq:weight_bits=2:act_bits=2",
    "quant_adaquant",
    "quant_gradptq:iters=300",
    "quant_hawqv3",
    "quant_hawqv3:bits=mixed",
    "quant_emq",
    "quant_fliqs",
    "quant_gaqat:lr=0.001",
    "quant_double_rounding:lr=0.001:epochs=10",
    "quant_lr2vq:m=4:k=16:min_params=512",
    "quant_dfp",
    "quant_adapt",
)
DENOISER = (
    "quant_quest:time_epochs=12:main_epochs=2",
    "quant_efficientdm:steps=50:epochs=12",
    "quant_vq4dit:k=32:trajectories=12",
)
COLUMNS = (
    "", "accuracy", "noise mse", "mean weight bits", "eps mse", "file to ship", "onnx", "latency", "onnxruntime",
    "kernel latency", "kernel layers", "time", "peak memory",
)  # fmt: skip
INTRODUCTION = """# Quantization methods side by side

Made by `python docs/make_quantization.py`: `eff compare` over the family on two small models, each method with its own recipe
where no option is named. It shows what each method gives and costs here; it does not rank them, which models this small cannot.
Measured on {machine}.

- **mean weight bits**: of the quantized layers; methods of codebooks count the codebooks in.
- **file to ship**: the packed file, header included; *onnx* holds 8-bit integers or floats.
- **latency**, one sample: PyTorch with fake quantization; the ONNX file in **onnxruntime**; quantized layers on `eff-kernels`
  (**kernel latency**) with the share of them that run there. What is slower than the first row is slower than float.
- **time** is the whole run: calibration or training, exports, measurements. **peak memory** is that of the process so far.

"""
MODELS = (
    ("A classifier", "zoo:digits_cnn", "digits", 12, CLASSIFIER, "packed,onnx"),
    ("A denoiser", "diffusion:digits_dit", "diffusion_digits", 60, DENOISER, "packed"),
)
ELSEWHERE = """
## Methods for other models

{lines}
"""
OTHERS = {
    "quant_biadapter": "adapters of a transformer, beside float adapters of equal bytes",
    "quant_codenet": "a detector; accuracy is AP50",
    "quant_vqgan_lc": "an image tokeniser; quality is PSNR and the share of codes in use",
    "quant_zipcache": "the cache of a language model, not its weights",
}


def main() -> None:
    """Run the comparisons and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    page = INTRODUCTION.format(
        machine=f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    for title, source, data, epochs, settings, formats in MODELS:
        with tempfile.TemporaryDirectory() as name:
            page += f"## {title}: `{source}`, {epochs} epochs on `{data}`\n\n"
            page += table(source, data, epochs, settings, tuple(formats.split(",")), Path(name)) + "\n"
    lines = "\n".join(f"- `{name}`: {why}." for name, why in OTHERS.items())
    page += ELSEWHERE.lstrip().format(lines=lines)
    Path(__file__).with_name("quantization.md").write_text(page, encoding="utf-8")


def table(
    source: str, data: str, epochs: int, settings: tuple[str, ...], formats: tuple[str, ...], folder: Path
) -> str:
    """Train the model, put it through every setting, return the Markdown."""
    train = Recipe(model=source, data=data, train=TrainOptions(epochs=epochs), device="cpu")
    apply(train, folder / "trained", log=TerminalLog())
    recipe = Recipe(model=str(folder / "trained" / "model.pt"), device="cpu", export=formats)
    result = compare(settings, recipe, folder / "comparison", log=TerminalLog())
    headers, rows = comparison_table(result)
    kept = [headers.index(column) for column in COLUMNS if column in headers]
    return markdown_table([headers[i] for i in kept], [[row[i] if i < len(row) else "" for i in kept] for row in rows])


if __name__ == "__main__":
    main()
