"""Correct the biases of a quantized graph on data, so that each operator has the mean that it had in float.

`graphopt.bias_correction` has the method. Every fourth sample is held out: the corrections are kept where the error of
the graph's outputs falls over these, and on most of them by themselves; else the graph stays as it is. A correction
is an addition to a float bias, so that it costs nothing when the model runs; a Conv, ConvTranspose or Gemm without a
bias gains one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.bias_correction import Correctable, correct, correctable
from graphopt.errors import DataError, PipelineError
from graphopt.feeds import Samples
from graphopt.graph import Array, Names
from graphopt.graph_copy import copy_graph
from graphopt.held_out import HELD_OUT, Judge, count_of, percent
from graphopt.model_io import Model
from graphopt.operators import QUANTIZING
from graphopt.pass_base import Context, Effect, Pass, PassResult
from graphopt.runtime import Session, open_session


@dataclass(frozen=True, kw_only=True)
class CorrectBias(Pass):
    """Add to biases what quantization took from the mean of each output channel; kept only if outputs come closer."""

    name: ClassVar[str] = "correct-bias"
    effect: ClassVar[Effect] = Effect.LOSSY

    samples: int = field(default=64, metadata={"help": "how many samples to use at most; a quarter is held out"})

    def __post_init__(self) -> None:
        if self.samples < HELD_OUT:
            raise PipelineError(f"correct-bias:samples must be at least {HELD_OUT}, not {self.samples}")

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Move biases; reads `context.unquantized` and `context.samples`.

        Raises:
            PipelineError: qdq did not run before.
            DataError: there are no data, too few samples, or one that a graph does not run on.
        """
        original = context.unquantized
        if original is None:
            raise PipelineError("correct-bias compares with the float graph that qdq quantized: put qdq before it")
        if context.samples is None:
            raise DataError("correct-bias measures what quantization changes on real inputs: give --data")
        if not any(node.op in QUANTIZING for node in graph.nodes):
            return PassResult(notes=("nothing is quantized, so there is nothing to correct",))
        context.infer_shapes(graph)
        operators, skipped = correctable(graph, original, context)
        if not operators:
            return PassResult(skipped=tuple(skipped))
        samples = context.samples.first(self.samples)
        count = count_of(samples, self.name)
        trial = copy_graph(graph)
        gained = correct(trial, original, samples, count, context)
        is_better, line = _judged(graph, trial, original, samples, context)
        changed = _move(graph, operators, gained) if is_better else 0
        return PassResult(
            rewrites=changed,
            skipped=tuple(skipped),
            parts={"operators": changed, "samples": count},
            notes=(f"error on {count // HELD_OUT} held-out samples: {line}",),
        )


def _judged(
    graph: gs.Graph, trial: gs.Graph, original: gs.Graph, samples: Samples, context: Context
) -> tuple[bool, str]:
    """Whether the corrected graph is closer to the float one on held-out samples, and a line that says so."""
    judge = Judge(open_session(Model(original, context.frame)), samples)
    old, new = (_exact_session(each, context) for each in (graph, trial))
    before, after = judge.error(old), judge.error(new)
    errors = f"{percent(before)} before, {percent(after)} after"
    if not after < before:
        return False, f"{errors}: nothing is corrected"
    if not judge.prefers(new, old):
        return False, f"{errors}, but most of them are no closer: nothing is corrected"
    return True, errors


def _exact_session(graph: gs.Graph, context: Context) -> Session:
    """One in which Q and DQ compute what they stand for, whatever int8 kernels this machine has."""
    return open_session(Model(graph, context.frame), exact=True)


def _move(graph: gs.Graph, operators: Sequence[Correctable], gained: dict[str, Array]) -> int:
    names = Names(graph)
    chosen = [(each, gained[each.output]) for each in operators if each.output in gained]
    for operator, by in chosen:
        operator.move(by, names)
    return len(chosen)
