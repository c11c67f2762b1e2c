"""One command for the serving table: raw ONNX Runtime, every face of ours, and the peers that install, in turn, round after round.

    python bench/serving/run.py --rounds 5 --markdown table.md --plot plot.svg

A server runs on one core and the client on another, except in the part `two cores`, where both use both. While one is measured the
others are stopped (SIGSTOP). Figures are medians over the rounds; a ratio is the median of the rounds' ratios. A peer is installed
into an environment of its own below `--environments`; one that can't be installed or does not answer is left out with its reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import clients
import numpy as np
import onnxruntime as ort
from contestants import PEERS, Contestant, Server, installed
from ours import OURS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swap_under_load import SIZES, mlp, write_version

from interlock.stores.modelspec import BatchingSpec

SERVER_CORE, CLIENT_CORE = "0", "1"
RAW = "raw ONNX Runtime"


@dataclass(frozen=True, slots=True)
class Work:
    """One column of the table: what is asked of every contestant that has the face."""

    face: str
    model: str
    rows: int
    in_flight: int
    two_cores: bool = False

    @property
    def title(self) -> str:
        """As the table shows it."""
        rows = "" if self.rows == 1 else f", {self.rows} rows"
        return f"{self.face} {self.model}{rows}, {self.in_flight} in flight" + (", 2 cores" if self.two_cores else "")


WORK = (
    *(Work("grpc", "tiny", 1, n) for n in (1, 16, 64)),
    *(Work("http", "tiny", 1, n) for n in (1, 16, 64)),
    Work("http", "tiny", 1, 64, two_cores=True),
    *(Work("grpc", "mid", 1, n) for n in (1, 64)),
    Work("http", "mid", 1, 64),
    Work("grpc", "mid", 64, 4),
)


def raw(path: Path, rows: int, seconds: float) -> float:
    """Runs per second of a bare session on the server's core, in a process of its own."""
    code = (
        "import sys, time, numpy as np, onnxruntime as ort\n"
        "o = ort.SessionOptions(); o.intra_op_num_threads = o.inter_op_num_threads = 1\n"
        "s = ort.InferenceSession(sys.argv[1], o, ['CPUExecutionProvider'])\n"
        "x = np.random.default_rng(0).standard_normal((int(sys.argv[2]), s.get_inputs()[0].shape[1])).astype(np.float32)\n"
        "for _ in range(50): s.run(['y'], {'x': x})\n"
        "n, t = 0, time.perf_counter()\n"
        "while time.perf_counter() - t < float(sys.argv[3]):\n"
        "    s.run(['y'], {'x': x}); n += 1\n"
        "print(n / (time.perf_counter() - t))\n"
    )
    command = ["taskset", "-c", SERVER_CORE, sys.executable, "-c", code, str(path), str(rows), str(seconds)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def expected(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the model really answers."""
    found: np.ndarray[Any, Any] = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        ["y"], {"x": x}
    )[0]
    return found


class Table:
    """Every window of every round, and why a contestant is not in it."""

    def __init__(self) -> None:
        self.rates: dict[str, dict[Work, list[float]]] = {}
        self.p50_ms: dict[str, dict[Work, list[float]]] = {}
        self.p99_ms: dict[str, dict[Work, list[float]]] = {}
        self.weight: dict[str, tuple[float, float]] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, work: Work, rate: float, p50_ms: float = 0.0, p99_ms: float = 0.0) -> None:
        """One window."""
        for kept, value in ((self.rates, rate), (self.p50_ms, p50_ms), (self.p99_ms, p99_ms)):
            kept.setdefault(name, {}).setdefault(work, []).append(value)

    def of_raw(self, name: str, work: Work) -> float | None:
        """Median of the rounds' ratios of rows per second to the bare session's single rows (for 64 rows: to its 64 rows)."""
        mine, theirs = self.rates.get(name, {}).get(work), self.rates[RAW].get(_raw_of(work))
        return statistics.median(a / b for a, b in zip(mine, theirs, strict=False)) if mine and theirs else None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        windows = [
            {"contestant": name, **asdict(work), "requests_per_second": rates, "p50_ms": self.p50_ms[name][work],
             "p99_ms": self.p99_ms[name][work], "of_raw": self.of_raw(name, work)}
            for name, works in self.rates.items() for work, rates in works.items()
        ]  # fmt: skip
        weight = {name: {"start_seconds": s, "memory_mb": m} for name, (s, m) in self.weight.items()}
        return {"windows": windows, "weight": weight, "left_out": self.left_out}

    def markdown(self) -> str:
        """One block per column of work: rate, share of raw, latencies; then what each server weighs."""
        parts = []
        for work in dict.fromkeys(w for works in self.rates.values() for w in works if w.face != "raw"):
            lines = [
                f"**{work.title}**",
                "",
                "| | requests/s | of raw | p50 ms | p99 ms | rounds |",
                "|---|---|---|---|---|---|",
            ]
            named = [(name, works[work]) for name, works in self.rates.items() if work in works]
            for name, rates in sorted(named, key=lambda pair: -statistics.median(pair[1])):
                share = self.of_raw(name, work)
                lines.append(
                    f"| {name} | {statistics.median(rates):,.0f} | {'' if share is None else f'{share:.3f}'}"
                    f" | {statistics.median(self.p50_ms[name][work]):.2f} | {statistics.median(self.p99_ms[name][work]):.2f} | {len(rates)} |"
                )
            parts.append("\n".join(lines))
        weight = ["**with the small model**", "", "| | start to first answer, s | memory, MB |", "|---|---|---|"]
        weight += [
            f"| {name} | {s:.2f} | {m:.0f} |" for name, (s, m) in sorted(self.weight.items(), key=lambda item: item[1])
        ]
        parts.append("\n".join(weight))
        parts += [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        return "\n\n".join(parts)


def _raw_of(work: Work) -> Work:
    return Work("raw", work.model, work.rows, 1)


def contestants(args: argparse.Namespace, table: Table) -> list[Contestant]:
    """Ours, and those peers that can be had."""
    chosen = [c for c in (*OURS, *PEERS) if not args.only or any(word in c.name.lower() for word in args.only)]
    found = []
    for contestant in chosen:
        print(f"installing {contestant.name}", file=sys.stderr) if contestant.peer else None
        why = installed(contestant.peer, args.environments) if contestant.peer else ""
        if why:
            table.left_out[contestant.name] = why
        else:
            found.append(contestant)
    return found


class Field:
    """The servers of one model, all started, all but one set aside."""

    def __init__(self, args: argparse.Namespace, model: str, table: Table, stack: ExitStack, pin: str) -> None:
        self._args, self._model, self._table, self._pin = args, model, table, pin
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "repository" / clients.MODEL / "1"
        # batching on, as the maker of an MLP would ask for it
        write_version(self.folder, mlp(SIZES[model], 1), SIZES[model], clients.MODEL, BatchingSpec())
        self._x = clients.rows_of(SIZES[model][0], 1)
        self._y = expected(self.folder / "model.onnx", self._x)
        self._servers: dict[str, Server] = {}
        self._stack = stack

    def enter(self, contestant: Contestant) -> None:
        """Starts a server and sets it aside; leaves it out when it can't be had."""
        if contestant.restless:
            return
        server = self._started(contestant)
        if server is not None:
            self._stack.callback(server.stop)
            server.set_aside()
            self._servers[contestant.name] = server

    def _started(self, contestant: Contestant) -> Server | None:
        server = Server(contestant, self.folder, self._args.environments, self._pin)
        try:
            server.start(self._x, self._y)
        except RuntimeError as error:
            server.stop()
            self._table.left_out[f"{contestant.name} ({self._model})"] = str(error)
            return None
        if self._model == "tiny" and self._pin:
            self._table.weight.setdefault(contestant.name, (server.start_seconds, server.memory_mb))
        return server

    def turn(self, contestant: Contestant, works: Sequence[Work]) -> None:
        """One contestant's windows of a round."""
        if contestant.restless:
            server = self._started(contestant)
            if server is None:
                return
            try:
                self._windows(server, works)
            finally:
                server.stop()
        elif contestant.name in self._servers:
            server = self._servers[contestant.name]
            if server.is_alive:
                server.bring_back()
            elif (again := self._started(contestant)) is not None:  # it bore the pause badly
                self._stack.callback(again.stop)
                server = self._servers[contestant.name] = again
            else:
                return
            try:
                self._windows(server, works)
            finally:
                if server.is_alive:
                    server.set_aside()

    def _windows(self, server: Server, works: Sequence[Work]) -> None:
        pin = CLIENT_CORE if self._pin else ""
        for work in works:
            if work.face not in server.contestant.faces:
                continue
            x = clients.rows_of(SIZES[self._model][0], work.rows)
            try:
                if work.face == "grpc":
                    found = clients.h2load(
                        server.grpc_port, clients.grpc_message(x), work.in_flight, self._args.seconds, pin
                    )
                else:
                    path, body = clients.json_body(x, server.contestant.protocol)
                    found = clients.wrk(server.http_port, path, body, work.in_flight, self._args.seconds, pin)
            except RuntimeError as error:
                self._table.left_out[f"{server.contestant.name}: {work.title}"] = str(error)[-300:]
                continue
            self._table.add(server.contestant.name, work, found.requests_per_second, found.p50_ms, found.p99_ms)


def fields() -> Iterator[tuple[str, str, list[Work]]]:
    """(model, core of the servers, work): one after the other, each with its own set of servers."""
    for model in dict.fromkeys(work.model for work in WORK):
        for two_cores in (False, True):
            works = [work for work in WORK if work.model == model and work.two_cores == two_cores]
            if works:
                yield model, "" if two_cores else SERVER_CORE, works


def measure(args: argparse.Namespace) -> Table:
    """Every field, every round."""
    table = Table()
    chosen = contestants(args, table)
    for model, pin, works in fields():
        with ExitStack() as stack:
            field = Field(args, model, table, stack, pin)
            for contestant in chosen:
                if {work.face for work in works} & set(contestant.faces):
                    print(f"starting {contestant.name} ({model})", file=sys.stderr)
                    field.enter(contestant)
            for number in range(args.rounds):
                begun = time.perf_counter()
                for work in {_raw_of(work) for work in works}:
                    table.add(RAW, work, raw(field.folder / "model.onnx", work.rows, args.seconds))
                for contestant in chosen:
                    field.turn(contestant, works)
                print(f"{model}, round {number + 1}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return table


def draw(path: Path, table: Table) -> None:
    """Share of the bare engine's rate, a group per column of work, a bar per contestant, logarithmic."""
    from matplotlib.figure import Figure

    works = list(dict.fromkeys(w for works in table.rates.values() for w in works if w.face != "raw"))
    names = [name for name in table.rates if name != RAW]
    figure = Figure(figsize=(1.6 * len(works) + 3, 5))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        shares = [table.of_raw(name, work) for work in works]
        left = [i + (place - len(names) / 2) * 0.8 / len(names) for i, share in enumerate(shares) if share]
        axes.bar(left, [share for share in shares if share], width=0.75 / len(names), label=name)
    axes.set(yscale="log", ylabel="share of the bare engine's single-row rate", xticks=range(len(works)))
    axes.set_xticklabels([work.title.replace(", ", "\n") for work in works], fontsize="small")
    axes.grid(axis="y", which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="per window")
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name holds one of these words")
    parser.add_argument("--environments", type=Path, default=Path(".bench"), help="where the peers are installed")
    parser.add_argument("--json", type=Path, help="where to write every window")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--plot", type=Path, help="where to draw it")
    args = parser.parse_args()
    args.only = [word.lower() for word in args.only]
    args.environments = args.environments.absolute()
    if missing := clients.missing():
        print(f"not installed: {', '.join(missing)} (Debian: nghttp2-client, wrk, util-linux)", file=sys.stderr)
        return 2
    table = measure(args)
    print(table.markdown())
    for path, text in ((args.json, json.dumps(table.as_dict(), indent=1)), (args.markdown, table.markdown())):
        if path:
            path.write_text(text + "\n")
    if args.plot:
        draw(args.plot, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
