"""The loop's order of events, its resume to the bit, averaging, refusals and early stopping, on a toy task with a known answer."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from stairstep.training import (
    EVALUATION_WAIT,
    Cadence,
    EvaluationReport,
    NonFiniteError,
    OptimSettings,
    PhaseSettings,
    RateSettings,
    ScheduleSettings,
    StepReport,
    Trainer,
)


class ToyTask:
    """Fits a vector to seeded targets; `scores` plays the selection split."""

    def __init__(self, scores: Mapping[int, float] | None = None, poison: int | None = None) -> None:
        self.weight = Parameter(torch.linspace(-1, 1, 8))
        self.scale = Parameter(torch.tensor(0.5))
        self.scores = scores or {}
        self.poison = poison
        self.seen: list[Tensor] = []

    def groups(self) -> dict[str, list[tuple[str, Parameter]]]:
        return {"llm": [("weight", self.weight)], "objective": [("scale", self.scale)]}

    def step(self, step: int) -> StepReport:
        target = torch.randn(8, generator=torch.Generator().manual_seed(step))
        loss = ((self.weight * self.scale - target) ** 2).mean()
        if step == self.poison:
            loss = loss * float("nan")
        loss.backward()
        return StepReport(loss.item(), {"accuracy": 0.5}, rows=[f"toy.jsonl:{step}"])

    def after_update(self) -> None:
        with torch.no_grad():
            self.scale.clamp_(0.1, 1.0)

    def validation(self) -> dict[str, float]:
        return {"loss": float(self.weight.detach().square().sum())}

    def evaluate(self, step: int) -> EvaluationReport:
        self.seen.append(self.weight.detach().clone())
        return EvaluationReport({"toy/hit@1": float(self.weight.detach().sum())}, self.scores.get(step))


class ToyJournal:
    def __init__(self, stop_at: int | None = None) -> None:
        self.trainer: Trainer | None = None
        self.events: list[tuple[int, dict[str, float]]] = []
        self.order: list[str] = []
        self.saved: dict[int, tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], int]] = {}
        self.best: list[int | None] = []
        self.held: list[int] = []  # steps that said how long their evaluation held training up
        self.stop_at = stop_at

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if EVALUATION_WAIT in values:
            assert list(values) == [EVALUATION_WAIT] and values[EVALUATION_WAIT] >= 0
            self.held.append(step)
            return
        kept = {name: value for name, value in values.items() if not name.startswith("time/")}
        self.events.append((step, kept))
        self.order.append(f"{next(iter(kept)).split('/')[0]}@{step}")

    def checkpoint(self, step: int) -> None:
        assert self.trainer is not None
        tensors, record = self.trainer.state()
        with self.trainer.averaged.in_place():
            weights = {name: value.detach().clone() for name, value in self.trainer.optimizer.named.items()}
        self.saved[step] = ({name: value.clone() for name, value in tensors.items()}, dict(record), weights, len(self.events))
        self.order.append(f"checkpoint@{step}")

    def recall(self, step: int) -> bool:
        assert self.trainer is not None
        if step not in self.saved:
            return False
        with torch.no_grad():
            for name, parameter in self.trainer.optimizer.named.items():
                parameter.copy_(self.saved[step][2][name])
        self.order.append(f"recall@{step}")
        return True

    def evaluating(self, step: int) -> None:
        assert self.trainer is not None
        assert self.trainer.progress.step == step or self.trainer.cadence.evaluation_waits

    def hand_over(self, steps: Sequence[int]) -> list[int]:
        raise AssertionError("nobody evaluates beside")

    def arrived(self, step: int, wait: bool) -> EvaluationReport | None:
        raise AssertionError("nobody evaluates beside")

    def evaluated(self, step: int, best_step: int | None) -> None:
        self.best.append(best_step)

    def stop_requested(self) -> bool:
        return self.stop_at is not None and self.trainer is not None and self.trainer.progress.step >= self.stop_at


class Alone:
    def any(self, flag: bool) -> bool:
        return flag


def trainer(task: ToyTask, journal: ToyJournal, steps: int = 12, cadence: Cadence | None = None, **optim: Any) -> Trainer:
    settings = OptimSettings(
        steps=steps,
        rates=RateSettings(llm=0.05, objective=0.02),
        schedule=ScheduleSettings("cosine", warmup_steps=3),
        **optim,
    )
    journal.trainer = Trainer(task, settings, PhaseSettings(), cadence or Cadence(2, 4, 3), journal, Alone())
    return journal.trainer


def test_a_step_updates_logs_saves_validates_and_evaluates_in_this_order() -> None:
    journal = ToyJournal()
    outcome = trainer(ToyTask(), journal, steps=4, cadence=Cadence(validation=2, evaluation=4, checkpoint=3)).run()
    assert outcome.reason == "finished"
    assert journal.order == [
        *("validation@0", "toy@0", "train@1", "train@2", "validation@2", "train@3", "checkpoint@3"),
        *("train@4", "checkpoint@4", "validation@4", "toy@4"),
    ]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("stop_at", [1, 3, 4, 11])
def test_a_stopped_run_goes_on_to_the_very_same_bits_and_events(ema: float | None, stop_at: int) -> None:
    whole_task, whole = ToyTask(), ToyJournal()
    whole_trainer = trainer(whole_task, whole, ema_decay=ema)
    whole_trainer.run()

    first = ToyJournal(stop_at=stop_at)
    assert trainer(ToyTask(), first, ema_decay=ema).run().reason == "stopped"
    tensors, record, weights, lines = first.saved[max(first.saved)]
    assert record["step"] == stop_at

    task, second = ToyTask(), ToyJournal()
    resumed = trainer(task, second, ema_decay=ema)
    with torch.no_grad():
        for name, parameter in resumed.optimizer.named.items():
            parameter.copy_(weights[name])
    resumed.load(tensors, record)
    second.events = first.events[:lines]
    assert resumed.run().reason == "finished"
    assert not torch.equal(task.weight, ToyTask().weight), "training must have moved the weights"
    assert torch.equal(task.weight, whole_task.weight)
    assert torch.equal(task.scale, whole_task.scale)
    assert second.events == whole.events
    ours, theirs = resumed.state()[0], whole_trainer.state()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_averaged_weights_are_evaluated_and_the_raw_ones_come_back() -> None:
    task, journal = ToyTask(), ToyJournal()
    run = trainer(task, journal, steps=8, cadence=Cadence(evaluation=8), ema_decay=0.5)
    raw = []
    after_update = task.after_update
    task.after_update = lambda: (after_update(), raw.append(task.weight.detach().clone()))[0]  # type: ignore[method-assign]
    run.run()
    expected = task.seen[0].clone()
    for weight in raw:
        expected = 0.5 * expected + 0.5 * weight
    assert torch.allclose(task.seen[-1], expected, atol=1e-6)
    assert not torch.allclose(task.seen[-1], raw[-1], atol=1e-4)
    assert torch.equal(task.weight, raw[-1])


def test_averaged_weights_leave_after_an_error_too() -> None:
    task, journal = ToyTask(), ToyJournal()
    run = trainer(task, journal, ema_decay=0.5)
    run._update(1)
    before = task.weight.detach().clone()
    with pytest.raises(RuntimeError, match="boom"), run.averaged.in_place():
        assert not torch.equal(task.weight, before)
        raise RuntimeError("boom")
    assert torch.equal(task.weight, before)


def test_a_loss_that_is_not_finite_stops_names_its_rows_and_changes_nothing() -> None:
    task, journal = ToyTask(poison=5), ToyJournal()
    run = trainer(task, journal)
    with pytest.raises(NonFiniteError, match=r"step 5: the loss is not finite.*toy\.jsonl:5"):
        run.run()
    clean_task, clean = ToyTask(), ToyJournal(stop_at=4)
    trainer(clean_task, clean).run()
    assert torch.equal(task.weight, clean_task.weight)
    assert max(journal.saved) == 4
    assert run.progress.step == 4


def test_early_stopping_looks_at_the_selection_split_and_not_at_step_zero() -> None:
    scores = {0: 0.99, 2: 0.2, 4: 0.5, 6: 0.4, 8: 0.3, 10: 0.9}
    journal = ToyJournal()
    outcome = trainer(ToyTask(scores), journal, steps=20, cadence=Cadence(evaluation=2), stop_after=2).run()
    assert (outcome.reason, outcome.step, outcome.best_step, outcome.best_score) == ("converged", 8, 4, 0.5)
    assert journal.best == [None, 2, 4, 4, 4]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_evaluations_that_wait_see_the_weights_of_their_steps(ema: float | None) -> None:
    scores = {4: 0.2, 8: 0.5, 12: 0.3}
    inline, after = ToyTask(scores), ToyTask(scores)
    told, waited = ToyJournal(), ToyJournal()
    outcome = trainer(inline, told, cadence=Cadence(evaluation=4), ema_decay=ema).run()
    assert trainer(after, waited, cadence=Cadence(evaluation=4, evaluation_waits=True), ema_decay=ema).run() == outcome
    assert outcome.best_step == 8
    assert waited.best == told.best == [None, 4, 8, 8]
    assert len(after.seen) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after.seen, inline.seen, strict=True))
    assert waited.order[0] == "checkpoint@0"
    assert waited.order[-8:] == [event for step in (0, 4, 8, 12) for event in (f"recall@{step}", f"toy@{step}")]


def test_a_stop_among_the_waiting_evaluations_keeps_them_waiting() -> None:
    scores = {4: 0.2, 8: 0.5, 12: 0.3}
    task, journal = ToyTask(scores), ToyJournal()
    first = trainer(task, journal, cadence=Cadence(evaluation=4, evaluation_waits=True))

    def stops_after_two() -> bool:
        return len(journal.best) == 2

    journal.stop_requested = stops_after_two  # type: ignore[method-assign]
    assert first.run().reason == "stopped"
    assert first.waiting == (0, 4, 8, 12), "no checkpoint may go before all are evaluated"
    again = ToyJournal()
    again.saved = journal.saved
    resumed = trainer(ToyTask(scores), again, cadence=Cadence(evaluation=4, evaluation_waits=True))
    resumed.load(*journal.saved[12][:2])
    outcome = resumed.run()
    assert (outcome.reason, outcome.best_step, again.best) == ("finished", 8, [None, 4, 8, 8])
    assert resumed.waiting == ()


def test_a_waiting_step_whose_checkpoint_is_gone_keeps_the_results_that_it_has() -> None:
    whole = ToyJournal()
    trainer(ToyTask(), whole, cadence=Cadence(evaluation=4, evaluation_waits=True)).run()
    task, again = ToyTask(), ToyJournal()
    again.saved = {step: one for step, one in whole.saved.items() if step != 4}
    resumed = trainer(task, again, cadence=Cadence(evaluation=4, evaluation_waits=True))
    resumed.load(*whole.saved[12][:2])
    assert resumed.run().reason == "finished"
    assert again.order == [event for step in (0, 8, 12) for event in (f"recall@{step}", f"toy@{step}")]
    assert len(again.best) == len(task.seen) == 3, "nothing is written for the step that was not evaluated"


def test_rates_by_group_decay_and_clipping_act() -> None:
    def run(**optim: Any) -> tuple[Tensor, Tensor, list[float]]:
        task, journal = ToyTask(), ToyJournal()
        trainer(task, journal, steps=5, cadence=Cadence(), **optim).run()
        return task.weight.detach(), task.scale.detach(), [event["train/gradient_norm"] for _, event in journal.events]

    weight, _, norms = run()
    decayed = run(weight_decay=0.5)
    clipped = run(clip_norm=1e-9)
    assert not torch.equal(weight, decayed[0])
    assert not torch.equal(weight, clipped[0])
    assert clipped[2][0] == norms[0], "the norm is logged before clipping"


def test_the_loss_own_parameters_are_not_decayed() -> None:
    task, journal = ToyTask(), ToyJournal()
    run = trainer(task, journal, weight_decay=0.9)
    groups = {options["name"]: options for options in run.optimizer._adamw.param_groups}
    assert groups["objective"]["weight_decay"] == 0.0
    assert groups["llm"]["weight_decay"] == 0.9
    assert groups["objective"]["lr"] == 0.02


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_an_evaluation_says_how_long_it_held_training_up(pause_s: float) -> None:
    class Slow(ToyTask):
        def evaluate(self, step: int) -> EvaluationReport:
            time.sleep(pause_s)
            return super().evaluate(step)

    waits: dict[int, float] = {}

    class Timed(ToyJournal):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            waits.update({step: values[EVALUATION_WAIT]} if EVALUATION_WAIT in values else {})
            super().log(step, values)

    journal = Timed()
    trainer(Slow(), journal, cadence=Cadence(validation=1, evaluation=4)).run()
    assert list(waits) == journal.held == [0, 4, 8, 12]
    assert all(one >= pause_s for one in waits.values())
    waits.clear()
    trainer(Slow(), Timed(), cadence=Cadence(validation=1, evaluation=4, evaluation_waits=True)).run()
    assert not waits, "those that wait for the end of training hold none of it up"

    class Blind(ToyTask):
        def evaluate(self, step: int) -> EvaluationReport:
            return EvaluationReport({})

    trainer(Blind(), Timed(), cadence=Cadence(validation=1, evaluation=4)).run()
    assert not waits, "where nothing is measured, nothing was waited for"


# --- evaluation beside training


class Beside(ToyJournal):
    """Others evaluate: a step's result is in once `late` further steps are trained, or as soon as somebody waits for it."""

    def __init__(self, scores: Mapping[int, float], late: int, **more: Any) -> None:
        super().__init__(**more)
        self.scores, self.late = scores, late
        self.handed: list[int] = []
        self.waited: list[int] = []

    def hand_over(self, steps: Sequence[int]) -> list[int]:
        assert all(step in self.saved for step in steps)
        self.handed += steps
        return list(steps)

    def arrived(self, step: int, wait: bool) -> EvaluationReport | None:
        assert self.trainer is not None
        if wait:
            if self.stop_requested():
                return None
            self.waited.append(step)
        if not wait and self.trainer.progress.step < step + self.late:
            return None
        self.order.append(f"arrived@{step}")
        return EvaluationReport({"toy/hit@1": self.scores[step]}, self.scores[step])


SCORES = {0: 0.9, 2: 0.1, 4: 0.5, 6: 0.3, 8: 0.4, 10: 0.2, 12: 0.3}


def beside(late: int, most: int = 2, **optim: Any) -> tuple[Beside, Any]:
    journal = Beside(SCORES, late)
    made = trainer(ToyTask(), journal, cadence=Cadence(evaluation=2, checkpoint=4, evaluation_beside=most), **optim)
    return journal, made.run()


@pytest.mark.parametrize("late", [0, 1, 3, 100])
def test_what_others_find_is_taken_in_once_each_and_in_order(late: int):
    journal, outcome = beside(late)
    assert journal.handed == list(SCORES)
    assert [name for name in journal.order if name.startswith("arrived")] == [f"arrived@{step}" for step in SCORES]
    assert [(step, values["toy/hit@1"]) for step, values in journal.events if "toy/hit@1" in values] == list(SCORES.items())
    assert (outcome.reason, outcome.best_step, outcome.best_score) == ("finished", 4, 0.5)
    assert [one for one in journal.best if one is not None][:1] == [2]  # the untrained step 0 is never the best
    assert journal.held == list(SCORES)
    assert set(SCORES) <= set(journal.saved)


def test_training_waits_only_for_more_than_may_be_open():
    journal, _ = beside(late=100, most=3)
    # At step 6 a fourth is open: the first is waited for; so at 8, 10 and 12; then the rest, for the run ends with the last.
    assert journal.waited == [0, 2, 4, 6, 8, 10, 12]
    assert journal.order.index("arrived@0") > journal.order.index("train@6")
    assert journal.order.index("arrived@4") > journal.order.index("train@10")
    assert beside(late=1, most=3)[0].waited == [12]


def test_a_run_that_converges_at_its_last_step_still_takes_in_what_is_open():
    journal = Beside({**SCORES, 10: 0.2, 12: 0.9}, late=100)
    made = trainer(ToyTask(), journal, cadence=Cadence(evaluation=2, checkpoint=4, evaluation_beside=2), stop_after=3)
    outcome = made.run()
    assert (outcome.step, outcome.best_step, outcome.best_score) == (12, 12, 0.9)
    assert outcome.reason == "converged"  # at step 10's score, as with evaluators of any speed
    assert made.waiting == ()


def test_a_stop_while_waiting_leaves_the_rest_to_the_next_life():
    journal = Beside(SCORES, late=100, stop_at=5)
    made = trainer(ToyTask(), journal, cadence=Cadence(evaluation=2, checkpoint=4, evaluation_beside=1))
    assert made.run().reason == "stopped"
    assert made.progress.step == 5
    further = Beside(SCORES, late=0)
    further.saved = journal.saved
    again = trainer(ToyTask(), further, cadence=Cadence(evaluation=2, checkpoint=4, evaluation_beside=1))
    tensors, record, weights, _ = journal.saved[5]
    with torch.no_grad():
        for name, parameter in again.optimizer.named.items():
            parameter.copy_(weights[name])
    again.load(tensors, record)
    outcome = again.run()
    assert (outcome.reason, outcome.best_step) == ("finished", 4)
    assert further.handed == list(SCORES)  # what is known is found again, and judged anew
    assert [step for step, values in further.events if "toy/hit@1" in values] == list(SCORES)


def converging(late: int, scores: Mapping[int, float], stop_at: int | None = None) -> tuple[Beside, Trainer]:
    """Twenty steps of which every second is evaluated, at most two open; two scores without a better one end the run."""
    journal = Beside(scores, late, stop_at=stop_at)
    cadence = Cadence(evaluation=2, checkpoint=4, evaluation_beside=2)
    return journal, trainer(ToyTask(), journal, steps=20, cadence=cadence, stop_after=2)


@pytest.mark.parametrize("late", [0, 3, 5, 100])
def test_early_stopping_counts_what_is_in(late: int):
    journal, made = converging(late, dict.fromkeys(range(0, 21, 2), 0.2) | {4: 0.5})
    outcome = made.run()
    assert (outcome.reason, outcome.best_step, outcome.best_score) == ("converged", 4, 0.5)
    assert outcome.step == 8 + min(late + late % 2, 4) < 20, "it trains on while step 8's score is not in, for two more evaluations at most"
    assert made.waiting == ()
    assert [step for step, values in journal.events if "toy/hit@1" in values] == list(range(0, outcome.step + 1, 2)), "all that was trained"
    assert journal.held == list(range(0, outcome.step + 1, 2))


def test_a_better_score_that_comes_late_is_the_best_of_a_run_that_has_converged():
    scores = dict.fromkeys(range(0, 21, 2), 0.2) | {4: 0.5, 10: 0.7, 12: 0.6}
    journal, made = converging(100, scores)
    outcome = made.run()
    # Step 8's score ends it, though that of step 10 comes in the same moment: with faster evaluators step 10 would not have been trained.
    assert (outcome.reason, outcome.step, outcome.best_step, outcome.best_score) == ("converged", 12, 10, 0.7)
    assert journal.best[-1] == 10
    assert made.waiting == ()


def test_scores_that_come_together_are_judged_one_after_the_other():
    class Together(Beside):
        """At step 10 everything is in; before, nothing."""

        def arrived(self, step: int, wait: bool) -> EvaluationReport | None:
            assert self.trainer is not None
            self.late = 0 if self.trainer.progress.step >= 10 else 100
            return super().arrived(step, wait)

    scores = dict.fromkeys(range(0, 21, 2), 0.2) | {2: 0.5, 8: 0.6}
    journal = Together(scores, 100)
    made = trainer(ToyTask(), journal, steps=20, cadence=Cadence(evaluation=2, evaluation_beside=9), stop_after=2)
    outcome = made.run()
    assert (outcome.reason, outcome.step, outcome.best_step) == ("converged", 10, 8), "step 6 ends it, and 8 does not take that back"
    slow = trainer(ToyTask(), Beside(scores, 1), steps=20, cadence=Cadence(evaluation=2, evaluation_beside=9), stop_after=2).run()
    assert (slow.reason, slow.step, slow.best_step) == ("converged", 8, 8)


def test_a_stop_while_a_converged_run_waits_is_a_stop():
    class Stopping(Beside):
        """Whoever waits for step 10 or a later one is stopped."""

        def arrived(self, step: int, wait: bool) -> EvaluationReport | None:
            return None if wait and step >= 10 else super().arrived(step, wait)

    scores = dict.fromkeys(range(0, 21, 2), 0.2) | {4: 0.5}
    journal = Stopping(scores, 5)
    made = trainer(ToyTask(), journal, steps=20, cadence=Cadence(evaluation=2, checkpoint=4, evaluation_beside=3), stop_after=2)
    assert made.run().reason == "stopped"
    assert made.waiting == (10, 12, 14)[: len(made.waiting)] != ()
    at = made.progress.step
    tensors, record, weights, _ = journal.saved[at]
    further = Beside(scores, 0)
    further.saved = journal.saved
    again = trainer(ToyTask(), further, steps=20, cadence=Cadence(evaluation=2, checkpoint=4, evaluation_beside=3), stop_after=2)
    with torch.no_grad():
        for name, parameter in again.optimizer.named.items():
            parameter.copy_(weights[name])
    again.load(tensors, record)
    outcome = again.run()
    assert (outcome.reason, outcome.step, outcome.best_step) == ("converged", at, 4)
    assert again.waiting == ()
