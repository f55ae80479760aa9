"""What each pass of `fold,prune,refit,calibrate,qdq` does to a net: MACs, bytes, latency, accuracy. A Markdown table.

    python benchmarks/prune_then_quantize.py [--macs 0.7] [--zoo models/zoo]
    python benchmarks/prune_then_quantize.py --smoke          # one net, few samples

Top-1 is that on the 10,000 test images of Fashion-MNIST, which are fetched if absent; EfficientNet-Lite0 has the share
of held-out photos on which its top-1 class is the float model's.
Latencies of all stages of a net are medians measured in turns in one process, on one sample.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compare_recovery import batches, classes, fashion_mnist, fetch
from zoo_table import places

import graphopt
from graphopt.data import load_samples
from graphopt.errors import GraphoptError
from graphopt.model_io import Model, load_model
from graphopt.runtime import measure_latency, open_session

NETS = {
    "fmnist_resnet": "prune:macs={macs}",
    "fmnist_mbv2": "prune:macs={macs}",
    "efficientnet_lite0_bn": "prune:macs={macs}:scope=global:importance=activation",
}


def stages(model: Path, data: str, macs: float, cut: str, target: str) -> list[tuple[str, Model | Path]]:
    """The model as it came in and after each pass of the pipeline."""
    prune = cut.format(macs=macs)

    def after(source: Model | Path, passes: str) -> Model:
        from_source = source if isinstance(source, Path) else source.to_proto()
        return load_model(graphopt.optimize(from_source, passes, data=data, target=target, verify=False).model)

    folded = after(model, "fold")
    refitted = after(folded, f"{prune},refit")  # refit needs what prune leaves, so the two go together
    return [
        ("float", model),
        ("fold", folded),
        ("prune", after(folded, prune)),
        ("refit", refitted),
        ("qdq", after(refitted, "calibrate,qdq")),
        ("qdq alone", after(folded, "calibrate,qdq")),
    ]


def measure(name: str, zoo: Path, macs: float, limit: int | None) -> list[str]:
    """The lines of one net."""
    model, calibration, evaluation = places(name, zoo)
    found = stages(model, calibration, macs, NETS[name], "ort-cpu")
    sessions = [open_session(each) for _, each in found]
    labels, samples = None, evaluation
    if name.startswith("fmnist"):
        images, labels = fashion_mnist.load_split("t10k", zoo)
        images, labels = images[:limit], labels[:limit]
        samples = batches(images, sessions[0].inputs[0].name)
    held_out = load_samples(samples, sessions[0].inputs, limit=limit)
    expected = classes(sessions[0], held_out)
    latencies = measure_latency(
        sessions, next(iter(load_samples(calibration, sessions[0].inputs, limit=1))), seconds=1.5 * len(sessions)
    )
    plain = graphopt.inspect(model)
    lines = []
    for (stage, each), session, latency in zip(found, sessions, latencies, strict=True):
        inspected = graphopt.inspect(each if isinstance(each, Path) else each.to_proto())
        found_classes = classes(session, held_out)
        agreement = float((found_classes == expected).mean())
        accuracy = "" if labels is None else f"{float((found_classes == labels).mean()):.4f}"
        cells = [
            name,
            stage,
            f"{inspected.macs / plain.macs:.1%}",
            f"{inspected.weight_nbytes / 1e6:.2f}",
            f"{latency * 1e3:.2f}",
            f"{latencies[0] / latency:.2f} x",
            accuracy,
            f"{agreement:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NET", help=f"of {', '.join(NETS)}")
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--zoo", type=Path, default=fetch.ZOO)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    names = arguments.names or (["fmnist_resnet"] if arguments.smoke else list(NETS))
    print("| net | after | MACs | MB | ms | faster | top-1 | agreement with float |\n|---|---|---|---|---|---|---|---|")
    for name in names:
        try:
            lines = measure(name, arguments.zoo, arguments.macs, 64 if arguments.smoke else None)
        except GraphoptError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
