"""Tables for a terminal of 100 columns: what each pass did, what was left alone and why, how close the result is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from graphopt.checking import Check
from graphopt.compare import OutputComparison
from graphopt.inspection import Inspection, Interface
from graphopt.pass_base import Pass, Skip
from graphopt.pipeline import options_of
from graphopt.ranges import Ranges
from graphopt.report.lint import print_lint_summary
from graphopt.report.records import Report

_SKIP_GROUPS = 12
_LAYERS = 20
_RANGES = 30
_NO_DIFFERENCE = 0.005  # shown as such: it rounds to a ratio of 1.00


def print_report(report: Report, console: Console) -> None:
    """The passes of a run, what was left alone, and the check against the float model."""
    console.print(_pass_table(report))
    for record in report.passes:
        if record.failure:
            first_line = record.failure.splitlines()[0]
            console.print(f"[red]{escape(record.text)} was rolled back:[/red] {escape(first_line)}")
        for note in record.notes:
            console.print(f"{escape(record.text)}: {escape(note)}")
    skipped = [(record.text.split(":")[0], skip) for record in report.passes for skip in record.skipped]
    if skipped:
        console.print(_skip_table(skipped))
    if report.check is not None:
        print_check(report.check, console)
    if report.lint is not None:
        print_lint_summary(report.lint, console)


def print_check(check: Check, console: Console) -> None:
    """Each output beside the reference's, then sizes and latency."""
    details = [escape(check.data), *(["made up"] if check.synthetic else [])]
    details += ["exact Q/DQ arithmetic"] if check.exact else []
    title = f"against the float model, {check.comparison.samples} samples ({', '.join(details)})"
    console.print(_comparison_table(title, check.comparison.outputs))
    if check.layers is not None:
        rows = check.layers.outputs
        more = f", worst {_LAYERS} of {len(rows)}" if len(rows) > _LAYERS else ""
        console.print(_comparison_table(f"tensors that both compute{more}", rows[:_LAYERS]))
    table = Table(title="cost", title_justify="left", title_style="bold")
    for column in ("", "float", "result", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "size, MB",
        f"{check.reference_nbytes / 1e6:.3f}",
        f"{check.other_nbytes / 1e6:.3f}",
        _ratio(check.reference_nbytes, check.other_nbytes, "smaller", "larger"),
    )
    if check.reference_latency is not None and check.other_latency is not None:
        table.add_row(
            "latency, ms",
            f"{check.reference_latency * 1e3:.3f}",
            f"{check.other_latency * 1e3:.3f}",
            _ratio(check.reference_latency, check.other_latency, "faster", "slower"),
        )
    console.print(table)
    if check.is_slower:
        console.print("[yellow]The result is slower than the float model on this machine.[/yellow]")


def _ratio(before: float, after: float, better: str, worse: str) -> str:
    """How much a cost went down or up, as "3.94 x smaller"; empty where one of them is nothing."""
    if not before or not after:
        return ""
    if abs(before / after - 1) <= _NO_DIFFERENCE:
        return "the same"
    return f"{before / after:.2f} x {better}" if after < before else f"[yellow]{after / before:.2f} x {worse}[/yellow]"


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Size, parameters, MACs, operators and dtypes."""
    table = Table(show_header=False, title=escape(inspection.path or ""), title_justify="left", title_style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _inspection_rows(inspection):
        table.add_row(name, escape(value))
    console.print(table)


def _inspection_rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield from (("input", _interface(each)) for each in found.inputs)
    yield from (("output", _interface(each)) for each in found.outputs)
    if found.file_nbytes is not None:
        yield "file", _bytes(found.file_nbytes)
    by_dtype = (
        f"{dtype} {_bytes(each.nbytes)} in {_count(each.tensors, 'tensor')}"
        for dtype, each in found.weight_dtypes.items()
    )
    yield "weights", f"{_bytes(found.weight_nbytes)}{_in_brackets(', '.join(by_dtype))}"
    yield "parameters", f"{found.parameters:,}"
    macs_left_out = f"without {_count(found.macs_unknown, 'node')} of unknown shape" if found.macs_unknown else ""
    yield "MACs", f"{_scaled(found.macs)}{_in_brackets(macs_left_out)}"
    left_out = (
        f"without {_count(found.activations_unknown, 'tensor')} of unknown size" if found.activations_unknown else ""
    )
    yield "peak activations", f"{_bytes(found.peak_activation_nbytes)}{_in_brackets(left_out)}"
    if assumed := ", ".join(f"{name} {_shape(shape)}" for name, shape in found.assumed_shapes.items()):
        yield "both figures for", assumed
    ops = ", ".join(f"{op} {count:,}" for op, count in found.ops.items())
    yield "nodes", f"{found.nodes:,}{': ' * bool(ops)}{ops}"
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opset.items())
    yield "opset", opsets + (f", IR version {found.ir_version}" if found.ir_version else "")
    if found.producer:
        yield "producer", found.producer


def _interface(each: Interface) -> str:
    if each.shape is None:
        return f"{each.name} {each.dtype} of unknown shape"
    return f"{each.name} {each.dtype} {_shape(each.shape)}"


def _shape(sizes: Iterable[int | str | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _bytes(count: int) -> str:
    return f"{count:,} bytes" if count < 1000 else f"{_scaled(count)}B"


def _scaled(count: int) -> str:
    """A number to three digits, in the unit that suits it: 4727232 is "4.73 M"."""
    value, units = float(count), ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {units[0]}" if units[0] else str(count)


def print_passes(registry: Mapping[str, type[Pass]], console: Console) -> None:
    """Every pass with its options, their types and defaults."""
    for kind in registry.values():
        summary = (kind.__doc__ or "").strip().splitlines()[0]
        console.print(f"[bold]{kind.name}[/bold] ({kind.effect.value}): {escape(summary)}")
        options = Table.grid(padding=(0, 2))
        for option in options_of(kind):
            help_and_default = [option.help, f"default {option.default}" if option.default else ""]
            options.add_row(
                f"{option.name}=[italic]{escape(option.type_name)}[/italic]",
                escape(", ".join(filter(None, help_and_default))),
            )
        if options.rows:
            console.print(Padding(options, (0, 0, 0, 4)))


def print_ranges(ranges: Ranges, console: Console) -> None:
    """The ranges of the first tensors and how these were chosen."""
    made_up = ", made up" if ranges.synthetic else ""
    shard = f", shard {ranges.shard}" if ranges.shard else ""
    title = f"ranges of {len(ranges.tensors)} tensors for {ranges.target}, {ranges.samples} samples"
    table = Table(title=f"{title} ({escape(ranges.source)}{made_up}{shard})", title_justify="left", title_style="bold")
    table.add_column("tensor", overflow="fold", min_width=30)
    for column in ("minimum", "maximum", "observed from", "to", "mean"):
        table.add_column(column, justify="right")
    table.add_column("method")
    for name, found in list(ranges.tensors.items())[:_RANGES]:
        table.add_row(
            escape(name),
            *(f"{each:.4g}" for each in (found.minimum, found.maximum)),
            *(f"{each:.4g}" for each in (found.observed_minimum, found.observed_maximum)),
            "" if found.mean is None else f"{found.mean:.4g}",
            found.method,
        )
    console.print(table)
    if len(ranges.tensors) > _RANGES:
        console.print(f"... and {len(ranges.tensors) - _RANGES} more in the file")


def _pass_table(report: Report) -> Table:
    table = Table(title=f"{escape(report.model)} for {report.target}", title_justify="left", title_style="bold")
    for column in ("pass", "rewrites", "skipped", "nodes", "MB", "seconds"):
        table.add_column(column, justify="left" if column == "pass" else "right", overflow="fold")
    table.add_row("(as it came in)", "", "", str(report.nodes), f"{report.nbytes / 1e6:.3f}", "")
    for record in report.passes:
        parts = ", ".join(f"{name} {count}" for name, count in record.parts.items() if count)
        name = escape(record.text) + (f"\n[dim]{escape(parts)}[/dim]" if parts else "")
        table.add_row(
            name,
            "[red]rolled back[/red]" if record.failure else str(record.rewrites),
            str(len(record.skipped)),
            str(record.nodes),
            f"{record.nbytes / 1e6:.3f}",
            f"{record.seconds:.2f}",
        )
    return table


def _skip_table(skipped: Iterable[tuple[str, Skip]]) -> Table:
    """Skips with the same reason but for the names in it share a line."""
    groups: dict[tuple[str, str], list[Skip]] = {}
    for name, skip in skipped:
        groups.setdefault((name, _without_names(skip.reason)), []).append(skip)
    table = Table(title="left alone", title_justify="left", title_style="bold")
    table.add_column("pass")
    table.add_column("places", justify="right")
    table.add_column("reason", overflow="fold")
    table.add_column("first", overflow="ellipsis", no_wrap=True, max_width=28)
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))
    for (name, _), skips in largest[:_SKIP_GROUPS]:
        table.add_row(name, str(len(skips)), escape(skips[0].reason), escape(skips[0].where))
    if len(largest) > _SKIP_GROUPS:
        table.add_row("", "", f"and {len(largest) - _SKIP_GROUPS} more reasons: --json lists all", "")
    return table


def _without_names(reason: str) -> str:
    """A reason with everything that looks like a tensor's or a node's name taken out."""
    return re.sub(r"\S*[\d/:_]\S*", "*", reason)


def _comparison_table(title: str, rows: Iterable[OutputComparison]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("tensor", overflow="fold")
    for column in ("SQNR, dB", "cosine", "largest error", "agreement"):
        table.add_column(column, justify="right")
    for row in rows:
        agreement = "" if row.agreement is None else f"{row.agreement:.4f}"
        table.add_row(escape(row.name), _decibels(row.sqnr_db), f"{row.cosine:.6f}", f"{row.max_error:.4g}", agreement)
    return table


def _decibels(value: float) -> str:
    return "exact" if math.isinf(value) and value > 0 else f"{value:.2f}"
