"""Studies: pieces are cached, killed ones go on, learning rates are extended, verdicts follow their rule."""

import contextlib
import dataclasses
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from tiny_model import write_data, write_model

import sborax as sx
from benchmarks.shapes import EPS, SHAPES
from experiments.studies import __main__ as command
from experiments.studies import atlas, commonsense, pieces, real
from experiments.studies.choosing import choosing
from experiments.studies.claims import Beats, Difference, LessGrowth, RateCosts, RateRatio, RateSlope, Within, overall
from experiments.studies.items import held_out
from experiments.studies.matching import STORED, matched, sized, trained
from experiments.studies.plots import digest
from experiments.studies.repeat import Repeated, claim_of, repeat
from experiments.studies.report import FIGURES, PAGE, Outcome, file_name, page, ranked, write
from experiments.studies.report import figures as figures_of
from experiments.studies.store import Store
from experiments.studies.study import Arm, Base, Held, Piece, Study, settings, sparse
from experiments.studies.tuning import Tuned, pending, progress
from sborax.data.source import read
from sborax.models.config import LlamaConfig
from sborax.records.claim import locked
from sborax.sweep.rates import half_decades, higher, lower
from sborax.sweep.stepper import SweepStepper
from sborax.train.measure import loss_on

RATES = (1e-3, 1e-2, 1e30)
"""The square of an update of about the last one is not finite."""
METHODS = {"LoRA": sx.LoRA(rank=2), "Bone": sx.Bone(rank=2)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, compiled_once) -> Study:
    """Two methods on a random model, three learning rates, two seeds."""
    place = tmp_path_factory.mktemp("tiny")
    data = sx.Data(str(write_data(place / "data.jsonl")), template="{instruction} ", max_length=32, limit=16)
    model = str(write_model(place / "model"))
    validation = Held(dataclasses.replace(data, limit=None), items=6, skip=16)
    arms = []
    for name, method in METHODS.items():
        rules = (sx.Rule("q_proj", method),)
        run = sx.Experiment(model, data, rules, steps=4, batch_size=2, save=sx.Save(every=2, keep=1))
        arms.append(Arm(name, "sums", run, validation))
    return Study("tiny", "two methods", "The lowest loss.\n\nIt decides.", tuple(arms), RATES, (0, 1), extensions=0)


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """The study run to its end: the folder of results, that of run directories, and what was printed."""
    results, work, lines = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("work"), []
    command.run(tiny, Store(tiny, results), work, float("inf"), echo=lines.append)
    return results, work, lines


def test_a_study_runs_once(tiny, ran):
    results, work, lines = ran
    files = sorted((results / "tiny").iterdir())
    store = Store(tiny, results)
    assert not pending(tiny, store) and len(files) == len(lines) == 4
    assert command.run(tiny, store, work, float("inf")) == 0
    assert {place.name for place in work.iterdir()} <= {"programs", "claims"}
    assert not [file for file in work.glob("claims/**/*") if file.is_file()]
    assert all(file.stat().st_size < 60_000 for file in files)


def test_a_piece_that_another_process_ran_is_not_run_again(tiny, ran, tmp_path):
    store, (file, *_) = Store(tiny, tmp_path), sorted((ran[0] / "tiny").iterdir())
    queue = pending(tiny, store)
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / file.name).write_text(file.read_text())
    assert [piece.digest for piece in queue if piece not in pending(tiny, store)] == [file.stem]


def test_a_claim_is_repeated(tiny, ran, tmp_path):
    claims = (Beats("Bone beats LoRA", "", "Bone"), Beats("Bone beats LoRA by its area", "", "Bone", kind="area"))
    study = dataclasses.replace(tiny, claims=claims)
    assert [claim_of(study, text) for text in ("bone beats LoRA", "area")] == list(claims)
    for text, reason in (("DoRA", "no claim of tiny: Bone beats LoRA; "), ("LoRA", "several claims of tiny")):
        with pytest.raises(sx.SboraxError, match=reason):
            claim_of(study, text)
    lines = []
    (rerun,) = repeat(study, claims[0], Store(study, ran[0]), tmp_path, echo=lines.append)
    # The same seeds, but each rate in a run of its own.
    np.testing.assert_allclose(rerun.again.seeds.value, rerun.stored.seeds.value, rtol=0, atol=1e-4)
    assert rerun.seeds == (0, 1) and rerun.inside and len(lines) == 5 and "inside the stored intervals" in lines[-1]
    far = dataclasses.replace(rerun.again, seeds=dataclasses.replace(rerun.again.seeds, value=100.0))
    assert "OUTSIDE" in str(Repeated("sums", rerun.stored, far, (0, 1)))
    with pytest.raises(sx.SboraxError, match="no setting has results of both arms"):
        repeat(study, claims[0], Store(study, tmp_path / "empty"), tmp_path)


def test_results_hold_what_a_member_did(tiny, ran):
    piece = Piece(tiny.arms[0], RATES, 1)
    result = Store(tiny, ran[0]).get(piece)
    assert result is not None and (result["arm"], result["seed"], result["config"]) == ("LoRA", 1, piece.config)
    assert [member["lr"] for member in result["members"]] == list(RATES)
    assert len(result["items_digests"]) == 8 * tiny.arms[0].held.items
    *alive, wild = result["members"]
    assert wild == {"lr": RATES[-1], "diverged": 1}
    for member in alive:
        assert len(member["items"]) == tiny.arms[0].held.items and len(member["curve"]) == 4
        np.testing.assert_allclose(np.mean(member["items"]), member["items_loss"], rtol=1e-4)
        np.testing.assert_allclose(np.mean(member["curve"]), member["area"], rtol=1e-4)
        assert member["trained"] == 2 * 2 * (32 + 32)
    # Seeds change what is seen and where it starts.
    second = Store(tiny, ran[0]).get(dataclasses.replace(piece, seed=0))
    assert second is not None and second["members"][0]["curve"] != result["members"][0]["curve"]


def test_a_piece_is_killed_before_its_first_step(tiny, tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(SweepStepper, "__init__", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert command.run(tiny, Store(tiny, tmp_path / "results"), tmp_path / "work", float("inf"), echo=lines.append) == 0
    assert "stopped" in lines[-1]


def test_a_killed_piece_goes_on(tiny, ran, tmp_path, monkeypatch):
    """A signal ends a piece after two of its four steps; the next call makes the other two, and the same numbers."""
    piece, lines = Piece(tiny.arms[0], RATES, 0), []
    store = Store(tiny, tmp_path / "results")
    record = SweepStepper.record

    def kill(self, dispatched, first):
        if dispatched.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return record(self, dispatched, first)

    with monkeypatch.context() as patch:
        patch.setattr(SweepStepper, "record", kill)
        assert command.run(tiny, store, tmp_path / "work", float("inf"), echo=lines.append) == 0
    assert "stopped" in lines[-1] and store.get(piece) is None
    output: list[str] = []
    result = pieces.run_piece(piece, tmp_path / "work", output.append)
    assert any(line.startswith("resuming after step") for line in output)
    expected = Store(tiny, ran[0]).get(piece)
    assert expected is not None and expected["members"] == result["members"]


@pytest.mark.nightly
def test_a_piece_that_cannot_go_on_begins_again(tiny, tmp_path):
    """The mean of its item losses over all tokens is `loss_on` of the adapter that it has written."""
    piece, lines = Piece(tiny.arms[0], (1e-2,), 0), []
    (tmp_path / piece.digest).mkdir()
    (tmp_path / piece.digest / "other.json").write_text("{}")
    result = pieces.run_piece(piece, tmp_path, lines.append)
    assert any("begun again" in line for line in lines)
    with locked(epath.Path(tmp_path / piece.digest)), pytest.raises(sx.SboraxError, match="in use by process"):
        pieces.run_piece(piece, tmp_path, lines.append)
    target = pieces.load_run(str(tmp_path / piece.digest))
    samples = held_out(piece.arm.held, target.model)
    mean = np.average(result["members"][0]["items"], weights=[int(sample.counts[1:].sum()) for sample in samples])
    expected = loss_on(target.model, target.params, target.adapters, pieces.batches_of(samples, piece.arm.held))
    np.testing.assert_allclose(mean, expected, rtol=1e-4)


def test_no_piece_begins_that_would_not_end_in_time(tiny, tmp_path):
    store, lines = Store(tiny, tmp_path / "results"), []
    store.seconds.append(100.0)
    assert command.run(tiny, store, tmp_path / "work", 99.0, echo=lines.append) == 0
    assert not (tmp_path / "work").exists() and "would take 120 s" in lines[0]


def test_a_piece_that_another_process_runs_is_left_to_it(tiny, tmp_path):
    store, work, lines = Store(tiny, tmp_path / "results"), tmp_path / "work", []
    places = [work / "claims" / piece.digest for piece in pending(tiny, store)]
    with contextlib.ExitStack() as stack:
        for place in places:
            place.mkdir(parents=True)
            stack.enter_context(locked(epath.Path(place)))
        assert command.run(tiny, store, work, float("inf"), echo=lines.append) == 0
    assert lines == [f"the {len(places)} known pieces that are left are run by other processes"]


def test_a_config_that_changes_is_another_piece(tiny):
    arm = tiny.arms[0]
    piece = Piece(arm, RATES, 0)
    changed = dataclasses.replace(arm, experiment=dataclasses.replace(arm.experiment, steps=5))
    short_arm = dataclasses.replace(arm, held=dataclasses.replace(arm.held, items=5))
    variants = [Piece(changed, RATES, 0), Piece(short_arm, RATES, 0), Piece(arm, RATES[:2], 0), Piece(arm, RATES, 1)]
    assert len({piece.digest, *(variant.digest for variant in variants)}) == 5
    assert Piece(dataclasses.replace(arm, name="other"), RATES, 0).digest == piece.digest
    assert sparse(sx.LoRA(rank=8)) == {"type": "LoRA"} and sparse(sx.LoRA(rank=2)) == {"type": "LoRA", "rank": 2}


def test_a_run_that_never_made_a_step_has_diverged(tmp_path):
    assert pieces.described(tmp_path, 0.1) == {"lr": 0.1, "diverged": 1}


def made_up(study: Study, folder: Path, losses, items: int = 40, rng=None) -> Store:
    """Results of a study without its runs. losses: `losses(arm, rate, seed)` is the mean over items."""
    store = Store(study, folder)
    rng = rng or np.random.default_rng(0)
    hardness = rng.normal(0.0, 1.0, items)
    while queue := pending(study, store):
        piece = queue[0]
        members = []
        for rate in piece.rates:
            value = losses(piece.arm.name, rate, piece.seed)
            values = list(value + hardness + rng.normal(0.0, 0.01, items))
            alive = {"trained": 10, "items": values, "items_loss": float(np.mean(values)), "area": float(value)}
            members.append({"lr": rate, **(alive if np.isfinite(value) else {"diverged": 1})})
        store.add(piece, {"members": members, "items_digests": "0", "seconds": 1.0, "device": "none"})
    return store


def valley(best: float, depth: float = 0.0):
    """Losses by learning rate with a minimum at `best`."""
    return lambda rate: depth + 0.2 * (np.log10(rate) - np.log10(best)) ** 2


def synthetic(*names: str, seeds: tuple[int, ...] = (0, 1, 2, 3), **changes) -> Study:
    """A study that is not run."""
    data = sx.Data("missing")
    arms = tuple(
        Arm(name, "none", sx.Experiment("m", data, (("x", sx.LoRA(rank=rank + 1)),), steps=1), Held(data))
        for rank, name in enumerate(names)
    )
    return Study("synthetic", "made up", "", arms, half_decades(1e-4, 5), seeds, **changes)


def write_text(place: Path) -> sx.Data:
    """Text without answers."""
    text = " ".join(f"{word} and {word + 1} make {2 * word + 1}." for word in range(400))
    place.write_text(text)
    return sx.Data(str(place), template="text", max_length=16, overlong="split")


def test_what_an_arm_forgets_is_measured_against_its_base(tiny, tmp_path):
    """The base is measured once, and a run that hardly trains forgets nothing."""
    probe, lines = Held(write_text(tmp_path / "text.txt"), items=5), []
    run = dataclasses.replace(tiny.arms[0].experiment, rules=(sx.Rule("mlp", sx.LoRA(rank=2)),))
    arm = dataclasses.replace(tiny.arms[0], experiment=run, kept=probe)
    study = dataclasses.replace(tiny, arms=(arm,), rates=(1e-9, 1e-1))
    store = Store(study, tmp_path / "results")
    assert command.run(study, store, tmp_path / "work", float("inf"), echo=lines.append) == 2
    assert [line.endswith(f"before training, {probe.data.label()}: measured") for line in lines] == [True, False, False]
    base = Base.of(arm)
    assert base is not None
    measured, result = store.get(base), store.get(Piece(arm, study.rates, 0))
    assert measured is not None and result is not None and len(measured["kept"]) == 5
    still, drift = (member["kept"] for member in result["members"])
    np.testing.assert_allclose(still, measured["kept"], rtol=2e-5)
    assert np.abs(np.subtract(drift, measured["kept"])).max() > 1e-2
    tuned = tuned_arms(study, store)["LoRA"]
    kept_losses = np.array([numbers["kept"] for numbers in tuned.at_best.values()])
    np.testing.assert_allclose(tuned.forgotten(), kept_losses - measured["kept"], rtol=0, atol=1e-6)
    # From another study's results too.
    second = dataclasses.replace(study, name="again")
    text = page([Outcome.of(second, Store(second, tmp_path / "results"))])
    assert "| forgotten, over items |" in text
    rows = [
        line for line in text.splitlines() if line.startswith(("| method", "|---|---|---|---|---|---|---|", "| LoRA"))
    ]
    assert [row.count("|") for row in rows] == [10, 10, 10]


def test_figures_are_those_of_the_numbers(tmp_path):
    """The page names every figure that is written, stale ones go, and the same numbers give the same bytes."""
    study = synthetic(*(f"arm {number}" for number in range(10)), reference="arm 0")

    def losses(arm, rate, seed):
        return np.inf if rate == 1e-2 and arm == "arm 3" else 3 + 0.1 * int(arm[-1]) + valley(1e-3)(rate)

    outcome = Outcome.of(study, made_up(study, tmp_path / "stored", losses))
    folder = tmp_path / FIGURES
    folder.mkdir()
    (folder / "stale.svg").write_text("")
    write([outcome], tmp_path / "RESULTS.md")
    files = {file.name: file.read_text() for file in folder.iterdir()}
    named = re.findall(rf"!\[.*?\]\({FIGURES}/(.*?)\)", (tmp_path / "RESULTS.md").read_text())
    kinds = ("differences", "rates", "sizes")
    assert sorted(files) == sorted(named) == [f"synthetic-none-{kind}.svg" for kind in kinds]
    write([outcome], tmp_path / "RESULTS.md")
    assert files == {file.name: file.read_text() for file in folder.iterdir()}
    arms = ranked(outcome, "none")
    for name, text in files.items():
        assert f"<dc:description>{digest(arms)}<" in text
        shown = [f">arm {number}<" in text for number in range(10)]
        # Differences name every arm but the reference; elsewhere the eight best have a colour and a name.
        assert shown == ([False] + 9 * [True] if "differences" in name else 8 * [True] + 2 * [False])
    assert digest(arms) != digest(arms[:-1])
    second = Outcome.of(
        study, made_up(study, tmp_path / "other", lambda arm, rate, seed: 1e-3 + losses(arm, rate, seed))
    )
    assert digest(ranked(second, "none")) != digest(arms)


def tuned_arms(study: Study, store: Store) -> dict[str, Tuned]:
    tuned = {arm.name: progress(study, arm, store)[1] for arm in study.arms}
    return {name: entry for name, entry in tuned.items() if entry is not None}


def test_learning_rates_are_extended_where_the_best_is_the_last(tmp_path):
    study = synthetic("low", "middle", "high", "far", tuned=(0, 1))
    best = {"low": 3e-5, "middle": 1e-3, "high": 1e-1, "far": 1e3}
    store = made_up(study, tmp_path, lambda arm, rate, seed: 3 + valley(best[arm])(rate))
    arms = tuned_arms(study, store)
    low, middle, high, far = (arms[name] for name in best)
    assert (low.best, low.extensions, low.rates.interior) == (3e-5, 2, True)
    assert (middle.best, middle.extensions, middle.rates.interior) == (1e-3, 0, True)
    assert (high.best, high.extensions, high.rates.interior) == (1e-1, 3, True)
    assert (far.extensions, far.rates.interior) == (3, False)
    # The other seeds run at the best rate alone.
    assert middle.seeds == (0, 1, 2, 3) and set(middle.members[1e-4]) == {0, 1}
    assert Beats("", "", "middle", "far").find("none", arms).verdict == "undecided"


def test_learning_rates_are_refined_around_the_best(tmp_path):
    study = synthetic("LoRA", "between", "far", tuned=(0, 1), refined=True)
    best = {"LoRA": 1e-3, "between": 5e-3, "far": 1e3}
    arms = tuned_arms(study, made_up(study, tmp_path, lambda arm, rate, seed: 3 + valley(best[arm])(rate)))
    lora, between, far = (arms[name] for name in best)
    assert (lora.best, lora.rates.rates) == (1e-3, (1e-4, 3e-4, 5.5e-4, 1e-3, 1.7e-3, 3e-3, 1e-2))
    assert (between.best, between.rates.interior, between.seeds) == (5.5e-3, True, (0, 1, 2, 3))
    # The best of all seeds is a parabola's minimum as before.
    np.testing.assert_allclose(10 ** between.best_by_seed()[0], 5e-3, rtol=0.05)
    # A best rate at the end has nothing on one side.
    assert far.extensions == 3 and not far.rates.interior


def test_a_rate_at_which_a_seed_diverges_is_not_chosen(tmp_path):
    study = synthetic("LoRA")

    def losses(arm, rate, seed):
        return np.inf if rate == 1e-3 and seed == 2 else 3 + valley(1e-3)(rate)

    arms = tuned_arms(study, made_up(study, tmp_path, losses))
    assert arms["LoRA"].best in (3e-4, 3e-3) and len(arms["LoRA"].seeds) == 4


def test_half_decades():
    assert half_decades(3e-4, 4) == (3e-4, 1e-3, 3e-3, 1e-2)
    for rate in (1e-5, 3e-4, 1.0, 3.0):
        assert lower(higher(rate)) == rate == higher(lower(rate))


@pytest.mark.parametrize(
    ("gap", "verdict"), [(-0.2, "reproduced"), (0.2, "not reproduced"), (-0.004, "undecided")], ids=str
)
def test_verdicts(gap, verdict, tmp_path):
    """A clear gain, a clear loss, and a gain whose interval over seeds reaches both 0 and a gain worth speaking of."""
    study = synthetic("LoRA", "new")
    noise = {(arm, seed): value for arm in ("LoRA", "new") for seed, value in enumerate((0.0, 0.03, -0.03, 0.01))}

    def losses(arm, rate, seed):
        shift = gap + noise[arm, 3 - seed] if arm == "new" else 0.0
        return 3 + shift + valley(1e-3)(rate)

    store = made_up(study, tmp_path, losses)
    arms = tuned_arms(study, store)
    assert Beats("", "", "new").judge(arms)[0] == verdict
    # 0.2 is within 10 % of a loss of 3, and surely beyond 1 %.
    assert Beats("", "", "new", slack=0.1).judge(arms)[0] == "reproduced"
    assert gap < 0.1 or Beats("", "", "new", slack=0.01).judge(arms)[0] == "not reproduced"
    assert Beats("", "", "new", "absent").find("none", arms) is None
    subset = {name: dataclasses.replace(entry, members={r: dict(list(m.items())[:2]) for r, m in entry.members.items()})
           for name, entry in arms.items()}  # fmt: skip
    subset = {name: dataclasses.replace(entry, tuning=(0, 1)) for name, entry in subset.items()}
    assert Beats("", "", "new").find("none", subset).verdict == "undecided"
    assert Beats("", "", "new").find("none", {**arms, "new": None}).verdict == "not run yet"


def test_verdicts_about_rates_bands_and_growth(tmp_path):
    study = synthetic("LoRA", "full", "near", "far")
    best, depth = {"LoRA": 1e-2, "full": 1e-3, "near": 1e-2, "far": 1e-2}, {"near": 0.01, "far": 0.5}
    losses = {name: valley(rate, depth.get(name, 0.0)) for name, rate in best.items()}
    arms = tuned_arms(study, made_up(study, tmp_path, lambda arm, rate, seed: 3 + losses[arm](rate)))
    assert RateRatio("", "", "full", 10.0).judge(arms)[0] == "reproduced"
    assert RateRatio("", "", "full", 3.0).judge(arms)[0] == "not reproduced"
    assert Within("", "", ("near",), 0.02).judge(arms)[0] == "reproduced"
    assert Within("", "", ("near", "far"), 0.02).judge(arms)[0] == "not reproduced"
    # Half a decade costs 0.05 of 3.
    for above in (False, True):
        assert RateCosts("", "", above, 0.01).judge(arms)[0] == "reproduced"
        assert RateCosts("", "", above, 0.02).judge(arms)[0] == "not reproduced"
    assert LessGrowth("", "", ("near", "LoRA"), ("far", "LoRA")).judge(arms)[0] == "reproduced"
    assert LessGrowth("", "", ("far", "LoRA"), ("near", "LoRA")).judge(arms)[0] == "not reproduced"
    assert RateSlope("", "", (("LoRA", 1), ("near", 2), ("far", 4))).judge(arms)[0] == "reproduced"
    assert RateSlope("", "", (("full", 1), ("LoRA", 2))).judge(arms)[0] == "not reproduced"
    assert overall(["reproduced", "undecided"]) == overall(["reproduced", "not reproduced"]) == "undecided"
    assert overall(["not reproduced", "undecided"]) == "not reproduced" and overall([]) == "not run yet"


def test_intervals_cover_the_truth():
    """Of 200 differences with a true mean, each interval covers it about 190 times."""
    rng = np.random.default_rng(1)
    covered = np.zeros(2)
    for _ in range(200):
        over_items, over_seeds = rng.normal(0.3, 1.0, (1, 24)), rng.normal(0.3, 1.0, (4, 1))
        for place, gap in enumerate((Difference.of(over_items).items, Difference.of(over_seeds).seeds)):
            assert gap.low is not None and gap.high is not None
            covered[place] += gap.low <= 0.3 <= gap.high
    assert np.all((0.9 < covered / 200) & (covered / 200 < 0.99)), covered / 200


def test_the_rate_is_chosen_on_other_items_than_are_reported(tmp_path):
    """Noise that makes a rate look best on its half of the items is not in the loss that is reported."""
    study = synthetic("LoRA", seeds=(0, 1, 2))
    store = Store(study, tmp_path)
    for piece in pending(study, store):
        members = [
            {"lr": rate, "trained": 1, "items": [2.0 if rate == 1e-3 else 3.0, 5.0 if rate == 1e-3 else 1.0] * 4}
            for rate in piece.rates
        ]
        store.add(piece, {"members": members, "items_digests": "0", "seconds": 1.0, "device": "none"})
    tuned = tuned_arms(study, store)["LoRA"]
    assert tuned.best == 1e-3 and np.all(tuned.losses() == 5.0)


def test_sizes_match_the_budget():
    """The stored sizes are what matching gives, for blocks and for a rank."""
    assert trained(atlas.SHAPE, atlas.LINEARS, sx.LoRA(rank=atlas.RANK)) == atlas.BUDGET
    sizes, methods = json.loads(STORED.read_text()), atlas.everything()
    assert matched(atlas.SHAPE, atlas.LINEARS, methods["C3A"], atlas.BUDGET) == sized(methods["C3A"], sizes["C3A"])
    assert trained(atlas.SHAPE, atlas.LINEARS, sized(methods["SBoRA-FA"], sizes["SBoRA-FA"])) == 45_000


@pytest.mark.nightly
def test_real_sizes_match_the_budget():
    """Every method trains as many parameters as LoRA within 7 %, but for MoSARA, which is as large as it can be."""
    shape = LlamaConfig(rms_norm_eps=EPS, **SHAPES["SmolLM2-135M"])
    counts = {name: trained(shape, atlas.LINEARS, method) for name, method in real.METHODS.items()}
    budget = counts["LoRA"]
    assert budget == 2_442_240
    assert all(0.93 < counts[name] / budget < 1.07 for name in counts.keys() - {"MoSARA"}), counts
    assert 0.12 < counts["MoSARA"] / budget < 0.14


def test_every_study_is_whole():
    """Arms of a setting have names of their own, every method is in the atlas, and every claim finds its arms."""
    for study in map(command.declared, command.names()):
        assert study.protocol and study.seeds
        for setting in settings(study):
            names = [arm.name for arm in study.arms if arm.setting == setting]
            assert len(set(names)) == len(names)
        for claim in study.claims:
            assert any(claim.needs([a.name for a in study.arms if a.setting == setting]) for setting in settings(study))
    names = {arm.name for arm in command.declared("atlas").arms}
    dense = {name for name in sx.methods.__all__ if not getattr(sx, name).of_quantised}
    assert dense - {"SBoRA"} <= names
    with pytest.raises(sx.SboraxError, match="no such study; there are atlas"):
        command.declared("unheard")


def test_the_page_is_that_of_the_results(tiny, ran):
    """docs/RESULTS.md and docs/choosing.md are what the stored results make of them."""
    outcomes = command.outcomes()
    assert page(outcomes) == PAGE.read_text()
    (of_atlas,) = (outcome for outcome in outcomes if outcome.study.name == "atlas")
    assert choosing(of_atlas) == command.CHOOSING.read_text()
    # Bytes of figures differ between versions of matplotlib, so that they are held by the digest of their numbers.
    figures = {file.name: file.read_text() for file in (PAGE.parent / FIGURES).glob("*.svg")}
    expected = {
        file_name(outcome.study, setting, figure): digest(ranked(outcome, setting))
        for outcome in outcomes
        for setting in settings(outcome.study)
        for figure in figures_of(outcome, setting)
    }
    assert figures.keys() == expected.keys() and all(f">{expected[file]}<" in text for file, text in figures.items())
    small = dataclasses.replace(tiny, claims=(Beats("Bone beats LoRA", "2409.15371", "Bone"),))
    text = page([Outcome.of(small, Store(small, ran[0]))])
    assert re.search(r"\| Bone beats LoRA \| arXiv:2409.15371 \| tiny \| \*\*undecided\*\* \| sums: [-+]0", text)
    assert text.count("| LoRA | 256 |") == 1 and "2 seeds" in text


def test_the_joint_questions_have_equal_shares(tmp_path, monkeypatch):
    """Of sets with 5, 6, 7 and, after balancing, 4 records; a second process leaves the files as they are."""
    for size, name in zip((5, 6, 7, 9), commonsense.SETS, strict=True):
        (tmp_path / name).mkdir()
        answers = ["true" if number % 4 else "false" for number in range(size)][:8]
        records = [{"instruction": f"{name} {number}", "answer": answer} for number, answer in enumerate(answers)]
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(json.dumps(records))
    monkeypatch.setenv("SBORAX_DATA", str(tmp_path))
    study = real.study()
    command.provide(study, tmp_path / "work")
    train, test = (read(f"{commonsense.FOLDER}/{split}.json") for split in ("train", "test"))
    of_sets = [[record["instruction"].split()[0] for record in records] for records in (train, test)]
    assert of_sets == [list(commonsense.SETS) * 4, [name for name in commonsense.SETS for _ in range(4)]]
    assert [record["answer"] for record in test[-4:]] == ["true", "false"] * 2
    file = tmp_path / "work" / "data" / commonsense.FOLDER / "train.json"
    file.write_text("[]")
    command.provide(study, tmp_path / "work")
    assert file.read_text() == "[]"
