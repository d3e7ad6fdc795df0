"""The page itself: HTML with its style sheet and charts inside, without a script and without anything from outside."""

import time
from html import escape
from statistics import median
from typing import Any

from laser_dist import __version__
from laser_dist.observability.metrics import HEALTHY, SCALARS, UNKNOWN, Healthy
from laser_dist.run_page.account import PARTS, Account
from laser_dist.run_page.charts import Points, bar, line_chart, number
from laser_dist.run_page.read import Run, finite
from laser_dist.run_page.style import STYLE

_GROUPS = (
    ("Losses, unweighted", "loss/", True),
    ("Weights of the terms", "weight/", False),
    ("Dev set", "dev/", False),
    ("In-batch: positive ranked first", ("train/latent_top1_accuracy", "train/explicit_top1_accuracy"), False),
    ("In-batch: mean rank of the positive", ("train/positive_mean_rank",), True),
    ("Gradient norm before clipping", ("train/gradient_norm",), True),
    ("Learning rate", ("train/learning_rate",), False),
    ("Tokens per second", ("speed/tokens_per_second",), False),
    ("Seconds of a step", "time/", False),
    ("Seconds that the slowest rank costs", ("ranks/lag",), False),
    ("Entropy of soft tokens", ("train/soft_token_entropy",), False),
    ("Peak of memory", ("memory/peak",), False),
)
_CLASSES = {name: f"p{index}" for index, name in enumerate(PARTS)}


def render(run: Run, against: Run | None = None) -> str:
    """The whole page."""
    title = f"{run.name} against {against.name}" if against else run.name
    body = [
        f"<h1>{escape(title)}</h1>",
        _summary(run),
        _alarms(run),
        _time(run.account),
        "<h2>Curves</h2>" + _curves(run, against),
        "<h2>Scalars</h2>" + _scalars(run, against),
        _configuration(run, against),
        f"<footer>{escape(str(run.folder.absolute()))} · written {_date(time.time())} by laser_dist {__version__}"
        + (f" · {run.damaged_lines} damaged lines left out" if run.damaged_lines else "")
        + "</footer>",
    ]
    # Nothing is loaded and nothing runs, whatever a run wrote into its files.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _summary(run: Run) -> str:
    config, account = run.config, run.account
    facts = [str(config.get("model.name", ""))]
    if rank := config.get("model.lora_rank"):
        facts.append(f"LoRA rank {rank}")
    facts.append(f"step {run.last_step:,}")
    if account:
        last = account.attempts[-1]
        facts += [
            f"{last.ranks} rank{'s' if last.ranks > 1 else ''}",
            f"{len(account.attempts)} attempt{'s' if len(account.attempts) > 1 else ''}",
            _duration(account.wall),
            f"training that lasted: {account.goodput:.1%}" + " of the time not paused" * (account.parts["paused"] > 0),
            {"no end": "killed, or still running"}.get(last.how, last.how),
        ]
    return f'<p class="facts">{" · ".join(escape(fact) for fact in facts if fact)}</p>'


def _alarms(run: Run) -> str:
    found = [*run.alarms]
    for attempt in run.account.attempts if run.account else ():
        if attempt.why:
            found.append((f"the attempt of {_date(attempt.began)}", attempt.why))
    for name in run.series:
        range_, value = HEALTHY.get(name, UNKNOWN), _recent(run, name)
        if value is not None and not range_.fits(value):
            found.append((name, f"{number(value)} in the last tenth; healthy: {range_.text}"))
    if not found:
        return '<p class="good">No alarm: nothing failed, nothing was passed over, no scalar left its limits.</p>'
    items = "".join(f"<li><b>{escape(where)}</b> {escape(said)}</li>" for where, said in found)
    return f'<section class="alarms"><h2>Alarms</h2><ul>{items}</ul></section>'


def _time(account: Account | None) -> str:
    if account is None:
        return "<h2>Time</h2><p class=muted>No ledger.jsonl: an earlier version of laser_dist did not write one.</p>"
    rows = "".join(
        f'<tr><td class=w><i class="key {_CLASSES[name]}"></i>{name}</td><td class=n>{_duration(value)}</td>'
        f"<td class=n>{value / account.wall if account.wall else 0:.1%}</td><td>{PARTS[name]}</td></tr>"
        for name, value in account.parts.items()
    )
    rest = account.unaccounted if abs(account.unaccounted) >= 0.05 else 0.0
    rows += (
        f"<tr class=sum><td>wall time</td><td class=n>{_duration(account.wall)}</td><td></td>"
        f"<td>unaccounted {rest:.1f} s (the host's clock was set, or rounding)</td></tr>"
    )
    attempts = "".join(
        f"<tr><td class=n>{index}</td><td>{_date(attempt.began)}</td><td class=n>{attempt.first:,}</td>"
        f"<td class=n>{attempt.last:,}</td><td class=n>{attempt.ranks}</td>"
        f"<td class=n>{_duration(attempt.until - attempt.began)}</td><td>{escape(attempt.how)}</td></tr>"
        for index, attempt in enumerate(account.attempts, 1)
    )
    return (
        f"<h2>Time</h2>{bar(account.parts, _CLASSES)}<div class=scroll><table>{rows}</table></div>"
        "<h3>Attempts</h3><div class=scroll><table><tr><th class=n>attempt<th>started"
        "<th class=n>after step<th class=n>to step<th class=n>ranks<th class=n>lasted<th>end</tr>"
        f"{attempts}</table></div>"
    )


def _curves(run: Run, against: Run | None) -> str:
    charts = []
    for title, names, log in _GROUPS:
        lines = _lines(run, names)
        if not any(lines.values()):
            continue
        unit = SCALARS.get(next(iter(lines)), ("", "", ""))[0]
        svg = line_chart(lines, _lines(against, names) if against else {}, unit=unit, log=log)
        keys = "".join(f'<span><i class="key c{i % 6}"></i>{escape(name.partition("/")[2])}</span>'
                       for i, name in enumerate(lines))  # fmt: skip
        shown = "" if len(lines) == 1 else f"<div class=keys>{keys}</div>"
        said = f" <small>{escape(unit)}</small>" if unit not in ("", "1") else ""
        charts.append(f"<figure><figcaption>{escape(title)}{said}</figcaption>{svg}{shown}</figure>")
    if not charts:
        return "<p class=muted>No scalars yet.</p>"
    other = f"<p class=muted>Dashed: {escape(against.name)}.</p>" if against else ""
    return f'{other}<div class="charts">{"".join(charts)}</div>'


def _lines(run: Run, names: str | tuple[str, ...]) -> dict[str, Points]:
    chosen = [n for n in run.series if n.startswith(names)] if isinstance(names, str) else names
    return {name: points for name in chosen if (points := finite(run.series.get(name, [])))}


def _scalars(run: Run, against: Run | None) -> str:
    names = [name for name in SCALARS if name in run.series] + [name for name in run.series if name not in SCALARS]
    heads = ["at start", "at end", "recent"] + ([f"recent of {against.name}"] if against else [])
    rows = []
    for name in names:
        unit, _, meaning = SCALARS.get(name, ("", "", ""))
        points, recent, range_ = run.series[name], _recent(run, name), HEALTHY.get(name, UNKNOWN)
        values = [number(points[0][1]), number(points[-1][1]), "" if recent is None else number(recent)]
        if against:
            theirs = _recent(against, name)
            values.append("" if theirs is None else number(theirs))
        cells = "".join(f"<td class=n>{value}</td>" for value in values)
        rows.append(
            f'<tr title="{escape(meaning)}"><td>{escape(name)}</td><td>{escape(unit)}</td>{cells}'
            f"<td>{_mark(range_, recent)}</td><td>{escape(range_.text)}</td></tr>"
        )
    head = "<th>scalar<th>unit" + "".join(f"<th class=n>{escape(h)}" for h in heads) + "<th><th>healthy"
    note = "<p class=muted>Recent: the median of the last tenth of the steps. Meanings: rest the pointer on a row.</p>"
    return f"{note}<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>" if rows else ""


def _mark(range_: Healthy, recent: float | None) -> str:
    if recent is None or (range_.low is None and range_.high is None):
        return ""
    return '<b class="good">✓</b>' if range_.fits(recent) else '<b class="bad">!</b>'


def _recent(run: Run, name: str) -> float | None:
    """Median of the last tenth; None if nothing there is finite."""
    points = run.series.get(name, [])
    if not points:
        return None
    since = points[-1][0] - max(1, points[-1][0] - points[0][0]) / 10
    values = [value for step, value in points if step >= since]
    if len(finite([(0, value) for value in values])) < len(values):
        return float("nan")
    return median(values)


def _configuration(run: Run, against: Run | None) -> str:
    whole = "".join(f"<tr><td>{escape(k)}</td><td>{_value(v)}</td></tr>" for k, v in run.config.items())
    parts = []
    if against:
        keys = [k for k in dict.fromkeys([*run.config, *against.config]) if k != "output"]
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td>{_value(ours)}</td><td>{_value(theirs)}</td></tr>"
            for key in keys
            if (ours := run.config.get(key)) != (theirs := against.config.get(key))
        )
        head = f"<tr><th>key<th>{escape(run.name)}<th>{escape(against.name)}</tr>"
        parts.append(
            f"<h2>What differs in the configuration</h2><div class=scroll><table>{head}{rows}</table></div>"
            if rows
            else "<h2>Configuration</h2><p>Both runs have the same, but for the output folder.</p>"
        )
    if whole:
        parts.append(f"<details><summary>Configuration of {escape(run.name)}</summary><table>{whole}</table></details>")
    return "".join(parts)


def _value(value: Any) -> str:
    return "<span class=muted>unset</span>" if value is None else escape(str(value))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:,.1f} h"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
