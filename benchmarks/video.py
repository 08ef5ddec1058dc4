"""A video of 180 frames of 448 x 448 against llama.cpp's way, every frame a picture: first token, prompt tokens.

    python benchmarks/video.py MODEL [--frames 180] [--packing 3 6] [--peer-frames 12] [--json FILE]

MODEL is a folder with a decoder and an mmproj file that both sides load. Ours is asked about the file, once for each
packing; its time is everything from the call to the first token, including indexing and decoding. mtmd encodes
`--peer-frames` of the frames in pieces between ours, and reads the whole prompt of all frames; its time is the
seconds per encoded frame times the frames, plus that reading. Decoding and cutting are not counted for it. Each side
is a process that is stopped while the other works. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.child import Child  # noqa: E402
from benchmarks.vision import load_average, machine  # noqa: E402

RATE = 3  # frames per second: the recipe takes all of 60 seconds
SIDE = 448


def make_video(path: Path, n_frames: int) -> None:
    """Write distinct frames: coarse shapes that differ in each, and noise."""
    import av
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "18"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        for i in range(n_frames):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((SIDE, SIDE))
            pixels = (np.asarray(coarse, np.uint16) + random.integers(0, 256, (SIDE, SIDE, 3), np.uint16)) // 2
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def measure(options: argparse.Namespace, threads: int, folder: Path) -> dict[str, Any]:
    """Measure both sides in turns."""
    from edge_runtime.store.find import find_model

    files = find_model(options.model, None)
    video = folder / "video.mp4"
    make_video(video, options.frames)
    n_ctx = 70 * options.frames + 256
    given = {"threads": threads, "n_ctx": n_ctx}
    model = {"model": str(files.decoder.parent)}
    peer_files = {"decoder": str(files.decoder), "mmproj": str(files.mmproj), "video": str(video)}
    ours: dict[str, Any] = {}
    encoded: list[dict[str, Any]] = []
    rounds = len(options.packing) + 1
    most = min(options.peer_frames, options.frames)
    shares = [most * i // rounds for i in range(rounds + 1)]
    with (
        Child("benchmarks.peers.video_mtmd", given | peer_files, options.logs / "video_mtmd.log") as peer,
        Child("benchmarks.peers.video_ours", given | model, options.logs / "video_ours.log") as own,
    ):
        loading = {"mtmd": peer.call("load"), "ours": own.call("load")}
        peer.call("encode_frames", first=0, count=1)  # not counted, like one picture of ours
        for i, packing in enumerate([*options.packing, None]):
            if shares[i + 1] > shares[i]:
                encoded.append(peer.call("encode_frames", first=shares[i], count=shares[i + 1] - shares[i]))
            if packing is not None:
                ours[str(packing)] = own.call("ask", video=str(video), packing=packing)
                print(f"packing {packing}: {ours[str(packing)]['first_token_s']:.1f} s", flush=True)
        reading = peer.call("prefill")
    return {"loading": loading, "ours": ours, "mtmd": {"encoded": encoded, "prefill": reading}}


def summarise(samples: dict[str, Any], n_frames: int) -> dict[str, Any]:
    """Times and tokens of both sides, and what follows from them."""
    peer = samples["mtmd"]
    per_frame = statistics.mean(
        [one["seconds"] / one["frames"] for one in peer["encoded"] for _ in range(one["frames"])]
    )
    whole = per_frame * n_frames + peer["prefill"]["seconds"]
    tokens = peer["prefill"]["prompt_tokens"]
    ours = samples["ours"]
    return {
        "ours_s": {f"packing {packing}": round(found["first_token_s"], 3) for packing, found in ours.items()},
        "peers_s": {"mtmd": round(whole, 3)},
        "mtmd": {
            "measured_frames": sum(one["frames"] for one in peer["encoded"]),
            "seconds_per_frame": round(per_frame, 4),
            "prefill_s": round(peer["prefill"]["seconds"], 3),
        },
        "tokens": {"mtmd": tokens}
        | {f"packing {packing}": found["prompt_tokens"] for packing, found in ours.items()},
        "times_faster": {
            f"packing {packing}": round(whole / found["first_token_s"], 2) for packing, found in ours.items()
        },
        "times_fewer_tokens": {
            f"packing {packing}": round(tokens / found["prompt_tokens"], 2) for packing, found in ours.items()
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder with a decoder and an mmproj file")
    parser.add_argument("--frames", type=int, default=180, help="at most 180, which the recipe takes all of")
    parser.add_argument("--packing", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--peer-frames", type=int, default=12, help="frames that mtmd encodes")
    parser.add_argument("--threads", type=int, help="threads of both sides (default: physical cores allowed)")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "bench" / "logs")
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    options = parser.parse_args()
    if not 1 <= options.frames <= 180 or options.peer_frames < 1:
        parser.error("--frames must be from 1 to 180, and --peer-frames at least 1")
    from edge_kernels.machine import cpu_count

    threads = options.threads or cpu_count()
    told = machine(threads) | {"load_average": {"start": load_average()}}
    with tempfile.TemporaryDirectory() as folder:
        samples = measure(options, threads, Path(folder))
    told["load_average"]["end"] = load_average()
    facts = summarise(samples, options.frames)
    print(f"\n{options.frames} frames{'':<22}{'first token':>12}{'tokens':>8}{'faster':>8}{'fewer':>8}")
    for name, seconds in facts["ours_s"].items():
        faster, fewer = facts["times_faster"][name], facts["times_fewer_tokens"][name]
        print(f"ours, {name:<25}{seconds:>10.1f} s{facts['tokens'][name]:>8}{faster:>7.2f}x{fewer:>7.2f}x")
    print(f"{'mtmd, each frame a picture':<31}{facts['peers_s']['mtmd']:>10.1f} s{facts['tokens']['mtmd']:>8}")
    peer = facts["mtmd"]
    print(
        f"mtmd: {peer['seconds_per_frame']:.2f} s a frame, measured on {peer['measured_frames']} and extrapolated, "
        f"and {peer['prefill_s']:.1f} s to read the whole prompt."
    )
    facts = {"scenario": "video", "frames": options.frames, **facts, "machine": told, "samples": samples}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
