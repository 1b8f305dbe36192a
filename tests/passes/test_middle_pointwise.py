"""middle_pointwise: constants of the activation lie side by side in a wide one, or do not fit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.errors import RefusalCode
from tests.helpers import Block, Plain, Rms, assert_exact, assert_fuses, error_of, fuse, parallel_form, tokens
from tests.passes.test_check_group import pair, refused


class Learned(nn.Module):
    """An activation with a learned number, or one for each channel, as several families have."""

    def __init__(self, width: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.alpha = nn.Parameter(torch.ones(shape))

    def forward(self, n: Tensor) -> Tensor:
        h = self.up(n)
        alpha = F.softplus(self.alpha)
        return self.down(torch.where(h > 0, alpha * h * h, (torch.expm1(h) - h) * alpha))


@pytest.mark.parametrize("per_channel", [False, True])
def test_learned_activations_lie_side_by_side(per_channel: bool) -> None:
    widths = (12, 4, 8)
    model = pair(*(Block(Rms(8), Learned(width, (width,) if per_channel else (1,))) for width in widths))
    fused, report = fuse(model, tokens(), verify="numeric")
    assert [(group.form, len(group.members)) for group in report.groups] == [("concatenated", 3)]
    assert_exact(fused(tokens()), parallel_form(model, tokens()), torch.float64)
    wanted = parallel_form(model, tokens())
    with torch.no_grad():
        model.layers[1].ffn.alpha.add_(0.5)
    assert error_of(parallel_form(model, tokens()), wanted) > 1e-4, "the vectors make no difference"


class Scaled(Plain):
    """A per-channel constant inside the middle."""

    def __init__(self, shape: Sequence[int], hidden: int = 8, width: int = 12) -> None:
        super().__init__(hidden, width)
        self.scale = nn.Parameter(torch.ones(*shape))

    def forward(self, n: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(n)) * self.scale)


@pytest.mark.parametrize("shape", [(12,), (1,), (1, 12), (1, 1, 12)])
def test_constants_per_intermediate_channel_are_concatenated(shape: tuple[int, ...]) -> None:
    assert_fuses(pair(*(Block(Rms(8), Scaled(shape)) for _ in range(2))), tokens())


class Cast(Plain):
    """Computes its activation in float32 and goes back to the dtype of another tensor, of any shape."""

    def __init__(self, other: nn.Parameter | None = None, hidden: int = 8, width: int = 12) -> None:
        super().__init__(hidden, width)
        self.other = self.fc2.weight if other is None else other

    def forward(self, n: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(n).float()).type_as(self.other))


class BySize(Plain):
    """Scales by its own width, a number that the trace computes."""

    def forward(self, n: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(n)) / self.fc1.weight.size(0))


def test_constants_that_cannot_be_concatenated_along_the_channels() -> None:
    words = "is not one number or one per intermediate channel"
    refused(pair(*(Block(Rms(8), Cast()) for _ in range(2))), RefusalCode.NOT_POINTWISE, words)
    refused(pair(*(Block(Rms(8), BySize(width=width)) for width in (12, 4))), RefusalCode.NOT_POINTWISE, words)


def test_a_dtype_that_is_read_off_a_shared_tensor_of_any_shape() -> None:
    shared = nn.Parameter(torch.empty(3, 5, dtype=torch.float64))
    model, x = pair(*(Block(Rms(8), Cast(shared)) for _ in range(2))), tokens()
    fused, report = fuse(model, x)
    assert [len(group.members) for group in report.groups] == [2]
    assert error_of(fused(x), parallel_form(model, x)) < 1e-6
