"""The rules that `graphopt lint` holds a model against; a target names its own in `Target.lint_rules`."""

from graphopt.lint_rules.rule import Finding, LintRule, Severity, Subject, rule

__all__ = ["Finding", "LintRule", "Severity", "Subject", "rule"]
