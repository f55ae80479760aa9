"""Hold a model against the rules of a target: what it refuses, and what makes it slower or less exact there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from graphopt.lint_rule import Finding, LintRule, Severity, Subject
from graphopt.model_io import Model
from graphopt.sizes import Shape
from graphopt.targets import Target

__all__ = ["Finding", "LintReport", "LintRule", "Severity", "lint_model"]

_ORDER = list(Severity)


@dataclass(frozen=True, kw_only=True)
class LintReport:
    """What the rules of a target find in a model, the gravest first."""

    model: str
    target: str
    findings: tuple[Finding, ...]
    titles: Mapping[str, str]  # of the rules that were asked, by id
    figures: Mapping[str, int | float]  # by what they count

    def count(self, severity: Severity) -> int:
        """How many findings are of a severity."""
        return sum(finding.severity is severity for finding in self.findings)

    @property
    def errors(self) -> frozenset[str]:
        """The ids of the rules of severity error that are broken."""
        return frozenset(finding.rule for finding in self.findings if finding.severity is Severity.ERROR)

    @property
    def failed(self) -> bool:
        """Whether a rule of severity error is broken."""
        return bool(self.errors)

    @property
    def verdict(self) -> str:
        """One sentence that sums up."""
        counts = {severity: self.count(severity) for severity in Severity}
        if not self.findings:
            return f"no rule of {self.target} is broken"
        words = [_counted(number, severity.value) for severity, number in counts.items() if number]
        found = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
        if self.failed:
            return f"{found}: {self.target} refuses this model, or computes something else"
        if counts[Severity.WARNING]:
            return f"{found}: the model runs on {self.target}, slower or less exactly than it could"
        return f"{found}: nothing to repair for {self.target}"

    def to_json(self) -> dict[str, Any]:
        """Return the same as a dict of what JSON has."""
        findings = [asdict(finding) | {"severity": finding.severity.value} for finding in self.findings]
        counts = Counter(finding.severity.value for finding in self.findings)
        return {
            "model": self.model,
            "target": self.target,
            "verdict": self.verdict,
            "counts": {severity.value: counts[severity.value] for severity in Severity},
            "figures": dict(self.figures),
            "findings": findings,
            "rules": dict(self.titles),
        }


def lint_model(model: Model, target: Target, input_shapes: Mapping[str, Shape] | None = None) -> LintReport:
    """Hold a model against the rules of a target; the model is left as it is.

    Args:
        model: of any tool.
        target: what it is for.
        input_shapes: by name; None: open sizes are assumed as in `graphopt.sizes`.
    """
    subject = Subject(model, target, input_shapes)
    findings = [finding for rule in target.lint_rules for finding in rule.findings(subject)]
    findings.sort(key=lambda finding: _ORDER.index(finding.severity))
    return LintReport(
        model="" if model.path is None else str(model.path),
        target=target.name,
        findings=tuple(findings),
        titles={rule.id: rule.title for rule in target.lint_rules},
        figures={} if target.lint_figures is None else target.lint_figures(subject),
    )


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" + ("s" if number != 1 and word != "info" else "")
