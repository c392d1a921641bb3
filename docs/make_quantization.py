"""Write docs/quantization.md: the quantization methods side by side, by `eff compare` and `eff apply`.

    python docs/make_quantization.py [--only classifier|denoiser|integers|networks|others|times] [--threads 1]

Classifiers: zoo:digits_cnn trained on scikit-learn's digits for 12 epochs. Denoisers: diffusion:digits_dit trained on them for
60. Then every method runs on the one it is for, with exports; those for other models run on a small one of their kind. Some
eight minutes. `--only` makes one part anew and keeps the others of the page. Trained networks and times per layer are what
benchmarks/post_training.py and benchmarks/time_per_layer.py have recorded.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from eff.cli.show import comparison_table, markdown_table, measurement_rows, size_text
from eff.compare import Comparison, ComparisonRow, compare, parse_setting
from eff.data import Data, load_data
from eff.log import TerminalLog
from eff.runner import apply
from eff.schemas import DataSpec, Recipe, TaskSpec, TrainOptions
from eff.session import Plugins
from eff.use import UseRequest, open_for_use
from eff_quant_biadapter.claims import Turned
from eff_quant_kit.execution import on_kernels

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
    "onnxruntime is", "onnx agrees", "kernel latency", "kernel layers", "kernels are", "time", "peak memory",
)  # fmt: skip
INT8 = "quant_lsq:weight_bits=8:act_bits=8"
INTRODUCTION = """# Quantization methods side by side

Made by `python docs/make_quantization.py`: `eff compare` and `eff apply` over the family on small models, each method with its own
recipe where no option is named. It shows what each method gives and costs here; it does not rank them, which models this small cannot.
Measured on {machine}.

- **mean weight bits**: of the quantized layers; methods of codebooks count the codebooks in.
- **file to ship**: the packed file, header included; *onnx* holds 8-bit integers or floats.
- **latency**, one sample: PyTorch with fake quantization; the ONNX file in **onnxruntime**; quantized layers on `eff-kernels`
  (**kernel latency**) with the share of them that run there. **onnxruntime is**, **kernels are**: against the float model in
  onnxruntime and in PyTorch. **onnx agrees**: how often it predicts the class that the quantized model predicts in PyTorch.
  Rows are measured one after the other, so other work on the machine shows in them; where the [integers stand beside
  float](#integers-beside-float) the two take turns.
- **time** is the whole run: calibration or training, exports, measurements. **peak memory** is that of the process so far.

"""
MODELS = {
    "classifier": ("A classifier", "zoo:digits_cnn", "digits", 12, CLASSIFIER, ("packed", "onnx")),
    "denoiser": ("A denoiser", "diffusion:digits_dit", "diffusion_digits", 60, DENOISER, ("packed",)),
}
INTEGERS = """## Integers beside float

Trained models with 8-bit weights and inputs (`{setting}`, calibrated, not trained further) as ONNX in onnxruntime
and on `eff-kernels`, beside the float model as ONNX in onnxruntime and in PyTorch. The two of a pair took turns; medians. **agrees**: on
how many of {count} test samples the integers predict the class that the quantized model predicts in PyTorch; **as float**: that
the float model predicts. onnxruntime keeps in float what is not quantized at once again, as the
convolutions of a ResNet before a sum.

"""
INTEGER_MODELS = (
    ("zoo:digits_cnn", "digits", TrainOptions(epochs=12)),
    ("zoo:cifar_resnet20", "digits", TrainOptions(epochs=6)),
    ("zoo:vit_micro?dim=256&depth=2", "digits", TrainOptions(epochs=12, optimizer="adamw", lr=1e-3)),
)
SAMPLES = 256
REPETITIONS = 15


NETWORKS = """## Trained networks

Accuracy of pretrained networks after post-training quantization, from `python benchmarks/post_training.py`: 256 unlabelled samples to
calibrate on, weights of all layers at W bits and inputs at A bits. **min-max** and **searched scales** round to nearest; **adaquant
light** is min-max with norm tuning, **adaquant** trains layers too; **adaround** and **gradptq** learn the rounding on the searched
scales, **by importance** with 2 to 8 bits by layer, as many on average (at 8 there is nothing to choose). **time** is that of the
calibration at W8A8. The records, with bytes, time per layer and numbers of samples, are `benchmarks/results/post-training-*.json`.
"""

TIMES = """## Time per layer

From `python benchmarks/time_per_layer.py` ({first[date]}, {first[device]}, {first[threads]} thread(s)): a whole calibration with few steps and
samples, one training step (batch, forward, backward, optimiser) beside the float model's, or one text read through the cache.
The record, with every option, is `benchmarks/results/time-per-layer.json`.

"""


@dataclass(frozen=True)
class Other:
    """A method for another kind of model: how its float model is trained and which settings are shown."""

    says: str
    model: str
    data: str
    settings: Mapping[str, str]
    """Column -> setting."""
    float_training: TrainOptions = field(default_factory=TrainOptions)
    training: TrainOptions = field(default_factory=TrainOptions)
    other_data: str | None = None
    """What the method sees, where that is not what the float model was trained on."""


OTHERS = {
    "quant_biadapter": Other(
        "Adapters of a vision transformer that was trained on upright digits; 150 digits turned by 90 degrees are to be learned. "
        "Float adapters of as many bytes stand beside them.",
        "zoo:vit_micro?depth=2", "digits",
        {"1 bit, width 32": "quant_biadapter", "float, width 1": "quant_biadapter:bits=32:dim=1"},
        TrainOptions(epochs=25, optimizer="adamw", lr=1e-3, augment=False), TrainOptions(epochs=40, batch_size=32, augment=False),
        "make_quantization:turned",
    ),
    "quant_codenet": Other(
        "A detector with deformable convolutions; AP of boxes in generated scenes.",
        "codenet:small", "scenes?classes=1&train=1000&test=200",
        {"W4A8": "quant_codenet"},
        TrainOptions(epochs=10, optimizer="adam", lr=0.004, batch_size=32), TrainOptions(epochs=4, lr=0.001),
    ),
    "quant_vqgan_lc": Other(
        "An image tokeniser: a trained autoencoder gets a codebook, of projected frozen features or of learned random entries.",
        "vqgan:small", "pictures:digits?size=32&train=800&test=200",
        {
            "frozen features": "quant_vqgan_lc:n_codes=512:table=kmeans:rate_p=0:rate_d=0",
            "random, learned": "quant_vqgan_lc:n_codes=512:codebook=random_tuned:rate_p=0:rate_d=0",
        },
        TrainOptions(epochs=4, batch_size=16, optimizer="adam", lr=5e-4), TrainOptions(epochs=4, batch_size=16),
    ),
    "quant_zipcache": Other(
        "The key/value cache of a language model; its weights stay in float. Half of each text is read through the cache.",
        "zoo:llama_tiny", "corpus?length=256&train=800&test=32",
        {"4 and 2 bits": "quant_zipcache", "2 bits": "quant_zipcache:bits_salient=2"},
        TrainOptions(epochs=1, optimizer="adamw", lr=3e-3, batch_size=8),
    ),
}  # fmt: skip


def main() -> None:
    """Make the parts and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=[*MODELS, "integers", "networks", "others", "times"], help="the part to make anew"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    makers = {name: lambda name=name: model_part(*MODELS[name]) for name in MODELS}
    makers |= {"integers": integers_part, "networks": networks_part, "others": others_part, "times": times_part}
    page = Path(__file__).with_name("quantization.md")
    old = kept(page) if arguments.only else []
    if arguments.only and len(old) != len(makers):
        parser.error(f"{page} has {len(old)} parts, not {len(makers)}; make it once without --only")
    parts = dict(zip(makers, old, strict=bool(old)))
    for name, make in makers.items():
        if arguments.only in (None, name):
            parts[name] = make()
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    page.write_text(INTRODUCTION.format(machine=machine) + "\n".join(parts.values()), encoding="utf-8")


def kept(page: Path) -> list[str]:
    """Return the parts of the page that is there, without its introduction."""
    return [f"## {part.rstrip()}\n" for part in page.read_text(encoding="utf-8").split("\n## ")[1:]]


def model_part(
    title: str, source: str, data: str, epochs: int, settings: tuple[str, ...], formats: tuple[str, ...]
) -> str:
    """Train the model, put it through every setting, return the Markdown."""
    with tempfile.TemporaryDirectory() as name:
        result = compared(source, data, TrainOptions(epochs=epochs), settings, formats, Path(name))
    headers, rows = comparison_table(result)
    headers += ["onnxruntime is", "onnx agrees", "kernels are"] if "onnx" in formats else []
    rows = [row + beside(result.rows[0], one) for row, one in zip(rows, result.rows, strict=True)]
    places = [headers.index(column) for column in COLUMNS if column in headers]
    table = [[row[i] if i < len(row) else "" for i in places] for row in rows]
    return f"## {title}: `{source}`, {epochs} epochs on `{data}`\n\n" + markdown_table(
        [headers[i] for i in places], table
    )


def beside(plain: ComparisonRow, row: ComparisonRow) -> list[str]:
    """Return how a setting computes beside the float model: pace in onnxruntime, its agreement, pace on eff-kernels."""
    details = [item.details if (item := one.artifact("onnx")) else {} for one in (plain, row)]
    before, after = (one.get("latency_ms") for one in details)
    agreement = details[1].get("agreement")
    kernels = row.measured.metrics.values.get("kernel_latency") if row.measured else None
    whole = plain.measured.latency_ms if plain.measured else None
    return [
        pace(after / before) if isinstance(before, float) and isinstance(after, float) and row is not plain else "-",
        f"{100 * agreement:.1f} %" if isinstance(agreement, float) else "-",
        pace(kernels.value / whole) if kernels and whole else "-",
    ]


def compared(
    source: str,
    data: str,
    training: TrainOptions,
    settings: tuple[str, ...],
    formats: tuple[str, ...],
    folder: Path,
    further: TrainOptions | None = None,
) -> Comparison:
    """Train a model in `folder`/trained and put it through every setting in `folder`/comparison."""
    train = Recipe(model=source, data=data, train=training, device="cpu")
    apply(train, folder / "trained", log=TerminalLog())
    recipe = Recipe(
        model=str(folder / "trained" / "model.pt"), device="cpu", export=formats, train=further or TrainOptions()
    )
    return compare(settings, recipe, folder / "comparison", log=TerminalLog())


def integers_part() -> str:
    """Return the table of integer execution beside float."""
    rows = []
    for source, data, training in INTEGER_MODELS:
        with tempfile.TemporaryDirectory() as name:
            compared(source, data, training, (INT8,), ("packed", "onnx"), Path(name), TrainOptions(epochs=0))
            rows += integer_rows(source, Path(name))
    headers = [
        "",
        "on",
        "float, 1 sample",
        "8 bits",
        "which is",
        "float, 64 samples",
        "8 bits",
        "which is",
        "agrees",
        "as float",
    ]
    return INTEGERS.format(setting=INT8, count=SAMPLES) + markdown_table(headers, rows)


def integer_rows(source: str, folder: Path) -> list[list[str]]:
    """Return the rows of one model for onnxruntime and eff-kernels."""
    comparison = folder / "comparison"
    quantized = comparison / INT8.replace(":", "-").replace("=", "_")
    plain, run = open_for_use(UseRequest(str(folder / "trained"), device="cpu"), Plugins(), TerminalLog(), True)
    simulated, _ = open_for_use(UseRequest(str(quantized), device="cpu"), Plugins(), TerminalLog(), True)
    split = run.split("test")
    inputs = run.task.module_inputs(split.batch(range(min(SAMPLES, len(split)))))
    assert inputs is not None
    pairs = {
        "onnxruntime": (session(comparison / "as-it-came" / "model.onnx"), session(quantized / "model.onnx")),
        "eff-kernels": (plain.model, on_kernels(simulated.model).model),
    }
    rows = []
    with torch.inference_mode():
        truth, wanted = (model(*inputs).argmax(1) for model in (plain.model, simulated.model))
        for name, (float_one, integer_one) in pairs.items():
            found = integer_one(*inputs).argmax(1)
            cells = []
            for count in (1, 64):
                before, after = taking_turns(float_one, integer_one, [value[:count] for value in inputs])
                cells += [f"{before:.2f} ms", f"{after:.2f} ms", pace(after / before)]
            rows.append([f"`{source}`", name, *cells, share(found == wanted), share(found == truth)])
    return rows


def session(path: Path) -> Callable[..., Tensor]:
    """Return a function that runs an ONNX file on as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    opened = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in opened.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        opened.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]
    )


def taking_turns(one: Callable[..., Any], other: Callable[..., Any], inputs: list[Tensor]) -> tuple[float, float]:
    """Return the median milliseconds of both on the same inputs."""
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(REPETITIONS + 3):
        for call, found in zip((one, other), times, strict=True):
            start = time.perf_counter()
            call(*inputs)
            if repetition >= 3:  # the first warm up
                found.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def pace(ratio: float) -> str:
    """Return a ratio of times in words."""
    return f"{ratio:.2f}x slower" if ratio > 1 else f"{1 / ratio:.2f}x faster"


def share(equal: Tensor) -> str:
    """Return how many are equal."""
    return f"{100 * float(equal.double().mean()):.1f} %"


def turned(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return digits turned by 90 degrees: 150 to adapt to, and the test images."""
    whole = load_data("digits")
    train, test = whole.split("train"), whole.split("test")
    return Data(spec, whole.task, Turned(train, range(150)), Turned(test, range(len(test))))


def networks_part() -> str:
    """Return what the benchmark of post-training quantization has recorded, a table per network."""
    parts = [NETWORKS]
    for what, title in (("cifar", "ResNet-20, CIFAR-10"), ("photos", "EfficientNet-Lite0, photos")):
        rows = recorded(f"post-training-{what}")
        first = next(iter(rows.values()))
        widths = [name for name in ("W8A8", "W4A8", "W4A4") if any(key.startswith(name) for key in rows)]
        settings = dict.fromkeys(key.partition(" ")[2] for name in widths for key in rows if key.startswith(name))
        lines = []
        for setting in sorted(settings, key=lambda text: text != "min-max, nearest"):
            found = [rows.get(f"{name} {setting}") for name in widths]
            time = f"{found[0]['seconds']:.0f} s on {found[0]['threads']} core(s)" if found[0] else "-"
            lines.append([setting, *(f"{row['after']:.2f} %" if row else "-" for row in found), time])
        heading = f"### {title}: {first['before']:.2f} % in float, {first['iters']} steps a layer where a method trains"
        parts.append(f"{heading}\n\n{markdown_table(['', *widths, 'time'], lines)}")
    return "\n".join(parts)


def recorded(what: str) -> dict[str, Any]:
    """Return the rows of a benchmark's record."""
    file = Path(__file__).parents[1] / "benchmarks" / "results" / f"{what}.json"
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def others_part() -> str:
    """Return one table per method for another kind of model: everything it measures, before and after."""
    text = "## Methods for other models\n\nA column per setting, the float model first; every figure that the method's run reports.\n"
    for name, other in OTHERS.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = "".join(f"- **{title}**: `{setting}`\n" for title, setting in other.settings.items())
            text += f"\n### {name}\n\n{other.says} `{other.model}`, `{other.data}`.\n\n{settings}\n"
            text += other_table(other, Path(folder))
    return text


def other_table(other: Other, folder: Path) -> str:
    """Train the float model where it is to be trained, apply each setting, return the table."""
    source: dict[str, Any] = {"model": other.model, "data": other.data, "device": "cpu"}
    if other.float_training.epochs:
        apply(Recipe(**source, train=other.float_training), folder / "trained", log=TerminalLog())
        source |= {"model": str(folder / "trained" / "model.pt"), "data": other.other_data}
    reports = []
    for index, setting in enumerate(other.settings.values()):
        recipe = Recipe(**source, methods=(parse_setting(setting),), train=other.training)
        reports.append(apply(recipe, folder / str(index), log=TerminalLog()))
    rows = measurement_rows([reports[0].before, *(report.after for report in reports)])
    own = [next(item for item in report.artifacts if item.format != "checkpoint") for report in reports]
    rows.append([f"{own[0].format} file", "-", *(size_text(item.bytes) for item in own)])
    rows.append(["time", "-", *(f"{report.seconds:.1f} s" for report in reports)])
    rows.append(["peak memory", "-", *(size_text(report.peak_memory_bytes) for report in reports)])
    return markdown_table(["", "float", *other.settings], rows)


def times_part() -> str:
    """Return the times per layer that the benchmark has recorded."""
    measured = recorded("time-per-layer")
    rows = []
    for kind in ("calibration", "training", "reading"):
        for name, row in measured.items():
            if row["kind"] == kind:
                in_seconds = "seconds" in row
                own = f"{row['seconds_per_layer']:.3f} s" if in_seconds else f"{row['ms_per_layer']:.2f} ms"
                float_one = (
                    ["-", "-"] if in_seconds else [f"{row['float_ms_per_layer']:.2f} ms", pace(row["over_float"])]
                )
                rows.append([name, kind, f"`{row['model']}`", str(row["layers"]), own, *float_one])
    headers = ["", "what", "model", "layers", "per layer", "float, per layer", "which is"]
    return TIMES.format(first=measured["quant_lsq"]) + markdown_table(headers, rows)


if __name__ == "__main__":
    main()
