"""The table of channel groups: what can be removed together, what that saves, and what stays for which reason."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphopt.channel_groups import ChannelGroups, Group

_MEMBERS = 2


def print_groups(groups: ChannelGroups, console: Console) -> None:
    """All groups, those that can be cut first."""
    table = Table(title=_title(groups), title_justify="left", title_style="bold")
    table.add_column("group", overflow="fold", max_width=34)
    for column in ("units", "MACs each", "params each"):
        table.add_column(column, justify="right")
    table.add_column("members, or why it stays", overflow="fold")
    for group in sorted(groups.groups, key=lambda each: each.frozen is not None):
        units = f"{group.size}" if group.width == 1 else f"{group.size} x {group.width}"
        table.add_row(escape(group.name), units, f"{group.macs:,}", f"{group.params:,}", escape(_remark(group)))
    console.print(table)
    if groups.nested:
        first = escape(", ".join(groups.nested[:_MEMBERS]))
        console.print(
            f"{len(groups.nested)} linear operators are in branches or bodies, where channels are not followed: {first}"
            + (" ..." if len(groups.nested) > _MEMBERS else "")
        )


def _title(groups: ChannelGroups) -> str:
    free = [group for group in groups.groups if group.frozen is None]
    return (
        f"{len(groups.groups)} channel groups, {len(free)} that can be cut, {sum(each.size for each in free):,} units"
    )


def _remark(group: Group) -> str:
    if group.frozen is not None:
        return f"stays: {group.frozen}"
    shown = ", ".join(f"{member.tensor}[{member.axis}]" for member in group.members[:_MEMBERS])
    more = len(group.members) - _MEMBERS
    text = shown + (f" and {more} more" if more > 0 else "")
    return f"{text}; not exact: {group.inexact}" if group.inexact else text
