"""The integer program as an ONNX graph: between the input's codes and the output's every tensor holds integers.

ConvInteger and MatMulInteger take 8-bit unsigned operands (weights with zero point 128: products of signed weights
saturate on CPUs without dot-product instructions), sums become int64, and the dyadic step is Mul, Add, Div, Sub: a
division by 2^e of a number made positive by 2^62 is a shift.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eff.errors import MissingDependencyError
from eff.run import Run
from eff_quant_hawqv3.network import Network
from eff_quant_hawqv3.program import compile_program
from eff_quant_hawqv3.runner import run_program

if TYPE_CHECKING:
    import onnx

OPSET = 18
WEIGHT_ZERO = 128
LIFT = 62


def write_onnx(net: Network, path: Path, run: Run) -> dict[str, Any]:
    """Write the file and return how it agrees with the network in onnxruntime.

    Outputs are "output", float32 like the model's, and "codes", int64.

    Raises:
        MissingDependencyError: onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("ONNX export needs onnx; pip install 'eff-quant-hawqv3[onnx]'") from error
    from eff.exporting import onnx_agreement, save_onnx

    example = run.task.example_inputs(1)[0].cpu().numpy()
    proto = onnx_model(*compile_program(net), example, run.task.input_names[0])
    save_onnx(proto, path, run)
    return onnx_agreement(net, path, run)


def onnx_model(
    program: dict[str, Any], tensors: dict[str, NDArray[Any]], example: NDArray[Any], input_name: str = "input"
) -> onnx.ModelProto:
    """Return the graph of a program.

    Args:
        program, tensors: of `compile_program`.
        example: inputs (N, ...), for the shapes.
        input_name: name of the graph's input.
    """
    from onnx import TensorProto, helper

    trace: dict[str, NDArray[Any]] = {}
    run_program(program, tensors, example, trace)
    graph = _Graph(program, tensors, {name: codes.shape for name, codes in trace.items()})
    graph.names["input"] = input_name
    for step in program["steps"]:
        getattr(graph, "_" + step["op"])(step)
    codes = graph.names[program["output"]]
    shape = list(trace[program["output"]].shape[1:])
    graph.add("Identity", [codes], "codes")
    wide = graph.add("Cast", [codes], to=TensorProto.DOUBLE)
    scale = np.asarray(program["output_scale"], np.float64)
    scaled = graph.add("Mul", [wide, graph.constant(graph.channels(scale, len(shape) + 1))])
    graph.add("Cast", [scaled], "output", to=TensorProto.FLOAT)
    made = helper.make_graph(
        graph.nodes,
        "hawqv3",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["batch", *example.shape[1:]])],
        [
            helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", *shape]),
            helper.make_tensor_value_info("codes", TensorProto.INT64, ["batch", *shape]),
        ],
        graph.constants,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


class _Graph:
    """Translates steps one by one."""

    def __init__(self, program: dict[str, Any], tensors: dict[str, NDArray[Any]], shapes: dict[str, tuple[int, ...]]):
        self.half_even = program["rounding"] == "half_even"
        self.tensors, self.shapes = tensors, shapes
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names: dict[str, str] = {}

    def constant(self, value: Any, dtype: Any = None) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def integer(self, value: Any) -> str:
        return self.constant(value, np.int64)

    def add(self, kind: str, inputs: Iterable[str], out: str | None = None, **options: Any) -> str:
        from onnx import helper

        out = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=f"node_{len(self.nodes)}", **options))
        return out

    def channels(self, array: NDArray[Any], ndim: int) -> NDArray[Any]:
        return array.reshape((1, -1) + (1,) * (ndim - 2)) if array.size > 1 else array.reshape(())

    def _own(self, step: dict[str, Any], key: str) -> NDArray[np.int64] | None:
        found = self.tensors.get(f"{step['out']}.{key}")
        return None if found is None else self.channels(found.astype(np.int64), len(self.shapes[step["out"]]))

    def _set(self, step: dict[str, Any], name: str) -> None:
        self.names[step["out"]] = name

    def _source(self, step: dict[str, Any]) -> str:
        return self.names[step["in"][0]]

    def _cast(self, name: str, kind: str) -> str:
        from onnx import TensorProto

        return self.add("Cast", [name], to=getattr(TensorProto, kind))

    def _quantize(self, step: dict[str, Any]) -> None:
        ratio = self.add("Div", [self._source(step), self.constant(step["step"], np.float32)])
        if self.half_even:
            rounded = self.add("Round", [ratio])
        else:
            rounded = self.add("Floor", [self.add("Add", [ratio, self.constant(0.5, np.float32)])])
        edges = [self.constant(step[key], np.float32) for key in ("low", "high")]
        self._set(step, self._cast(self.add("Clip", [rounded, *edges]), "INT64"))

    def _layer(self, step: dict[str, Any]) -> None:
        weight = self.tensors[f"{step['out']}.weight"].astype(np.int16) + WEIGHT_ZERO
        zero, conv = -step["low"], step["conv"]
        shifted = self.add("Add", [self._source(step), self.integer(zero)])
        operands = [self._cast(shifted, "UINT8"), self.constant(weight if conv else weight.T, np.uint8)]
        zeros = [self.constant(zero, np.uint8), self.constant(WEIGHT_ZERO, np.uint8)]
        if conv is None:
            sums = self.add("MatMulInteger", operands + zeros)
        else:
            options = {"strides": conv["stride"], "pads": [*conv["padding"], *conv["padding"]]}
            sums = self.add(
                "ConvInteger", operands + zeros, dilations=conv["dilation"], group=conv["groups"],
                kernel_shape=list(weight.shape[2:]), **options,
            )  # fmt: skip
        self._set(step, self.add("Add", [self._cast(sums, "INT64"), self.integer(self._own(step, "bias"))]))

    def _requantize(self, step: dict[str, Any]) -> None:
        m, e = self._own(step, "m"), self._own(step, "e")
        assert m is not None and e is not None
        one = np.int64(1)
        product = self.add("Mul", [self._source(step), self.integer(m)])
        lifted = self.add("Add", [product, self.integer((one << (e - 1)) + (one << LIFT))])
        quotient = self.add("Div", [lifted, self.integer(one << e)])
        level = self.add("Sub", [quotient, self.integer(one << (LIFT - e))])
        if self.half_even:
            back = self.add("Mul", [quotient, self.integer(one << e)])
            tie = self._cast(self.add("Equal", [lifted, back]), "INT64")
            odd = self.add("Mod", [level, self.integer(2)])
            level = self.add("Sub", [level, self.add("Mul", [tie, odd])])
        if step["low"] is not None:
            level = self.add("Max", [level, self.integer(step["low"])])
            level = self.add("Min", [level, self.integer(step["high"])])
        self._set(step, level)

    def _clip(self, step: dict[str, Any]) -> None:
        level = self.add("Max", [self._source(step), self.integer(self._own(step, "low"))])
        high = self._own(step, "high")
        self._set(step, level if high is None else self.add("Min", [level, self.integer(high)]))

    def _add(self, step: dict[str, Any]) -> None:
        self._set(step, self.add("Add", [self.names[name] for name in step["in"]]))

    def _cat(self, step: dict[str, Any]) -> None:
        self._set(step, self.add("Concat", [self.names[name] for name in step["in"]], axis=1))

    def _max_pool(self, step: dict[str, Any]) -> None:
        self._pool(step, "Max", "ReduceMax", -(2**62))

    def _sum_pool(self, step: dict[str, Any]) -> None:
        self._pool(step, "Add", "ReduceSum", 0)

    def _pool(self, step: dict[str, Any], two: str, all_at_once: str, border: int) -> None:
        """Join shifted slices, because pooling operators take floats or 8 bits."""
        source, kernel, padding = self._source(step), step["kernel"], step["padding"]
        before, after = self.shapes[step["in"][0]][2:], self.shapes[step["out"]][2:]
        if tuple(before) == tuple(kernel) and not any(padding):
            return self._set(step, self.add(all_at_once, [source, self.integer([2, 3])], keepdims=1))
        if any(padding):
            sides = [0, 0, *padding, 0, 0, *padding]
            source = self.add("Pad", [source, self.integer(sides), self.integer(border)])
        level = ""
        for top in range(kernel[0]):
            for left in range(kernel[1]):
                cuts = [
                    (start, start + (size - 1) * stride + 1, stride)
                    for start, size, stride in zip((top, left), after, step["stride"], strict=True)
                ]
                part = self._cut(source, cuts, 2)
                level = self.add(two, [level, part]) if level else part
        self._set(step, level)

    def _cut(self, source: str, cuts: Any, first_axis: int) -> str:
        columns = [self.integer(list(column)) for column in zip(*cuts, strict=True)]
        axes = self.integer(list(range(first_axis, first_axis + len(cuts))))
        return self.add("Slice", [source, columns[0], columns[1], axes, columns[2]])

    def _slice(self, step: dict[str, Any]) -> None:
        self._set(step, self._cut(self._source(step), step["cuts"], 1))

    def _flatten(self, step: dict[str, Any]) -> None:
        self._set(step, self.add("Flatten", [self._source(step)], axis=1))

    def _pad(self, step: dict[str, Any]) -> None:
        sides, ndim = step["sides"], len(self.shapes[step["out"]])
        pairs = [(0, 0)] * (ndim - len(sides) // 2) + [(sides[i], sides[i + 1]) for i in range(0, len(sides), 2)][::-1]
        flat = [left for left, _ in pairs] + [right for _, right in pairs]
        self._set(step, self.add("Pad", [self._source(step), self.integer(flat), self.integer(0)]))
