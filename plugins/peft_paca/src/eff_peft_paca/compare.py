"""PaCA beside LoRA of the `peft` library, full tuning and a linear probe: same model, data, recipe and head.

Used by the claims and by benchmarks/against_peft.py.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from eff.data import Batch, Data, move_batch
from eff.errors import MissingDependencyError
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_peft_kit.targets import adaptable_layers, in_features, is_linear, output_layer
from eff_peft_paca.config import PaCAConfig
from eff_peft_paca.diagnostics import record_kept
from eff_peft_paca.layer import partial_layers
from eff_peft_paca.plugin import PaCA

STEPS = 50
"""Steps whose time is measured, per setting."""


@dataclass(frozen=True)
class Setting:
    """What is compared.

    Args:
        data: to train and test on.
        lora_rank: of every LoRA layer; its scale is 1 and it has no dropout, as PaCA's.
        paca: options of PaCA; its scale must be 1.
        epochs: of all settings.
        lr: learning rate by setting: adapters, full, probe.
        batch_size: of all settings.
        seed: of training.
        device: where to run.
    """

    data: Data
    lora_rank: int
    paca: PaCAConfig
    epochs: int
    lr: Mapping[str, float]
    batch_size: int = 16
    seed: int = 0
    device: torch.device = torch.device("cpu")

    def run(self, kind: str) -> Run:
        """Return a run with the recipe of one kind of setting."""
        recipe = TrainOptions(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr[kind], optimizer="adamw", weight_decay=0.0,
            schedule="cosine", augment=False,
        ).over(CORE_TRAINING)  # fmt: skip
        task = make_task(self.data.task, Plugins())
        return Run(task, self.device, self.seed, self.data, train=recipe, training=True)


@dataclass
class Adapted:
    """A model made ready for training in one way."""

    model: nn.Module
    run: Run
    plugins: Plugins
    layers: dict[str, nn.Module]
    """The layers that are tuned, in the form they have now."""

    @property
    def trained(self) -> int:
        """Numbers that are trained, the head included."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def target_names(model: nn.Module, run: Run) -> tuple[list[str], str]:
    """Return the names of all linear layers but the output layer, and the output layer's."""
    inputs = tuple(value.to(run.device) for value in run.task.example_inputs(1))
    head = output_layer(model, lambda: model(*inputs))
    assert head is not None
    return [name for name, layer in adaptable_layers(model).items() if is_linear(layer) and name != head], head


def with_paca(model: nn.Module, setting: Setting, **changes: object) -> Adapted:
    """Return a copy of the model with PaCA; `changes` are put over the setting's options."""
    run = setting.run("adapters")
    method = PaCA(setting.paca.model_copy(update=changes))
    seed_everything(setting.seed, "transform")
    made = method.transform(model=copy.deepcopy(model).to(run.device), run=run)
    plugins = Plugins([Chosen("peft_paca", "", "eff-peft-paca", method)])
    return Adapted(made, run, plugins, dict(partial_layers(made)))


def with_lora(model: nn.Module, setting: Setting) -> Adapted:
    """Return a copy of the model with LoRA of the peft library, in its defaults but for the rank.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependencyError(
            "the comparison with LoRA needs peft, which is not installed; pip install 'eff-peft-paca[claims]'"
        ) from error
    run = setting.run("adapters")
    made = copy.deepcopy(model).to(run.device)
    names, head = target_names(made, run)
    seed_everything(setting.seed, "transform")
    config = LoraConfig(r=setting.lora_rank, lora_alpha=setting.lora_rank, lora_dropout=0.0, target_modules=names)
    made = inject_adapter_in_model(config, made)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(f"{head}."))
    return Adapted(made.to(run.device), run, Plugins(), {name: made.get_submodule(name) for name in names})


def with_full(model: nn.Module, setting: Setting, probe: bool = False) -> Adapted:
    """Return a copy of the model that is trained whole, or its output layer only (`probe`)."""
    run = setting.run("probe" if probe else "full")
    made = copy.deepcopy(model).to(run.device)
    names, head = target_names(made, run)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not probe or name.startswith(f"{head}."))
    return Adapted(made, run, Plugins(), {name: made.get_submodule(name) for name in names})


def accuracy(adapted: Adapted) -> float:
    """Train and return the accuracy in % on the test split."""
    Training(adapted.model, adapted.run, adapted.plugins).run_all()
    assert adapted.run.data is not None
    return task_metrics(adapted.model, adapted.run.data, adapted.run).values["accuracy"].value


def a_batch(adapted: Adapted, samples: int) -> Batch:
    """Return the first training samples."""
    return move_batch(adapted.run.split("train").batch(range(samples)), adapted.run.device)


def kept(adapted: Adapted, samples: int) -> tuple[int, int]:
    """Return the bytes that one training step keeps for its backward pass: in the tuned layers, and in all."""
    batch = a_batch(adapted, samples)
    adapted.model.train()
    with record_kept(adapted.model, adapted.layers) as found:
        loss = adapted.run.task.loss(adapted.run.forward(adapted.model, batch), batch)
    del loss
    return found.layers, found.total


def step_times(many: Mapping[str, Adapted], samples: int, steps: int = STEPS) -> dict[str, float]:
    """Return the median time of a training step in ms; the settings take turns, so that noise hits all alike."""
    calls = {name: _stepper(adapted, samples) for name, adapted in many.items()}
    times: dict[str, list[float]] = {name: [] for name in many}
    for index in range(steps + 5):
        for name, call in calls.items():
            device = many[name].run.device
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if index >= 5:  # warm-up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _stepper(adapted: Adapted, samples: int) -> Callable[[], None]:
    batch = a_batch(adapted, samples)
    trained = [parameter for parameter in adapted.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    layers = list(partial_layers(adapted.model).values())
    adapted.model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        adapted.run.task.loss(adapted.run.forward(adapted.model, batch), batch).backward()
        optimizer.step()
        for layer in layers:
            layer.synchronise()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kept_share_bound(model: nn.Module, adapted: Adapted) -> float:
    """Return 1.2 times the trained columns over the input features of all adapted layers, in %."""
    columns = sum(len(layer.index) for layer in partial_layers(adapted.model).values())
    return 120.0 * columns / sum(in_features(model.get_submodule(name)) for name in adapted.layers)


def compare(model: nn.Module, setting: Setting) -> dict[str, float]:
    """Return everything the claims check: accuracies in %, bytes kept, the ratio of step times."""
    makers = {
        "full": lambda: with_full(model, setting),
        "lora": lambda: with_lora(model, setting),
        "paca": lambda: with_paca(model, setting),
        "paca_norm": lambda: with_paca(model, setting, selection="weight_norm"),
        "probe": lambda: with_full(model, setting, probe=True),
    }
    samples = setting.batch_size
    found = {f"{name}_kept": kept(makers[name](), samples) for name in ("full", "lora", "paca")}
    times = step_times({name: makers[name]() for name in ("lora", "paca")}, samples)
    measured = {name: accuracy(make()) for name, make in makers.items()}
    paca, lora = makers["paca"](), makers["lora"]()
    return measured | {
        "paca_kept_share": 100.0 * found["paca_kept"][0] / found["full_kept"][0],
        "kept_share_bound": kept_share_bound(model, paca),
        **{f"{name}_kept_mb": found[f"{name}_kept"][0] / 1e6 for name in ("full", "lora", "paca")},
        **{f"{name}_kept_all_mb": found[f"{name}_kept"][1] / 1e6 for name in ("full", "lora", "paca")},
        "paca_step_over_lora": times["paca"] / times["lora"],
        "paca_trained": float(paca.trained),
        "lora_trained": float(lora.trained),
    }
