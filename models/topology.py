"""Full-size public topologies with seeded weights, to check structure, size and speed.

    python models/topology.py resnet50 OUT.onnx

The onnx package ships graphs of well-known nets, light_*.onnx, in which ConstantOfShape nodes stand in for
the large weights. Here each of these becomes an initializer with seeded values: N(0, 2 / fan-in) for
weights of Conv and Gemm (He et al. 2015), near 1 for scales, near 0 for biases. One forward pass of seeded
noise then sets the mean and variance of every BatchNormalization, so that activations stay well scaled. The
result has opset 17 and the cost of the real net; its answers mean nothing.

Exit status: 0 written, 2 wrong request.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper, version_converter

Floats = NDArray[np.float32]

OPSET = 17
IR_VERSION = 8  # the one that came with opset 17
SEED = 0
LIGHT_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
SPREAD = 0.1  # standard deviation of scales and biases
PASS_THROUGH = ("Reshape", "Unsqueeze")  # may stand between a placeholder and the operator that it serves


def available() -> list[str]:
    """List the names of the graphs that onnx ships."""
    return sorted(path.stem.removeprefix("light_") for path in LIGHT_FOLDER.glob("light_*.onnx"))


def placeholder_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Return the shape of every ConstantOfShape output; the shapes are initializers."""
    constants = {value.name: value for value in graph.initializer}
    return {
        node.output[0]: tuple(numpy_helper.to_array(constants[node.input[0]]).tolist())
        for node in graph.node
        if node.op_type == "ConstantOfShape"
    }


def purpose(graph: onnx.GraphProto, name: str) -> tuple[str, int]:
    """Return the operator that a constant serves, and which of its inputs it is."""
    node = next(node for node in graph.node if name in node.input)
    if node.op_type in PASS_THROUGH:
        return purpose(graph, node.output[0])
    return node.op_type, list(node.input).index(name)


def seeded(kind: tuple[str, int], shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Draw values for one constant, from what `purpose` says it is."""
    noise = rng.standard_normal(shape)
    if kind in (("Conv", 1), ("Gemm", 1)):
        fan_in = np.prod(shape[1:])
        return np.asarray(noise * np.sqrt(2 / fan_in), np.float32)
    is_scale = kind[0] == "Mul" or kind in (("BatchNormalization", 1), ("BatchNormalization", 4))
    return np.asarray(is_scale + SPREAD * noise, np.float32)


def fill_placeholders(graph: onnx.GraphProto, rng: np.random.Generator) -> None:
    """Put seeded initializers in the place of the ConstantOfShape nodes; drop what only these used."""
    filled = [
        numpy_helper.from_array(seeded(purpose(graph, name), shape, rng), name)
        for name, shape in placeholder_shapes(graph).items()
    ]
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    used = {name for node in nodes for name in node.input}
    kept = [value for value in graph.initializer if value.name in used]
    constants = {value.name for value in [*kept, *filled]}
    inputs = [value for value in graph.input if value.name not in constants and value.name in used]
    for field, values in ((graph.node, nodes), (graph.initializer, [*kept, *filled]), (graph.input, inputs)):
        del field[:]
        field.extend(values)


def batch_statistics(model: onnx.ModelProto, rng: np.random.Generator) -> dict[str, Floats]:
    """Return mean and variance of every BatchNormalization's input, by the names of its constants.

    In training mode the operator normalizes by its batch and puts out momentum * old + (1 - momentum) * new
    statistics: with momentum 0 those of the batch.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    wanted: dict[str, str] = {}
    for node in probe.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        kept = [attribute for attribute in node.attribute if attribute.name == "epsilon"]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
        node.attribute.append(onnx.helper.make_attribute("momentum", 0.0))
        for constant in node.input[3:5]:
            node.output.append(f"{constant}:batch")
            wanted[constant] = node.output[-1]
            probe.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[-1]))
    if not wanted:
        return {}
    (data,) = probe.graph.input
    shape = [size.dim_value for size in data.type.tensor_type.shape.dim]
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    noise = rng.standard_normal(shape).astype(np.float32)
    values = session.run(list(wanted.values()), {data.name: noise})
    return dict(zip(wanted, values, strict=True))


def build(name: str) -> onnx.ModelProto:
    """Return the net of that name with seeded weights; the same one every time."""
    rng = np.random.default_rng(SEED)
    light = onnx.load(LIGHT_FOLDER / f"light_{name}.onnx")
    model = version_converter.convert_version(light, OPSET)  # while it is still small
    model.ir_version = IR_VERSION
    fill_placeholders(model.graph, rng)
    statistics = batch_statistics(model, rng)
    for constant in model.graph.initializer:
        if constant.name in statistics:
            constant.CopyFrom(numpy_helper.from_array(statistics[constant.name], constant.name))
    onnx.checker.check_model(model)
    return model


def main() -> None:
    """Build one net and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", choices=available(), help=", ".join(available()))
    parser.add_argument("out", metavar="OUT.onnx", type=Path)
    arguments = parser.parse_args()
    model = build(arguments.name)
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    onnx.save(model, partial)
    partial.replace(arguments.out)
    parameters = sum(np.prod(value.dims, dtype=np.int64) for value in model.graph.initializer)
    print(f"{arguments.out}: {len(model.graph.node)} nodes, {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
