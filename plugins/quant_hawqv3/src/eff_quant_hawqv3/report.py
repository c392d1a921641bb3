"""What quant_hawqv3 reports: sizes, bit operations, the three paths, equality with the runner, the sensitivities."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import nn

from eff.data import Data, move_batch, ordered_batches
from eff.measure import task_metrics
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_hawqv3.bits import BITS
from eff_quant_hawqv3.config import HAWQV3Config
from eff_quant_hawqv3.network import Network, simulate
from eff_quant_hawqv3.program import compile_program
from eff_quant_hawqv3.runner import run_program

LATENCIES = "latency.json"


def describe(model: nn.Module, data: Data | None, run: Run, config: HAWQV3Config, structure: dict[str, Any]) -> Metrics:
    """Return the metrics; empty for a model that is not on integers."""
    if not isinstance(model, Network):
        return Metrics()
    model.eval()
    bits = {name: model.layer(name).bits for name in model.plan.layers}
    counts = {name: model.layer(name).weight.numel() for name in bits}
    operations = {name: model.plan.macs[name] * b * b for name, b in bits.items()}
    values = {
        "mean_weight_bits": Metric(
            value=sum(counts[n] * b for n, b in bits.items()) / sum(counts.values()), unit="bits", better="lower"
        ),
        "weight_bytes": Metric(value=sum(counts[n] * b / 8 for n, b in bits.items()), unit="B", better="lower"),
        "bit_operations": Metric(value=sum(operations.values()) / 1e9, unit="G", better="lower"),
    }
    for name, value in structure.get("constraint", {}).items():
        values[name] = Metric(value=value)
    omega = structure.get("omega", {})
    rows: list[TableRow] = []
    for name, b in bits.items():
        row: TableRow = {"layer": name, "bits": b, "weights": counts[name], "macs": model.plan.macs[name]}
        if name in omega:
            row.update({f"omega_{k}": value for k, value in zip(BITS, omega[name], strict=True)})
        rows.append(row)
    if data is not None:
        for path in ("float", "simulated"):
            model.path = path
            metric = task_metrics(model, data, run).values["accuracy"]
            values[f"{path}_accuracy"] = metric
        model.path = "integers"
        if config.compare_samples:
            values.update(compare_with_runner(model, data, run, config.compare_samples))
    if run.keeps_files:
        write_latencies(model, run)
    return Metrics(values=values, tables={"layers": rows})


def compare_with_runner(net: Network, data: Data, run: Run, samples: int) -> dict[str, Metric]:
    """Return how many codes of all steps are equal in the numpy runner, and how many of the largest outputs."""
    program, tensors = compile_program(net)
    equal = total = same = count = 0
    for batch in ordered_batches(data.split("test"), 64):
        batch = move_batch(batch, run.device)
        inputs = run.task.module_inputs(batch)
        assert inputs is not None
        x = inputs[0][: samples - count]
        _, expected = simulate(net, x)
        found: dict[str, Any] = {}
        output = run_program(program, tensors, x.cpu().numpy(), found)
        for name, codes in expected.items():
            equal += int((codes.cpu().numpy() == found[name]).sum())
            total += found[name].size
        same += int((largest(program, output) == largest(program, expected[program["output"]].cpu().numpy())).sum())
        count += len(x)
        if count >= samples:
            break
    return {
        "equal_codes": Metric(value=100 * equal / total, unit="%"),
        "equal_classes": Metric(value=100 * same / count, unit="%"),
        "compared_samples": Metric(value=count),
    }


def largest(program: dict[str, Any], codes: Any) -> Any:
    """Return the class of each row; codes of one scale are compared as they are."""
    scale = np.asarray(program["output_scale"])
    return (codes * scale if scale.size > 1 else codes).argmax(1)


def write_latencies(net: Network, run: Run) -> None:
    """Write latency.json: milliseconds of each layer at 4 and 8 bits on this device."""
    from eff_quant_hawqv3.latency import measure_layers

    x = run.task.example_inputs(1)[0].to(run.device)
    _, trace = simulate(net, x)
    shapes = {node.layer: tuple(trace[node.name].shape) for node in net.plan.nodes if node.op == "layer"}
    with torch.inference_mode():
        found = measure_layers(net, shapes, run.device)
    with run.output(LATENCIES, format="json") as path:
        path.write_text(json.dumps(found, indent=2), encoding="utf-8")
