"""`python -m benchmarks.gpu_status`: whether each op's, and the core's, present sources were verified on a GPU."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from benchmarks import sources
from benchmarks.gpu_state import all_states, standing

STYLES = {"verified": "green", "changed": "yellow", "failed": "red", "never": "yellow"}


def table() -> Table:
    states = all_states()
    result = Table("op", "standing", "what is known")
    for op in [*sources.op_names(), sources.GRAPH, sources.CORE]:
        status, remark = standing(op, states)
        result.add_row(op, f"[{STYLES[status]}]{status}", remark)
    return result


def main() -> int:
    Console(width=None if sys.stdout.isatty() else 140, file=sys.stdout).print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
