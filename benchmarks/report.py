"""From the timed rows to one record (JSON), a table on the screen and a chart of the ratios (PNG).

A row of the record has the labels op, case, dtype, layout, direction, mode, provider; `ours`, `peer` (seconds of a
call) and `ratio` (peer / ours), each with median, q1, q3; rounds; error, peer_error and allowed (relative to the
largest value; absent end to end); source_hash of the kernel. Where its work is counted: `work` (bytes, flops,
precision), gb_per_s and gflop_per_s of ours, `floor`, the seconds that the work takes at least by the ceilings of the
device, and `share`, the floor over ours.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import environment

SCHEMA_VERSION = 1
Row = dict[str, Any]


class WrongCaseError(ValueError):
    """A row whose result was wrong, or was not checked: it has no speed."""


def rows_of(pytest_json: dict[str, Any]) -> list[Row]:
    """The rows that pytest-benchmark's JSON carries.

    Raises:
        WrongCaseError: the error of a row is over what is allowed.
    """
    rows = [bench["extra_info"] for bench in pytest_json["benchmarks"]]
    for bench, row in zip(pytest_json["benchmarks"], rows, strict=True):
        if not row.get("error", math.nan) <= row.get("allowed", math.nan):  # false for NaN
            raise WrongCaseError(
                f"{bench['name']}: expected an error of at most {row.get('allowed')}, but got {row.get('error')}"
            )
    return rows


def record_of(
    rows: list[Row], failed: list[str], device: str, verified: bool | None, load_before: float
) -> dict[str, Any]:
    """The whole record: what was timed, what was wrong, whether `verify` passed (None: not run), how busy it was."""
    return {
        "schema_version": SCHEMA_VERSION,
        **environment.describe(device),
        "load_before": round(load_before, 2),
        "verified": verified,
        "failed": failed,
        "rows": rows,
    }


def write(record: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes `<name>.json` and, where there are rows, `<name>.png`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    if record["rows"]:
        paths.append(folder / f"{name}.png")
        chart(record, paths[1])
    return paths


def by_op(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["op"], []).append(row)
    return groups


def median_ratio(rows: list[Row]) -> float:
    """Over the rows against another library; what a dtype gains over our own float32 is not counted."""
    ratios = [row["ratio"]["median"] for row in rows if not row["provider"].startswith("pvk")]
    return statistics.median(ratios) if ratios else float("nan")


def print_table(record: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"Ours against the peer on {record['device']}, threads: {record['threads']}; ratio = peer / ours"
    )
    for column in ("case", "dtype", "layout", "direction", "against"):
        table.add_column(column, overflow="fold")
    for column in ("ours", "peer", "ratio", "quartiles", "GB/s", "GFLOP/s", "% of floor", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for op, rows in by_op(record["rows"]).items():
        table.add_row(f"[bold]{op}")
        for row in rows:
            table.add_row(*_cells(row), style="" if row["ratio"]["median"] >= 1 else "yellow")
        table.add_row("  median of the op", *[""] * 6, f"{median_ratio(rows):.2f}x", style="bold", end_section=True)
    console.print(table)


def _cells(row: Row) -> list[str]:
    ratio = row["ratio"]
    direction = row["direction"] + (", graph" if row["mode"] == "graph" else "")
    return [
        f"  {row['case']}",
        row["dtype"],
        row["layout"],
        direction,
        row["provider"],
        seconds_text(row["ours"]["median"]),
        seconds_text(row["peer"]["median"]),
        f"{ratio['median']:.2f}x",
        f"{ratio['q1']:.2f}-{ratio['q3']:.2f}",
        f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "",
        f"{row['gflop_per_s']:.1f}" if "gflop_per_s" in row else "",
        f"{row['share']:.0%}" if "share" in row else "",
        f"{row['error']:.0e}" if "error" in row else "",
    ]


def seconds_text(seconds: float) -> str:
    """Three digits in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def chart(record: dict[str, Any], path: Path) -> None:
    """Horizontal bars of the median ratios, with their quartiles; logarithmic; a line at 1."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups = by_op(record["rows"])
    figure = Figure(figsize=(11, 2.0 + 0.6 * len(groups) + 0.24 * len(record["rows"])), layout="constrained")
    axes = figure.subplots(
        len(groups), sharex=True, squeeze=False, height_ratios=[len(rows) + 1.5 for rows in groups.values()]
    )
    providers = list(dict.fromkeys(row["provider"] for row in record["rows"]))
    colours = {provider: f"C{index}" for index, provider in enumerate(providers)}
    for axis, (op, rows) in zip(axes[:, 0], groups.items(), strict=True):
        middle = [row["ratio"]["median"] for row in rows]
        low = [row["ratio"]["median"] - row["ratio"]["q1"] for row in rows]
        high = [row["ratio"]["q3"] - row["ratio"]["median"] for row in rows]
        # Bars grow from 1: to the right where ours is faster.
        axis.barh(
            range(len(rows)),
            [value - 1 for value in middle],
            left=1,
            xerr=[low, high],
            color=[colours[row["provider"]] for row in rows],
            error_kw={"elinewidth": 0.8, "ecolor": "0.3"},
        )
        axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
        for position, value in enumerate(middle):
            axis.annotate(
                f"{value:.2f}x", (1.01, position), xycoords=("axes fraction", "data"), va="center", fontsize=8
            )
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(f"{op}: median {median_ratio(rows):.2f}x", loc="left", fontsize=10)
        axis.grid(axis="x", which="both", alpha=0.2)
        axis.set_axisbelow(True)
    last = axes[-1, 0]
    last.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    last.set_xlabel("peer's time / ours (right of the line ours is faster; whiskers are quartiles)")
    figure.suptitle(f"pyvision_kernels on {record['device']}, threads: {record['threads']}, torch {record['torch']}")
    legend = [Patch(color=colour, label=f"against {provider}") for provider, colour in colours.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8)
    figure.savefig(path, dpi=110)


def _label(row: Row) -> str:
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(row["dtype"], row["dtype"])
    parts = [row["case"], dtype, row["direction"]]
    parts += [row["layout"]] if row["layout"] != "contiguous" else []
    parts += [row["mode"]] if row["mode"] != "eager" else []
    return ", ".join(parts)
