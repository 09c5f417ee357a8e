"""Fits an encoded sample to the longest allowed sequence without ever breaking an image or a clip."""

from __future__ import annotations

import dataclasses

from theworld_train.batch import EncodedSample


def fit_to_budget(sample: EncodedSample, max_length: int) -> EncodedSample | None:
    """Cuts a sample at its end to at most `max_length` tokens.

    Image and world blocks are indivisible: a cut that would break or remove any of their tokens is not made, as tokens
    and pixels would no longer match.

    Args:
        sample: The encoded sample.
        max_length: Tokens that it may have.

    Returns:
        The sample, cut if it was too long; None if it does not fit, or if no supervised token would be left. The first
        token does not count as supervised, since nothing precedes it to predict it from.
    """
    if sample.input_ids.shape[0] > max_length:
        if sample.indivisible[max_length:].any():
            return None
        sample = dataclasses.replace(
            sample,
            input_ids=sample.input_ids[:max_length],
            token_type_ids=sample.token_type_ids[:max_length],
            supervised=sample.supervised[:max_length],
            indivisible=sample.indivisible[:max_length],
            trimmed=sample.input_ids.shape[0] - max_length,
        )
    return sample if sample.supervised[1:].any() else None
