"""What leaves sborax by the command line: merged models, adapters with their cards, and what is refused."""

import io
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from command_line import fails, prints
from etils import epath
from huggingface_hub import ModelCard
from tiny_model import CONTEXT, tokenizer, write_model
from torch_pair import shaken

import sborax as sx
from sborax.cli import main
from sborax.data.template import chat_ends
from sborax.interop.card import write_card
from sborax.models.load import load_model
from sborax.records.adapter import fingerprint, save_adapter
from sborax.records.report import SUMMARY
from sborax.train.experiment import save_experiment

TOKENS = jnp.arange(24).reshape(2, 12) + 2
RULES = {
    "one": (("self_attn/q", sx.SBoRA(rank=4)), ("up_proj", sx.LoRA(rank=2))),
    "two": (("self_attn/(q|v)", sx.DoRA(rank=2)),),
    "mixed": (("self_attn/q", sx.LoRA(rank=2)), ("up_proj", sx.Bone(rank=4))),
    "ranks": (("self_attn/q", sx.Bone(rank=2)), ("up_proj", sx.Bone(rank=4))),
    "pissa": (("self_attn/q", sx.PiSSA(rank=2)),),
}


def write_run(folder: Path, name: str, model: Path, **fields) -> Path:
    """The directory that a run would leave, without the run."""
    run, data = folder / name, sx.Data(name="talks.jsonl", template="chat")
    experiment = sx.Experiment(model=str(model), data=data, rules=RULES[name], steps=3, eval=sx.Eval(data), **fields)
    base = load_model(model, experiment.precision).params
    params, adapters = sx.attach(jax.random.key(1), base, experiment.rules)
    run.mkdir()
    save_experiment(experiment, epath.Path(run))
    trained = {"norm/scale": params["norm"]["scale"] + 0.25} if experiment.train_also else {}
    save_adapter(run / "adapter", shaken(adapters), rules=RULES[name], base=fingerprint(base), trained_base=trained)
    (run / SUMMARY).write_text(json.dumps({"trainable_parameters": 1234, "last_loss": 2.5, "eval_loss": 2.25}))
    return run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A base model and runs on it."""
    folder = tmp_path_factory.mktemp("doors")
    model = write_model(folder / "model")
    for name in RULES:
        write_run(folder, name, model, **({"train_also": ("norm",)} if name == "two" else {}))
    return folder


def change(folder: Path, name: str):
    """The params of a run alone, merged."""
    base = load_model(folder / "model")
    return base, sx.merge(*sx.load_adapter(folder / name / "adapter", base.params))


def runs_as_written(text: str, folder: Path, kind: str, **names) -> dict:
    """The names that the card's block for `kind` leaves when it is run beside the files."""
    block = re.search(rf"{kind}:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    exec(block[1].replace("path/to/this/directory", str(folder)), names)
    return names


def test_the_card_of_an_adapter(workshop, capsys, tmp_path):
    prints(capsys, "export", workshop / "one", tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["sborax", "lora", "sbora"] and card.data.base_model is None
    for part in (
        "Method: LoRA, SBoRA, stored as PEFT's `LORA`", f"Base model: {workshop / 'model'}.", "Exact:",
        "Data: `talks.jsonl`, split train, template 'chat', loss on answer.", "Held-out data: ", "3 steps of 4 rows",
        "`up_proj`: LoRA(rank=2)", "1,234 trained parameters, training loss of the last step 2.5000, held-out loss at "
        "the end 2.2500.",
    ):  # fmt: skip
        assert part in card.content, part
    base, merged = change(workshop, "one")
    namespace = runs_as_written(card.content, tmp_path, "With sborax", tokens=TOKENS)
    np.testing.assert_allclose(namespace["logits"], base.apply(merged, None, TOKENS), rtol=1e-4, atol=1e-4)


def test_the_hub_reads_the_name_of_a_base_that_it_has(workshop, tmp_path):
    base = load_model(workshop / "model")
    params, adapters = sx.load_adapter(workshop / "one" / "adapter", base.params)
    sx.save_peft(tmp_path, base, params, adapters, base="some/model", facts={"Data": "of: our [own]"})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/model" and card.data.to_dict()["base_model_relation"] == "adapter"
    assert "Data: of: our [own]" in card.content and "from_pretrained('some/model')" in card.content


def test_truncation_is_told(workshop, capsys, tmp_path):
    """DoRA as LoRA: mean and worst on the screen, every module on the card, and a higher rank is closer."""
    lines = {
        rank: prints(capsys, "export", workshop / "two", tmp_path / rank, "--as", "lora", "--rank", rank)
        for rank in "18"
    }
    worst = {}
    for rank, line in lines.items():
        mean, maximum = (float(re.search(rf"([\d.e-]+) {how}", line)[1]) for how in ("on average", "at most"))
        content = (tmp_path / rank / "README.md").read_text()
        errors = [float(row) for row in re.findall(r"^\| model\.layers\S+ \| (\S+) \|$", content, re.MULTILINE)]
        assert len(errors) == 4 and max(errors) == maximum
        np.testing.assert_allclose(np.mean(errors), mean, rtol=5e-3)
        assert f"{mean:.3g} on average, {maximum:.3g} at most" in content
        worst[rank] = maximum
    assert worst["8"] < worst["1"] < 1
    exact = prints(capsys, "export", workshop / "one", tmp_path / "exact", "--as", "lora", "--rank", "1")
    assert "exact" in exact
    ranks = json.loads((tmp_path / "exact" / "adapter_config.json").read_text())
    assert {ranks["r"], *ranks["rank_pattern"].values()} == {4, 2}


def test_exports_that_are_refused(workshop, capsys, tmp_path):
    for name in ("mixed", "ranks"):
        assert "use --as lora" in fails(capsys, "export", workshop / name, tmp_path / "out", "--as", "native")
        assert not (tmp_path / "out").exists()
        prints(capsys, "export", workshop / name, tmp_path / name, "--as", "lora")
    assert "--rank 2: must be" in fails(capsys, "export", workshop / "one", tmp_path / "out", "--rank", "2")
    assert "--rank 0: must be" in fails(
        capsys, "export", workshop / "two", tmp_path / "out", "--as", "lora", "--rank", "0"
    )
    (tmp_path / "README.md").write_text("# My notes\n\n- sborax\n")
    refusals = {"export": "exists and is not an empty directory", "merge": "was not written by sborax"}
    for command, says in refusals.items():
        assert says in fails(capsys, command, workshop / "one", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "mixed", "ranks"]
    with pytest.raises(sx.SboraxError, match="was not written by sborax"):
        write_card(tmp_path, "mine")
    assert (tmp_path / "README.md").read_text() == "# My notes\n\n- sborax\n"


def test_a_merged_model_says_what_it_is(workshop, capsys, tmp_path):
    prints(capsys, "merge", workshop / "two", tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["sborax", "dora"]
    assert "norm trained beside the adapters" in card.content and "held-out loss at the end 2.2500" in card.content
    base, merged = change(workshop, "two")
    want = np.asarray(base.apply(merged, None, TOKENS))
    namespace = runs_as_written(card.content, tmp_path / "merged", "With sborax", tokens=TOKENS)
    np.testing.assert_allclose(namespace["logits"], want, rtol=1e-4, atol=1e-4)
    model = runs_as_written(card.content, tmp_path / "merged", "With transformers")["model"]
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(np.asarray(TOKENS), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(theirs, want, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_adapters_merged_with_weights(workshop, capsys, tmp_path):
    """Runs and a PEFT adapter onto a model and onto a run: W + sum of w (W_i - W), and transformers computes it."""
    prints(capsys, "export", workshop / "pissa", tmp_path / "peft")
    terms = {"one": 0.5, "two": -0.25, "pissa": 2.0}
    places = [workshop / "one", workshop / "two", tmp_path / "peft"]
    words = [
        word for place, weight in zip(places, terms.values(), strict=True) for word in ("--add", f"{place}={weight}")
    ]
    output = prints(capsys, "merge", workshop / "model", tmp_path / "several", *words)
    assert f"the base plus 0.5 times the change by {workshop / 'one'} plus -0.25 times" in output
    base = load_model(workshop / "model")
    want = jax.tree.map(np.float64, base.params)
    for name, weight in terms.items():
        want = jax.tree.map(
            lambda sum_, end, start, weight=weight: sum_ + weight * (np.float64(end) - np.float64(start)),
            want, change(workshop, name)[1], base.params,
        )  # fmt: skip
    got = load_model(tmp_path / "several").params
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "several").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(np.asarray(TOKENS), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits, base.apply(got, None, TOKENS), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "several" / "README.md").read_text()
    assert f"{workshop / 'one'}: Data: " in card and "2 times the change by" in card and "- dora" in card
    # Each kept entry of a change alone stays, times its weight.
    words = ("--add", f"{workshop / 'one'}=0.5", "--combination", "dare_ties_svd", "--density", "0.25", "--seed", "3")
    assert "combined by dare_ties_svd, density 0.25" in prints(
        capsys, "merge", workshop / "model", tmp_path / "dare", *words
    )
    delta, full_delta = (
        np.asarray(
            tree["layers"]["self_attn"]["q_proj"]["kernel"] - base.params["layers"]["self_attn"]["q_proj"]["kernel"]
        )
        for tree in (load_model(tmp_path / "dare").params, change(workshop, "one")[1])
    )
    mask = delta != 0
    assert 0.1 < mask[full_delta != 0].mean() < 0.4
    np.testing.assert_allclose(delta[mask], 2.0 * full_delta[mask], rtol=0, atol=1e-6)
    # A run counts once; its own change added with weight -1 leaves the base.
    prints(capsys, "merge", workshop / "one", tmp_path / "none", "--add", f"{workshop / 'one'}=-1")
    for leaf, expected in zip(
        jax.tree.leaves(load_model(tmp_path / "none").params), jax.tree.leaves(base.params), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected)


def test_merges_that_are_refused(workshop, capsys, tmp_path):
    run = shutil.copytree(workshop / "one", tmp_path / "one")
    plan = json.loads((run / "adapter" / "plan.json").read_text())
    plan["base"]["layers/mlp/up_proj/kernel"] = "0" * 16
    (run / "adapter" / "plan.json").write_text(json.dumps(plan))
    for words, says in [
        (["--add", workshop / "two"], "give a run or a PEFT adapter and its weight"),
        (["--add", f"{workshop / 'two'}=nan"], "give a run or a PEFT adapter and its weight"),
        (["--add", f"{workshop / 'model'}=1"], "neither a run nor a PEFT adapter"),
        (["--add", f"{run}=1"], "(layers/mlp/up_proj/kernel differs)"),
        (["--add", f"{workshop / 'two'}=1", "--approximate", "weights"], "leave --add out"),
        (["--combination", "ties_svd", "--density", "0.5"], "combines several changes; give them with --add"),
        (["--add", f"{workshop / 'one'}=1", "--combination", "ties"], "'ties' needs a density in (0, 1], got None"),
        (["--add", f"{workshop / 'one'}=1", "--combination", "tie"], "combination must be one of cat, linear"),
    ]:
        assert says in fails(capsys, "merge", workshop / "model", tmp_path / "out", *words)
    assert "not a run" in fails(capsys, "merge", workshop / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def talk(capsys, monkeypatch, lines, *argv):
    """What a conversation prints: on stdout, and on stderr."""
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main([str(word) for word in ("generate", *argv, "--chat")]) == 0
    return capsys.readouterr()


@pytest.mark.nightly
def test_a_conversation(workshop, capsys, monkeypatch):
    """Every turn sees all before it through the chat template, and ends at the mark that the template puts."""
    words = ["--system", "Be brief.", "--max-new-tokens", "8", "--temperature", "1", "--seed", "3"]
    output = talk(capsys, monkeypatch, "Hi\n\nAnd?\n", workshop / "one", *words)
    base = load_model(workshop / "model")
    params, adapters = sx.load_adapter(workshop / "one" / "adapter", base.params)
    messages, answers = [{"role": "system", "content": "Be brief."}], []
    for number, turn in enumerate(("Hi", "And?")):
        messages.append({"role": "user", "content": turn})
        ids = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        key = jax.random.fold_in(jax.random.key(3), number)
        (new,) = sx.generate(base, params, adapters, [ids], 8, temperature=1.0, key=key, eos=[1])
        answers.append(base.tokenizer.decode(new, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert output.out == "".join(f"{answer}\n" for answer in answers) and output.err == ""
    assert talk(capsys, monkeypatch, "", workshop / "one").out == ""


def test_a_long_conversation_forgets_its_beginning(workshop, capsys, monkeypatch):
    lines = "".join(f"{number}{'x' * 20}\n" for number in range(3))
    output = talk(capsys, monkeypatch, lines, workshop / "model", "--max-new-tokens", "8")
    assert "the context is full: 2 earlier turns are forgotten" in output.err
    monkeypatch.setattr("sys.stdin", io.StringIO("y" * CONTEXT))
    assert f"does not fit the context of {CONTEXT}" in fails(capsys, "generate", workshop / "model", "--chat")


def test_what_chat_does_not_go_with(workshop, capsys, tmp_path):
    assert "leave --prompt" in fails(capsys, "generate", workshop / "model", "--chat", "--prompt", "x")
    for words in (["--chat"], ["--prompt", "x"]):
        assert "--stop '': every text holds" in fails(capsys, "generate", workshop / "model", *words, "--stop", "")
    assert "give --chat" in fails(capsys, "generate", workshop / "model", "--prompt", "x", "--system", "y")
    assert "--prompt or --chat" in fails(capsys, "generate", workshop / "model")


def test_a_turn_ends_where_the_template_says():
    """At the tokenizer's end of text, and at the mark of the template where that is another one."""
    byte_tokenizer = tokenizer()
    assert chat_ends(byte_tokenizer) == [1]
    byte_tokenizer.eos_token = "<|im_start|>"
    assert chat_ends(byte_tokenizer) == [0, 1]
    byte_tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(sx.SboraxError, match=r"refuses this conversation \(no system here\)"):
        chat_ends(byte_tokenizer)


def test_added_tokens_stay_tokens(capsys, tmp_path):
    """Plain and special ones, here, in the merged model, and there in transformers; so does the chat template."""
    model = write_model(tmp_path / "model", vocab_size=264)
    original = transformers.AutoTokenizer.from_pretrained(model)
    original.add_tokens(["<tool>"])
    original.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    original.save_pretrained(model)
    prints(capsys, "merge", write_run(tmp_path, "one", model), tmp_path / "merged")
    text, talk = "a<tool>b<|mark|>", [{"role": "user", "content": "x<tool>"}]
    for copy in (
        load_model(model).tokenizer,
        load_model(tmp_path / "merged").tokenizer,
        transformers.AutoTokenizer.from_pretrained(tmp_path / "merged"),
    ):
        ids = copy(text)["input_ids"]
        assert ids == original(text)["input_ids"] and len(ids) == 4 and {258, 259} < set(ids)
        assert copy.decode(ids, skip_special_tokens=True) == "a<tool>b"
        assert copy.apply_chat_template(talk, tokenize=False) == original.apply_chat_template(talk, tokenize=False)
