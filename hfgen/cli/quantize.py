"""`hfgen quantize`: a quantised copy of a model on disk, a few tensors at a time."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfgen import catalog

if TYPE_CHECKING:
    from hfgen.kit.streaming import Report

POLL = 0.02  # seconds between two looks at RssAnon


def quantize(
    model: Annotated[str, typer.Argument(help="A folder with config.json and safetensors, or a hub id.")],
    method: Annotated[str, typer.Option(help="The quantizer; `hfgen ls quantizers` lists them.")],
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted run goes on with the same command.")],
    bits: Annotated[int | None, typer.Option(help="Bits per code; the method's own default if left out.")] = None,
    args: Annotated[str, typer.Option(help='Other fields of the method\'s config, as JSON: {"n_sigma": 2.5}.')] = "{}",
    max_shard_size: Annotated[str, typer.Option(help="Largest file, and so the memory held.")] = "500MB",
) -> None:
    """Quantise a model without ever holding it whole; `from_pretrained` then loads the folder as it is."""
    from rich.console import Console

    console = Console()
    try:
        run(model, method, bits, args, out, max_shard_size, console)
    except (ValueError, TypeError) as exc:
        print(f"hfgen: {exc}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"hfgen: interrupted; the same command goes on from {out}.partial", file=sys.stderr)
        raise SystemExit(130) from None


def run(model: str, method: str, bits: int | None, args: str, out: Path, max_shard_size: str, console: Any) -> Report:
    """What the command does, with its errors as exceptions."""
    fields = parse_fields(args) | ({} if bits is None else {"bits": bits})
    config_cls = catalog.load(method, "quantizers")
    from huggingface_hub.serialization._base import parse_size_to_int
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hfgen.kit.streaming import quantize_folder

    config = config_cls(**fields)
    try:
        shard = parse_size_to_int(max_shard_size)
    except ValueError:
        shard = 0
    if shard <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size!r}; give a size such as 500MB or 2GB")
    source, start = find_model(model), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with PeakMemory() as peak, Progress(*columns, console=console) as bar:
        task = bar.add_task("tensors", total=None)
        report = quantize_folder(
            source, config, out, shard, lambda done, total: bar.update(task, completed=done, total=total)
        )
    print_report(report, out, time.monotonic() - start, peak.bytes, console)
    return report


def parse_fields(text: str) -> dict[str, Any]:
    """The JSON object of --args. Raises ValueError where it is none, or sets bits a second time."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as exc:
        raise ValueError(
            f"--args is {text!r}, which is not JSON ({exc}); give an object such as '{{\"n\": 1}}'"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(f"--args is {text!r}, which is no JSON object; give one such as '{{\"n\": 1}}'")
    if "bits" in fields:
        raise ValueError(f"--args sets bits to {fields['bits']!r}; give it as --bits")
    return fields


def find_model(model: str) -> Path:
    """The folder, or the hub's snapshot of that id without weights in other formats.

    Raises:
        ValueError: it is neither, or cannot be downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    others = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "original/*"]
    try:
        return Path(snapshot_download(model, ignore_patterns=others))
    except (ValueError, OSError) as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise ValueError(f"MODEL is {model!r}, which is no folder, and the hub did not give it: {reason}") from None


class PeakMemory:
    """The largest RssAnon (heap, without mapped files) of this process while the context is open, polled.

    `bytes` is None where there is no /proc.
    """

    def __init__(self) -> None:
        self.bytes = rss_anon()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            now = rss_anon()
            self.bytes = now if self.bytes is None or now is None else max(self.bytes, now)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()


def rss_anon() -> int | None:
    """Anonymous resident memory in bytes, from /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


def print_report(report: Report, out: Path, seconds: float, peak: int | None, console: Any) -> None:
    """The table at the end."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    memory = "not measured: no /proc here" if peak is None else f"{peak:,} (RssAnon, polled every {POLL * 1e3:.0f} ms)"
    rows = [
        ("bytes before", f"{report.before:,}"),
        ("bytes after", f"{report.after:,} ({report.after / report.before:.1%})"),
        ("bits per weight", f"{report.bits_per_weight:.3f} in quantised layers, scales and outliers counted"),
        ("layers quantised", f"{len(report.quantized)}, with {report.weights:,} weights"),
        ("left in float", f"{len(report.left_in_float)} tensors"),
    ]
    rows += [("", f"{count} x {why}") for why, count in Counter(report.left_in_float.values()).most_common()]
    if report.dropped:
        names = ", ".join(report.dropped[:5])
        rows.append(("not in the model", f"{len(report.dropped)} tensors of the source left out: {names}"))
    if report.reused:
        rows.append(("taken over", f"{report.reused} shards of an interrupted run"))
    rows += [("seconds", f"{seconds:.1f}"), ("peak memory", memory), ("written to", str(out))]
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
