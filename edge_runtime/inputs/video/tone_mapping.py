"""HDR pixels → 8-bit SDR pixels. Arrays in, arrays out; knows no files.

A PQ or HLG frame that is shown like an ordinary one looks grey and flat. Here its light is computed, bright parts are
rolled off with the curve of BT.2390, and the result is encoded with the curve of ordinary screens, so that text and
faces keep the contrast they have on a screen.

Sources: SMPTE ST 2084 (PQ), ITU-R BT.2100 (HLG and its OOTF), BT.2390-11 section 5.4 (EETF), BT.2408 (203 cd/m² is
paper white), BT.2087 (from BT.2020's primaries to BT.709's), BT.1886.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

PQ, HLG = 16, 18
"""Numbers of the transfer characteristics in H.273, as in libav."""
CURVES = {PQ: "PQ", HLG: "HLG"}

WHITE = 203.0
"""cd/m² of a white page: 1.0 in the output."""
PEAK = 1000.0
"""cd/m² of the brightest pixel if the file does not say; HLG's reference screen."""
BRIGHTEST = 10_000.0
_CODES = 1 << 12
_FINE = 1 << 16  # entries of a table indexed by computed light: its steps must not be visible
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_HLG_A, _HLG_B, _HLG_C = 0.17883277, 0.28466892, 0.55991073
_HLG_GAMMA = 1.2  # of a screen of 1000 cd/m²
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)


def to_sdr(rgb: npt.NDArray[np.uint16], curve: int, peak: float = PEAK) -> npt.NDArray[np.uint8]:
    """Tone-map a frame.

    Parameters
    ----------
    rgb : ndarray [shape=(height, width, 3), uint16], full range, BT.2020's primaries.
    curve : `PQ` or `HLG`.
    peak : cd/m² of the brightest pixel.

    Returns
    -------
    rgb : ndarray [shape=(height, width, 3), uint8], like sRGB pictures.
    """
    peak = float(np.clip(peak, WHITE, BRIGHTEST))
    out = np.empty(rgb.shape, np.uint8)
    for row in range(0, len(rgb), 64):  # strips stay in the CPU cache: a third of the time of whole frames
        out[row : row + 64] = _strip(rgb[row : row + 64], curve, peak)
    return out


def _strip(rgb: npt.NDArray[np.uint16], curve: int, peak: float) -> npt.NDArray[np.uint8]:
    codes = np.moveaxis(rgb >> 4, -1, 0)  # 12 bits, as many as videos have: so tables stay in the CPU cache, too
    light = [_light(curve)[channel] for channel in codes]
    # The brightest channel decides how much a pixel is dimmed, so that its hue is kept.
    if curve == PQ:
        dimming = _dimming(curve, peak)[codes.max(axis=0)]
    else:
        luma = sum((part * weight for part, weight in zip(light, _LUMA_2020, strict=True)), start=np.float32(0))
        screen = luma ** np.float32(_HLG_GAMMA - 1) * np.float32(PEAK / WHITE)
        brightest = np.maximum(np.maximum(light[0], light[1]), light[2]) * screen * np.float32(WHITE / BRIGHTEST)
        place = np.sqrt(np.sqrt(np.minimum(brightest, 1))) * np.float32(_FINE - 1)
        dimming = _dimming(curve, peak)[place.astype(np.uint16)] * screen
    for part in light:
        part *= dimming
    out = np.empty(rgb.shape, np.uint8)
    for channel, weights in enumerate(_TO_709):
        mixed = light[0] * weights[0] + light[1] * weights[1] + light[2] * weights[2]
        out[..., channel] = _display()[(np.clip(mixed, 0, 1) * np.float32(65535) + np.float32(0.5)).astype(np.uint16)]
    return out


@lru_cache(maxsize=4)
def _light(curve: int) -> Float32:
    """Light of each code of a channel: relative to a white page for PQ, to the scene's brightest for HLG."""
    codes = np.linspace(0, 1, _CODES)
    if curve == PQ:
        return (_pq_light(codes) / WHITE).astype(np.float32)
    dark = codes**2 / 3
    bright = (np.exp((codes - _HLG_C) / _HLG_A) + _HLG_B) / 12
    return np.where(codes <= 0.5, dark, bright).astype(np.float32)


@lru_cache(maxsize=8)
def _dimming(curve: int, peak: float) -> Float32:
    """Factor for a pixel by its brightest channel: by its code for PQ, by the fourth root of its light for HLG."""
    signal = np.linspace(0, 1, _CODES) if curve == PQ else _pq_code(np.linspace(0, 1, _FINE) ** 4 * BRIGHTEST)
    before, after = _pq_light(signal), _pq_light(_roll_off(signal, peak))
    return np.divide(after, before, out=np.ones_like(before), where=before > 1e-6).astype(np.float32)


def _roll_off(signal: npt.NDArray[np.float64], peak: float) -> npt.NDArray[np.float64]:
    """BT.2390's EETF: PQ signals up to `peak` → PQ signals up to `WHITE`, dark ones unchanged."""
    top, most = _pq_code(np.array(peak)), _pq_code(np.array(WHITE))
    inside, target = np.minimum(signal / top, 1), most / top
    knee = 1.5 * target - 0.5
    if knee >= 1:
        return np.minimum(signal, most)
    t = np.clip((inside - knee) / (1 - knee), 0, 1)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * target
    found: npt.NDArray[np.float64] = np.where(inside < knee, inside, spline) * top
    return found


def _pq_light(code: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """PQ's EOTF: signal from 0 to 1 → cd/m²."""
    root = code ** (1 / _M2)
    light: npt.NDArray[np.float64] = (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1) * BRIGHTEST
    return light


def _pq_code(light: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The inverse of `_pq_light`."""
    root = (light / BRIGHTEST) ** _M1
    code: npt.NDArray[np.float64] = ((_C1 + _C2 * root) / (1 + _C3 * root)) ** _M2
    return code


@lru_cache(maxsize=1)
def _display() -> npt.NDArray[np.uint8]:
    """BT.1886: 16-bit light → 8-bit sample."""
    return np.round(np.linspace(0, 1, 1 << 16) ** (1 / 2.4) * 255).astype(np.uint8)
