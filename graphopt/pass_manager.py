"""Run passes in order over a clone of a graph: verify each, time it, roll back what breaks the model, report all.

The model is cloned before each pass (weights are shared, never copied), so a pass that fails costs nothing: the clone
is dropped, the run goes on with the graph from before, and the record of the pass says why. Where a failure folder was
asked for, that graph, its inputs and a command line that fails in the same way are written there. The clone of a pass
that counts no rewrites is dropped too: nothing that was not verified gets into the result.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import onnx
from onnx import numpy_helper

from graphopt.errors import DataError, GraphoptError, ModelError, PipelineError
from graphopt.feeds import Feed
from graphopt.files import write_text_atomically
from graphopt.garbage import rare_collections
from graphopt.graph import all_graphs, remove_unread_constants
from graphopt.input_values import with_input_values
from graphopt.made_up import made_up_samples
from graphopt.model_io import Model, Source, load_model, save_model
from graphopt.pass_base import Context, Effect, Pass, PassResult, input_values
from graphopt.pipeline import format_pass, format_pipeline
from graphopt.report.records import PassRecord, Report
from graphopt.runtime import open_session
from graphopt.verification import Verdict, examine, inferred_shapes, judge, reordered_outputs
from graphopt.version import VERSION

VERIFICATION_FEEDS = 2
_SEE_SKIPPED = ": the places that it left alone, and why, are in the report"


@dataclass(frozen=True)
class Result:
    """What a run gives back: the new model and what happened."""

    optimized: Model
    report: Report

    @property
    def model(self) -> onnx.ModelProto:
        """The new model as a protobuf."""
        return self.optimized.to_proto()

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the new model; never over a file it came from, and never a part of it.

        Raises:
            OutputError: the file exists and `overwrite` is false, or it cannot be written.
        """
        save_model(self.optimized, path, overwrite=overwrite)


class PassManager:
    """Runs a list of passes over a model."""

    def __init__(self, passes: Sequence[Pass], *, verify: bool = True) -> None:
        for item in passes:
            if not isinstance(item, Pass):
                raise PipelineError(f"{item!r} is no pass: give instances, such as Fold(), or a pipeline text")
        self.passes = tuple(passes)
        self.verify = verify

    @rare_collections()
    def run(self, source: Source, context: Context | None = None, *, failure_folder: Path | None = None) -> Result:
        """Run the passes over a clone of `source`.

        Args:
            source: a path, a ModelProto, a gs.Graph or a loaded Model; never changed.
            context: the request that passes share; the default is the target ort-cpu without data.
            failure_folder: gets a folder for each pass that breaks the model; None: nothing is written.

        Raises:
            GraphoptError: the model cannot be read or run, or a pass cannot honour its options.
        """
        original = model = with_input_values(load_model(source), input_values(self.passes))
        context = context or Context()
        context.original = original
        report = self._new_report(model, context)
        feeds, before = self._examine_input(model, context, report)
        for number, item in enumerate(self.passes):
            context.progress(f"pass {item.name}", 0, 1)
            previous = model
            try:
                model, record, warnings, before = self._run_one(item, previous, context, feeds, before)
            except GraphoptError as error:
                raise _with_earlier_failure(error, report) from error
            context.progress(f"pass {item.name}", 1, 1)
            report.passes.append(record)
            report.warnings += warnings
            if item.effect is Effect.LOSSY and not record.rewrites and record.failure is None:
                report.warnings.append(f"pass {item.name} changed nothing" + (_SEE_SKIPPED if record.skipped else ""))
            if record.failure is not None and failure_folder is not None:
                folder = failure_folder / f"{number}-{item.name}"
                written = _write_failure(folder, previous, item, context, feeds, record.failure)
                report.warnings.append(f"pass {item.name} was rolled back; {written}")
        if open_defaults := sum(tensor.name in model.frame.defaults for tensor in model.graph.inputs):
            report.warnings.append(
                f"{open_defaults} graph inputs have default values that a caller may override, so they are neither "
                "folded nor quantized: put freeze-inputs first in the pipeline to make them constants"
            )
        return Result(model.copy() if model is original else model, report)

    def _new_report(self, model: Model, context: Context) -> Report:
        return Report(
            model=str(model.path or model.graph.name),
            pipeline=format_pipeline(self.passes),
            target=context.target.name,
            version=VERSION,
            nodes=node_count(model),
            nbytes=model.nbytes,
            data="" if context.samples is None else context.samples.description,
            synthetic=context.samples is None,
        )

    def _examine_input(self, model: Model, context: Context, report: Report) -> tuple[list[Feed], Verdict | None]:
        """The feeds to verify with, and the verdict on the model as it came in."""
        if not self.verify:
            return [], None
        try:
            session = open_session(model, copy_weights=False)
        except ModelError as error:
            raise ModelError(f"{error}; --no-verify runs passes that need no onnxruntime") from error
        feeds: list[Feed] = []
        if context.samples is not None:
            feeds = list(islice(context.samples, VERIFICATION_FEEDS))
        else:
            try:
                feeds = list(made_up_samples(session, model.graph, count=VERIFICATION_FEEDS, seed=context.seed))
            except DataError as error:
                report.warnings.append(f"outputs are not verified: {error}")
        verdict = examine(model, feeds, session)
        if verdict.refusal:
            report.warnings.append(
                f"the model as it came in is refused ({verdict.refusal}), but onnxruntime runs it: "
                "verification asks that nothing gets worse"
            )
        return feeds, verdict

    def _run_one(
        self, item: Pass, model: Model, context: Context, feeds: Sequence[Feed], before: Verdict | None
    ) -> tuple[Model, PassRecord, tuple[str, ...], Verdict | None]:
        """Apply one pass to a clone; return the clone, or the model itself where the clone is not to be used."""
        candidate = model.copy()
        context.frame = candidate.frame
        start = time.perf_counter()
        failure: str | None = None
        result = PassResult()
        after = before
        try:
            result = item.apply(candidate.graph, context)
            if result.rewrites:
                remove_unread_constants(candidate.graph)
            if before is not None and result.rewrites:
                after = examine(candidate, feeds)
                failure = judge(
                    before,
                    after,
                    item.effect,
                    lambda: reordered_outputs(model, feeds),
                    lambda number: inferred_shapes(model, feeds[number]),
                )
        except ModelError as error:  # onnxruntime refuses what the pass made of a model that it ran
            failure = str(error)
        except GraphoptError:
            raise
        except Exception as error:  # a bug of the pass: name it, keep the model from before it
            failure = f"the pass crashed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        is_kept = result.rewrites > 0 and failure is None
        final = candidate if is_kept else model
        record = PassRecord(
            text=format_pass(item),
            effect=item.effect.value,
            rewrites=result.rewrites if is_kept else 0,
            nodes=node_count(final),
            nbytes=final.nbytes,
            seconds=time.perf_counter() - start,
            parts=result.parts,
            skipped=result.skipped,
            notes=result.notes,
            failure=failure,
        )
        return final, record, result.warnings, after if is_kept else before


def _with_earlier_failure(error: GraphoptError, report: Report) -> GraphoptError:
    """The error of a pass that misses what an earlier one, which was rolled back, would have left for it."""
    failed = next((record for record in report.passes if record.failure), None)
    if failed is None or failed.failure is None:
        return error
    return type(error)(f"{error}; before that, {failed.text} was rolled back: {failed.failure.splitlines()[0]}")


def node_count(model: Model) -> int:
    """Nodes of a model, those of branches and bodies included."""
    return sum(len(graph.nodes) for graph in all_graphs(model.graph))


def _write_failure(
    folder: Path, model: Model, item: Pass, context: Context, feeds: Sequence[Feed], failure: str
) -> str:
    """Write what reproduces a failure: the model before the pass, its inputs, its ranges and a command.

    Returns a clause that says so, or why it cannot be written: neither may end the run.
    """
    command = f"graphopt optimize before.onnx --passes {format_pass(item)} --target {context.target.name}"
    command += " --data feeds" if feeds else ""
    command += " --ranges ranges.json" if context.ranges is not None else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, folder / "before.onnx", overwrite=True)
        for number, feed in enumerate(feeds):
            _write_feed(folder / "feeds" / f"test_data_set_{number}", feed)
        if context.ranges is not None:
            context.ranges.save(folder / "ranges.json")
        text = f"{failure}\n\nTo see it again, in this folder:\n\n    {command}\n"
        write_text_atomically(folder / "README.txt", text)
    except (OSError, GraphoptError) as error:
        return f"what reproduces it could not be written to {folder}: {error}"
    return f"{folder} reproduces its failure"


def _write_feed(folder: Path, feed: Feed) -> None:
    """Write a feed as ONNX test data, which takes any name and any type of an input."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, value) in enumerate(feed.items()):
        (folder / f"input_{number}.pb").write_bytes(numpy_helper.from_array(value, name).SerializeToString())
