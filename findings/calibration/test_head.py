"""Heads: their sizes, and logits that were scaled and capped by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lab.errors import UserError
from lab.subjects.anatomy import Decoder
from lab.subjects.head import Head, possible_heads
from lab.subjects.tiny import VOCABULARY, tiny

pytestmark = pytest.mark.calibration


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_the_head_knows_its_vocabulary(architecture):
    decoder = Decoder(tiny(architecture))
    assert decoder.unembedding.vocabulary == VOCABULARY != decoder.width


def test_logits_are_scaled_then_capped():
    """A raw logit of 4, times 3, over 2: 6; capped at 5: 5 tanh(1.2)."""
    linear = torch.nn.Linear(1, 2, bias=False)
    linear.weight.data = torch.tensor([[4.0], [-1.0]])
    hidden = torch.ones(1, 1)
    assert Head(linear)(hidden).tolist() == [[4, -1]]
    assert Head(linear, multiplier=3, divisor=2)(hidden).tolist() == [[6, -1.5]]
    capped = Head(linear, multiplier=3, divisor=2, cap=5).logits(hidden, torch.float32)
    assert capped[0].tolist() == pytest.approx([5 * math.tanh(1.2), -5 * math.tanh(0.3)])


def test_a_model_without_head_is_refused_in_one_line():
    model = tiny("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="has no head over a vocabulary"):
        possible_heads(model, model.config)
