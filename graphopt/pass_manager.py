"""Run passes in order over a clone of a graph: verify each, time it, roll back what breaks the model, report all.

The model is cloned before each pass (weights are shared, never copied), so a pass that fails costs nothing: the clone
is dropped, the run goes on with the graph from before, and the record of the pass says why. Where a failure folder was
asked for, that graph, its inputs and a command line that fails in the same way are written there.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnx

from graphopt.data import Feed
from graphopt.errors import GraphoptError, ModelError
from graphopt.files import write_text_atomically
from graphopt.graph import all_graphs
from graphopt.made_up import made_up_samples
from graphopt.model_io import Model, Source, load_model, save_model
from graphopt.pass_base import Context, Pass, PassResult
from graphopt.pipeline import format_pass, format_pipeline
from graphopt.report.records import PassRecord, Report
from graphopt.runtime import open_session
from graphopt.verification import Verdict, examine, judge
from graphopt.version import VERSION

VERIFICATION_FEEDS = 2


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
        """Write the new model; never over the file it came from, and never a part of it.

        Raises:
            OutputError: the file exists and `overwrite` is false, or it cannot be written.
        """
        source = self.optimized.path
        save_model(self.optimized, path, overwrite=overwrite, protect=() if source is None else (source,))


class PassManager:
    """Runs a list of passes over a model."""

    def __init__(self, passes: Sequence[Pass], *, verify: bool = True) -> None:
        self.passes = tuple(passes)
        self.verify = verify

    def run(
        self, source: Source | Model, context: Context | None = None, *, failure_folder: Path | None = None
    ) -> Result:
        """Run the passes over a clone of `source`.

        Args:
            source: a path, a ModelProto, a gs.Graph or a loaded Model; never changed.
            context: the request that passes share; the default is the target ort-cpu without data.
            failure_folder: gets a folder for each pass that breaks the model; None: nothing is written.

        Raises:
            GraphoptError: the model cannot be read or run, or a pass cannot honour its options.
        """
        model = source if isinstance(source, Model) else load_model(source)
        context = context or Context()
        context.defaults = model.frame.defaults
        report = self._new_report(model, context)
        feeds, before = self._examine_input(model, context, report)
        for number, item in enumerate(self.passes):
            context.progress(f"pass {item.name}", number, len(self.passes))
            candidate, record, after = self._run_one(item, model, context, feeds, before)
            report.passes.append(record)
            if record.failure is None:
                model, before = candidate, after
            elif failure_folder is not None:
                folder = failure_folder / f"{number}-{item.name}"
                _write_failure(folder, model, item, context, feeds, record.failure)
                report.warnings.append(f"pass {item.name} was rolled back; {folder} reproduces its failure")
        context.progress("passes", len(self.passes), len(self.passes))
        return Result(model, report)

    def _new_report(self, model: Model, context: Context) -> Report:
        report = Report(
            model=str(model.path or model.graph.name),
            pipeline=format_pipeline(self.passes),
            target=context.target.name,
            version=VERSION,
            nodes=node_count(model),
            nbytes=model.nbytes,
            data="" if context.samples is None else context.samples.description,
            synthetic=context.samples is None,
        )
        if model.frame.defaults:
            report.warnings.append(
                f"{len(model.frame.defaults)} graph inputs have default values that a caller may override, so they "
                "are neither folded nor quantized: put freeze-inputs first in the pipeline to make them constants"
            )
        return report

    def _examine_input(self, model: Model, context: Context, report: Report) -> tuple[list[Feed], Verdict | None]:
        """The feeds to verify with, and the verdict on the model as it came in."""
        if not self.verify:
            return [], None
        session = open_session(model)
        if context.samples is not None:
            feeds = list(islice(context.samples, VERIFICATION_FEEDS))
            verdict = examine(model, feeds)
        else:
            feeds = list(made_up_samples(session, count=VERIFICATION_FEEDS, seed=context.seed))
            try:
                verdict = examine(model, feeds)
            except ModelError as error:
                report.warnings.append(
                    f"outputs are not verified: the model does not run on made-up inputs ({error}); give --data"
                )
                feeds, verdict = [], examine(model, [])
        if verdict.refusal:
            report.warnings.append(
                f"the model as it came in is refused ({verdict.refusal}), but onnxruntime runs it: "
                "verification asks that nothing gets worse"
            )
        return feeds, verdict

    def _run_one(
        self, item: Pass, model: Model, context: Context, feeds: Sequence[Feed], before: Verdict | None
    ) -> tuple[Model, PassRecord, Verdict | None]:
        """Apply one pass to a clone and verify it; the record says whether the clone may be used."""
        candidate = model.copy()
        start = time.perf_counter()
        failure: str | None = None
        result = PassResult()
        after = before
        try:
            result = item.apply(candidate.graph, context)
            if before is not None and result.rewrites:
                after = examine(candidate, feeds)
                failure = judge(before, after, item.effect)
        except ModelError as error:  # onnxruntime refuses what the pass made of a model that it ran
            failure = str(error)
        except GraphoptError:
            raise
        except Exception as error:  # a bug of the pass: name it, keep the model from before it
            failure = f"the pass crashed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        final = model if failure else candidate
        record = PassRecord(
            text=format_pass(item),
            effect=item.effect.value,
            rewrites=0 if failure else result.rewrites,
            nodes=node_count(final),
            nbytes=final.nbytes,
            seconds=time.perf_counter() - start,
            parts=result.parts,
            skipped=result.skipped,
            notes=result.notes,
            failure=failure,
        )
        return candidate, record, after


def node_count(model: Model) -> int:
    """Nodes of a model, those of branches and bodies included."""
    return sum(len(graph.nodes) for graph in all_graphs(model.graph))


def _write_failure(
    folder: Path, model: Model, item: Pass, context: Context, feeds: Iterable[Feed], failure: str
) -> None:
    """Write what reproduces a failure: the model before the pass, its inputs, its ranges and a command."""
    (folder / "feeds").mkdir(parents=True, exist_ok=True)
    save_model(model, folder / "before.onnx", overwrite=True)
    command = f"graphopt optimize before.onnx --passes {format_pass(item)} --target {context.target.name}"
    for number, feed in enumerate(feeds):
        np.savez(folder / "feeds" / f"{number:05d}.npz", **feed)  # type: ignore[arg-type] # its stub mistypes **
        command += "" if number else " --data feeds"
    if context.ranges is not None:
        context.ranges.save(folder / "ranges.json")
        command += " --ranges ranges.json"
    write_text_atomically(folder / "README.txt", f"{failure}\n\nTo see it again, in this folder:\n\n    {command}\n")
