"""S3FT data do not depend on the number of processes: one torchrun of two runs all scenarios, the last is killed."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from datasets import Dataset

from hfgen import sandbox
from hfgen.trainers import S3FTConfig, S3FTTrainer, build_s3ft_dataset

D = sandbox.tasks.D
SCENARIOS = {
    "greedy": {"s3ft_batch_size": 3},
    "sampled": {"s3ft_batch_size": 2, "num_candidates": 3, "s3ft_seed": 5},
    "by-the-model": {"s3ft_batch_size": 4, "paraphraser": "self", "paraphrase_attempts": 2},
    "half-built": {"s3ft_batch_size": 3},
    "one-block": {"s3ft_batch_size": 64},  # the second process has nothing to do
    "killed": {"s3ft_batch_size": 1},
}


def config(folder, **options):
    quiet = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    return S3FTConfig(str(folder), s3ft_max_new_tokens=24, save_strategy="no", **quiet, **options)


def data():
    return Dataset.from_list(D.rows(D.prompts[:14]))


def build(folder, name):
    options = dict(SCENARIOS[name])
    paraphraser = options.pop("paraphraser", sandbox.tasks.oracle_paraphraser)
    args = config(Path(folder) / name, **options)
    return build_s3ft_dataset(sandbox.load_model(), data(), D.judge, paraphraser, sandbox.load_tokenizer(), args)


def digest(dataset):
    return hashlib.sha256(json.dumps([dataset.to_list(), str(dataset.features)]).encode()).hexdigest()


def worker(folder):
    """What each of the two processes runs."""
    from hfgen_plugins.trainers.s3ft import data as s3ft_data

    rank = int(os.environ["RANK"])
    found = {name: digest(build(folder, name)) for name in SCENARIOS if name != "killed"}
    args = config(
        Path(folder) / "trained", max_steps=3, per_device_train_batch_size=2, judge="exact", learning_rate=0.01
    )
    trainer = S3FTTrainer(
        sandbox.load_model(),
        args=args,
        train_dataset=data(),
        judge=D.judge,
        paraphraser=sandbox.tasks.oracle_paraphraser,
        processing_class=sandbox.load_tokenizer(),
    )
    trainer.train()
    found["trained"] = hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
    ).hexdigest()
    found["training data"] = digest(trainer.s3ft_dataset)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    append, written = s3ft_data._Cache.append, []

    def dies(self, block, rows):
        append(self, block, rows)
        written.append(block)
        if rank == 1 and len(written) == 3:
            with self.part.open("a") as file:
                file.write('{"block": 7, "rows": [{"sou')  # the machine goes down in the middle of a line
            os._exit(9)

    s3ft_data._Cache.append = dies
    build(folder, "killed")


def test_two_processes_build_what_one_builds(tmp_path):
    single = {name: digest(build(tmp_path / "one", name)) for name in SCENARIOS}
    assert len(set(single.values())) >= 3
    half = tmp_path / "two" / "half-built" / "_s3ft_data"  # what one process left when it was killed
    half.mkdir(parents=True)
    whole = tmp_path / "one" / "half-built" / "_s3ft_data"
    lines = (whole / "part-0.jsonl").read_text().splitlines(keepends=True)
    (half / "manifest.json").write_text((whole / "manifest.json").read_text())
    (half / "part-0.jsonl").write_text("".join(lines[:2]) + lines[2][:40])

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launch, __file__, str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=300
    )
    ranks = [tmp_path / "two" / f"rank-{r}.json" for r in range(2)]
    assert all(path.exists() for path in ranks), run.stderr[-3000:]
    found = [json.loads(path.read_text()) for path in ranks]
    assert found[0] == found[1]
    assert {name: found[0][name] for name in SCENARIOS if name != "killed"} == {
        name: value for name, value in single.items() if name != "killed"
    }
    parts = sorted(p.name for p in (tmp_path / "two" / "greedy" / "_s3ft_data").glob("part-*"))
    assert parts == ["part-0.jsonl", "part-1.jsonl"]  # both worked

    assert run.returncode != 0  # the last scenario was killed; one process goes on with what two have left
    left = (tmp_path / "two" / "killed" / "_s3ft_data" / "part-1.jsonl").read_text()
    assert left.count("\n") == 3 and not left.endswith("\n")
    assert digest(build(tmp_path / "two", "killed")) == single["killed"]


if __name__ == "__main__":
    worker(sys.argv[1])
