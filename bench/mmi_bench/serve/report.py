"""Reports of a result: tables for a terminal, CSV, Markdown, an HTML page with plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from rich import box
from rich.console import Console
from rich.table import Table

from mmi_bench.serve.definitions import BY_KEY, PERCENTILES
from mmi_bench.serve.plots import plots
from mmi_bench.serve.result import Result
from mmi_bench.serve.sample_statistics import Interval, Summary
from mmi_deploy.cli.console import print_table
from mmi_deploy.system.files import write_new_file

RESULT, REQUESTS = "result.json", "requests.jsonl"

_LATENCY_HEADINGS = ("latency, ms", "requests", "mean", "95 % of the mean",
                     *(f"p{p}" for p in PERCENTILES), "max")  # fmt: skip
_RATE_HEADINGS = ("rate, 1/s", "value", "95 %")

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mmi_deploy">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1d1f23; --paper: #fbfaf7; --faint: #6a6f78; --line: #dedbd2; }
body { margin: 0 auto; max-width: 64rem; padding: 0 1.25rem 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 2rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.about { color: var(--faint); margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.bad { color: #b00020; font-weight: 600; }
svg { max-width: 100%; height: auto; }
pre { overflow-x: auto; background: #0000000a; padding: .8rem; border-radius: .4rem;
  font-size: .85rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="about">$about</p>
$body
</body>
</html>
""")


def print_report(console: Console, result: Result) -> None:
    """Print both tables and the remarks."""
    console.print(title(result))
    for headings, rows in ((_LATENCY_HEADINGS, latency_rows(result)),
                           (_RATE_HEADINGS, rate_rows(result))):  # fmt: skip
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        if rows:
            print_table(console, table)
    for note in result.notes():
        console.print(note)


def title(result: Result) -> str:
    """Workload, load and server in one line."""
    about = result.about
    load = about["load"]
    facts = ", ".join(f"{key} {value}" for key, value in load.items() if key != "kind" and value)
    name, server = about["workload"]["name"], about["server"]
    return f"{name}, {load['kind']}{f' ({facts})' if facts else ''}: {server['model']}" + (
        f" at {server['url']}" if not server.get("bundle") else f", {server['target']}"
    )


def about_line(result: Result) -> str:
    """Machine, start and client in one line."""
    about = result.about
    machine = about["machine"]
    runs = len(result.runs)
    return (
        f"{machine['processor']}, {machine['cores']} cores, load before "
        f"{machine['load_before']:.1f}; {about['started']}; {runs} run{'s' * (runs != 1)}; "
        f"{about['client']['endpoint']}, {about['client']['transport']}"
    )


def latency_rows(result: Result) -> list[list[str]]:
    """Cells of the table of latencies, in ms; blank where the sample does not carry them."""
    return [
        [
            BY_KEY[key].name,
            str(one.requests),
            ms(one.mean),
            _range(result.mean_interval(key), 1000),
            *(ms(one.percentiles[p]) for p in PERCENTILES),
            ms(one.greatest),
        ]
        for key, one in result.measures.items()
    ]


def rate_rows(result: Result) -> list[list[str]]:
    """Cells of the table of rates."""
    rows = []
    for key, rate in result.rates.items():
        if rate.value or key in ("requests_per_second", "goodput"):
            rows.append([BY_KEY[key].name, number(rate.value), _range(rate.interval, 1)])
    fractions = [one.goodput_fraction for one in result.runs if one.goodput_fraction is not None]
    if fractions:
        share = 100 * sum(fractions) / len(fractions)
        words = ", ".join(limit.word for limit in result.limits)
        rows.append([f"share within {words}", f"{share:.1f} %", ""])
    return rows


def write_files(result: Result, folder: Path) -> None:
    """Write all files of a result into an empty folder."""
    write_data(result, folder)
    write_new_file(folder / "summary.csv", to_csv(result))
    write_new_file(folder / "report.md", to_markdown(result))
    write_new_file(folder / "index.html", to_html(result, plots(result, folder)))


def write_data(result: Result, folder: Path) -> None:
    """Write what `mmi bench compare` reads: the result, and a line for each request."""
    lines = "".join(json.dumps(line) + "\n" for line in result.lines())
    write_new_file(folder / REQUESTS, lines)
    write_new_file(folder / RESULT, json.dumps(result.to_json(), indent=1) + "\n")


def to_csv(result: Result) -> str:
    """A line for each measure, in seconds or a second."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f"p{p}" for p in PERCENTILES]
    writer.writerow(["measure", "kind", "requests", "values", "mean", "mean_low", "mean_high",
                     "min", *names, "max"])  # fmt: skip
    for key, one in result.measures.items():
        low, high = result.mean_interval(key) or ("", "")
        row = [key, "latency", one.requests, one.values, one.mean, low, high, one.least]
        writer.writerow([*row, *map(_blank, _percentiles(one)), one.greatest])
    for key, rate in result.rates.items():
        low, high = rate.interval or ("", "")
        blanks = [""] * (len(names) + 2)
        writer.writerow([key, "rate", "", "", rate.value, low, high, *blanks])
    return out.getvalue()


def to_markdown(result: Result) -> str:
    """Tables and remarks."""
    parts = [f"# {title(result)}", about_line(result)]
    for headings, rows in ((_LATENCY_HEADINGS, latency_rows(result)),
                           (_RATE_HEADINGS, rate_rows(result))):  # fmt: skip
        if rows:
            parts.append("\n".join(_markdown_table(headings, rows)))
    parts.append("\n".join(f"* {note}" for note in result.notes()))
    return "\n\n".join(parts) + "\n"


def to_html(result: Result, pictures: Sequence[tuple[str, str]]) -> str:
    """Page with everything in it; pictures: heading and SVG of each plot."""
    body: list[str] = []
    for headings, rows in ((_LATENCY_HEADINGS, latency_rows(result)),
                           (_RATE_HEADINGS, rate_rows(result))):  # fmt: skip
        if rows:
            body += _html_table(headings, rows)
    body.append("<h2>Remarks</h2>\n<ul>")
    for note in result.notes():
        mark = ' class="bad"' if any(word.isupper() and len(word) > 4 for word in note.split()) \
            else ""  # fmt: skip
        body.append(f"<li{mark}>{escape(note)}</li>")
    body.append("</ul>")
    for heading, svg in pictures:
        body.append(f"<h2>{escape(heading)}</h2>\n{svg}")
    about = {**result.about, "plan": vars(result.plan)}
    body.append(f"<h2>Provenance</h2>\n<pre>{escape(json.dumps(about, indent=1))}</pre>")
    return _PAGE.substitute(
        title=escape(title(result)), about=escape(about_line(result)), body="\n".join(body)
    )


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield '<div class="scroll"><table>'
    yield "<tr>" + "".join(f'<th scope="col">{escape(one)}</th>' for one in headings) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</table></div>"


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|---|{'---:|' * (len(headings) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _percentiles(one: Summary) -> list[float | None]:
    return [one.percentiles[p] for p in PERCENTILES]


def _blank(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


def ms(seconds: float | None) -> str:
    """Milliseconds with three digits; blank for None."""
    return "" if seconds is None else number(1000 * seconds)


def number(value: float) -> str:
    """Three digits at least, no exponent."""
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def _range(interval: Interval | None, scale: float) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"{number(scale * low)} to {number(scale * high)}"
