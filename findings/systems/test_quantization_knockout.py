"""T-11 quantization beside T-2 layer knockout: is a corrupted layer worse than none?"""

from fixtures.claims import claim
from lab.statistics.correlations import spearman_by_order

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("T-11.40", "corrected", on=ORIGINAL)
def test_rounding_layers_1_to_3_hurts_more_than_removing_them(quantization, layer_knockout):
    """Rounding layer 1, 2 or 3 to 2 bits costs more nats than removing it; for layer 0 it is the reverse.

    4.8 against 0.6, 6.0 against 0.13 (the layer that is cheapest to remove), 3.4 against 0.16; 1.2 against 8.8. The two
    experiments read different texts; T-11.40b measures both on one. Errors that grow on their way through the model
    (T-11.9) cannot explain it.
    """
    rounded, removed = quantization.two_bit_damage, layer_knockout.loss_delta
    assert (rounded - removed).sel(layer=[1, 2, 3]).min() > 0
    assert rounded.sel(layer=0) < removed.sel(layer=0)


@claim("T-11.40d", "control")
def test_knockout_loss_does_not_foretell_two_bit_damage(quantization, layer_knockout):
    """Knockout losses do not foretell damage at 2 bits: Spearman over layers is below 0.4.

    -0.23 published. 0.4 is the limit of T-11.28 and T-11.37. On one text: T-11.40c.
    """
    assert spearman_by_order(layer_knockout.loss_delta, quantization.two_bit_damage) < 0.4
