from __future__ import annotations

import pytest
import torch
from torch import nn

from headrace_extractor.runner.hooks.capture import HookDidNotFireError, Site, capture


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states):
        self.calls += 1
        return (hidden_states + 1, "something else")


class Stack(nn.Module):
    def __init__(self, n_blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(n_blocks))

    def forward(self, x):
        for block in self.blocks:
            (x, _) = block(hidden_states=x)
        return x


def before(stack, number):
    return Site(name=f"in{number}", module=stack.blocks[number], is_input=True)


def behind(stack, number):
    return Site(name=f"out{number}", module=stack.blocks[number], is_input=False)


def test_inputs_given_by_keyword_and_outputs_in_tuples_are_captured():
    stack = Stack()
    with capture([before(stack, 1), behind(stack, 1)]) as captured:
        stack(torch.zeros(2))

    assert captured["in1"].tolist() == [1, 1]
    assert captured["out1"].tolist() == [2, 2]


@pytest.mark.parametrize("order", [1, -1])
def test_pass_stops_at_the_deepest_site_whatever_the_order(order):
    stack = Stack()
    sites = [behind(stack, 0), before(stack, 1)][::order]
    with capture(sites) as captured:
        stack(torch.zeros(2))
        pytest.fail("the pass went on")

    assert set(captured) == {"out0", "in1"}
    assert [block.calls for block in stack.blocks] == [1, 0, 0]


def test_hook_that_does_not_fire_is_an_error():
    stack = Stack()
    stray = Site(name="stray", module=Block(), is_input=False)
    with pytest.raises(HookDidNotFireError, match="stray"), capture([behind(stack, 0), stray]):
        stack(torch.zeros(2))


def test_site_passed_twice_is_an_error():
    stack = Stack()
    stack.blocks[1] = stack.blocks[0]
    with pytest.raises(HookDidNotFireError, match="twice"), capture([behind(stack, 0), behind(stack, 2)]):
        stack(torch.zeros(2))


def test_no_hook_outlives_the_block():
    stack = Stack()
    with capture([behind(stack, 0)]):
        stack(torch.zeros(2))
    with pytest.raises(ZeroDivisionError), capture([before(stack, 0), behind(stack, 2)]):
        raise ZeroDivisionError
    stack(torch.zeros(2))

    assert not any(block._forward_hooks or block._forward_pre_hooks for block in stack.blocks)
    assert [block.calls for block in stack.blocks] == [2, 1, 1]


def test_what_a_site_takes_of_its_tensor_is_taken_at_once():
    class Adder(nn.Module):
        def forward(self, x):
            return x.add_(1)

    model = nn.Sequential(nn.Identity(), Adder(), Adder())
    kept = Site(name="kept", module=model[1], is_input=False, take=torch.clone)
    last = Site(name="last", module=model[2], is_input=False)
    with capture([last, kept]) as captured:
        model(torch.zeros(2))

    assert captured["kept"].tolist() == [1, 1]
    assert captured["last"].tolist() == [2, 2]


def test_a_module_that_returns_no_tensor_is_an_error():
    class Silent(nn.Module):
        def forward(self, x):
            return None

    model = Silent()
    with pytest.raises(HookDidNotFireError, match="no tensor"), capture([Site(name="s", module=model, is_input=False)]):
        model(torch.zeros(2))
