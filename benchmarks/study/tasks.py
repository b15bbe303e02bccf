"""A task of the study: one program run in a directory of its own, and what its result is made of."""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Results = Mapping[str, Mapping[str, Any]]
"""Name of a task -> its result, of those that are done."""


class Task(NamedTuple):
    """One run of one program."""

    name: str  # <network and width>-<variant>-<seed>: of its directory and its result
    program: str  # script: train or diagnose
    flags: str  # without --run_dir
    run: str  # task whose directory it works in: its own, or that of the run that is diagnosed
    after: str = ''  # task whose result must be there first
    # Of a branch: result of `after` -> --branch_at and --max_steps.
    part: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None
    needed: Callable[[Mapping[str, Any]], bool] = lambda result: True  # whether, by the result of `after`
    full: bool = False  # whether its result keeps all signals, and scores of the checkpoints

    def arguments(self, results: Results, directory: Path) -> list[str]:
        """The script's flags."""
        found = [*shlex.split(self.flags), f'--run_dir={directory / self.run}']
        if self.part is not None:
            at, until = self.part(results[self.after])
            found += [f'--branch_from={directory / self.after}', f'--branch_at={at}', f'--max_steps={until}']
        return found

    def ready(self, results: Results) -> bool:
        """Whether it can be run now."""
        return not self.after or self.after in results

    def applies(self, results: Results) -> bool:
        """Whether it is to be run at all, as far as that is known."""
        before = results.get(self.after)
        return before is None or self.needed(before)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that are there."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))}


def write(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f'{name}.part'
    part.write_text(json.dumps(result, separators=(',', ':')) + '\n')
    part.rename(folder / f'{name}.json')
