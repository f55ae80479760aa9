"""What `graphopt lint` prints: findings by rule, the first places of each, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphopt.lint import Finding, LintReport, Severity
from graphopt.targets import Target

_PLACES = 3  # of a rule that are printed
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}


def print_lint(report: LintReport, console: Console) -> None:
    """A table of findings, the figures, and the verdict."""
    if report.findings:
        console.print(_finding_table(report))
    for name, value in report.figures.items():
        console.print(f"{escape(name)}: {_figure(value)}")
    colour = "red" if report.failed else "yellow" if report.count(Severity.WARNING) else "green"
    console.print(f"[{colour}]{escape(report.verdict)}[/{colour}]")


def print_lint_summary(report: LintReport, console: Console) -> None:
    """The verdict and the figures, on one line."""
    figures = ", ".join(f"{name}: {_figure(value)}" for name, value in report.figures.items())
    console.print(f"lint: {escape(report.verdict)}{escape(f' ({figures})') if figures else ''}")


def print_rules(target: Target, console: Console) -> None:
    """Every rule of a target."""
    table = Table(title=f"rules of {target.name}", title_justify="left", title_style="bold")
    for column in ("rule", "severity", "title", "source"):
        table.add_column(column, overflow="fold")
    for rule in sorted(target.lint_rules, key=lambda rule: rule.id):
        severity = f"[{_COLOURS[rule.severity]}]{rule.severity.value}[/]"
        table.add_row(rule.id, severity, escape(rule.title), escape(rule.source.removeprefix("Source: ")))
    console.print(table)


def _finding_table(report: LintReport) -> Table:
    name = escape(report.model) or "the model"
    table = Table(title=f"{name} for {report.target}", title_justify="left", title_style="bold", show_lines=True)
    table.add_column("rule", no_wrap=True)
    table.add_column("places", justify="right")
    table.add_column("what is wrong, and what to do", overflow="fold")
    groups: dict[str, list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault(finding.rule, []).append(finding)
    for rule, findings in groups.items():
        severity = findings[0].severity
        heading = f"[{_COLOURS[severity]}]{rule}\n{severity.value}[/{_COLOURS[severity]}]"
        table.add_row(heading, str(len(findings)), f"[bold]{escape(report.titles[rule])}[/bold]\n{_places(findings)}")
    return table


def _places(findings: Iterable[Finding]) -> str:
    """The first places, those with the same message on one line."""
    by_message: dict[str, list[str]] = {}
    for finding in findings:
        by_message.setdefault(finding.message, []).append(finding.where)
    lines = [f"{_names(names)}{escape(message)}" for message, names in list(by_message.items())[:_PLACES]]
    left = sum(len(names) for names in list(by_message.values())[_PLACES:])
    return "\n".join([*lines, *([f"[dim]and {left} more: --json lists all[/dim]"] if left else [])])


def _names(names: list[str]) -> str:
    shown = ", ".join(escape(name) for name in names[:_PLACES] if name)
    more = f" and {len(names) - _PLACES} more" if len(names) > _PLACES else ""
    return f"[cyan]{shown}{more}[/cyan]: " if shown else ""


def _figure(value: float) -> str:
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"
