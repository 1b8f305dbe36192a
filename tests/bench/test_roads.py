"""Roads: the paper's windows of whole blocks."""

from __future__ import annotations

import torch

from bench.roads import parallel_blocks, pick_windows
from tests.fxfusion.recovery.own_text import model_of, own_text


def test_windows_are_picked_by_their_largest_then_their_summed_dependency() -> None:
    matrix = torch.full((6, 6), 0.5).triu(1)
    matrix[3, 4] = 0.1
    matrix[0, 1] = 0.1
    matrix[1, 2] = 0.3
    assert pick_windows(matrix, 2) == [(0, 1), (3, 4)], "equal: the earlier one first; 1-2 overlaps"
    matrix[0, 1] = 0.2
    assert pick_windows(matrix, 2)[0] == (3, 4)
    tied = torch.full((4, 4), 0.2).triu(1)
    tied[1, 3] = 0.0
    assert pick_windows(tied, 3) == [(1, 2, 3)], "the largest entries are equal: the sum decides"


def test_parallel_blocks_all_read_the_windows_input() -> None:
    model, ids = model_of(), own_text()[0][:2]
    layers, calls = model.model.layers, []
    hook = layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        hook.remove()
        found = parallel_blocks(model, [(1, 2)])(ids)
        x, kwargs = calls[0]
        y = x + (layers[1](x, **kwargs) - x) + (layers[2](x, **kwargs) - x)
        expected = model.lm_head(model.model.norm(layers[3](y, **kwargs)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-2), "it is another function"
    assert len(model.model.layers) == 4 and model.model.layers is layers, "the model stays as it is"
