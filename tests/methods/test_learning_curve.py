"""The learning curve: the fit against brute force, the interval, the stop rule, the runs it rides on."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn
from transformers import Trainer, TrainingArguments

from hfgen.callbacks import LearningCurveCallback
from hfgen_plugins.callbacks.learning_curve.learning_curve import (
    EXPONENTS,
    Curve,
    fit,
    interval,
    resampled,
    solve,
    widening,
)

X = np.arange(1, 31) * 50.0


def squares(curve, x, y):
    return float(((curve(x) - y) ** 2).sum())


# --- the fit ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 5), min_size=5, max_size=12), st.floats(1e-3, 5), st.booleans())
def test_a_and_c_equal_constrained_least_squares(values, exponent, rising):
    """Against scipy's minimiser of the same squares under the same bounds."""
    y = np.array(values) / 6 if rising else np.array(values)
    x = np.arange(1, len(y) + 1) / len(y)
    best = 1.0 if rising else 0.0
    c, a, rest = (float(v[0, 0]) for v in solve(x, y[None], np.array([exponent]), rising, best))
    f = x**-exponent
    scale = f.max()  # so that both unknowns are of one size

    def loss(p):
        left = y - p[0] - p[1] * f / scale
        return float(left @ left), np.array([-2 * left.sum(), -2 * (left * f / scale).sum()])

    bounds = [(None, best) if rising else (best, None), (None, 0) if rising else (0, None)]
    options = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 10_000, "maxfun": 100_000}
    known = minimize(loss, [y.mean(), 0.0], jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    own = float(((y - c - a * f) ** 2).sum())
    assert own == pytest.approx(rest, rel=1e-6, abs=1e-8)
    assert own <= known.fun + 1e-6
    assert (c <= best and a <= 0) if rising else (c >= best and a >= 0)


@pytest.mark.parametrize(
    ("rising", "true"), [(False, Curve(1.5, 0.7, 0.4, 1500.0)), (True, Curve(0.9, -0.3, 1.3, 1500.0))]
)
def test_a_power_law_is_recovered(rising, true):
    found = fit(X, true(X), rising, float(rising))
    assert squares(found, X, true(X)) < 1e-12
    assert (found.limit, found.scale, found.exponent) == pytest.approx(
        (true.limit, true.scale, true.exponent), rel=1e-4
    )
    assert found(6000) == pytest.approx(true(6000), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_no_finer_grid_of_exponents_does_better(seed):
    noise = np.random.default_rng(seed).normal(0, 0.05, len(X))
    y = 1.0 + 2.0 * (X / 50) ** -0.5 + noise
    found = fit(X, y, False, 0.0)
    _, _, rest = solve(X / X.max(), y[None], np.geomspace(*EXPONENTS, 20_000), False, 0.0)
    assert squares(found, X, y) <= rest.min() + 1e-6 * rest.min()


def test_the_end_is_predicted_at_30_percent_of_the_budget():
    """The sheet's bar: noise of 0.2 points, the final value within 0.3 points."""
    true, x = Curve(0.92, -0.35, 0.8, 100.0), np.arange(1, 31) * 33.0  # of 3300 steps
    errors, inside = [], 0
    for seed in range(40):
        y = true(x) + np.random.default_rng(seed).normal(0, 0.002, len(x))
        curve = fit(x, y, True, 1.0)
        low, high = np.quantile(resampled(x, y, curve, True, 1.0, 200)(3300), [0.025, 0.975])
        errors.append(abs(curve(3300) - true(3300)))
        inside += low <= true(3300) <= high
    assert np.median(errors) <= 0.003
    assert inside >= 32  # of 40: the interval of 95 % holds what it says, near enough


def test_the_interval_is_of_one_more_evaluation():
    """A power law with noise of 2 %: 95 % of what is evaluated later lies within; that of the curve alone holds less."""
    true, x, at = Curve(0.5, 1.0, 0.7, 50.0), np.arange(1, 21) * 50.0, np.array([1500.0])
    inside = of_curve = factors = 0.0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y, later = true(x) + rng.normal(0, 0.02, len(x)), true(1500.0) + rng.normal(0, 0.02)
        curve = fit(x, y, False, 0.0)
        many = resampled(x, y, curve, False, 0.0, 200)
        middle, down, up = (v[0] for v in interval(x, y, curve, many, at))
        below, above = widening(x, y, False, 0.0, 100)
        inside += middle - below * down <= later <= middle + above * up
        low, high = np.quantile(many(1500.0), [0.025, 0.975])
        of_curve += low <= later <= high
        factors += (below + above) / 120
    assert inside >= 55 and of_curve < inside - 5  # of 60; 57 are expected
    assert 1.0 < factors < 2.0


def test_a_run_that_has_outdone_its_predictions_widens_the_interval():
    """A run that begins slowly, as no power law does: its early fits predict too much, so the interval grows below."""
    x = np.arange(1, 13) * 10.0
    slow = 0.3 + 2.0 / (1.0 + np.exp((x - 60.0) / 15.0)) + np.random.default_rng(0).normal(0, 0.01, len(x))
    below, above = widening(x, slow, False, 0.0, 200)
    few = 2.2622 / 1.96  # Student's quantile, 9 degrees of freedom
    assert below > 2 and above == pytest.approx(few, rel=1e-3)
    mirrored = widening(x, 1.0 - slow / 3, True, 1.0, 200)
    assert mirrored[1] > 2 and mirrored[0] == pytest.approx(few, rel=1e-3)
    exact = widening(x, 1.0 + 2.0 * (x / 10) ** -0.5, False, 0.0, 50)  # no noise, nothing missed
    assert exact == pytest.approx((few, few), rel=1e-3)


def test_resampled_fits_are_seeded_and_flat_curves_are_flat():
    y = np.full(8, 2.0)
    curve = fit(X[:8], y, False, 0.0)
    assert curve(10_000) == pytest.approx(2.0)
    y = 2.0 + np.random.default_rng(0).normal(0, 0.1, 8)
    curve = fit(X[:8], y, False, 0.0)
    one, two = (resampled(X[:8], y, curve, False, 0.0, 50)(5000) for _ in range(2))
    assert np.array_equal(one, two) and one.std() > 0


# --- in runs ------------------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """A model whose evaluation loss follows a curve of its own evaluations."""

    def __init__(self, curve):
        super().__init__()
        self.weight, self.curve, self.seen = nn.Parameter(torch.zeros(())), curve, 0

    def forward(self, x, labels=None):
        if self.training:
            return {"loss": (self.weight - 1) ** 2, "logits": x[:, None].float()}
        self.seen += 1
        return {"loss": self.weight * 0 + self.curve(self.seen), "logits": x[:, None].float()}


ROWS = [{"x": float(i), "labels": 0} for i in range(8)]


def run(folder, callback, curve, **arguments):
    given = {
        "max_steps": 200, "eval_strategy": "steps", "eval_steps": 5, "logging_steps": 50, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant", **arguments,
    }  # fmt: skip
    options = {"train_dataset": ROWS, "eval_dataset": ROWS, "callbacks": [callback]}
    trainer = Trainer(Scripted(curve), TrainingArguments(str(folder), **given), **options)
    trainer.train()
    return trainer


def test_it_predicts_from_the_users_evaluations(tmp_path):
    callback = LearningCurveCallback()
    trainer = run(tmp_path, callback, lambda n: 1.0 + 2.0 * n**-0.5)
    fits = [row for row in callback.history if "predicted" in row]
    assert [row["step"] for row in fits] == list(range(25, 201, 5)) and len(callback.history) == 40
    end = 1.0 + 2.0 * 40**-0.5
    assert all(row["predicted"] == pytest.approx(end, abs=1e-3) for row in fits)
    assert fits[0]["limit"] == pytest.approx(1.0, abs=1e-2) and fits[0]["exponent"] == pytest.approx(0.5, abs=1e-2)
    assert callback.findings == [] or callback.findings[0]["step"] > 150  # it still gains until late
    assert any("hfgen/learning_curve/predicted" in row for row in trainer.state.log_history)


def test_it_stops_when_the_rest_is_not_worth_it(tmp_path, caplog):
    noise = np.random.default_rng(0).normal(0, 0.002, 100)

    def curve(n):
        return 1.0 + 2.0 * n**-2.0 + noise[n]

    told, stopped = LearningCurveCallback(), LearningCurveCallback(stop=True)
    with caplog.at_level(logging.INFO, "hfgen.learning_curve"):
        assert run(tmp_path, told, curve).state.global_step == 200
    assert "is not worth it: loss is predicted to end at" in caplog.text
    trainer = run(tmp_path, stopped, curve)
    assert trainer.state.global_step == told.findings[0]["step"] < 150
    (found,) = stopped.findings
    assert (found["kind"], found["level"]) == ("enough", "INFO") and found["confidence"] >= 0.95
    last = [row["sure"] for row in stopped.history if "sure" in row]
    assert min(last[-3:]) >= 0.95 and (len(last) == 3 or last[-4] < 0.95)  # three one after the other


def test_a_curve_that_still_falls_is_not_stopped(tmp_path):
    callback = LearningCurveCallback(stop=True)
    assert run(tmp_path, callback, lambda n: 3.0 - 0.04 * n, max_steps=150).state.global_step == 150
    assert callback.findings == []


def test_warm_up_points_are_left_out(tmp_path):
    callback = LearningCurveCallback()
    run(
        tmp_path, callback, lambda n: 9.0 if n <= 4 else 1.0 + 2.0 * n**-0.5, max_steps=100, warmup_steps=20,
        lr_scheduler_type="constant_with_warmup",
    )  # fmt: skip
    fits = [row for row in callback.history if "predicted" in row]
    assert fits[0]["step"] == 45 and fits[0]["predicted"] == pytest.approx(1.0 + 2.0 * 20**-0.5, abs=2e-3)


def test_a_decaying_learning_rate_is_warned_of_and_not_stopped(tmp_path, caplog):
    callback = LearningCurveCallback()
    run(tmp_path, callback, lambda n: 1.0 + 2.0 * n**-2.0, lr_scheduler_type="cosine")
    assert "lr_scheduler_type is 'cosine': a decaying learning rate" in caplog.text
    assert callback.findings == [] and callback.history[-1]["sure"] == 1.0
    with pytest.raises(ValueError, match="stop is True and args.lr_scheduler_type is 'linear'.*set 'constant'"):
        run(tmp_path, LearningCurveCallback(stop=True), lambda n: 1.0, lr_scheduler_type="linear")


def test_an_accuracy_of_a_named_set(tmp_path):
    scores = iter(0.9 - 0.5 * n**-0.7 for n in range(1, 100))
    callback = LearningCurveCallback(metric="accuracy", dataset="b")
    given = TrainingArguments(
        str(tmp_path), max_steps=40, eval_strategy="steps", eval_steps=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        Scripted(lambda n: 1.0), given, train_dataset=ROWS, eval_dataset={"a": ROWS[:2], "b": ROWS},
        compute_metrics=lambda p: {"accuracy": next(scores) if len(p.label_ids) == 8 else 0.5}, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.history[-1]["value"] == pytest.approx(0.9 - 0.5 * 20**-0.7)
    assert callback.history[-1]["limit"] == pytest.approx(0.9, abs=1e-3) and callback.fired == 16
    assert math.isfinite(callback.history[-1]["high"]) and callback.history[-1]["high"] <= 1.0


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_an_unknown_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match="metric is 'f1', and the evaluation has loss, runtime"):
        run(tmp_path, LearningCurveCallback(metric="f1"), lambda n: 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": 1}, "LearningCurveCallback.metric is 1; give a string"),
        ({"rising": "yes"}, "LearningCurveCallback.rising is 'yes'"),
        ({"best": math.nan}, "LearningCurveCallback.best is nan"),
        ({"worth": 0}, "LearningCurveCallback.worth is 0"),
        ({"patience": 0}, "LearningCurveCallback.patience is 0"),
        ({"points": 4}, "LearningCurveCallback.points is 4; give an integer of at least 5"),
        ({"stop": 1}, "LearningCurveCallback.stop is 1"),
        ({"draws": 3}, "LearningCurveCallback.draws is 3"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        LearningCurveCallback(**options)
