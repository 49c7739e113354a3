"""`hfgen quantize`: a quantised copy of a model on disk.

Methods without data read a few tensors at a time; those that calibrate (`--calib`) hold the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
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
    calib: Annotated[
        Path | None, typer.Option(help="Calibration rows, for methods that need data: .jsonl, .json or .parquet.")
    ] = None,
    calib_rows: Annotated[int | None, typer.Option(help="Rows to take from the start of that file; 128.")] = None,
    average_bits: Annotated[
        float | None, typer.Option(help="Choose each layer's bits so that the average is this (adaquant).")
    ] = None,
    bits_map: Annotated[
        Path | None, typer.Option(help="Bits of single layers: the file that `hfgen search evopress --out` writes.")
    ] = None,
    args: Annotated[str, typer.Option(help='Other fields of the method\'s config, as JSON: {"n_sigma": 2.5}.')] = "{}",
    max_shard_size: Annotated[str, typer.Option(help="Largest file, and so the memory held.")] = "500MB",
) -> None:
    """Quantise a model; `from_pretrained` then loads the folder as it is. Without --calib it is never held whole."""
    from rich.console import Console

    console = Console()
    try:
        given = {"bits": bits, "average_bits": average_bits, "bits_map": bits_map and read_map(bits_map)}
        fields = parse_fields(args) | {k: v for k, v in given.items() if v is not None}
        run(model, method, fields, out, max_shard_size, console, calib, calib_rows)
    except (ValueError, TypeError) as exc:
        print(f"hfgen: {exc}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"hfgen: interrupted; the same command goes on from {out}.partial", file=sys.stderr)
        raise SystemExit(130) from None


def run(
    model: str,
    method: str,
    fields: dict[str, Any],
    out: Path,
    max_shard_size: str,
    console: Any,
    calib: Path | None = None,
    calib_rows: int | None = None,
) -> Report:
    """What the command does, with its errors as exceptions."""
    config_cls = catalog.load(method, "quantizers")
    from huggingface_hub.serialization._base import parse_size_to_int
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hfgen.kit.streaming import quantize_folder

    config = config_cls(**fields)
    needs = bool(getattr(config, "calibrated", False))
    if needs is (calib is None):
        fix = "give --calib FILE with calibration rows" if needs else "leave --calib out"
        raise ValueError(f"--method {method} {'needs' if needs else 'uses no'} data to quantise with; {fix}")
    if calib is None and calib_rows is not None:
        raise ValueError(f"--calib-rows is {calib_rows}, which only --calib reads; leave it out")
    try:
        shard = parse_size_to_int(max_shard_size)
    except ValueError:
        shard = 0
    if shard <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size!r}; give a size such as 500MB or 2GB")
    source, start = find_model(model), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with PeakMemory() as peak, Progress(*columns, console=console) as bar:
        task = bar.add_task("calibrating" if needs else "tensors", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if calib is None:
            report, found = quantize_folder(source, config, out, shard, show), None
        else:
            report, found = calibrate_folder(source, config, out, shard, show, calib, calib_rows)
    print_report(report, out, time.monotonic() - start, peak.bytes, console, found)
    return report


def calibrate_folder(
    source: Path,
    config: Any,
    out: Path,
    max_shard_size: int,
    progress: Callable[[int, int], None],
    calib: Path,
    calib_rows: int | None,
) -> tuple[Report, Any]:
    """Load the model in `source`, calibrate it on rows of `calib`, write it to `out`; returns its quantizer, too.

    What is done lies in `out`.partial, which the same call takes up (where the method keeps it).

    Raises:
        ValueError: the model, the rows or the folders are not as they must be.
    """
    from transformers import AutoTokenizer

    from hfgen.kit import calibration, checks, streaming
    from hfgen.kit.quantizer import PARTS

    calib_rows = 128 if calib_rows is None else calib_rows
    checks.integer("hfgen quantize", "calib_rows", calib_rows, 1)
    source, out = source.resolve(), out.resolve()
    streaming.check_out(out, source)
    cls = streaming.streamable_class(source, config)
    tokenizer = None
    with contextlib.suppress(
        OSError, ValueError, KeyError
    ):  # rows of input_ids need none; read_rows says where others do
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    rows = calibration.read_rows(calib, tokenizer, calib_rows)
    partial = out.with_name(out.name + ".partial")
    if partial.exists() and not {path.name for path in partial.iterdir()} <= {"layers", "final"}:
        raise ValueError(f"{partial} is in the way and holds no interrupted calibration; remove or rename it")
    with streaming.quiet_host():
        loaded = cls.from_pretrained(str(source), dtype="auto", local_files_only=True)
        before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        model = config.calibrate(loaded, rows, progress, partial / "layers")
        final = partial / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir(parents=True)
        streaming.copy_other_files(source, final)
        model.save_pretrained(final, max_shard_size=max_shard_size)
    if out.exists():
        out.rmdir()
    os.rename(final, out)
    shutil.rmtree(partial)
    layers = {name: model.get_submodule(name) for name in model.hf_quantizer.quantized}
    stored = [t for layer in layers.values() for n, t in layer.state_dict().items() if n in (*PARTS, "weight")]
    report = streaming.Report(
        before=before,
        after=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        weights=sum(layer.in_features * layer.out_features for layer in layers.values()),
        packed=sum(t.nbytes for t in stored),
        quantized=list(layers),
        left_in_float=model.hf_quantizer.left_in_float,
        dropped=[],
        reused=0,
    )
    return report, model.hf_quantizer


def read_map(path: Path) -> dict[str, Any]:
    """{module name: bits} of a JSON file. Raises ValueError where it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ValueError(f"--bits-map is {str(path)!r}, which cannot be read as JSON ({exc})") from None
    if not isinstance(found, dict):
        raise ValueError(f"--bits-map {path} holds no JSON object; give {{module name: bits}}")
    return found


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
    for name in ("bits", "average_bits"):
        if name in fields:
            raise ValueError(f"--args sets {name} to {fields[name]!r}; give it as --{name.replace('_', '-')}")
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


def print_report(
    report: Report, out: Path, seconds: float, peak: int | None, console: Any, quantizer: Any = None
) -> None:
    """The table at the end; `quantizer` of a calibrated model, which may have an account of it (`.calibration`)."""
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
    if bits_map := getattr(getattr(quantizer, "quantization_config", None), "bits_map", None):
        counts = sorted(Counter(bits_map.values()).items())
        rows.append(("bits of layers", ", ".join(f"{count} x {bits}" for bits, count in counts)))
    account: Any = None
    with contextlib.suppress(AttributeError):  # a method need not keep one
        account = quantizer.calibration
    if account:
        names = account["reverted"]
        kept = f"{len(names)}, no better on held-out tokens: {', '.join(names[:5])}" if names else "0"
        rows.append(("kept as they began", kept))
        if account["reused"]:
            rows.append(("taken over", f"{account['reused']} layers of an interrupted run"))
    if report.reused:
        rows.append(("taken over", f"{report.reused} shards of an interrupted run"))
    rows += [("seconds", f"{seconds:.1f}"), ("peak memory", memory), ("written to", str(out))]
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
