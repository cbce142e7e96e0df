"""A decoder's parts, found without knowing the architecture, are the model's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from lab.errors import UserError
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import ARCHITECTURES, LAYERS, VOCABULARY, tiny

pytestmark = pytest.mark.calibration

IDS = torch.randint(1, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(7))


def replayed(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Final states of the captured calls, layer after layer."""
    captured = decoder.capture(ids)
    hidden = captured.entry
    for layer, (args, kwargs) in zip(decoder.layers, captured.calls, strict=True):
        output = layer(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_layers_give_the_models_own_logits(architecture):
    """Entry, captured calls, final norm and head, put together again, are bitwise the model."""
    model = tiny(architecture)
    decoder = Decoder(model)
    own = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(decoder.norm_and_head(replayed(decoder, IDS)), own, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_arguments_alike_for_all_rows_are_kept_once(architecture):
    """Without padding mask no argument of these models depends on the row, so none is repeated for k states."""
    decoder = Decoder(tiny(architecture))
    for layer in range(decoder.n_layers):
        args, kwargs = decoder.capture(IDS).call(layer, 4)
        tensors = [leaf for leaf in flat([args, kwargs]) if isinstance(leaf, torch.Tensor)]
        assert tensors
        assert all(tensor.shape[0] == 1 for tensor in tensors)


def flat(nested):
    """Leaves of nested tuples, lists and dicts."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, (tuple, list)):
        return [leaf for item in nested for leaf in flat(item)]
    return [nested]


class RowBiased(nn.Module):
    """A layer that needs an argument per row: it adds what the caller hands it for each row."""

    def forward(self, hidden, *, row_bias):
        return hidden + row_bias


class RowBiasedModel(nn.Module):
    """Wraps a Llama so that every layer is also handed a value per row, as models with per-layer inputs do."""

    def __init__(self):
        super().__init__()
        self.inner = tiny("llama")
        self.inner.model.layers = nn.ModuleList(RowBiased() for _ in range(LAYERS))
        self.config = self.inner.config

    def forward(self, input_ids, **_):
        rows = input_ids[:, 0].float()[:, None, None]
        hidden = self.inner.model.embed_tokens(input_ids)
        for layer in self.inner.model.layers:
            hidden = layer(hidden, row_bias=rows)
        return CausalLMOutput(logits=self.inner.lm_head(self.inner.model.norm(hidden)))

    def get_decoder(self):
        return self.inner.model

    def get_input_embeddings(self):
        return self.inner.model.embed_tokens

    def get_output_embeddings(self):
        return self.inner.lm_head


def test_arguments_that_depend_on_the_row_are_tiled():
    """k stacked states see the row's own argument k times, in the order of the stack."""
    captured = Decoder(RowBiasedModel()).capture(IDS)
    _, kwargs = captured.call(2, 3)
    expected = IDS[:, 0].float()[:, None, None].repeat(3, 1, 1)
    torch.testing.assert_close(kwargs["row_bias"], expected, rtol=0, atol=0)


class AddsFolded(nn.Module):
    """Adds the first of a row's two values."""

    def forward(self, hidden, *, row_bias):
        return hidden + row_bias.view(-1, 2)[:, :1, None]


class FoldedRowsModel(RowBiasedModel):
    """Hands out the values of all rows in one axis, two for each, as models fold heads and rows."""

    def __init__(self):
        super().__init__()
        self.inner.model.layers = nn.ModuleList(AddsFolded() for _ in range(LAYERS))

    def forward(self, input_ids, **_):
        hidden = self.inner.model.embed_tokens(input_ids)
        folded = torch.stack([input_ids[:, 0], input_ids[:, 1]], dim=1).float().flatten()
        for layer in self.inner.model.layers:
            hidden = layer(hidden, row_bias=folded)
        return CausalLMOutput(logits=self.inner.lm_head(self.inner.model.norm(hidden)))


def test_arguments_with_rows_folded_into_another_axis_are_noticed():
    """They cannot be tiled for other numbers of states, but one pass would take them for alike in all rows."""
    decoder = Decoder(FoldedRowsModel())
    with pytest.raises(RuntimeError, match="must match"):
        decoder.capture(IDS)


def passes(decoder, ids, monkeypatch):
    """Forward passes of the model in a capture of these ids."""
    seen, record = [], decoder._record
    monkeypatch.setattr(decoder, "_record", lambda rows, about: seen.append(len(rows)) or record(rows, about))
    decoder.capture(ids)
    return seen


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, [1]), (7, [7]), (3, [3, 1]), (4, [4, 1])], ids=["alone", "other", "tokens", "head"]
)
def test_one_pass_is_enough_where_no_axis_has_as_many_entries_as_rows(rows, expected, monkeypatch):
    """Nine tokens and heads of eight: three rows, or four, may be an axis of any of these."""
    ids = IDS[:1].repeat(rows, 1)
    assert passes(Decoder(tiny("qwen3")), ids, monkeypatch) == expected


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "granite"])
def test_one_pass_finds_what_two_find(architecture, monkeypatch):
    decoder = Decoder(tiny(architecture))
    ids = torch.arange(1, 78).reshape(7, 11)
    once = decoder.capture(ids)
    monkeypatch.setattr("lab.subjects.anatomy.may_depend_on_row", lambda calls, rows: True)
    twice = decoder.capture(ids)
    for one, two in zip(flat(once.recorded), flat(twice.recorded), strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_a_capture_that_failed_leaves_nothing_to_the_next():
    """Layers that are not called are noticed though they were called before."""
    decoder = Decoder(tiny("llama"))
    expected = decoder.capture(IDS)
    with pytest.raises(IndexError):
        decoder.capture(torch.full((1, 4), VOCABULARY))
    assert torch.equal(decoder.capture(IDS).entry, expected.entry)
    assert not decoder._recorded, "no batch is held"


def test_the_text_tower_of_a_multimodal_model_is_found():
    """In Gemma 3 with vision the layers are the text tower's, although the vision tower has as many."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny("gemma3_text").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 8}, image_token_id=VOCABULARY - 1
    )
    model = Gemma3ForConditionalGeneration(config).float().eval()
    decoder = Decoder(model)
    ids = IDS.remainder(VOCABULARY - 1)
    assert decoder.layers[0] is model.model.language_model.layers[0]
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(decoder.norm_and_head(replayed(decoder, ids)), own, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_capture_leaves_the_model_as_it_was(architecture):
    """The layers are back in their list, no hook is left, and the model's logits do not change."""
    model = tiny(architecture)
    before = model(input_ids=IDS, use_cache=False).logits
    decoder = Decoder(model)
    decoder.capture(IDS)
    assert list(decoder_list(model)) == decoder.layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, before, rtol=0, atol=0)


def decoder_list(model):
    """The model's list of layers under the names it has in these architectures."""
    inner = model.get_decoder()
    return inner.h if hasattr(inner, "h") else inner.layers


def test_hooks_on_layers_do_not_see_the_capture():
    """A hook that someone else has set on a layer sees real activations only."""
    decoder = Decoder(tiny("llama"))
    calls = []
    decoder.layers[1].register_forward_hook(lambda module, args, output: calls.append(output))
    decoder.capture(IDS)
    assert not calls


def test_a_failing_forward_leaves_the_layers_restored():
    """Ids outside the vocabulary make the embedding fail; the layers come back into their list all the same."""
    model = tiny("llama")
    decoder = Decoder(model)
    with pytest.raises(IndexError):
        decoder.capture(torch.full((1, 4), VOCABULARY))
    assert list(decoder_list(model)) == decoder.layers


def test_a_model_without_a_list_of_layers_is_refused():
    """One line that names the model and says what was looked for."""
    model = tiny("llama")
    model.config.num_hidden_layers = 17
    with pytest.raises(UserError, match="no list of 17 decoder layers found in LlamaForCausalLM"):
        Decoder(model)


def test_a_head_of_unknown_form_is_refused():
    """A model whose logits are not the head of its normed final state is not measured wrongly but refused."""
    model = tiny("llama")
    other_head = nn.Linear(model.config.hidden_size, VOCABULARY, bias=False)
    model.get_output_embeddings = lambda: other_head
    with pytest.raises(UserError, match="do not give the model's own logits"):
        Decoder(model)


def test_a_model_without_a_head_is_refused():
    """A bare decoder has no logits; the message says how to load it."""
    with pytest.raises(UserError, match="load it as a causal language model"):
        Decoder(tiny("llama").model)
