import pytest

from stable_opd.options import RolloutOptions, UpdateOptions


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (lambda: RolloutOptions(samples_per_prompt=-1), "samples_per_prompt of at least 0.* got -1"),
        (lambda: RolloutOptions(max_new_tokens=0), "max_new_tokens of at least 1.* and 0"),
        (lambda: UpdateOptions(micro_batch_tokens=0), "micro_batch_tokens of at least 1.* got 0"),
        (lambda: UpdateOptions(gradient_clip=0.0), "gradient_clip above 0.* 0.0, 0 and 3"),
        (lambda: UpdateOptions(gradient_clip=-1.0), "gradient_clip above 0.* -1.0, 0 and 3"),
        (lambda: UpdateOptions(compare_gradients_every=-1), "compare_gradients_every and .* of at least 0.* -1 and 3"),
        (lambda: UpdateOptions(max_skipped=-1), "max_skipped of at least 0.* and -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        options()


def test_smallest_settings_are_accepted():
    assert RolloutOptions(samples_per_prompt=0, max_new_tokens=1).max_new_tokens == 1
    assert UpdateOptions(micro_batch_tokens=1, gradient_clip=1e-9).micro_batch_tokens == 1
