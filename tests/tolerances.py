"""Every tolerance of the runtime's tests, once, with its derivation.

Goldens were computed in float32 from bfloat16 weights by an independent oracle, so an exact path differs from them
only by the order of float32 sums.
"""

# Pixel values are one division and one subtraction of float32: equal, or one rounding at magnitude 1.
PIXELS = 1e-6
# Features pass 3 layers of sums over at most 304 terms at magnitude 3: 304 * 2^-24 * 3 = 5e-5, measured 1e-5.
VISION = 1e-4
# The resampler adds one attention over up to 1024 keys; outputs are a third as large.
RESAMPLER = 1e-4
# Float32 sines of phases up to 100 * 1: half a unit in the last place of 1 is 6e-8; one bit of a frequency
# may differ.
SINE = 2e-6
# At time 71,999 one frequency bit is 71,999 * 2^-24 = 4e-3 of phase.
SINE_FAR = 5e-3
# Logits are sums of 256 products after 3 decoder layers in another library (llama.cpp); measured 4e-5.
LOGITS = 1e-3
