"""T-11 quantization: whole models under round-to-nearest and the methods of libraries.

All linear maps of all layers are quantized; embedding and head stay in 16 bits, also for torchao, whose default takes
the head too (the memory figures are those of its default). Weights that were stored in few bits do not tell what
full-precision weights lose at 4 bits: claims that need that say so. GPTQ and k-quants: `test_quantization_encoders`.
"""

from fixtures.claims import claim, not_applicable

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("T-11.17", "published", on=ORIGINAL)
def test_order_of_the_methods(quantization):
    """Methods by rising damage: GPTQ-8, RTN-8, LLM.int8, torchao INT8, NF4, GPTQ-4, RTN-4, RTN-3.

    The three smallest (0.0021, 0.0023, 0.0050 nat) are within each other's noise on one text of 4096 tokens.
    """
    assert sorted(quantization.methods, key=quantization.method_damage) == [
        "gptq_w8a16",
        "rtn_8",
        "bitsandbytes_int8",
        "torchao_int8_weight_only",
        "bitsandbytes_nf4",
        "gptq_w4a16",
        "rtn_4",
        "rtn_3",
    ]


@claim("T-11.17b", "corrected")
def test_rounding_to_8_bits_loses_nothing(quantization):
    """Round-to-nearest at 8 bits loses at most 0.005 nat per token.

    0.0023 published, -0.001 in a pilot on SmolLM2. The paired error of a thousand tokens is about 0.003: the claim is
    not made where the interval that the texts leave holds the limit. A 4-bit grid of the weights is no obstacle:
    rounding to 8 bits adds the error of free weights (T-11.38).
    """
    quantization.require_resolved(0.005, "rtn_8")
    assert quantization.method_damage("rtn_8") <= 0.005


@claim("T-11.17c", "corrected")
def test_nf4_beats_rounding_to_4_bits(quantization):
    """NF4 loses less than round-to-nearest at 4 bits.

    0.010 and 0.052 nat published. Both add their error on top of what a 4-bit grid has cost before, and both errors are
    checked to be those of free weights. Block sizes differ where round-to-nearest uses 128: see T-11.18b.
    """
    quantization.require_free_weights("bitsandbytes_nf4", "rtn_4")
    assert quantization.method_damage("bitsandbytes_nf4") < quantization.method_damage("rtn_4")


@claim("T-11.17d", "corrected")
def test_3_bits_lose_5_times_more_than_4(quantization):
    """Round-to-nearest loses at least 5 times as many nats at 3 bits as at 4 bits.

    61 published, 6.2 in a pilot on SmolLM2. The squared error alone grows by 5.4.
    """
    assert quantization.method_damage("rtn_3") >= 5 * quantization.method_damage("rtn_4")


@claim("T-11.17e", "control")
def test_matched_noise_does_what_4_bit_rounding_does(quantization):
    """Unbiased noise as large as Gaussian weights' rounding error does within a factor of 2 what 4-bit rounding does.

    The noise knows of no grid, neither the rounding's nor one on which the weights were stored. The model's own error
    is checked to be within 40 % of the Gaussian law's. If it fails, damage at 4 bits is not a matter of the size of the
    error, and widths cannot be compared by it.
    """
    quantization.require_free_weights("rtn_4")
    assert 0.5 <= quantization.method_damage("rtn_4") / quantization.noise_damage(4) <= 2


@claim("T-11.17f", "hypothesis")
def test_matched_noise_hurts_more_than_3_bit_rounding(quantization):
    """Unbiased noise as large as Gaussian weights' rounding error at 3 bits does more damage than that rounding.

    Open: at 3 bits the error depends on the weight (small weights vanish), which shrinks matrices instead of adding to
    them. The noise has the Gaussian law's size; the model's own error may be somewhat larger (T-11.38).
    """
    assert quantization.noise_damage(3) > quantization.method_damage("rtn_3")


@claim("T-11.18", "published", on=ORIGINAL)
def test_nf4_beats_gptq_and_rounding(quantization):
    """NF4 loses less than GPTQ at 4 bits, and that less than round-to-nearest at 4 bits.

    Confounded: blocks of 64 against groups of 128 (a third of the gain in squared error over round-to-nearest), and a
    calibration set of short single lines for GPTQ.
    """
    nf4, gptq, rounding = map(quantization.method_damage, ("bitsandbytes_nf4", "gptq_w4a16", "rtn_4"))
    assert nf4 < gptq < rounding


@claim("T-11.18b", "control")
def test_nf4_beats_rounding_at_equal_block_size(quantization):
    """In blocks of 64 weights, too, NF4 loses less than round-to-nearest at 4 bits.

    For Gaussian weights the relative errors are 0.092 and 0.108. A measurement of its own where round-to-nearest uses
    128, the same as T-11.17c where it uses 64.
    """
    rounding = "rtn_4_g64" if "rtn_4_g64" in quantization.methods else "rtn_4"
    quantization.require_free_weights("bitsandbytes_nf4", rounding)
    if quantization.provenance["settings"]["group_size"] != 64 and rounding == "rtn_4":
        not_applicable(f"the record of {quantization.subject} has no round-to-nearest in groups of 64")
    assert quantization.method_damage("bitsandbytes_nf4") < quantization.method_damage(rounding)


@claim("T-11.19", "published", on=ORIGINAL)
def test_calibrated_methods_outperform_rounding(quantization):
    """Calibration-based methods dramatically outperform round-to-nearest.

    Read as: the best 4-bit method is calibrated (NF4 is not), and GPTQ loses at most half of what round-to-nearest
    loses at the same width.
    """
    assert min(quantization.methods_of(4), key=quantization.method_damage) == "gptq_w4a16"
    assert quantization.method_damage("gptq_w4a16") <= 0.5 * quantization.method_damage("rtn_4")
    assert quantization.method_damage("gptq_w8a16") <= 0.5 * quantization.method_damage("rtn_8")


@claim("T-11.19b", "corrected", on=ORIGINAL)
def test_calibration_halves_the_damage_at_4_bits_only(quantization):
    """GPTQ halves the loss of round-to-nearest at 4 bits, ties with it at 8 bits, and data-free NF4 beats both at 4.

    "Ties" is read as 0.002 nat, half of what a text of 4096 tokens resolves.
    """
    assert quantization.method_damage("rtn_4") >= 2 * quantization.method_damage("gptq_w4a16")
    assert abs(quantization.method_damage("rtn_8") - quantization.method_damage("gptq_w8a16")) <= 0.002
    assert quantization.method_damage("bitsandbytes_nf4") < quantization.method_damage("gptq_w4a16")


@claim("T-11.20", "published", on=ORIGINAL)
def test_8_bit_methods_lose_less_than_0_07(quantization):
    """Every 8-bit method loses less than 0.07 points of perplexity."""
    rises = [quantization.method_delta_perplexity(method) for method in quantization.methods_of(8)]
    assert max(rises) < 0.07


@claim("T-11.20b", "corrected")
def test_8_bit_methods_lose_at_most_0_0075_nat(quantization):
    """Every 8-bit method loses at most 0.0075 nat per token.

    The same limit in nat (0.07 of 9.25). LLM.int8 also quantizes activations. Not made where the interval of the worst
    method holds the limit.
    """
    quantization.require_every_library()
    quantization.require_resolved(0.0075, *quantization.methods_of(8))
    assert max(map(quantization.method_damage, quantization.methods_of(8))) <= 0.0075


@claim("T-11.21", "published", on=ORIGINAL)
def test_3_bits_are_catastrophic(quantization):
    """Round-to-nearest at 3 bits raises the perplexity by more than 100."""
    assert quantization.method_delta_perplexity("rtn_3") > 100


@claim("T-11.21b", "corrected")
def test_3_bits_lose_a_nat(quantization):
    """Round-to-nearest at 3 bits loses at least 1 nat per token.

    3.1 published, 2.2 in a pilot on SmolLM2: the model's perplexity at least rises by a factor of e.
    """
    assert quantization.method_damage("rtn_3") >= 1


@claim("T-11.21c", "hypothesis")
def test_asymmetric_3_bits_hurt_less(quantization):
    """At 3 bits an asymmetric range (8 levels) loses less than the symmetric one (7 levels).

    Open: the quantizer, not only the width, is what varies.
    """
    assert quantization.method_damage("minmax_3") < quantization.method_damage("rtn_3")


@claim("T-11.21d", "hypothesis")
def test_mse_optimal_2_bits_hurt_least(quantization):
    """Of the 2-bit rules, the one with the least weight error does the least damage to the whole model."""
    rules = ("rtn_2", "minmax_2", "mse_2")
    assert min(rules, key=quantization.method_damage) == "mse_2"


# ---- memory and speed


@claim("T-11.22", "published")
def test_int8_needs_more_memory_than_bfloat16(quantization):
    """INT8 models need more memory than the bfloat16 model, because of their metadata.

    The source read 12.5 and 12.9 GB beside 8.05 GB while the bfloat16 model still lay on the device. Judged here with
    nothing else resident: its figures less that model, and measured ones in a process per method.
    """
    int8 = min(map(quantization.memory, ("bitsandbytes_int8", "torchao_int8_weight_only")))
    assert int8 > quantization.memory("bfloat16")


@claim("T-11.22b", "corrected")
def test_memory_falls_with_the_width(quantization):
    """NF4 needs less memory than both INT8 models, and those less than bfloat16.

    Published, net: 2.67, 4.42, 4.81 and 8.05 GB.
    """
    int8 = [quantization.memory(method) for method in ("bitsandbytes_int8", "torchao_int8_weight_only")]
    assert quantization.memory("bitsandbytes_nf4") < min(int8)
    assert max(int8) < quantization.memory("bfloat16")


@claim("T-11.22c", "corrected")
def test_memory_is_what_arithmetic_expects(quantization):
    """The memory of every method is within 2 % of what the parameter counts expect.

    NF4 4.127 bits per weight of the layers, INT8 8, all else 16; torchao's head too, which unties it; its 4-bit codes,
    where they were measured, take a byte each on a CPU (T-11.22d). 2 % leaves room for the channel scales of INT8 and
    for allocation granularity.
    """
    methods = {"bfloat16", "bitsandbytes_nf4", "bitsandbytes_int8", "torchao_int8_weight_only"}
    methods |= set(quantization.memory_methods)
    off = [quantization.memory(method) / quantization.expected_memory(method) - 1 for method in sorted(methods)]
    assert max(map(abs, off)) <= 0.02


@claim("T-11.22d", "hypothesis")
def test_torchao_4_bits_save_nothing_over_8_on_a_cpu(quantization):
    """torchao's 4-bit weights take at least as much memory as its 8-bit weights on a CPU.

    Its CPU form keeps a 4-bit code in a byte; only the GPU kernel packs two.
    """
    assert quantization.memory("torchao_intx4_weight_only") >= quantization.memory("torchao_int8_weight_only")


@claim("T-11.23", "published", on=ORIGINAL)
def test_decoding_slows_down(quantization):
    """Decoding speed falls from bfloat16 over NF4 and torchao INT8 to LLM.int8.

    86.9, 53.7, 45.2, 19.5 tokens per second at batch 1, eager, uncompiled: a statement about kernels of its day, so it
    is audited and not measured again.
    """
    order = ["bfloat16", "bitsandbytes_nf4", "torchao_int8_weight_only", "bitsandbytes_int8"]
    assert sorted(order, key=quantization.tokens_per_second, reverse=True) == order


# ---- summary sentences of the source


@claim("T-11.35", "published")
def test_uniform_4_bits_are_near_lossless(quantization):
    """Uniform 4 bits are near-lossless: at most 0.1 nat per token.

    0.052 nat (5.3 % of the perplexity) on the original model, which is generous to call lossless. In models below 3
    billion parameters a pilot says otherwise (0.357 nat), on weights that had been stored in 4 bits: what those lose
    when rounded again says nothing about a first rounding.
    """
    quantization.require_full_precision()
    assert quantization.method_damage("rtn_4") <= 0.1


@claim("T-11.35b", "hypothesis")
def test_another_4_bits_are_not_near_lossless(quantization):
    """Weights once stored in 5 bits or fewer lose more than 0.1 nat per token when rounded to another 4-bit grid.

    The form of T-11.35 that such subjects can answer; a warning against re-quantizing quantized checkpoints. Full
    precision weights do not apply.
    """
    if quantization.stored_in_few_bits < 0.5:
        not_applicable(f"less than half of the weights of {quantization.subject} were stored in few bits before")
    quantization.require_free_weights("rtn_4")
    assert quantization.method_damage("rtn_4") > 0.1


@claim("T-11.36", "published", on=ORIGINAL)
def test_torchao_int4_was_compared(quantization):
    """torchao's 4-bit weights were compared.

    The project's overview says so; the run failed for want of a kernel package.
    """
    assert "torchao_int4_weight_only" in quantization.methods


@claim("T-11.36b", "corrected")
def test_torchao_4_bits_are_as_good_as_rounding(quantization):
    """torchao's 4-bit integers lose between half and 1.5 times what round-to-nearest loses in groups of the same size.

    The configuration that runs on a CPU is symmetric rounding too, with all 16 levels instead of 15.
    """
    ratio = quantization.method_damage("torchao_intx4_weight_only") / quantization.method_damage("rtn_4")
    assert 0.5 <= ratio <= 1.5


@claim("T-11.36c", "hypothesis")
def test_gguf_q4_1_beats_q4_0(quantization):
    """Of GGUF's 4-bit formats, the one with an offset (Q4_1) loses less than the one without (Q4_0).

    Does not apply to weights whose grid Q4_1 shares, such as those that a Q4_1 file held.
    """
    quantization.require_free_weights("gguf_q4_0", "gguf_q4_1")
    assert quantization.method_damage("gguf_q4_1") < quantization.method_damage("gguf_q4_0")
