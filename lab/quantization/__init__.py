"""Instruments of quantization: rounding rules, library quantizers, quantized layers, width recipes, memory."""
