"""A search that is killed at any moment goes on to the same candidates, and its log keeps every one, once."""

import multiprocessing
import os
import signal

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from common.configuration import Configuration
from common.files import SearchBusy, exclusive
from common.ranks import uniform
from common.reports import RunLog, read_log
from common.search import SAMPLERS, CandidateFailed, Search, SearchSettings, promote
from common.search.trials import Notes

SETTINGS = SearchSettings(budgets=(0.5, 0.3), candidates=4, seed=3)


class Counting:
    """A screener that counts, and misbehaves at the given calls."""

    def __init__(self, screener, *, interrupt_at=None, fail_at=()):
        self.factors, self._screener, self.scored = screener.factors, screener, False
        self.calls, self._interrupt_at, self._fail_at = 0, interrupt_at, fail_at

    def screen(self, config):
        self.calls += 1
        if self.calls == self._interrupt_at:
            raise KeyboardInterrupt
        if self.calls in self._fail_at:
            raise CandidateFailed("the outputs are not finite")
        return self._screener.screen(config)


def search_in(folder, screener, menus, sensitivity, settings=SETTINGS):
    with RunLog(folder / "run.log") as log:
        return Search(screener, menus, sensitivity, settings, folder / "state", log).run(progress=False)


def without_time(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def keys(log):
    return [(record["trial"], record["status"]) for record in log.candidates]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, screener, menus, sensitivity):
    return search_in(tmp_path_factory.mktemp("whole"), screener, menus, sensitivity)


def test_every_candidate_is_within_its_budget_and_differs(uninterrupted, factors):
    assert len(uninterrupted) == 8
    for record in uninterrupted:
        assert record["flops"] <= record["budget"] * factors.dense_flops * (1 + 1e-9)
    assert len({(record["budget"], record["config"]) for record in uninterrupted}) == 8


@pytest.mark.parametrize("interrupt_at", [1, 3, 6])
def test_an_interrupted_search_resumes_to_the_same_trials(
    tmp_path, screener, menus, sensitivity, uninterrupted, interrupt_at
):
    first = Counting(screener, interrupt_at=interrupt_at)
    with pytest.raises(KeyboardInterrupt):
        search_in(tmp_path, first, menus, sensitivity)
    second = Counting(screener)
    records = search_in(tmp_path, second, menus, sensitivity)
    assert without_time(records) == without_time(uninterrupted)
    assert first.calls - 1 + second.calls == len(records)  # the interrupted one alone was begun twice
    log = read_log(tmp_path / "run.log")
    assert keys(log) == [(record["trial"], "screened") for record in records]
    assert log.warnings == [] or all("Baseline" in warning or "baseline" in warning for warning in log.warnings)


def test_a_search_that_was_killed_outright_resumes_to_the_same_trials(
    tmp_path, screener, menus, sensitivity, uninterrupted
):
    class Killing(Counting):
        def screen(self, config):
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().screen(config)

    process = multiprocessing.get_context("fork").Process(
        target=search_in, args=(tmp_path, Killing(screener), menus, sensitivity)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    again = Counting(screener)
    records = search_in(tmp_path, again, menus, sensitivity)
    assert without_time(records) == without_time(uninterrupted)
    assert again.calls == len(records) - 5
    assert keys(read_log(tmp_path / "run.log")) == [(record["trial"], "screened") for record in records]


def test_a_finished_search_does_nothing_again(tmp_path, screener, menus, sensitivity, uninterrupted):
    search_in(tmp_path, screener, menus, sensitivity)
    again = Counting(screener)
    assert without_time(search_in(tmp_path, again, menus, sensitivity)) == without_time(uninterrupted)
    assert again.calls == 0


def test_what_the_log_lost_is_written_again(tmp_path, screener, menus, sensitivity):
    records = search_in(tmp_path, screener, menus, sensitivity)
    path = tmp_path / "run.log"
    path.write_bytes(path.read_bytes()[:-200])  # killed in the middle of the last block
    search_in(tmp_path, screener, menus, sensitivity)
    assert sorted(keys(read_log(path))) == sorted((record["trial"], "screened") for record in records)


def test_a_failed_candidate_is_recorded_and_the_search_goes_on(tmp_path, screener, menus, sensitivity):
    records = search_in(tmp_path, Counting(screener, fail_at=(2, 7)), menus, sensitivity)
    assert [record["status"] for record in records].count("failed") == 2
    assert len(records) == 8
    assert all(record["reason"] for record in records if record["status"] == "failed")
    log = read_log(tmp_path / "run.log")
    assert [record["status"] for record in log.candidates].count("failed") == 2


def test_the_seed_decides_the_candidates(tmp_path, screener, menus, sensitivity, uninterrupted):
    other = SearchSettings(budgets=(0.5, 0.3), candidates=4, seed=4)
    records = search_in(tmp_path, screener, menus, sensitivity, other)
    assert [r["config"] for r in records] != [r["config"] for r in uninterrupted]


def test_two_searches_do_not_disturb_each_other(tmp_path, screener, menus, sensitivity, uninterrupted):
    first, second = tmp_path / "a", tmp_path / "b"
    with RunLog(first / "run.log") as log_a, RunLog(second / "run.log") as log_b:
        one = Search(screener, menus, sensitivity, SETTINGS, first, log_a)
        two = Search(screener, menus, sensitivity, SETTINGS, second, log_b)
        results = two.run(progress=False), one.run(progress=False)
    for records in results:
        assert without_time(records) == without_time(uninterrupted)


def _try_to_hold(folder, answers):
    try:
        with exclusive(folder):
            answers.put("held")
    except SearchBusy as busy:
        answers.put(str(busy))


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with exclusive(tmp_path):
        process = context.Process(target=_try_to_hold, args=(tmp_path, answers))
        process.start()
        assert "another process is searching" in answers.get(timeout=60)
        process.join()
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_other_samplers_take_the_policys_place(tmp_path, screener, menus, sensitivity, sampler, factors):
    settings = SearchSettings(budgets=(0.4,), candidates=3, sampler=sampler, seed=1)
    records = search_in(tmp_path, screener, menus, sensitivity, settings)
    assert len(records) == 3
    assert all(record["flops"] <= 0.4 * factors.dense_flops * (1 + 1e-9) for record in records)


def test_promoted_are_the_best_of_each_budget_less_the_beaten():
    def record(trial, budget, flops, divergence, config="a:(1)"):
        numbers = {"flops": flops, "params": flops, "divergence": divergence, "val_accuracy": 0.9}
        return {"trial": trial, "budget": budget, "config": config, "status": "screened", **numbers}

    records = [
        record("large", 0.3, 30, 0.10, "a:(3)"),
        record("large again", 0.3, 30, 0.10, "a:(3)"),
        record("large but worse", 0.3, 29, 0.20, "a:(4)"),
        record("small", 0.1, 10, 0.15, "a:(1)"),
        record("small and worse", 0.1, 10, 0.30, "a:(2)"),
        {"trial": "failed", "budget": 0.1, "config": "a:(9)", "status": "failed", "reason": "NaN"},
    ]
    assert [one["trial"] for one in promote(records, 1)] == ["large again", "small"]
    # The second of the larger budget is beaten by the first of the smaller one in every respect.
    assert [one["trial"] for one in promote(records, 2)] == ["large again", "small"]


def test_a_configuration_survives_the_log(factors):
    config = uniform(factors, 0.3)
    assert Configuration.parse(str(Configuration(config))) == config
    with pytest.raises(ValueError, match="three ranks or one"):
        Configuration.parse("conv1:(2, 3)")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budgets": ()}, "budgets"),
        ({"budgets": (1.5,)}, "budgets"),
        ({"candidates": 0}, "candidates"),
        ({"sampler": "oracle"}, "policy, tpe, random, nsga2"),
        ({"objective": "luck"}, "divergence, accuracy"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**wrong)


def test_a_budget_below_everything_is_refused(tmp_path, screener, menus, sensitivity):
    with pytest.raises(ValueError, match="a budget must lie between"):
        search_in(tmp_path, screener, menus, sensitivity, SearchSettings(budgets=(0.0001,), candidates=1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_that_was_cut_while_a_generation_was_told_resumes_to_the_same_trials(
    tmp_path, screener, menus, sensitivity, sampler, monkeypatch
):
    settings = SearchSettings(budgets=(0.5,), candidates=14, generation=4, seed=1, sampler=sampler)
    whole = search_in(tmp_path / "whole", screener, menus, sensitivity, settings)
    real, stored = optuna.Study.add_trial, []

    def cut(study, trial):
        if "record" in trial.user_attrs:
            stored.append(trial)
            if len(stored) == 11:
                raise KeyboardInterrupt
        real(study, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", cut)
    with pytest.raises(KeyboardInterrupt):
        search_in(tmp_path / "cut", screener, menus, sensitivity, settings)
    monkeypatch.setattr(optuna.Study, "add_trial", real)
    again = Counting(screener)
    assert without_time(search_in(tmp_path / "cut", again, menus, sensitivity, settings)) == without_time(whole)
    assert again.calls == len({record["config"] for record in whole[12:]} - {record["config"] for record in whole[:12]})
    study = optuna.load_study(study_name=None, storage=journal_of(tmp_path / "cut" / "state"))
    assert [trial.user_attrs["record"]["trial"] for trial in study.trials] == [record["trial"] for record in whole]


def test_a_search_that_is_given_more_candidates_is_the_search_of_that_many(tmp_path, screener, menus, sensitivity):
    few, many = (SearchSettings(budgets=(0.5,), candidates=count, generation=4, seed=1) for count in (6, 11))
    search_in(tmp_path / "grown", screener, menus, sensitivity, few)
    grown = search_in(tmp_path / "grown", screener, menus, sensitivity, many)
    assert without_time(grown) == without_time(search_in(tmp_path / "at once", screener, menus, sensitivity, many))


def test_a_note_that_a_kill_cut_short_is_no_result(tmp_path, uninterrupted):
    notes = Notes(tmp_path / "screened.jsonl")
    assert notes.read() == {}
    for record in uninterrupted[:3]:
        notes.add(record)
    (tmp_path / "screened.jsonl").write_bytes((tmp_path / "screened.jsonl").read_bytes()[:-9])
    assert list(notes.read()) == [record["config"] for record in uninterrupted[:2]]
    notes.add(uninterrupted[3])
    assert list(notes.read()) == [uninterrupted[place]["config"] for place in (0, 1, 3)]


def test_a_candidate_is_one_line_of_the_journal_however_many_layers_there_are(tmp_path, screener, menus, sensitivity):
    search_in(tmp_path, screener, menus, sensitivity, SearchSettings(budgets=(0.5,), candidates=8, seed=1))
    lines = (tmp_path / "state" / "study.journal").read_text().splitlines()
    assert len(lines) <= 8 + 3  # the study, and what its values are called


def test_a_journal_that_a_kill_cut_short_goes_on(tmp_path, screener, menus, sensitivity, uninterrupted):
    search_in(tmp_path, screener, menus, sensitivity)
    path = tmp_path / "state" / "study.journal"
    path.write_bytes(path.read_bytes()[:-30])
    again = Counting(screener)
    assert without_time(search_in(tmp_path, again, menus, sensitivity)) == without_time(uninterrupted)
    assert again.calls == 1
    assert without_time(search_in(tmp_path, Counting(screener, interrupt_at=1), menus, sensitivity))


def test_a_search_that_was_begun_in_sqlite_goes_on_there(tmp_path, screener, menus, sensitivity, uninterrupted):
    search_in(tmp_path, screener, menus, sensitivity)
    state = tmp_path / "state"
    for name in (f"budget {budget} policy seed 3" for budget in SETTINGS.budgets):
        optuna.copy_study(
            from_study_name=name, from_storage=journal_of(state), to_storage=f"sqlite:///{state / 'study.sqlite3'}"
        )
    (state / "study.journal").unlink()
    again = Counting(screener)
    assert without_time(search_in(tmp_path, again, menus, sensitivity)) == without_time(uninterrupted)
    assert again.calls == 0


def journal_of(folder):
    return optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.journal")))
