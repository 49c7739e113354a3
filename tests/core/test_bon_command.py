"""`hfgen bon`: every format gives the same curves; files that cannot be used are one sentence and exit code 2."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from hfgen.cli import bon as command
from hfgen.decoding import best_of_n_curves
from tests.core.test_cli import hfgen


def scored(prompts=12, samples=40):
    """Rows with a turn in gold: outliers that the proxy likes."""
    rng = np.random.default_rng(0)
    base, odd = rng.normal(size=(prompts, samples)), rng.random((prompts, samples)) < 0.05
    members = base[..., None] + 0.3 * rng.normal(size=(prompts, samples, 3)) + 3 * odd[..., None]
    return members.mean(-1), base - 4 * odd, members


@pytest.fixture
def columns():
    proxy, gold, members = scored()
    ids = np.repeat([f"q{i}" for i in range(12)], 40)
    order = np.random.default_rng(1).permutation(len(ids))  # rows of one prompt need not be together
    return {
        "prompt_id": ids[order].tolist(), "proxy": proxy.ravel()[order].tolist(), "gold": gold.ravel()[order].tolist(),
        "members": members.reshape(-1, 3)[order].tolist(), "seed": np.repeat(range(6), 80)[order].tolist(),
    }  # fmt: skip


def write(path, columns):
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def flat(columns):
    members = np.array(columns["members"])
    return {k: v for k, v in columns.items() if k != "members"} | {f"members_{k}": members[:, k] for k in range(3)}


def test_the_command_prints_and_writes(tmp_path, columns):
    file = write(tmp_path / "s.jsonl", columns)
    done = hfgen(
        "bon", str(file), "--n", "1,4,16,40", "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")
    )
    found = json.loads((tmp_path / "o.json").read_text())
    order = np.argsort(np.array([int(p[1:]) for p in columns["prompt_id"]]), kind="stable")
    proxy, gold = (np.array(columns[k])[order].reshape(12, 40) for k in ("proxy", "gold"))
    expected = best_of_n_curves(proxy, gold, n=[1, 4, 16, 40])
    assert found["n"] == [1, 4, 16, 40] and found["prompts"] == 12
    for name in ("proxy", "gold"):
        assert np.allclose(found["curves"][name]["mean"], expected.curves[name].mean, atol=1e-12)
    assert found["advice"]["turns_down"] is True and found["advice"]["text"] in " ".join(done.stdout.split())
    assert f"{expected.curves['gold'].mean[1]:.3g}" in done.stdout and "12 prompts, 40 samples each" in done.stdout
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_no_torch_is_imported(tmp_path, columns):
    code = (
        "import sys; sys.argv = ['hfgen', 'bon', sys.argv[1]]\nfrom hfgen.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(tmp_path / "s.csv", flat(columns)))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_format_gives_the_same(tmp_path, columns):
    first = None
    for name in ("a.jsonl", "b.parquet", "c.csv"):
        file = write(tmp_path / name, flat(columns) if name == "c.csv" else columns)
        found = command.read(file, "prompt_id", "proxy", None, None, "seed")
        assert list(found) == ["proxy", "gold", "members", "groups"] and len(set(found["groups"])) == 6
        curves = best_of_n_curves(**found).to_dict()
        first = first or curves
        assert curves == first


def test_other_names_and_counts(tmp_path, columns):
    columns = {"task": columns["prompt_id"], "rm": columns["proxy"], "human": [g > 0 for g in columns["gold"]]}
    file = write(tmp_path / "a.parquet", columns)
    found = command.read(file, "task", "rm", "human", None, None)
    assert list(found) == ["proxy", "gold"] and set(np.concatenate(found["gold"])) == {0.0, 1.0}
    file = write(tmp_path / "b.parquet", {k: v[:-3] for k, v in columns.items()})  # unequal counts
    assert sorted({len(p) for p in command.read(file, "task", "rm", "human", None, None)["proxy"]})[-1] == 40
    assert [len(p) for p in command.read(file, "task", "rm", None, None, None)["proxy"]].count(40) < 12


def without(columns, name):
    return {k: v for k, v in columns.items() if k != name}


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda c: without(c, "prompt_id"), (), "has no column 'prompt_id'; it has proxy, gold"),
        (lambda c: without(c, "proxy"), (), "has no column 'proxy'"),
        (lambda c: c, ("--gold", "golden"), "has no column 'golden'.*--gold"),
        (lambda c: c, ("--members", "rm"), "has no column 'rm'.*--members"),
        (lambda c: c, ("--group", "run"), "has no column 'run'.*--group"),
        (lambda c: c | {"proxy": ["a"] * 480}, (), "column 'proxy' of .* is string, not numbers"),
        (lambda c: c | {"proxy": [None, *c["proxy"][1:]]}, (), "column 'proxy' of .* has 1 empty cells"),
        (lambda c: c | {"prompt_id": [None, *c["prompt_id"][1:]]}, (), "column 'prompt_id' of .* has an empty cell"),
        (
            lambda c: c | {"gold": [*c["gold"][:2], float("nan"), *c["gold"][3:]]},
            (),
            "NaN or an infinity in 1 .* sample 3",
        ),
        (lambda c: c | {"members": [[1.0], *c["members"][1:]]}, (), "has lists of 1 to 3 scores"),
        (lambda c: c | {"members": [[1.0, None, 2.0], *c["members"][1:]]}, (), "column 'members' of .* has 1 empty"),
        (lambda c: c | {"members": c["proxy"]}, (), "is double, not lists"),
        (lambda c: c | {"prompt_id": ["lone", *c["prompt_id"][1:]]}, (), "has one sample for prompt_id 'lone'"),
        (lambda c: {k: v[:0] for k, v in c.items()} | {"proxy": pa.array([], pa.float64())}, (), "has no samples"),
        (lambda c: c, ("--n", "64"), "n has 64; .* 1 to 40"),
        (lambda c: c, ("--n", "4,x"), "--n is '4,x'; give whole numbers"),
        (lambda c: c, ("--plot", "a.xlsx"), "ends in .png, .svg or .pdf"),
        (lambda c: c | {"seed": list(range(480))}, ("--group", "seed"), "has samples of several seed"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, columns, change, options, words, monkeypatch, capsys):
    """In this process: 18 interpreters would take long."""
    import re

    import typer
    from typer.testing import CliRunner

    file = write(tmp_path / "s.parquet", change(columns))
    app = typer.Typer()
    app.command()(command.bon)
    done = CliRunner().invoke(app, [str(file), *options])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert re.search(words, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "nan.jsonl").write_text('{"prompt_id": 1, "proxy": NaN}\n{"prompt_id": 1, "proxy": 2.0}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt_id": 1, "proxy"\n')
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "a.xlsx").touch()
    for name, words in (
        ("nan.jsonl", "column 'proxy' of .* has NaN or an infinity in 1 samples, first in sample 1"),
        ("bad.jsonl", "cannot be read"),
        ("bad.parquet", "cannot be read"),
        ("a.xlsx", "ends in .jsonl"),
        ("none.csv", "is not there"),
    ):
        with pytest.raises(ValueError, match=words):
            command.read(tmp_path / name, "prompt_id", "proxy", None, None, None)
