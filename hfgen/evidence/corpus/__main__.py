"""``python -m hfgen.evidence.corpus make | one | figures | effects``: the runs, one of them, what callbacks make of it."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import time
from pathlib import Path
from typing import Any

from .cases import COUNTS, plan, settings
from .figures import CORPUS, EFFECTS, FIGURES

# One thread, and kernels that do not depend on the processor's make: the same numbers on another machine of this kind.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default",
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
}  # fmt: skip


def one(label: str, number: int, attempt: int | None = None) -> dict[str, Any]:
    """The run's record: of the first attempt whose truth bears the label out, or of `attempt`."""
    from .train import ATTEMPTS, run

    for tried in range(ATTEMPTS) if attempt is None else [attempt]:
        record = run(label, settings(label, number, tried))
        if record is not None:
            return {"number": number, "attempt": tried} | record
    raise LookupError(f"none of {ATTEMPTS} attempts at {label} {number} shows what it is meant to; change its settings")


def line(record: dict[str, Any]) -> str:
    """The record as it is shipped: one line of JSON."""
    return json.dumps(record, separators=(",", ":"))


def make(folder: Path) -> None:
    """Trains all runs that `folder` does not hold yet, each kept at once, then packs them."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = plan()
    for done, (label, number) in enumerate(runs):
        path = folder / f"{label.replace(' ', '_')}-{number}.json"
        if not path.is_file():
            start = time.monotonic()
            try:
                text = line(one(label, number))
            except LookupError as exc:  # said again below
                print(exc, flush=True)
                continue
            path.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
            path.with_suffix(".part").replace(path)
            print(f"{done + 1}/{len(runs)} {label} {number}: {time.monotonic() - start:.1f} s", flush=True)
    texts = []
    for label, n in COUNTS.items():
        for path in (folder / f"{label.replace(' ', '_')}-{i}.json" for i in range(n)):
            if path.is_file():  # what monitors find is made of the rows, at whatever their defaults are by then
                record = json.loads(path.read_text(encoding="utf-8"))
                texts.append(line({key: value for key, value in record.items() if key != "findings"}) + "\n")
    CORPUS.write_bytes(lzma.compress("".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"wrote {CORPUS}: {len(texts)} runs, {CORPUS.stat().st_size / 1e6:.2f} MB")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hfgen.evidence.corpus", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["make", "one", "figures", "effects"], default="make")
    parser.add_argument("--folder", type=Path, default=Path("corpus"), help="where finished runs are kept (make)")
    parser.add_argument("--label", choices=list(COUNTS), help="of one run (one)")
    parser.add_argument("--number", type=int, default=0, help="which of them (one)")
    parser.add_argument("--attempt", type=int, help="of its settings (one); default: the first that shows the label")
    options = parser.parse_args(arguments)
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):  # before torch is imported
        os.execve(
            sys.executable, [sys.executable, "-m", "hfgen.evidence.corpus", *sys.argv[1:]], os.environ | ENVIRONMENT
        )
    import logging

    logging.disable(logging.WARNING)  # what monitors and the host say of a thousand runs
    if options.command == "make":
        make(options.folder)
    elif options.command == "one":
        print(line(one(options.label, options.number, options.attempt)))
    elif options.command == "figures":
        from .figures import make_figures

        FIGURES.write_text(json.dumps(make_figures(), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {FIGURES}")
    else:
        from .effects import make_effects

        EFFECTS.write_text(json.dumps(make_effects(), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {EFFECTS}")


if __name__ == "__main__":
    main()
