"""Runs and sweeps are read as they are, equal ones are grouped, and unequal ones stay apart."""

import dataclasses
import json
import math

import numpy as np
import pytest
from etils import epath
from runs_on_disk import BASE, answers, experiment, write_run, write_sweep

import sborax as sx
from sborax.adapters.core import SboraxError
from sborax.evaluate.compare.groups import compare, method_label
from sborax.evaluate.compare.rows import read_rows
from sborax.evaluate.compare.tables import conditions, interior, rates_table
from sborax.records.lengths import write_lengths
from sborax.train.experiment import save_experiment

pytestmark = pytest.mark.quick


def read(*places):
    return read_rows([str(place) for place in places])


# Rows


def test_a_run_is_read_as_it_is(tmp_path):
    items, metrics = answers([True, False, True, True], [0.5, 1.0, 1.5, 2.0])
    run = write_run(
        tmp_path / "run", experiment(sx.SBoRA(rank=8), 3e-3, 2), 1.25, trained=48, memory=5, seconds=0.25,
        scores={"arc_easy": items}, metrics={"arc_easy": metrics},
    )  # fmt: skip
    (row,) = read(run)
    assert (row.run, row.lr, row.seeds, row.trained, row.steps) == (str(run), 3e-3, (2, 2), 48, 40)
    # The first step, which compiled, took nine seconds.
    assert (row.memory, row.step_seconds, row.device, row.diverged) == (5, 0.25, "1 x cpu", None)
    assert row.held_out == ((10, 1.25 * 1.75), (20, 1.25 * 1.5), (30, 1.25 * 1.25), (40, 1.25))
    assert len(row.losses) == 40 and row.prints == BASE
    assert row.config["rules.0.method.rank"] == 8 and row.config["data.name"] == "train.jsonl"
    assert list(row.measurements) == ["held-out loss", "arc_easy acc", "arc_easy answer loss", "training loss"]
    assert row.measurements["held-out loss"].value == 1.25 and row.measurements["held-out loss"].items is None
    np.testing.assert_array_equal(row.measurements["arc_easy acc"].items, [1.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(row.measurements["arc_easy answer loss"].items, [0.5, 1.0, 1.5, 2.0])
    last = [loss for _, loss in row.losses][-10:]
    assert row.measurements["training loss"].value == pytest.approx(sum(last) / 10)


def test_the_held_out_loss_has_its_samples(tmp_path):
    run = write_run(tmp_path / "run", experiment(), 1.5, held_out=[(1, 3.0), (2, 2.0), (3, 4.0)])
    measured = read(run)[0].measurements["held-out loss"]
    # Nine nats over six tokens; the mean of three means would be 1.78.
    np.testing.assert_allclose(measured.items, [1.5 + 1.5 / 2, 1.5 - 1 / 2, 1.5 - 0.5 / 2])
    assert measured.value == 1.5 and measured.items.mean() == pytest.approx(1.5) and measured.identity


def test_a_held_out_loss_is_that_of_the_end(tmp_path):
    """A run that went on without held-out data has one of an earlier adapter."""
    run = write_run(tmp_path / "run", experiment(eval=sx.Eval()))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    subset = [json.dumps(line) for line in lines if "loss" in line or line["step"] < 40]
    (run / "metrics.jsonl").write_text("\n".join(subset))
    assert list(read(run)[0].measurements) == ["training loss"]


def test_a_sweep_is_all_its_members(tmp_path):
    losses = {(1e-3, 0): 1.0, (1e-3, 1): 1.1, (1e-2, 0): None}
    place = write_sweep(tmp_path / "sweep", sx.LoRA(rank=4), losses)
    rows = read(place)
    assert [(row.lr, row.seeds[1]) for row in rows] == list(losses)
    assert [row.diverged for row in rows] == [None, None, 20]
    # The process and its steps are shared by all members.
    assert {(row.memory, row.step_seconds) for row in rows} == {(None, None)}
    (member,) = read(place / "lr=0.001,seed_adapter=0")
    assert (member.memory, member.held_out) == (None, rows[0].held_out)


def test_perplexity_gives_losses_of_windows(tmp_path):
    items = [{"window": 0, "tokens": 4, "logprob": -8.0}, {"window": 1, "tokens": 5, "logprob": -5.0}]
    metrics = {"wikitext2": {"perplexity": math.exp(1.5), "loss": 1.5}}
    (row,) = read(write_run(tmp_path / "run", experiment(), scores={"wikitext2": items}, metrics=metrics))
    np.testing.assert_allclose(row.measurements["wikitext2 loss"].items, [2.0, 1.0])
    assert "wikitext2 perplexity" not in row.measurements


def test_scores_of_whole_sets_have_no_items(tmp_path):
    items = [{"text": "a", "ROUGE-L": 0.5}]
    metrics = {"e2e_nlg": {"BLEU": 0.25, "ROUGE-L": 0.5}}
    (row,) = read(write_run(tmp_path / "run", experiment(), scores={"e2e_nlg": items}, metrics=metrics))
    assert row.measurements["e2e_nlg BLEU"].items is None and row.measurements["e2e_nlg BLEU"].value == 0.25


def edited(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def no_summary(run):
    (run / "summary.json").unlink()


def half_a_line(run):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss"')


def no_step(run):
    (run / "metrics.jsonl").write_text('{"loss": 1.0}\n')


def text_for_a_loss(run):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": "low"}\n')


def prints_of_another_kind(run):
    edited(run / "adapter" / "plan.json", lambda plan: plan.update(base=[1]))


def other_accuracy(run):
    edited(run / "scores" / "scores.json", lambda file: file["scores"][0]["metrics"]["acc"].update(value=0.75))


def task_outside(run):
    edited(run / "scores" / "scores.json", lambda file: file["scores"][0].update(task="../../arc"))


def no_sample(run):
    (run / "eval_losses.jsonl").write_text('{"digest": "0", "tokens": 0, "loss": 1.0}\n')


def other_mean(run):
    (run / "eval_losses.jsonl").write_text('{"digest": "0", "tokens": 2, "loss": 3.0}\n')


def no_item(run):
    (run / "scores" / "arc_easy.jsonl").write_text("[1]\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_summary, "has not ended"),
        (half_a_line, "line 1: not JSON"),
        (no_step, "line 1 has no step"),
        (text_for_a_loss, "loss is 'low', not a number"),
        (prints_of_another_kind, "base is missing, or of another kind"),
        (other_accuracy, r"its acc is 0.5, scores.json says 0.75"),
        (task_outside, "has no metrics"),
        (no_item, "line 1 is no item"),
        (no_sample, "line 1 is no loss of a held-out sample; delete the file"),
        (other_mean, "its mean is 1.5, metrics.jsonl ends with 1; delete the file"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, damage, message):
    items, metrics = answers([True, False], [0.5, 1.0])
    run = write_run(tmp_path / "run", experiment(), scores={"arc_easy": items}, metrics={"arc_easy": metrics})
    damage(run)
    with pytest.raises(SboraxError, match=message):
        read(run)


def test_what_is_no_ended_run_is_refused(tmp_path):
    with pytest.raises(SboraxError, match="neither a run nor a sweep"):
        read(tmp_path)
    stopped = write_run(tmp_path / "stopped", experiment(), finished=False)
    with pytest.raises(SboraxError, match="was stopped after step 20"):
        read(stopped)
    # Runs that ended, and went on until they were killed: nothing says how many steps so many epochs are.
    longer = write_run(tmp_path / "longer", experiment())
    save_experiment(experiment(steps=80), epath.Path(longer))
    killed = write_run(tmp_path / "killed", experiment(steps=None, epochs=2.0))
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 0.9}\n')
    for run in (longer, killed):
        with pytest.raises(SboraxError, match="ended after step 40, was continued and has not ended again"):
            read(run)
    sweep = write_sweep(tmp_path / "sweep", sx.LoRA(rank=4), {(1e-3, 0): 1.0})
    with pytest.raises(SboraxError, match="is given twice"):
        read(sweep, sweep / "lr=0.001,seed_adapter=0")
    edited(sweep / "sweep.json", lambda file: file["members"][0].update(name="../stopped"))
    with pytest.raises(SboraxError, match="holds no members of a sweep"):
        read(sweep)


# Groups


def runs(tmp_path, *described, **settings):
    """Runs of (experiment, loss), read."""
    start = len(list(tmp_path.iterdir()))
    places = [
        write_run(tmp_path / f"run{start + number}", description, loss, **settings)
        for number, (description, loss) in enumerate(described)
    ]
    return read(*places)


def test_seeds_and_learning_rates_make_one_group(tmp_path):
    lora, bone = sx.LoRA(rank=4), sx.Bone(rank=4)
    losses = {1e-4: (1.5, 1.6, 1.7), 1e-3: (1.0, 1.1, 1.2), 1e-2: (2.0, 2.1, 2.2)}
    rows = runs(
        tmp_path,
        *((experiment(lora, lr, seed), loss) for lr, row in losses.items() for seed, loss in enumerate(row)),
        *((experiment(bone, lr, seed), loss - 0.5) for lr, row in losses.items() for seed, loss in enumerate(row)),
    )
    (setting,) = compare(rows)
    assert setting.title == "" and setting.measures == ("held-out loss",) == (setting.chosen_by,)
    first, second = setting.groups
    assert [first.label, second.label] == ["LoRA(rank=4)", "Bone(rank=4)"]
    assert (first.lr, first.rates.interior, len(first.rows), len(first.best)) == (1e-3, True, 9, 3)
    assert first.rates.scores == pytest.approx((1.6, 1.1, 2.1))
    estimate = second.estimates["held-out loss"]
    assert estimate.value == pytest.approx(0.6) and estimate.items is None
    # Paired by seed, which differ by the same.
    assert estimate.gap.value == pytest.approx(-0.5) and estimate.gap.high == pytest.approx(-0.5)
    assert estimate.differs and first.estimates["held-out loss"].gap is None
    assert setting.ranked == [second, first]


UNEQUAL = {
    "data": {"data": sx.Data("other.jsonl")},
    "held-out data": {"eval": sx.Eval(sx.Data("train.jsonl"), every=10)},
    "steps": {"steps": 41},
    "batch size": {"batch_size": 8},
    "precision": {"precision": "bfloat16"},
    "remat": {"remat": "full"},
}


@pytest.mark.parametrize("change", UNEQUAL.values(), ids=list(UNEQUAL))
def test_unequal_runs_are_shown_apart(tmp_path, change):
    rows = runs(tmp_path, (experiment(), 1.0), (experiment(seed=1, **change), 2.0))
    first, second = compare(rows)
    key = next(iter(change))
    assert key in first.title and key in second.title and first.title != second.title
    assert [group.estimates["held-out loss"].value for part in (first, second) for group in part.groups] == [1.0, 2.0]


def test_a_run_that_was_resumed_with_more_steps_is_shown_apart(tmp_path):
    first, second = (write_run(tmp_path / str(seed), experiment(sx.LoRA(rank=4), 1e-3, seed)) for seed in (0, 1))
    write_lengths(epath.Path(second), {0: 20, 20: 40})
    settings = compare(read(first, second))
    words = "learning rates of 20 after step 0, then 40 after step 20"
    assert [words in conditions(setting) for setting in settings] == [False, True]
    assert settings[1].title.startswith("learning rates of=20 after step 0")
    (second / "lengths.json").write_text('{"0": "20"}')
    with pytest.raises(SboraxError, match="is no table of steps"):
        read(second)


def test_other_bases_and_other_samples_are_shown_apart(tmp_path):
    rows = runs(tmp_path, (experiment(), 1.0))
    other_base = runs(tmp_path, (experiment(seed=1), 1.0), base=BASE | {"embed_tokens/embedding": "0" * 16})
    other_samples = runs(tmp_path, (experiment(seed=2), 1.0), samples="99 samples")
    assert len(compare([*rows, *other_base])) == 2 and len(compare([*rows, *other_samples])) == 2
    # One base under two names, and with some leaves quantised.
    alias = runs(tmp_path, (experiment(seed=3, model="elsewhere/tiny"), 1.0), base=dict([next(iter(BASE.items()))]))
    assert len(compare([*rows, *alias])) == 1


def test_what_changes_no_number_keeps_runs_together(tmp_path):
    saved = experiment(seed=1, save=sx.Save(every=5), log=("tensorboard",))
    rows = runs(tmp_path, (experiment(), 1.0), (saved, 2.0))
    (setting,) = compare(rows)
    assert len(setting.groups[0].best) == 2 and setting.groups[0].estimates["held-out loss"].value == 1.5


def test_groups_by_a_key_of_the_config(tmp_path):
    rows = runs(tmp_path, *((experiment(method, batch_size=size), 1.0)
                for method in (sx.LoRA(rank=4), sx.LoRA(rank=8)) for size in (4, 8)))  # fmt: skip
    settings = compare(rows, by=("batch_size",))
    assert [setting.title for setting in settings] == ["rules.0.method.rank=4", "rules.0.method.rank=8"]
    assert [group.label for group in settings[0].groups] == ["batch_size=4", "batch_size=8"]
    (setting,) = compare(rows, by=("method", "batch_size"))
    assert [group.label for group in setting.groups] == [
        f"LoRA(rank={rank}), batch_size={size}" for rank in (4, 8) for size in (4, 8)
    ]
    with pytest.raises(SboraxError, match="--by rank: no run has such a key"):
        compare(rows, by=("rank",))


def test_the_same_run_is_never_counted_twice(tmp_path):
    rows = runs(tmp_path, (experiment(), 1.0), (experiment(save=sx.Save(every=5)), 1.0))
    with pytest.raises(SboraxError, match="are the same run; leave one out"):
        compare(rows)
    # Nor a seed that changes nothing: a method that starts without chance, on one order of the data.
    rows = runs(tmp_path, (experiment(), 1.0), (dataclasses.replace(experiment(), seed_adapter=1), 1.0))
    (setting,) = compare(rows)
    assert len(setting.groups[0].best) == 1 and setting.groups[0].estimates["held-out loss"].seeds.low is None
    assert any("so they count once" in note for note in setting.notes)


def test_a_best_learning_rate_at_an_end_is_told(tmp_path):
    place = write_sweep(tmp_path / "sweep", sx.LoRA(rank=4), {(1e-3, 0): 2.0, (1e-2, 0): 1.0, (1e-1, 0): None})
    (setting,) = compare(read(place))
    (group,) = setting.groups
    assert (group.lr, group.rates.interior, group.diverged) == (1e-2, True, 1)
    second = write_sweep(tmp_path / "other", sx.LoRA(rank=4), {(1e-3, 0): 2.0, (1e-2, 0): 1.0})
    (setting,) = compare(read(second))
    assert setting.groups[0].rates.interior is False
    assert any("is the highest that was tried; extend the sweep" in note for note in setting.notes)


def test_a_learning_rate_that_was_not_scored_was_not_tried(tmp_path):
    """Scores of some rates alone: the others are neither worse nor diverged."""
    items, metrics = answers([True, False], [1.0, 2.0])
    settings = {"eval": sx.Eval()}
    rows = []
    for number, (lr, right) in enumerate({1e-4: None, 1e-3: True, 1e-2: None}.items()):
        score = {"scores": {"arc_easy": items}, "metrics": {"arc_easy": metrics}} if right else {}
        run = write_run(tmp_path / f"run{number}", experiment(lr=lr, **settings), **score)
        lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "eval_loss" not in line]
        (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        rows += read(run)
    (setting,) = compare(rows)
    (group,) = setting.groups
    assert setting.chosen_by == "arc_easy acc" and group.lr == 1e-3 and len(group.best) == 1
    assert group.rates.rates == (1e-3,) and group.rates.interior is None
    assert interior(group) == "one scored" and rates_table(setting) is None


def test_a_group_without_the_main_score_keeps_its_others(tmp_path):
    items, metrics = answers([True, False], [1.0, 2.0])
    scores = {"scores": {"arc_easy": items}, "metrics": {"arc_easy": metrics}}
    rows = [
        *runs(tmp_path, (experiment(), 1.0), base=None, **scores),
        *runs(tmp_path, (experiment(sx.Bone(rank=4)), 2.0), (experiment(sx.Bone(rank=4), 1e-2), 1.5), base=None),
    ]
    # As of runs before the held-out loss had a place.
    rows[0] = dataclasses.replace(rows[0], measurements={"arc_easy acc": rows[0].measurements["arc_easy acc"]})
    extra = [dataclasses.replace(rows[0], config=rows[0].config | {"seed_data": seed}, losses=()) for seed in (1, 2)]
    (setting,) = compare([*rows, *extra])
    scored, plain = setting.groups
    assert setting.chosen_by == "arc_easy acc" and list(scored.estimates) == ["arc_easy acc"]
    assert (plain.lr, plain.rates) == (1e-2, None) and plain.estimates["held-out loss"].value == 1.5
    assert (
        "Bone(rank=4): has no arc_easy acc, so that its learning rate was chosen by its held-out loss" in setting.notes
    )


def test_learning_rates_are_compared_on_the_seeds_that_all_have(tmp_path):
    """Tuned with the first seed, and run with others at the best rate: these say nothing about the other rates."""
    losses = {1e-4: (1.3,), 1e-3: (1.0, 1.2, 1.4), 1e-2: (1.1,)}
    cases = [
        (experiment(lr=lr, seed=seed), loss) for lr, of_rate in losses.items() for seed, loss in enumerate(of_rate)
    ]
    (setting,) = compare(runs(tmp_path, *cases))
    (group,) = setting.groups
    assert (group.lr, group.rates.scores, group.rates.interior) == (1e-3, (1.3, 1.0, 1.1), True)
    assert len(group.best) == 3 and group.estimates["held-out loss"].value == pytest.approx(1.2)
    # Without a seed in common, all of them count.
    apart = [(experiment(sx.Bone(rank=4), lr, seed), loss) for lr, seed, loss in ((1e-3, 0, 1.0), (1e-2, 1, 0.9))]
    (setting,) = compare(runs(tmp_path, *apart))
    assert setting.groups[0].lr == 1e-2


def scored(tmp_path, number, method, seed, right, losses, loss=1.0, protocol=None):
    items, metrics = answers(right, losses)
    run = write_run(
        tmp_path / f"scored{number}", experiment(method, seed=seed), loss,
        scores={"arc_easy": items}, metrics={"arc_easy": metrics},
    )  # fmt: skip
    if protocol:
        edited(run / "scores" / "scores.json", lambda file: file["scores"][0].update(protocol))
    return run


def test_items_are_paired_where_they_are_the_same(tmp_path):
    random = np.random.default_rng(0)
    hard = random.gamma(2.0, 1.0, 60)
    right = [bool(hit) for hit in random.binomial(1, 0.5, 60)]
    places = []
    for number, (method, gain) in enumerate([(sx.LoRA(rank=4), 0.0), (sx.Bone(rank=4), 0.1)]):
        for seed in (0, 1):
            losses = list(hard + gain + random.normal(0.0, 0.05, 60))
            places.append(scored(tmp_path, 2 * number + seed, method, seed, right, losses, 1.0 + seed))
    (setting,) = compare(read(*places))
    assert setting.measures == ("held-out loss", "arc_easy acc", "arc_easy answer loss")
    reference, second = (group.estimates["arc_easy answer loss"] for group in setting.groups)
    assert reference.interval.over == "items" and reference.interval.draws == 60 and reference.seeds.draws == 2
    assert second.gap.over == "items" and second.gap.value == pytest.approx(0.1, abs=0.02)
    # Two thirds of a nat apart by hardness, and told apart all the same.
    assert second.gap.high - second.gap.low < 0.1 * (second.interval.high - second.interval.low)
    assert second.gap.excludes_zero


def test_held_out_losses_are_paired_by_sample(tmp_path):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 20, 80)
    hard = tokens * random.gamma(4.0, 0.5, 80)
    places = []
    for method, gain in ((sx.LoRA(rank=4), 0.0), (sx.Bone(rank=4), 0.05)):
        for seed in (0, 1):
            losses = hard + tokens * (gain + random.normal(0.0, 0.01, 80))
            held_out = [(int(count), float(loss)) for count, loss in zip(tokens, losses, strict=True)]
            run, mean = tmp_path / f"run{len(places)}", float(losses.sum() / tokens.sum())
            places.append(write_run(run, experiment(method, seed=seed), mean, held_out=held_out))
    rows = read(*places)
    (setting,) = compare(rows)
    reference, second = (group.estimates["held-out loss"] for group in setting.groups)
    assert reference.items.draws == second.items.draws == 80 and reference.items.value == pytest.approx(reference.value)
    # Far more samples than a difference as small as that needs are hard or easy for both.
    assert second.gap_items.value == pytest.approx(0.05, abs=0.005) and second.gap_items.excludes_zero
    assert second.gap_items.high - second.gap_items.low < 0.05 * (second.items.high - second.items.low)
    # The interval of a ratio of sums, and not that of a mean of ratios.
    draws = random.integers(0, 80, (4000, 80))
    low, high = np.quantile(hard[draws].sum(1) / tokens[draws].sum(1), (0.025, 0.975))
    assert reference.items.high - reference.items.low == pytest.approx(high - low, rel=0.1)


def test_runs_with_and_without_samples_are_compared_by_their_means(tmp_path):
    first = write_run(tmp_path / "kept", experiment(), 1.5, held_out=[(1, 1.0), (1, 2.0)])
    earlier = write_run(tmp_path / "earlier", experiment(sx.Bone(rank=4)), 1.0)
    (setting,) = compare(read(first, earlier))
    assert [group.estimates["held-out loss"].value for group in setting.groups] == [1.5, 1.0]
    assert all(group.estimates["held-out loss"].items is None for group in setting.groups)
    second = write_run(tmp_path / "other", experiment(sx.HRA(rank=4)), 2.0, held_out=[(1, 1.0), (2, 5.0)])
    (setting,) = compare(read(first, second))
    assert any("held-out loss: runs were scored in 2 ways" in note for note in setting.notes)


@pytest.mark.parametrize("protocol", [{"limit": 2}, {"seed": 1}, {"data": "other.json"}, {"protocol": "generated"}])
def test_scores_of_other_items_or_protocols_are_shown_apart(tmp_path, protocol):
    places = [
        scored(tmp_path, 0, sx.LoRA(rank=4), 0, [True, False], [1.0, 2.0]),
        scored(tmp_path, 1, sx.Bone(rank=4), 0, [True, True], [1.0, 1.5], protocol=protocol),
    ]
    (setting,) = compare(read(*places))
    first, second = setting.groups
    assert "arc_easy (1) acc" in first.estimates and "arc_easy (2) acc" in second.estimates
    assert not {"arc_easy (2) acc", "arc_easy acc"} & first.estimates.keys()
    assert any("scored in 2 ways" in note for note in setting.notes)


def test_labels_tell_groups_apart(tmp_path):
    plain, rite = experiment(), experiment(optimizer=sx.Optimizer(name="lora_rite", lr=1e-3))
    patterns = experiment(rules=(sx.Rule("self_attn", sx.LoRA(rank=4)),), optimizer=sx.Optimizer(lr=1e-3))
    rows = runs(tmp_path, (plain, 1.0), (experiment(sx.Bone(rank=4)), 1.1), (rite, 1.2), (patterns, 1.3))
    (setting,) = compare(rows)
    labels = [group.label for group in setting.groups]
    assert len(set(labels)) == 4 and labels[1] == "Bone(rank=4)"
    assert labels[2] == "LoRA(rank=4), optimizer.name=lora_rite"
    assert labels[3] == "LoRA(rank=4), rules.0.pattern=self_attn"


def test_methods_in_words():
    mixed = experiment(rules=(sx.Rule("q|v", sx.LoRA(rank=4)), sx.Rule("mlp", sx.Bone(rank=8))))
    assert method_label(mixed) == "q|v: LoRA(rank=4); mlp: Bone(rank=8)"
    assert method_label(experiment(rules=(), train_base=True)) == "full fine-tuning"
    assert method_label(experiment(procedure=sx.COLA(every=10))) == "LoRA(rank=4), COLA"
