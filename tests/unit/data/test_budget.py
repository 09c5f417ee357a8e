"""Too long samples lose their end, never a part of an image."""

from __future__ import annotations

import pytest
import torch

from theworld_train.batch import EncodedSample
from theworld_train.data.budget import fit_to_budget


def sample(layout: str) -> EncodedSample:
    """Builds a sample from a letter for each token: q question, i image block, a answer."""
    ids = torch.arange(len(layout))
    image = torch.tensor([letter == "i" for letter in layout])
    answer = torch.tensor([letter == "a" for letter in layout])
    return EncodedSample(ids, image.long(), answer, image, torch.zeros(1, 3, 2, 2), (torch.zeros(1, 3, 2, 2),))


def test_a_sample_that_fits_is_left_alone() -> None:
    fitting = sample("iiqaa")
    assert fit_to_budget(fitting, 5) is fitting


def test_text_is_cut_at_the_end_and_pixels_stay() -> None:
    cut = fit_to_budget(sample("iiqaaaa"), 5)
    assert cut is not None
    assert [t.shape[0] for t in (cut.input_ids, cut.token_type_ids, cut.supervised, cut.indivisible)] == [5] * 4
    assert cut.input_ids.tolist() == [0, 1, 2, 3, 4]
    assert cut.pixel_values is not None
    assert len(cut.world_frames) == 1


@pytest.mark.parametrize("max_length", range(1, 9))
def test_no_cut_ever_meets_a_block(max_length: int) -> None:
    layout = "qaiiiqaa"
    cut = fit_to_budget(sample(layout), max_length)
    assert (cut is None) == (max_length < 5)
    if cut is not None:
        assert int(cut.indivisible.sum()) == 3


def test_a_block_at_the_very_end_of_the_budget_fits() -> None:
    assert fit_to_budget(sample("qaiiiq"), 5) is not None
    assert fit_to_budget(sample("qaiiiq"), 4) is None


def test_a_sample_without_a_supervised_token_left_does_not_fit() -> None:
    assert fit_to_budget(sample("iiqqaa"), 4) is None
    assert fit_to_budget(sample("iiqqaa"), 5) is not None


def test_a_sample_without_any_supervised_token_never_fits() -> None:
    assert fit_to_budget(sample("iiqq"), 100) is None


def test_the_first_token_does_not_count_as_supervised() -> None:
    assert fit_to_budget(sample("aqq"), 100) is None
