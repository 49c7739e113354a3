"""Calibration rows from files; the inputs of one layer at a time; what a teacher keeps; interrupted runs."""

import json
import weakref

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hfgen import sandbox
from hfgen.kit import calibration
from hfgen.kit.calibration import held_out, prepare, read_rows, walk
from hfgen.kit.finished import Finished, digest
from hfgen.kit.quantizer import quantizable
from hfgen.kit.teacher import Teacher
from hfgen.quantizers import EasyQuantConfig

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 32}
OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": 32}
GEMMA = {
    "head_dim": 8,
    "num_key_value_heads": 1,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}


def llama(layers=2, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, num_hidden_layers=layers, **SMALL, **changes)).eval()


def rows(lengths=(7, 9, 7, 12, 9, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 32, (n,), generator=generator).tolist()} for n in lengths]


def names_of(model):
    return list(quantizable(model, EasyQuantConfig())[0])


def halved(given):
    """Stands for a quantiser: the same layer with weights halved."""
    new = nn.Linear(*given.module.weight.shape[::-1]) if isinstance(given.module, nn.Linear) else None
    if new is None:
        new = type(given.module)(given.module.nf, given.module.nx)
    new.weight = nn.Parameter(given.module.weight.detach() / 2)
    new.bias = given.module.bias
    return new


def walked(model, batches, change=halved, **options):
    """{name: (x, row)} in the order of visits."""
    found = {}

    def visit(given):
        found[given.name] = given.x.clone(), given.row.clone()
        return change(given)

    walk(model, names_of(model), batches, visit, **options)
    return found


def cached(model, names, batches, replace):
    """The plain way: a whole pass over all rows for each layer; `replace`d one by one if given."""
    found = {}
    for name in names:
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, kept=seen: kept.append(args[0].detach().flatten(0, -2))
        )
        with torch.no_grad():
            for row in batches:
                model(**row)
        handle.remove()
        found[name] = torch.cat(seen)
        if replace:
            given = calibration.Inputs(name, model.get_submodule(name), found[name], None)
            model.set_submodule(name, replace(given))
    return found


MODELS = {
    "llama": llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)).eval(),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, word_embed_proj_dim=8)).eval(),  # has layers outside of the blocks
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=2, **SMALL, **GEMMA)).eval(),  # masks differ
    "bert": lambda: BertModel(BertConfig(num_hidden_layers=2, **SMALL)).eval(),
}


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_streaming_is_caching_everything_bit_for_bit(name, sequential):
    torch.manual_seed(1)
    model = MODELS[name]()
    batches, state = prepare(rows(), 1), {k: v.clone() for k, v in model.state_dict().items()}
    found = walked(model, batches, sequential=sequential)
    halves = {n: model.get_submodule(n).weight.clone() for n in found}
    assert set(found) == set(names_of(MODELS[name]()))
    for n in found:
        assert torch.equal(halves[n], state[f"{n}.weight"] / 2), n
    again = MODELS[name]()
    again.load_state_dict(state)
    want = cached(again, list(found), batches, halved if sequential else None)
    for n in found:
        assert torch.equal(found[n][0], want[n]), n
    other = MODELS[name]()
    other.load_state_dict(state)
    differs = walked(other, batches, sequential=not sequential)
    assert any(not torch.equal(found[n][0], differs[n][0]) for n in found)


def test_layers_with_one_input_share_it_and_blocks_run_in_order():
    order = list(walked(llama(), prepare(rows(), 1)))
    kinds = [n.rpartition(".")[2] for n in order[:7]]
    assert kinds == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all(n.startswith("model.layers.0") for n in order[:7]) and len(order) == 14
    calls = []
    model = llama()
    model.model.layers[0].register_forward_pre_hook(lambda *a: calls.append(1))
    walked(model, prepare(rows(), 1))
    # 3 shapes: 1 to trace, 2 to compare, 3 for the arguments, 4 groups x 3, 3 through the block (hidden states: none)
    assert len(calls) <= 1 + 2 + 3 + 4 * 3 + 3 + 3


class Chainless(nn.Module):
    """Two blocks, and the model does something between them that is no block's."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) + input_ids[..., None] / 32
        return x


def test_a_model_that_is_no_chain_of_blocks_is_walked_with_whole_passes():
    class Blocks(Chainless):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    torch.manual_seed(0)
    model = Blocks()
    names, batches, found = ["layers.0.0", "layers.1.0"], prepare(rows(), 1), {}
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def visit(given):
        found[given.name] = given.x.clone()
        return halved(given)

    walk(model, names, batches, visit)
    again = Blocks()
    again.load_state_dict(state)
    want = cached(again, names, batches, halved)
    assert all(torch.equal(found[n], want[n]) for n in names)


def test_images_are_rows_too():
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, num_labels=3, num_hidden_layers=2, **{**SMALL, "vocab_size": 3})
    model = ViTForImageClassification(config).eval()
    found = walked(model, prepare([{"pixel_values": torch.randn(3, 8, 8)} for _ in range(5)], 64))
    x, row = next(iter(found.values()))
    assert x.shape == (25, 16) and row.bincount().tolist() == [5] * 5 and len(found) == 12


def test_a_layer_the_rows_never_reach_has_no_inputs():
    class Idle(Chainless):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(8, 3)

    seen, model = {}, Idle()
    walk(
        model,
        ["layers.0", "layers.1", "unused"],
        prepare(rows(), 1),
        lambda g: seen.setdefault(g.name, g.x) is None or g.module,
    )
    assert seen["unused"].shape == (0, 8) and len(seen["layers.0"]) == sum(len(r["input_ids"]) for r in rows())


def test_tokens_are_a_fixed_choice():
    total = sum(len(r["input_ids"]) for r in rows())
    everything = walked(llama(), prepare(rows(), 1), lambda g: g.module)
    some = walked(llama(), prepare(rows(), 1), lambda g: g.module, tokens=20)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(calibration.SEED))[:20].sort().values
    for name, (x, row) in everything.items():
        assert torch.equal(some[name][0], x[chosen]) and torch.equal(some[name][1], row[chosen])
    _, row = everything["model.layers.0.mlp.up_proj"]
    assert row.bincount().tolist() == [7, 7, 7, 9, 9, 12]  # rows of one length come together


class Alive(TorchDispatchMode):
    """Bytes of all tensors made while it is on and still alive, and their peak."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def _gone(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out


def test_memory_does_not_grow_with_the_layers():
    """Beside the model: the hidden states, one layer's inputs, and one batch in work."""
    lengths = [32] * 256
    peaks = []
    for layers in (2, 12):
        model = llama(layers)
        batches = prepare(rows(lengths), 1)
        with Alive(model) as alive:
            walk(model, names_of(model), batches, lambda given: given.module, tokens=2**20)
        peaks.append(alive.peak)
    tokens = sum(lengths)
    hidden, widest = tokens * 16 * 4, tokens * 24 * 4
    assert peaks[1] <= 1.001 * peaks[0], peaks
    batch = calibration.BATCH * 4 * (16 * 6 + 24 * 4 + 2 * 32 * 2)
    assert hidden + widest <= peaks[0] <= hidden + widest + batch, (peaks, hidden + widest, batch)


def test_a_cache_is_switched_off_and_on_again():
    model = llama()
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda m, a, k: seen.append(k.get("past_key_values")), with_kwargs=True
    )
    walked(model, prepare(rows(), 1))
    assert set(seen) == {None} and model.config.use_cache


# --- rows -----------------------------------------------------------------------------------------------------------


def written(path, table):
    if path.suffix == ".parquet":
        Dataset.from_list(table).to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_of_every_column_and_format(suffix, tmp_path):
    tokenizer = sandbox.load_tokenizer()
    path, texts = tmp_path / f"rows{suffix}", ["ab:1", "Rabc=cba"]
    want = [{"input_ids": tokenizer(t)["input_ids"]} for t in texts]
    assert read_rows(written(path, [{"text": t} for t in texts]), tokenizer) == want
    assert read_rows(written(path, [{"prompt": t[:2], "completion": t[2:]} for t in texts]), tokenizer) == want
    assert read_rows(written(path, want)) == want
    padded = [{"input_ids": r["input_ids"] + [0], "attention_mask": [1] * len(r["input_ids"]) + [0]} for r in want]
    assert read_rows(written(path, padded)) == want
    assert read_rows(path, limit=1, max_length=2) == [{"input_ids": want[0]["input_ids"][:2]}]
    chat = [{"messages": [{"role": "user", "content": t}]} for t in texts]
    with pytest.raises(ValueError, match="holds messages, but the tokenizer has no chat template; give text"):
        read_rows(written(path, chat), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bare = [r["input_ids"][1:] for r in want]  # the template gives no BOS
    assert [r["input_ids"] for r in read_rows(path, tokenizer)] in ([r["input_ids"] for r in want], bare)


def test_files_that_are_refused(tmp_path):
    tokenizer, path = sandbox.load_tokenizer(), tmp_path / "rows.jsonl"
    for bad in (tmp_path / "none.jsonl", tmp_path / "rows.csv"):
        with pytest.raises(ValueError, match="give an existing .jsonl, .json, .parquet file"):
            read_rows(bad, tokenizer)
    with pytest.raises(ValueError, match="has the columns label, words; wanted: input_ids, text, messages, or prompt"):
        read_rows(written(path, [{"words": "a", "label": 1}]), tokenizer)
    with pytest.raises(ValueError, match="holds text; give the model's tokenizer, or a column input_ids"):
        read_rows(written(path, [{"text": "a"}]))
    path.write_text("{broken")
    with pytest.raises(ValueError, match="cannot be read as .jsonl"):
        read_rows(path, tokenizer)
    path.write_text("")
    with pytest.raises(ValueError, match=r"rows.jsonl (has no rows|cannot be read)"):
        read_rows(path, tokenizer)


def test_batches_have_no_padding():
    given = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": torch.tensor([7, 8])},
        {"input_ids": [9]},
    ]
    first, second = prepare(given, 5)
    assert first["input_ids"].tolist() == [[5, 6], [7, 8]] and second["input_ids"].tolist() == [[9]]
    with pytest.raises(ValueError, match="hold 5 tokens .padding not counted., at least 6 are needed; give more rows"):
        prepare(given, 6)
    with pytest.raises(ValueError, match="calibration row 0 has text; give dicts with input_ids"):
        prepare([{"text": "a"}], 1)
    extra = prepare([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4]}], 1)
    assert [set(b) for b in extra] == [{"input_ids", "labels"}, {"input_ids"}]
    assert len(prepare(rows([100] * 30), 1)) == 2 and prepare(rows([3000]), 1)[0]["input_ids"].shape == (1, 3000)


def test_held_out_rows():
    row = torch.arange(8).repeat_interleave(3)
    mask = held_out(row)
    assert mask.sum() == 6 and torch.equal(mask.view(8, 3).all(1), mask.view(8, 3).any(1))
    assert held_out(torch.zeros(8)).tolist() == [False] * 6 + [True] * 2


# --- the teacher ----------------------------------------------------------------------------------------------------


def test_the_teacher_measures_kl(monkeypatch):
    base, other, batches = llama(), llama(), prepare(rows(), 1)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    teacher = Teacher.of(base, batches, 10**9)
    total = count = 0
    for row in rows():
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits.double().log_softmax(-1) for m in (base, other))
        total += float((p.exp() * (p - q)).sum())
        count += ids.numel()
    assert teacher.loss(other) == pytest.approx(total / count, rel=1e-4) and teacher.loss(other) > 1e-5
    assert teacher.loss(base) == pytest.approx(0, abs=1e-8)
    monkeypatch.setattr("hfgen.kit.teacher.TOP", 4)
    few = Teacher.of(base, batches, 10**9)
    assert few.logp[0].shape[-1] == 5 and torch.allclose(few.logp[0].exp().sum(-1), torch.ones(()), atol=1e-5)
    assert 0 < few.loss(other) < teacher.loss(other)  # lumping classes can only lose
    assert len(Teacher.of(base, batches, 1).rows) == 1
    with pytest.raises(ValueError, match="BertModel gives no logits to compare by; load the model with a head"):
        Teacher.of(MODELS["bert"](), batches, 1)


# --- interrupted runs -----------------------------------------------------------------------------------------------


def test_finished_layers_are_found_again(tmp_path):
    folder = tmp_path / "layers"
    first = Finished.open(folder, {"settings": {"choices": (2, 3)}, "rows": digest(rows())})
    first.add("a.b", {"weight": torch.arange(6).view(2, 3).T}, {"after": 1.5})
    first.note("costs", {"a.b": {"2": 0.5}})
    again = Finished.open(folder, {"settings": {"choices": (2, 3)}, "rows": digest(rows())})
    assert torch.equal(again.load("a.b")["weight"], torch.arange(6).view(2, 3).T)
    assert again.notes == {"a.b": {"after": 1.5}, "costs": {"a.b": {"2": 0.5}}}
    with pytest.raises(ValueError, match="interrupted run with another rows; delete it to start anew"):
        Finished.open(folder, {"settings": {"choices": (2, 3)}, "rows": digest(rows(seed=1))})
    path = folder / "calibration.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this hfgen writes 1"):
        Finished.open(folder, {})
    path.write_text(json.dumps(manifest))
    (folder / manifest["layers"]["a.b"]).unlink()
    with pytest.raises(ValueError, match="lacks layer-00001.safetensors, which its manifest lists"):
        Finished.open(folder, {})
    path.unlink()
    (folder / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="in the way and has no calibration.json"):
        Finished.open(folder, {})
    Finished.open(tmp_path / "new", {"rows": "1"})
    assert Finished.open(tmp_path / "new", {"rows": "2"}).identity == {"rows": "2"}  # nothing was done yet
