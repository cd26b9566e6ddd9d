from __future__ import annotations

import pytest
import torch

from nmoe_train.data.views import VIEWS, light, strong

IMAGES = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_view_keeps_shape_and_range_and_depends_on_the_seed_only(name, channels):
    x = IMAGES[:, :channels]
    views = [VIEWS[name](x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert views[0].shape == x.shape
    assert views[0].dtype == torch.float32
    assert views[0].min() >= 0
    assert views[0].max() <= 255.001
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_a_light_view_shifts_and_mirrors_and_keeps_the_brightness():
    flat = torch.full((200, 1, 16, 16), 200, dtype=torch.uint8)
    flat[:, :, :, :8] = 100
    views = light(flat, torch.Generator().manual_seed(0))
    middle = views[:, 0, 8, 6:10].mean(1)
    assert middle.min() >= 100
    assert middle.max() <= 200.01
    mirrored = views[:, 0, 8, 4] > views[:, 0, 8, 12]
    assert 60 < mirrored.sum() < 140


def test_a_strong_view_makes_a_fifth_grey_and_keeps_the_colours_of_a_sixth():
    red = torch.zeros(1000, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 200
    views = strong(red, torch.Generator().manual_seed(0))[:, :, 4, 4]
    grey = (views[:, 0] - views[:, 1]).abs() < 1
    unchanged = (views - torch.tensor([200.0, 0, 0])).abs().max(1).values < 1
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert unchanged.float().mean().item() == pytest.approx(0.2 * 0.8, abs=0.04)
