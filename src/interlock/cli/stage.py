"""What a person sees of the demo: a live picture on a terminal, plain lines in a pipe, and the summary at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from interlock.cli.console import last
from interlock.cli.story import Scene, Story
from interlock.client.load import figures

BARS = " ▁▂▃▄▅▆▇█"
WINDOW_SECONDS = 2.0
_STATE_STYLE = {"RUNNING": "green", "ROLLING_BACK": "yellow", "PAUSED": "yellow", "FAILED": "red", "COMPLETED": "cyan"}


def sparkline(values: Sequence[float], width: int) -> str:
    """The values' course in `width` characters, each the mean of its share."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    points = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(points), max(points)
    scale = (len(BARS) - 2) / (high - low) if high > low else 0.0
    return "".join(BARS[1 + int((point - low) * scale)] for point in points)


class Stage:
    """Shows a scene four times a second on a terminal; elsewhere only the events, one line each."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.lines: deque[str] = deque(maxlen=12)
        self.scene = Scene()
        self._start = time.monotonic()
        self._live = (
            Live(get_renderable=self._picture, console=console, refresh_per_second=4, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            for line in self.lines:
                self.console.print(line, highlight=False, markup=False)

    def say(self, text: str) -> None:
        """One event."""
        line = f"{time.monotonic() - self._start:6.1f} s  {text}"
        self.lines.append(line)
        if not self._live:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _picture(self) -> RenderableType:
        rows = [_training(self.scene), _serving(self.scene), _traffic(self.scene)]
        story = Text("\n".join(self.lines), no_wrap=True, overflow="ellipsis")
        elapsed = f"{time.monotonic() - self._start:.0f} s"
        return Group(
            *rows,
            Panel(
                story,
                title="what happened",
                title_align="left",
                subtitle=f"{self.scene.chapter}  ·  {elapsed}",
                subtitle_align="right",
            ),
        )


def _training(scene: Scene) -> Panel:
    state = scene.run.get("state", "…")
    states = list(scene.checkpoints.values())
    counts = f"checkpoints {states.count('GOOD')} good, {states.count('CANDIDATE')} candidate, {states.count('QUARANTINED')} quarantined"
    reward = scene.rewards[-1] if scene.rewards else float("nan")
    head = Text.assemble(
        (state, _STATE_STYLE.get(state, "white")),
        f"  step {scene.step}  attempt {scene.attempt}  rollbacks {len(scene.rollbacks)}  ·  {counts}",
    )
    curve = Text(f"reward {reward:6.1f}  {sparkline(list(scene.rewards), 60)}", style="green")
    return Panel(Group(head, curve), title="training", title_align="left")


def _serving(scene: Scene) -> Panel:
    swap = scene.swap
    head = Text(f"model policy  version {scene.version or '-'}  epoch {scene.epoch}  swaps done {len(scene.receipts)}")
    if not swap:
        return Panel(Group(head, Text("no swap yet", style="dim")), title="serving", title_align="left")
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=100, completed=swap["progress_percent"], width=30)
    row.add_row(
        f"to version {last(swap['spec']['candidate_version'])}",
        bar,
        f"{swap['state']:<11}",
        Text(swap["message"][:70], style="dim"),
    )
    return Panel(Group(head, row), title="serving", title_align="left")


def _traffic(scene: Scene) -> Panel:
    if scene.load is None or not scene.load.samples:
        return Panel(Text("waits for the first version", style="dim"), title="traffic", title_align="left")
    load = scene.load
    since = load.elapsed - WINDOW_SECONDS
    recent = [sample for sample in load.samples[-1000:] if sample.due >= since]
    now = figures(recent)
    failed = Text(f"failed {load.num_failed}", style="red bold" if load.num_failed else "green bold")
    text = Text.assemble(
        f"{len(recent) / WINDOW_SECONDS:5.0f} requests/s  ",
        f"answered {len(load.samples):>7}  ",
        failed,
        f"  p50 {now.p50_ms:6.2f} ms  p99 {now.p99_ms:6.2f} ms",
    )
    return Panel(text, title="traffic", title_align="left")


def summary(console: Console, story: Story, broken: Sequence[str], home: str) -> None:
    """What came of it: training, swaps, traffic, traces, and what to try next."""
    console.rule("summary", align="left")
    _training_summary(console, story)
    _swap_summary(console, story.scene.receipts)
    if story.scene.load:
        console.print(_traffic_summary(story))
    _traces(console, story)
    console.print()
    for promise in broken:
        console.print(f"[red bold]broken[/]  {promise}")
    if not broken:
        console.print(
            "[green bold]every promise held[/]: swaps completed, the fault was rolled back, the reward recovered, failed requests: 0"
        )
    console.print(f"\nnext, with the same state:  export INTERLOCK_HOME={home}", highlight=False, soft_wrap=True)
    for command, text in (
        ("interlock up", "serve the last version and keep it running"),
        ("interlock status", "rooms, models, swaps, runs"),
        ("interlock model explain policy", "why what serves is what serves"),
        ("interlock model rollback policy", "back to the version before, in one command"),
        ("interlock checkpoint list demo", "candidate, good and quarantined checkpoints"),
    ):
        console.print(f"  {command:<34} {text}", highlight=False)


def _training_summary(console: Console, story: Story) -> None:
    scene = story.scene
    quarantined = list(scene.checkpoints.values()).count("QUARANTINED")
    course = f"reward {story.reward_before_fault:.0f} before the fault, {story.reward_after:.0f} after the rollback"
    counts = f"{len(scene.rollbacks)} rollback(s), {quarantined} checkpoint(s) quarantined"
    _line(console, f"training   {scene.step} steps, {course}; {counts}")
    for rollback in scene.rollbacks:
        _line(console, f"           {verdict(rollback)}; decided by the {rollback['decided_by']}")


def verdict(rollback: dict[str, Any]) -> str:
    """A rollback in one sentence: rule, value, limit, from step, to step."""
    figures = f"{rollback['metric']} {rollback['value']:.4g}, limit {rollback['limit']:.4g}"
    return f"rule {rollback['rule']}: {figures}; step {rollback['from_step']} -> {rollback['to_step']}"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(title: str, columns: Sequence[str]) -> Table:
    """A table without lines: the first column on the left, figures on the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _swap_summary(console: Console, receipts: Sequence[dict[str, Any]]) -> None:
    columns = ("ended", "version", "step", "reward", "switch ms", "in flight", "drained", "cut", "failed")
    table = _table("swaps, from their receipts", columns)
    for receipt in receipts:
        switch_ms = float(str(receipt.get("switch_duration") or "0s").removesuffix("s")) * 1000
        versions = f"{last(receipt['stable_version']) or '-'} -> {last(receipt['candidate_version'])}"
        counts = [str(receipt[f"{name}_count"]) for name in ("in_flight", "drained", "cut", "failed")]
        step = str(receipt.get("origin", {}).get("step", "-"))
        table.add_row(receipt["state"], versions, step, f"{receipt['reward'] or 0:.0f}", f"{switch_ms:.1f}", *counts)
    console.print()
    console.print(table)


def _traffic_summary(story: Story) -> Table:
    assert story.scene.load is not None
    report = story.scene.load.report()
    title = f"traffic: {report.count} requests, {report.rate:.0f}/s, failed {report.failed}"
    table = _table(title, ("", "requests", "failed", "p50 ms", "p99 ms", "max ms"))
    words = {
        "before": "before the swaps",
        "during": "during a swap",
        "between": "between swaps",
        "after": "after the swaps",
        "http": "HTTP (gateway)",
        "grpc": "gRPC (direct)",
    }
    for name, f in [*report.windows.items(), *report.protocols.items()]:
        if f.count:
            times = [f"{value:.2f}" for value in (f.p50_ms, f.p99_ms, f.max_ms)]
            table.add_row(words.get(name, name), str(f.count), str(f.failed), *times)
    return table


def _traces(console: Console, story: Story) -> None:
    console.print()
    rows = [(f"swap {last(r['swap'])}", r["trace_id"]) for r in story.scene.receipts] + [
        (f"rollback at step {r['from_step']}", r["trace_id"]) for r in story.scene.rollbacks
    ]
    for name, trace_id in rows:
        if trace_id:
            console.print(f"trace      {trace_id}  {name}", highlight=False)
    _line(console, "           grep one in the logs, or set INTERLOCK_OTLP_ENDPOINT and open it in Jaeger")
