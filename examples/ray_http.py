"""Ask a server about every picture of a folder, by Ray Data: python ray_http.py FOLDER http://HOST:11434/v1 MODEL.

Needs the extra [ray]. The server may be edge-runtime's, or any other of OpenAI's API.
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import ray
from ray.data.llm import HttpRequestProcessorConfig, build_processor


def ask(folder: str, url: str, model: str, prompt: str) -> Any:
    """A data set with the answer about every picture of a folder (or s3://... address)."""

    def request(row: dict[str, Any]) -> dict[str, Any]:
        picture = "data:image;base64," + base64.b64encode(row["bytes"]).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 200,
            "temperature": 0,
        }
        return {"payload": body, "path": row["path"]}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "answer": row["http_response"]["choices"][0]["message"]["content"]}

    config = HttpRequestProcessorConfig(
        url=f"{url}/chat/completions",
        batch_size=8,
        concurrency=2,  # workers; each sends the requests of a batch one after the other
        max_retries=5,  # a full server answers 503
    )
    return build_processor(config, preprocess=request, postprocess=answer)(
        ray.data.read_binary_files(folder, include_paths=True)
    )


if __name__ == "__main__":
    for row in ask(*sys.argv[1:4], "Read all text.").iter_rows():
        print(row)
