"""Our side of the video benchmark: a whole request about a video file, as a user would send it."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.child import serve, timed

QUESTION = "Describe the video."


class VideoOurs:
    """A loaded model.

    Options: model (a folder), threads, n_ctx.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def load(self) -> dict[str, Any]:
        """Load, and encode one picture so that kernels are compiled and weights packed."""
        from PIL import Image

        from benchmarks.harness.pictures import picture
        from edge_runtime import Model

        options = self._options
        self.model, load_s = timed(
            lambda: Model.load(
                options["model"], n_ctx=options["n_ctx"], n_threads=options["threads"], tuned=False, force=True
            )
        )
        content = [Image.fromarray(picture(448, 448)), QUESTION]
        self.model.chat([{"role": "user", "content": content}], greedy=True, max_tokens=1)
        return {"load_s": load_s, "n_ctx": self.model.n_ctx}

    def ask(self, video: str, packing: int) -> dict[str, Any]:
        """Ask about the video; stop at the first token."""
        part = {"type": "video", "video": video, "packing": packing}
        answer = self.model.chat([{"role": "user", "content": [part, QUESTION]}], greedy=True, max_tokens=1)
        return {
            "first_token_s": answer.timings_s["first_token"],
            "prompt_tokens": answer.prompt_tokens,
            "visual_tokens": answer.visual_tokens,
            "cached_tokens": answer.cached_tokens,
            "frames": len(answer.pictures),
            "groups": len(answer.videos[0]["temporal_ids"]),
            "timings_s": answer.timings_s,
        }


if __name__ == "__main__":
    serve(VideoOurs)
