"""The result of a measurement as Markdown, JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {
    "engine": ("engine", "{}"),
    "scenario": ("passages", "{}"),
    "pairs_per_second": ("pairs/s", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "tokens_per_second_min": ("min", "{:.0f}"),
    "tokens_per_second_max": ("max", "{:.0f}"),
    "ratio": ("ours is", "{}"),
    "p50_ms": ("p50 ms", "{:,.0f}"),
    "p95_ms": ("p95 ms", "{:,.0f}"),
    "resident_mb": ("MB", "{:,.0f}"),
    "peak_resident_mb": ("peak MB", "{:,.0f}"),
    "seconds_to_ready": ("ready s", "{:.1f}"),
}


def write(result: dict[str, Any], folder: Path) -> str:
    """Writes MODEL.json, MODEL.md and, with matplotlib, MODEL.png into the folder; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    name = result["model"]
    text = markdown(result)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    if result["rows"]:
        plot(result, folder / f"{name}.png")
    return text


def write_lines(folder: Path, name: str, lines: list[str], content: dict[str, Any]) -> list[str]:
    """Writes the lines as NAME.md and the content as NAME.json into the folder; returns the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return lines


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    files = ", ".join(f"{name} {size:,.0f} MB" for name, size in result["files_mb"].items())
    lines = [
        f"# {result['model']}", "",
        f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}", "",
        f"- {machine['cpus']} x {machine['cpu']}, {machine['memory_gb']} GB, {machine['system']}; load at the start "
        f"{machine['load_at_start']}",
        f"- flags: {' '.join(machine['flags'])}",
        f"- Python {machine['python']}; {packages}",
        f"- threads: one for each core in every engine, {machine['cpus']} here",
        f"- files: {files}",
        f"- texts: {result['texts']}, {result['mean_tokens_per_pair']:.0f} tokens in a pair on average; "
        f"{result['runs']} rounds, every engine asked in turn with the same lists", "",
        "tokens/s and pairs/s: median over the rounds, with the slowest and the fastest. Latencies are of whole "
        "requests, over HTTP. MB: resident memory after the last round, mapped file included. \"ours is\": tokens/s of "
        "the first row of the same list length, divided by this engine's.", "",
    ]  # fmt: skip
    lines += table(with_ratios(result["rows"]), COLUMNS)
    lines += ["", *(f"- not measured: {name}: {reason}" for name, reason in result["missing"].items())]
    return "\n".join(lines).rstrip() + "\n"


def table(rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> list[str]:
    """columns: key of a row -> (title, format)."""
    lines = ["| " + " | ".join(title for title, _ in columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(form.format(row[key]) for key, (_, form) in columns.items()) + " |")
    return lines


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows ordered by scenario, each with how many times its speed the first engine has in the same scenario."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    ordered = [row for scenario in scenarios for row in rows if row["scenario"] == scenario]
    first: dict[str, float] = {}
    for row in ordered:
        first.setdefault(row["scenario"], row["tokens_per_second"])
    return [{**row, "ratio": f"{first[row['scenario']] / row['tokens_per_second']:.2f} x"} for row in ordered]


def plot(result: dict[str, Any], path: Path) -> bool:
    """Horizontal bars of tokens/s with their spread, one group for each scenario. False without matplotlib."""
    pyplot = import_pyplot()
    if pyplot is None:
        return False
    scenarios = list(dict.fromkeys(row["scenario"] for row in result["rows"]))
    engines = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    figure, axes = pyplot.subplots(
        1, len(scenarios), figsize=(3.2 * len(scenarios) + 2, 0.4 * len(engines) + 1.4), sharey=True, squeeze=False
    )
    for axis, scenario in zip(axes[0], scenarios, strict=True):
        rows = [row for row in result["rows"] if row["scenario"] == scenario]
        for row in rows:
            speed = row["tokens_per_second"]
            spread = [[speed - row["tokens_per_second_min"]], [row["tokens_per_second_max"] - speed]]
            color = "tab:blue" if row["engine"].startswith("rerank-server") else "tab:gray"
            axis.barh(engines.index(row["engine"]), speed, xerr=spread, color=color)
        axis.set_title(f"{scenario} passages", fontsize=9)
        axis.set_xlabel("tokens/s")
    axes[0][0].set_yticks(range(len(engines)), engines)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{result['model']}, {result['machine']['cpus']} x {result['machine']['cpu']}", fontsize=10)
    save(figure, pyplot, path)
    return True


def import_pyplot() -> Any:
    """matplotlib's pyplot without a display; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, pyplot: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
