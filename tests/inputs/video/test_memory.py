"""A long video in full HD: memory does not grow, and only what is needed for wanted frames is decoded."""

from __future__ import annotations

import gc
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from edge_runtime import Model
from inputs.video.test_files import recipe

MINUTES, RATE, SIZE = 10, 10, (1920, 1080)
LIMIT = 400 << 20
N_FRAMES = MINUTES * 60 * RATE
N_DISTINCT = 601


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    """Ten minutes in full HD: a bright bar over noise that changes every five seconds.

    After a minute the same packets come again, which takes a tenth of the time to make. The number of frames between
    is such that no group of the recipe holds the frames of another.
    """
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "g": "50"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        packets = []
        for i in range(N_DISTINCT):
            if i % 50 == 0:
                small = rng.integers(0, 200, (SIZE[1] * 3 // 2 // 60, SIZE[0] // 60), np.uint8)
                ground = np.kron(small, np.ones((60, 60), np.uint8))
            planes = ground.copy()
            planes[: SIZE[1], i * 3 % SIZE[0] :][:, :40] = 235
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            packets += stream.encode(frame)
        packets += stream.encode()
        assert len(packets) == N_DISTINCT
        kept = [(bytes(packet), packet.is_keyframe) for packet in packets]
        for i in range(N_FRAMES):
            data, is_keyframe = kept[i % N_DISTINCT]
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, RATE), is_keyframe
            packet.pts = packet.dts = i
            container.mux(packet)
    return path


class Peak:
    """Peak memory meanwhile, sampled: RSS minus what was used before."""

    def __enter__(self) -> Peak:
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._process.memory_info().rss
        self.extra = 0
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.extra = max(self.extra, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@pytest.mark.slow
def test_ten_minutes_of_full_hd_are_answered_in_little_memory(exact_folder: Path, images, long_video):
    """540 frames in 180 groups, as in the recipe; their slices alone would be 325 MB, decoded frames 3.4 GB."""
    with Model.load(exact_folder, n_ctx=16384) as model:
        model.chat(
            [{"role": "user", "content": [images["wide"], "What?"]}], max_tokens=2
        )  # weights are in memory then
        gc.collect()
        with Peak() as peak:
            answer = model.chat(
                [{"role": "user", "content": [{"type": "video", "video": long_video}, "What happens?"]}],
                greedy=True,
                max_tokens=4,
            )
    (facts,) = answer.videos
    indices, groups = recipe(N_FRAMES, float(RATE))
    assert answer.visual_tokens == 180 * 64
    assert facts["temporal_ids"] == groups
    assert np.allclose(np.concatenate(facts["times_s"]), np.array(indices) / RATE, atol=1e-6)
    assert peak.extra < LIMIT, f"{peak.extra / 2**20:.0f} MB"
    print(f"peak {peak.extra / 2**20:.0f} MB more; {answer.timings_s}")
