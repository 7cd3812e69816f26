"""What checks find, and how it is told."""

from __future__ import annotations

import difflib
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mila_mm.errors import UserError, printable

# A path in a message stays whole.
_LONGEST = 8192

ERROR, WARNING, NOTE = 'error', 'warning', 'note'


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, doubtful or worth knowing.

    Attributes:
        level: 'error' (a run would fail or learn something else than meant), 'warning' or 'note'.
        where: Key of the config, or file; the first words of the line.
        message: The rest of the line.
    """

    level: str
    where: str
    message: str

    def __str__(self) -> str:
        return f'{self.where}: {self.message}' if self.where else self.message


@dataclass
class Report:
    """Everything that checks found about a config and its data.

    Attributes:
        findings: In the order in which they were found.
        counts: For each split ('train', 'val', 'test') what it holds, name to number.
    """

    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings in, each line once."""
        for finding in findings:
            if finding not in self.findings:
                self.findings.append(finding)

    def of(self, level: str) -> list[Finding]:
        """Return the findings of a level."""
        return [finding for finding in self.findings if finding.level == level]

    def refuse(self, hint: str) -> None:
        """Raise the errors, if any, on three lines at most.

        Args:
            hint: What to do to see all of them, the last line.

        Raises:
            UserError: If there is an error among the findings.
        """
        errors = self.of(ERROR)
        if not errors:
            return
        lines = [str(finding) for finding in errors[:2]]
        more = f'{len(errors) - 2} more; ' if len(errors) > 2 else ''
        raise UserError('\n'.join([*lines, f'{more}{hint}']))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return {
            'errors': len(self.of(ERROR)),
            'warnings': len(self.of(WARNING)),
            'counts': self.counts,
            'findings': [asdict(finding) for finding in self.findings],
        }


def _finding(level: str, where: str, message: str) -> Finding:
    # Names out of files are in both, and must neither steer a terminal nor forge a line.
    return Finding(level, printable(where, _LONGEST), printable(message, _LONGEST))


def error(where: str, message: str) -> Finding:
    """Return a finding that must stop a run."""
    return _finding(ERROR, where, message)


def warning(where: str, message: str) -> Finding:
    """Return a finding that a person should see."""
    return _finding(WARNING, where, message)


def note(where: str, message: str) -> Finding:
    """Return a finding that is worth knowing and no fault."""
    return _finding(NOTE, where, message)


def shown(values: Sequence[Any], limit: int = 5) -> str:
    """Return the first values of a list and how many more there are."""
    first = ', '.join(repr(value) if isinstance(value, str) else str(value) for value in values[:limit])
    return first if len(values) <= limit else f'{first} and {len(values) - limit} more'


def brief(value: Any, limit: int = 60) -> str:
    """Return a value of a file, cut where it is long."""
    text = repr(list(value) if isinstance(value, array) else value)
    return text if len(text) <= limit else f'{text[: limit - 3]}...'


def _composed(name: str) -> str:
    return unicodedata.normalize('NFC', str(name))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; nearest: 'x'" for the most similar name, blanks and capitals aside, '' where none is similar."""
    names = list(names)
    for known in names:
        if str(known) != str(name) and _composed(known) == _composed(name):
            return f'; {known!r} there is in another Unicode form ({known!a} there, {name!a} here)'
    by_form = {str(known).strip().lower(): known for known in names}
    close = difflib.get_close_matches(str(name).strip().lower(), by_form, n=1)
    return f'; nearest: {by_form[close[0]]!r}' if close else ''
