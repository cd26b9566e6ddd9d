from __future__ import annotations

import numpy as np
import pytest

from nmoe_edge.protocol.classmix import MAX_ROWS, MIN_ROWS, PRIOR_ROWS, ClassMix, class_mix, cross_adapted, shrunk_mix

SKEWED = np.array([0.6, 0.25, 0.1, 0.04, 0.01])


def answers(rows, mix=SKEWED, seed=0, noise=1.2):
    """Calibrated answers without a prior to rows of this class mix, and the true classes."""
    random = np.random.default_rng(seed)
    truth = random.choice(len(mix), rows, p=mix)
    x = np.eye(len(mix))[truth] + random.normal(0, noise, (rows, len(mix)))
    scores = x / noise**2  # log p(x | class), up to a constant
    p = np.exp(scores - scores.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True)).astype(np.float32), truth


def test_a_skewed_mix_is_recovered_within_a_few_points():
    p, truth = answers(MAX_ROWS)
    seen = np.bincount(truth, minlength=5) / len(truth)
    assert np.abs(class_mix(p) - seen).max() < 0.05
    assert class_mix(p).sum() == pytest.approx(1)


def test_an_even_mix_stays_even():
    p, _ = answers(MAX_ROWS, np.full(5, 0.2))
    assert class_mix(p) == pytest.approx(np.full(5, 0.2), abs=0.06)


def test_a_class_that_was_never_seen_keeps_a_share():
    p = np.tile(np.array([[1.0, 0.0, 0.0]]), (500, 1))
    assert class_mix(p).min() > 0


def test_reweighted_answers_are_right_more_often():
    learned, new = answers(1000, seed=1), answers(3000, seed=2)
    mix = ClassMix(5)
    mix.reweight(learned[0])
    plain = (new[0].argmax(1) == new[1]).mean()
    weighed = (mix.reweight(new[0]).argmax(1) == new[1]).mean()
    assert weighed > plain + 0.05


def test_reweighting_multiplies_by_the_mix_and_normalises():
    mix = ClassMix(5)
    mix.reweight(answers(1000)[0])
    before = mix.mix.copy()
    p, _ = answers(50, seed=3)
    product = p * before
    found = mix.reweight(p)
    assert found.dtype == np.float32
    assert found == pytest.approx(product / product.sum(1, keepdims=True), rel=1e-5)


def test_too_few_rows_leave_an_answer_unchanged():
    mix = ClassMix(5)
    p, _ = answers(MIN_ROWS)
    for row in p[:-1]:
        assert mix.reweight(row[None]) == pytest.approx(row[None], rel=1e-6)
    assert mix.mix is None
    mix.reweight(p[-1:])
    assert mix.mix == pytest.approx(shrunk_mix(p, class_mix(p)))


def test_a_request_is_not_reweighted_by_what_is_learned_from_itself():
    mix = ClassMix(5)
    p, _ = answers(1000)
    assert mix.reweight(p) == pytest.approx(p, rel=1e-6)
    assert mix.mix is not None


def test_the_mix_learns_from_the_original_answers_and_not_from_reweighted_ones():
    mix = ClassMix(5)
    p, _ = answers(1500)
    for start in range(0, len(p), 100):
        mix.reweight(p[start : start + 100])
    assert np.array_equal(mix.saved_rows(), p)
    assert mix.mix == pytest.approx(class_mix(p), abs=0.03)  # each estimate continues from the last one


def test_at_most_max_rows_are_kept_and_the_oldest_are_dropped():
    mix = ClassMix(5)
    p, _ = answers(MAX_ROWS + 500)
    for start in range(0, len(p), 250):
        mix.reweight(p[start : start + 250])
    assert mix.rows == MAX_ROWS
    assert np.array_equal(mix.saved_rows(), p[500:])


def test_the_mix_follows_a_camera_that_is_moved():
    mix = ClassMix(5)
    mix.reweight(answers(MAX_ROWS, noise=0.6)[0])
    mix.reweight(answers(MAX_ROWS, SKEWED[::-1], seed=4, noise=0.6)[0])
    assert mix.mix == pytest.approx(SKEWED[::-1], abs=0.06)


def test_a_new_mix_has_no_rows_to_save():
    assert ClassMix(5).saved_rows().shape == (0, 5)


def test_saved_rows_restore_the_mix():
    first, second = ClassMix(5), ClassMix(5)
    first.reweight(answers(600)[0])
    second.restore(first.saved_rows())
    assert second.rows == 600
    assert second.mix == pytest.approx(first.mix)


def test_too_few_saved_rows_make_no_mix():
    mix = ClassMix(5)
    mix.restore(answers(MIN_ROWS - 1)[0])
    assert (mix.rows, mix.mix) == (MIN_ROWS - 1, None)


def test_only_the_newest_saved_rows_are_restored():
    mix = ClassMix(5)
    p, _ = answers(MAX_ROWS + 7)
    mix.restore(p)
    assert np.array_equal(mix.saved_rows(), p[7:])


@pytest.mark.parametrize(
    "rows",
    [
        np.full((3, 4), 0.25),
        np.full(5, 0.2),
        np.full((2, 3, 5), 0.2),
        np.array([[0.2, 0.2, np.nan, 0.2, 0.2]]),
        np.array([[np.inf, 0.0, 0.0, 0.0, 0.0]]),
        np.array([[0.6, 0.6, -0.2, 0.0, 0.0]]),
        np.zeros((2, 5)),
    ],
    ids=["narrow", "one row", "deep", "nan", "inf", "negative", "zeros"],
)
def test_saved_rows_that_are_not_probabilities_are_refused_and_change_nothing(rows):
    mix = ClassMix(5)
    mix.restore(answers(300)[0])
    before = mix.mix.copy()
    with pytest.raises(ValueError, match="rows"):
        mix.restore(rows)
    assert mix.rows == 300
    assert np.array_equal(mix.mix, before)


def test_few_rows_hardly_move_the_mix():
    p, _ = answers(1, seed=6)
    uniform = np.full(5, 0.2)
    assert np.abs(class_mix(p) - uniform).max() < 0.1
    assert np.abs(class_mix(np.zeros((0, 5))) - uniform).max() == pytest.approx(0)


def test_the_estimate_maximises_the_likelihood_of_the_rows_and_the_even_ones():
    p, _ = answers(400, seed=7)
    mix = class_mix(p, steps=500)

    def likelihood(mix):
        return np.log(p @ mix).sum() + PRIOR_ROWS / 5 * np.log(mix).sum()

    for moved in np.random.default_rng(0).dirichlet(np.ones(5), 50):
        assert likelihood(0.9 * mix + 0.1 * moved) < likelihood(mix)


@pytest.mark.parametrize("rows", [10, 30, 300, 3000])
def test_rows_of_an_even_mix_leave_answers_almost_as_they_are(rows):
    even = np.full(5, 0.2)
    worst = 0.0
    for seed in range(5):
        p, _ = answers(rows, even, seed=seed)
        worst = max(worst, np.abs(shrunk_mix(p, class_mix(p)) - even).max())
    assert worst < 0.08


def test_a_clear_mix_is_trusted():
    p, _ = answers(500, np.array([0.9, 0.1, 0, 0, 0]), noise=0.5)
    mix = class_mix(p)
    assert shrunk_mix(p, mix) == pytest.approx(mix, abs=0.02)


def test_more_rows_of_the_same_mix_are_trusted_more():
    p, _ = answers(2000, seed=12)
    distances = [np.abs(shrunk_mix(p[:n], class_mix(p[:n])) - 0.2).max() for n in (20, 200, 2000)]
    assert distances == sorted(distances)
    assert shrunk_mix(p[:, :1], np.ones(1)).tolist() == [1.0]


def test_adapted_answers_do_not_depend_on_the_order_of_rows():
    p, _ = answers(501, seed=8)
    random = np.random.default_rng(0)
    for seed in range(3):
        order = random.permutation(len(p))
        noise = 1 + 1e-7 * random.normal(size=p.shape)  # another batch size rounds otherwise
        shuffled = cross_adapted((p * noise)[order], seed)
        assert np.array_equal(cross_adapted(p[order], seed), cross_adapted(p, seed)[order])
        assert shuffled == pytest.approx(cross_adapted(p, seed)[order], abs=0.01)


def test_rows_sorted_by_class_are_adapted_well():
    p, truth = answers(2000, seed=9)
    order = np.argsort(truth)
    plain = (p.argmax(1) == truth).mean()
    assert (cross_adapted(p[order], 0).argmax(1) == truth[order]).mean() > plain + 0.05


def test_two_alternating_classes_are_adapted_well():
    p, truth = answers(1000, np.array([0.5, 0.5, 0, 0, 0]), seed=10)
    alternating = np.empty(1000, int)
    order = np.argsort(truth, kind="stable")
    alternating[0::2] = order[:500]
    alternating[1::2] = order[500:][::-1]
    plain = (p.argmax(1) == truth).mean()
    assert (cross_adapted(p[alternating], 0).argmax(1) == truth[alternating]).mean() > plain


def test_each_seed_draws_other_halves_and_the_same_seed_the_same():
    p, _ = answers(300, seed=11)
    assert np.array_equal(cross_adapted(p, 1), cross_adapted(p, 1))
    assert not np.array_equal(cross_adapted(p, 1), cross_adapted(p, 2))


def test_a_single_row_has_no_other_half_and_stays_as_it_is():
    p, _ = answers(1)
    assert np.array_equal(cross_adapted(p, 0), p)
    assert cross_adapted(np.zeros((0, 5)), 0).shape == (0, 5)
