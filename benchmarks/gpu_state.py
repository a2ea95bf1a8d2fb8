"""What a GPU has run: the stages of `make gpu`, and of each op the sources that were verified.

benchmarks/results/<gpu>/state.json: {"gpu", "stages": {name: {status, reason, inputs, seconds, date, git_sha}},
"ops": {op: {source_hash, git_sha, date, passed, failed}}}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import sources

FILE = "state.json"


@dataclass
class State:
    """The state of one GPU's results; saved after every stage. Checks of an op: suite, memcheck, racecheck."""

    folder: Path
    gpu: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    ops: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def load(folder: Path, gpu: str = "") -> State:
        path = folder / FILE
        content = json.loads(path.read_text()) if path.is_file() else {"gpu": gpu}
        return State(folder, **content)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"gpu": self.gpu, "stages": self.stages, "ops": self.ops}
        fresh = self.folder / f"{FILE}.new"  # whoever is killed here leaves the old file whole
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self.folder / FILE)

    def has_passed(self, stage: str, inputs: str) -> bool:
        known = self.stages.get(stage, {})
        return known.get("status") == "passed" and known.get("inputs") == inputs

    def note_check(self, op: str, check: str, status: str, source_hash: str, where: dict[str, Any]) -> None:
        """Adds the outcome of a check of an op; what was known of other sources is dropped."""
        entry = self.ops.get(op)
        if entry is None or entry["source_hash"] != source_hash:
            entry = {"source_hash": source_hash, "passed": [], "failed": []}
        for key in ("passed", "failed"):
            entry[key] = [name for name in entry[key] if name != check]
        if status in ("passed", "failed"):
            entry[status].append(check)
            entry.update(where)
        if entry["passed"] or entry["failed"]:
            self.ops[op] = entry


def standing(op: str, states: list[State]) -> tuple[str, str]:
    """(verified | changed | failed | never, a remark) of an op's present sources, over all GPUs' results."""
    present = sources.kernel_hash(op, "cuda")
    known = [(state, state.ops[op]) for state in states if op in state.ops]
    current = [(state, entry) for state, entry in known if entry["source_hash"] == present]
    for state, entry in current:
        if entry["failed"]:
            return "failed", f"{', '.join(entry['failed'])} on {entry['date']}, {state.gpu}"
    verified = [(state, entry) for state, entry in current if "suite" in entry["passed"]]
    if verified:
        return "verified", "; ".join(f"{', '.join(e['passed'])} on {e['date']}, {s.gpu}" for s, e in verified)
    passed = [(entry["date"], state.gpu) for state, entry in known if "suite" in entry["passed"]]
    if passed:
        return "changed", "sources changed since {}, {}".format(*max(passed))
    return "never", "never verified on a GPU"


def all_states() -> list[State]:
    return [State.load(path.parent) for path in sorted(sources.RESULTS.glob(f"*/{FILE}"))]
