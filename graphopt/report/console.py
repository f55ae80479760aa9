"""Tables for a terminal of 100 columns: what each pass did, what was left alone and why, how close the result is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphopt.checking import Check
from graphopt.compare import OutputComparison
from graphopt.inspection import Inspection
from graphopt.pass_base import Pass, Skip
from graphopt.pipeline import options_of
from graphopt.report.records import Report

_SKIP_GROUPS = 12
_LAYERS = 20


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
        f"{check.reference_nbytes / check.other_nbytes:.2f} x smaller",
    )
    slower = False
    if check.reference_latency is not None and check.other_latency is not None:
        ratio = check.reference_latency / check.other_latency
        slower = ratio < 1
        table.add_row(
            "latency, ms",
            f"{check.reference_latency * 1e3:.3f}",
            f"{check.other_latency * 1e3:.3f}",
            f"[yellow]{1 / ratio:.2f} x slower[/yellow]" if slower else f"{ratio:.2f} x faster",
        )
    console.print(table)
    if slower:
        console.print("[yellow]The result is slower than the float model on this machine.[/yellow]")


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Size, parameters, MACs, operators and dtypes."""
    table = Table(show_header=False)
    for name, value in inspection.to_json().items():
        table.add_row(name.replace("_", " "), escape(_plain(value)))
    console.print(table)


def print_passes(registry: Mapping[str, type[Pass]], console: Console) -> None:
    """Every pass with its options, their types and defaults."""
    for kind in registry.values():
        summary = (kind.__doc__ or "").strip().splitlines()[0]
        console.print(f"[bold]{kind.name}[/bold] ({kind.effect.value}): {escape(summary)}")
        for option in options_of(kind):
            default = f", default {option.default}" if option.default else ""
            console.print(
                f"    {option.name}=[italic]{escape(option.type_name)}[/italic]: {escape(option.help)}{escape(default)}"
            )


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


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
