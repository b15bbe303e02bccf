"""What the debugger found, as plain data: the machine-readable result (design, section 7)."""

import dataclasses
import html
from typing import Any

from jaxrnn import environment


@dataclasses.dataclass(frozen=True)
class Symptom:
    """What a detector found, and the first step at which its rule holds."""

    kind: str
    step: int


@dataclasses.dataclass(frozen=True)
class Cause:
    """What the pattern of outcomes says."""

    kind: str = 'none'
    why: str = ''


@dataclasses.dataclass(frozen=True)
class Replay:
    """What was computed again, and whether it came out the same."""

    bit_identical: bool = False  # every replayed step that has a record gave that record again
    first_mismatch: int | None = None
    steps_replayed: int = 0
    checkpoints_probed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Fields and their order are those of diagnosis.json."""

    symptom: Symptom | None = None
    first_bad_step: int | None = None
    onset_step: int | None = None
    where: dict[str, Any] | None = None
    checks: tuple[dict[str, Any], ...] = ()
    cause: Cause = Cause()
    remedies: tuple[dict[str, Any], ...] = ()
    replay: Replay = Replay()
    versions: dict[str, str] = dataclasses.field(default_factory=environment.versions)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """The screen that the commands print."""
        return as_text(self)

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return as_html(self)


def as_html(diagnosis: Diagnosis) -> str:
    """A diagnosis for a notebook: `report` puts its own in place of this, too."""
    return f'<pre>{html.escape(repr(diagnosis))}</pre>'


def as_text(diagnosis: Diagnosis) -> str:
    """A diagnosis for a person: `report`, which is above this room, puts its own in place of this."""
    return repr(diagnosis)
