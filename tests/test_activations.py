"""Activations of a language model that are computed by one kernel give what its own give."""

import torch
from torch import nn
from transformers.activations import NewGELUActivation

from flashsloth import FlashSlothModel
from flashsloth.model.backbones import fuse_activations
from tiny_models import tiny_config


def test_gelu_of_eight_operations_becomes_one_with_the_same_values():
    holder = nn.ModuleDict({"act": NewGELUActivation()})
    values = torch.linspace(-12, 12, 4001)
    before = holder["act"](values)
    fuse_activations(holder)
    assert not isinstance(holder["act"], NewGELUActivation)
    torch.testing.assert_close(holder["act"](values), before, atol=1e-6, rtol=1e-6)


def test_no_model_keeps_the_slow_form():
    model = FlashSlothModel(tiny_config("phi"))
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert any(type(module).__name__ == "GELUTanh" for module in model.language_model.modules())
