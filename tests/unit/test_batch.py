"""A batch that was laid into one tensor comes back as it was."""

from __future__ import annotations

import dataclasses

import torch

from theworld_train.batch import Batch

BATCH = Batch(
    input_ids=torch.arange(6).view(2, 3),
    attention_mask=torch.ones(2, 3, dtype=torch.int64)[:, ::1],
    token_type_ids=torch.arange(12).view(3, 4).T[:2, :3],  # not contiguous
    labels=torch.full((2, 3), -100),
    pixel_values=None,
    world_frames=torch.zeros(0, 3, 8, 8),
    world_frame_counts=(5, 1),
    sample_ids=("a", "b"),
    kinds=("x", "y"),
    image_states=torch.randn(1, 5, 3).to(torch.bfloat16),  # 30 bytes: the next one would begin at no multiple of 4
    images_known=(True, False),
    world_latents=torch.randn(2, 16, 1, 1),
    blocks_known=(True, False),
)


def test_flat_batch_comes_back():
    back = BATCH.flatten().batch()
    for field in dataclasses.fields(Batch):
        ours, theirs = getattr(back, field.name), getattr(BATCH, field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype is theirs.dtype
            assert torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


def test_flat_batch_is_a_single_tensor():
    flat = BATCH.flatten()
    assert not any(isinstance(value, torch.Tensor) for value in flat.rest.values())
    assert {part.untyped_storage().data_ptr() for part in (flat.batch().labels, flat.batch().world_latents)} == {
        flat.data.untyped_storage().data_ptr()
    }
