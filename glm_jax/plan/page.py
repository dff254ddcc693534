"""A plan as a page: where a step's time goes, and the operations that take most of XLA's."""

from __future__ import annotations

import html

from glm_jax.plan.plan import Plan
from glm_jax.plan.program import Operation

# by the first word of a part
COLORS = {"XLA": "#4c78a8", "kernel": "#59a14f", "exposed": "#e15759"}
LEAST = 0.002  # share of a step below which parts are added up
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
  color: #222 }
.bar { display: flex; height: 40px; border-radius: 4px; overflow: hidden }
.bar div { border-right: 1px solid #fff; box-sizing: border-box }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: 3px 12px 3px 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 6px }
code { font-size: 13px }
"""


def page(plan: Plan, worst: list[tuple[Operation, int]]) -> str:
    """HTML without anything from elsewhere. worst: operations with how often each runs, as
    plan.worst gives them.
    """
    title = f"{plan.mode}, {plan.topology}"
    if not plan.fits:
        return _document(
            title,
            f"<p>Does not fit {_gib(plan.hbm_capacity_bytes)} of"
            f" HBM.</p><pre>{html.escape(plan.message)}</pre>",
        )
    step, parts = plan.estimated_step_seconds, dict(plan.parts)
    small = [name for name, seconds in parts.items() if seconds < LEAST * step]
    parts["XLA, kernels and collectives of less than 0.2% each"] = sum(
        parts.pop(name) for name in small
    )
    facts = {
        "estimated step": _time(step), "MFU": f"{plan.estimated_mfu:.3f}",
        "time of the bytes that a step needs": _time(plan.needed_hbm_seconds),
        "XLA's operations, kernels, exposed collectives": ", ".join(
            _time(s) for s in (plan.xla_seconds, plan.kernel_seconds,
                               plan.exposed_collective_seconds)
        ),
        "HBM of a chip": f"{_gib(plan.hbm_bytes_per_chip)} of {_gib(plan.hbm_capacity_bytes)}",
        "kernels called, lowered, distinct": f"{plan.kernel_calls}, {plan.lowered_kernels}, "
            f"{plan.distinct_kernels}",
        "lowered and compiled in": f"{plan.lower_seconds:.0f} s and {plan.compile_seconds:.0f} s",
    }  # fmt: skip
    bar = "".join(
        f'<div style="flex: {seconds / step:.5f}; background: {_color(name)}"'
        f' title="{html.escape(name)}: {_time(seconds)}"></div>'
        for name, seconds in parts.items()
    )
    listed = _table(
        (
            f'<span class="swatch" style="background: {_color(name)}"></span>{html.escape(name)}',
            _time(seconds),
            f"{seconds / step:.1%}",
        )
        for name, seconds in parts.items()
    )
    operations = _table(
        (
            f"{times} x {operation.cycles:,} cycles",
            operation.kind,
            f"<code>{html.escape(operation.source or operation.op_name[-60:])}</code>",
        )
        for operation, times in worst
    )
    collectives = _table(
        (
            html.escape(f"{row['kind']} along {row['axes']}"),
            f"{row['count']} x",
            _gib(row["bytes"]),
            _time(row["seconds"]),
            f"{_time(row['exposed_seconds'])} exposed",
        )
        for row in plan.collectives
    )
    return _document(
        title,
        f"""{_table((name, html.escape(value)) for name, value in facts.items())}
<h2>Where the time goes</h2><div class="bar">{bar}</div>{listed}
<h2>Collectives: times, bytes that a chip receives</h2>{collectives}
<h2>Most of XLA's cycles</h2>{operations}
<p>Compiled and estimated, nothing measured: XLA's operations by its own cycles, kernels at the
rate of the MXU or HBM, collectives by their bytes over the links of the torus, less what is
scheduled beside them; routing is balanced, and the host is left out.</p>""",
    )


def _document(title: str, body: str) -> str:
    title = html.escape(title)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>
{body}</html>
"""


def _table(rows) -> str:
    """Cells are HTML; those that begin with a digit stand to the right."""
    cell = lambda text: f"<td{' class=number' if text[:1].isdigit() else ''}>{text}</td>"
    return "<table>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"


def _color(part: str) -> str:
    return COLORS.get(part.replace(",", " ").split()[0], "#999")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
