"""Windows over mixers of every kind: a mixer is whatever is not token-wise, with or without a linear layer in sight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfusion
from fxfusion.backend import forget_reports, last_reports
from tests.helpers import HIDDEN, Block, Gated, Rms, branch_of, error_of, match, randomise, tokens

SEQ = 5
Mix = Callable[[Any, Tensor], Tensor]


def lin(inside: int = HIDDEN, outside: int = HIDDEN) -> nn.Linear:
    return nn.Linear(inside, outside)


def attention() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(HIDDEN, 2, batch_first=True)


def exponential(m: Any, n: Tensor) -> Tensor:
    state, found = n[:, 0], [n[:, 0]]
    for place in range(1, SEQ):
        state = 0.9 * state + 0.1 * n[:, place]
        found.append(state)
    return torch.stack(found, 1)


def recurrence(m: Any, n: Tensor) -> Tensor:
    state, found = torch.zeros_like(n[:, 0]), []
    for place in range(SEQ):
        state = torch.tanh(m.one(n[:, place]) + m.two(state))
        found.append(state)
    return torch.stack(found, 1)


MIXERS: dict[str, tuple[Mix, dict[str, Callable[[], nn.Module]]]] = {
    "attention of torch": (lambda m, n: m.one(n, n, n, need_weights=False)[0], {"one": attention}),
    "Fourier": (lambda m, n: torch.fft.fft2(n, dim=(-2, -1)).real, {}),
    "real Fourier": (lambda m, n: torch.fft.irfft(torch.fft.rfft(n, dim=1) * 0.5, n=SEQ, dim=1), {}),
    "convolution": (lambda m, n: m.one(n.mT).mT, {"one": lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)}),
    "pooling": (lambda m, n: F.avg_pool1d(n.mT, 3, 1, 1).mT - n, {}),
    "mean": (lambda m, n: n.mean(1, keepdim=True).expand_as(n), {}),
    "mean between linear layers": (lambda m, n: m.two(m.one(n).mean(1, True)).expand_as(n), {"one": lin, "two": lin}),
    "LSTM": (lambda m, n: m.two(m.one(n)[0]), {"one": lambda: nn.LSTM(HIDDEN, HIDDEN, batch_first=True), "two": lin}),
    "recurrence by hand": (recurrence, {"one": lin, "two": lin}),
    "exponential mean": (exponential, {}),
    "shift": (lambda m, n: F.pad(n, (0, 0, 1, 0))[:, :-1] - n, {}),
    "linear over tokens": (
        lambda m, n: m.two(F.gelu(m.one(n.mT))).mT,
        {"one": lambda: lin(SEQ, 6), "two": lambda: lin(6, SEQ)},
    ),
    "softmax over tokens": (lambda m, n: n.softmax(1), {}),
    "reversal": (lambda m, n: n[:, torch.arange(SEQ - 1, -1, -1)], {}),
}


class Mixer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.mix, modules = MIXERS[name]
        self.norm = nn.LayerNorm(HIDDEN)
        for key, make in modules.items():
            setattr(self, key, make())

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self, self.norm(x))


class Layer(nn.Module):
    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.mixer, self.ffn = Mixer(name), Block(Rms(HIDDEN), Gated(HIDDEN, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x + self.mixer(x))


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(name, 12 + 4 * index) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def hoisted(model: Model, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = x + layer.mixer(x)
    return x + sum(branch_of(layer.ffn)(x) for layer in model.layers)


@pytest.fixture
def _recurrent_layers() -> Any:
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.mark.usefixtures("_recurrent_layers")
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *((name, False) for name in MIXERS),
        *((name, True) for name in ("attention of torch", "Fourier", "LSTM", "mean")),
    ],
)
def test_a_window_over(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    forget_reports()
    model = Model(name).double().requires_grad_(False)
    randomise(model)
    x = tokens()
    options = {"compiler": "eager", "policy": {"windows": [[0, 1, 2]]}, "strict": True}
    compiled = torch.compile(model, backend=fxfusion.ffn_fusion, options=options, dynamic=dynamic)
    assert error_of(compiled(x), hoisted(model, x)) < 1e-10
    assert error_of(model(x), hoisted(model, x)) > 1e-3, "the comparison shows nothing"
    (report,) = last_reports()
    assert [len(group.members) for group in report.groups] == [3]


def test_a_branch_that_treats_each_token_by_itself_is_no_mixer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffns = nn.ModuleList(Block(Rms(HIDDEN), Gated(HIDDEN, 12)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.ffns[0](x)
            x = x + F.layer_norm(x, (HIDDEN,)).sin()
            return self.ffns[1](x)

    model = Scaled().double()
    randomise(model)
    found = match(model, tokens())
    assert not found.mixers and [ffn.name for ffn in found.ffns] == ["ffns.0.ffn", "ffns.1.ffn"]
